"""The reader of compiled programs: FLOPs, memory traffic and collectives of HLO texts with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpt.planning import hlo
from gpt.planning.hlo import Collective

MESH = SimpleNamespace(shape={"data": 2, "model": 4}, size=8)


def matmul_flops(text: str) -> int:
    return sum(operation.times * operation.flops for operation in hlo.operations(text))


LOOPS = """HloModule m, is_scheduled=true

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[16,16]{1,0:T(8,128)(2,1)} constant({...})
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%product
  %g = bf16[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%next, %g)
}

%condition (p.1: (s32[], bf16[8,16])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%product (a: bf16[8,16], b: bf16[16,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,16]{1,0} parameter(1)
  ROOT %dot = bf16[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x.1: bf16[8,16]) -> (s32[], bf16[8,16]) {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %t.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%start, %x.1)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%t.1), condition=%condition, body=%bodyKNOWN
}
"""


@pytest.mark.parametrize(
    ("known", "trips"), [("", 4), (', backend_config={"known_trip_count":{"n":"5"}}', 5)], ids=["counted", "known"]
)
def test_the_body_of_a_loop_is_multiplied_by_its_trip_count(known, trips):
    text = LOOPS.replace("KNOWN", known)  # 0, 2, 4, 6
    assert matmul_flops(text) == trips * 2 * 8 * 16 * 16
    assert hlo.collectives(text, MESH) == [
        Collective("all-reduce", ("model",), group=4, overlaps=False, count=trips, bytes=trips * 8 * 16 * 2)
    ]


def test_an_unknown_trip_count_raises_an_error():
    text = LOOPS.replace("KNOWN", "").replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="the trip count of the loop loop is not known"):
        matmul_flops(text)


def entry(*lines: str) -> str:
    return "HloModule m\n\nENTRY %main (a: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        # [5, 7, 3] · [5, 3, 2], a batch of 5, as the TPU compiler writes it
        (
            ("7,3,5", "5,2,3", "5,7,2"),
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=bf0_0oi->0bf",
            2 * 5 * 7 * 2 * 3,
        ),
        # 8 outputs of a window of 3, which meets the padding once at each end
        (("1,8,4", "3,4,6", "1,8,6"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 6 * 4 * (3 * 8 - 2)),
        # the plain product [7, 3] · [3, 2]
        (("7,3", "3,2", "7,2"), "dim_labels=bf_io->bf", 2 * 7 * 2 * 3),
    ],
    ids=["batched", "padded", "plain"],
)
def test_flops_of_convolutions(shapes, attributes, expected):
    left, right, result = shapes
    text = entry(
        f"%a = f32[{left}]{{0}} parameter(0)",
        f"%b = f32[{right}]{{0}} parameter(1)",
        f"ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {attributes}",
    )
    assert matmul_flops(text) == expected


def test_the_rings_that_the_program_states_are_counted():
    ring = '{"phase_rings":[{"core_count":"4","ring_type":"ICI_RING_TYPE_UNIDIR_CW"}]}'
    options = f'replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, backend_config={{"color_strategies":[{ring},{ring}]}}'
    text = entry("%a = f32[4]{0} parameter(0)", f"ROOT %r = f32[16]{{0}} all-gather(%a), {options}")
    assert hlo.collectives(text, MESH) == [Collective("all-gather", ("model",), 4, False, 1, 64, rings=2)]


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("model",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups=[2,4]<=[8]", ("model",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("model",), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", ("data", "model"), 8),
        ("replica_groups={}", ("data", "model"), 8),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",), 2),  # half of `model`
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("model",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("model",), 2),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ("model",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
    ],
)
def test_mesh_axes_of_replica_groups(groups, axes, size):
    text = entry("%a = f32[4]{0} parameter(0)", f"ROOT %r = f32[4]{{0}} all-reduce(%a), {groups}, to_apply=%add")
    assert hlo.collectives(text, MESH) == [Collective("all-reduce", axes, size, False, 1, 16)]


def test_asynchronous_collectives_count_once():
    groups = "replica_groups=[2,4]<=[8], dimensions={0}"
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        f"%s = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%a), channel_id=1, {groups}",
        "%k = f32[4]{0} negate(%a)",
        "%d = f32[16]{0} all-gather-done(%s)",
        "%p = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%a), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
        "%l = f32[4]{0} negate(%a)",
        "%e = f32[4]{0} collective-permute-done(%p)",
        *(
            f'%c{i} = f32[16]{{0}} all-gather(%a), channel_id=7, {groups}, frontend_attributes={{chain_id="0"}}'
            for i in range(3)  # the parts that the TPU compiler fuses with matrix products
        ),
        f'%c3 = f32[16]{{0}} all-gather(%a), channel_id=8, {groups}, frontend_attributes={{chain_id="1"}}',
    )
    gathers, permute = hlo.collectives(text, MESH)
    assert gathers == Collective("all-gather", ("model",), 4, True, count=3, bytes=3 * 64)
    assert permute == Collective("collective-permute", ("model",), 4, True, count=1, bytes=16)
    assert (gathers.sent, permute.sent) == (144, 16)


def test_asynchronous_collectives_overlap_only_if_kernels_are_scheduled_before_their_end():
    start = "%s = f32[16]{0} all-reduce-start(%a), replica_groups=[2,4]<=[8], to_apply=%add"
    end = "%d = f32[16]{0} all-reduce-done(%s)"
    free, kernel = "%b = f32[4,4]{1,0} bitcast(%a)", "%k = f32[16]{0} negate(%a)"
    for lines, overlaps in [((start, free, end, kernel), False), ((start, kernel, end), True), ((start, free), True)]:
        text = entry("%a = f32[16]{0} parameter(0)", *lines)
        assert [collective.overlaps for collective in hlo.collectives(text, MESH)] == [overlaps]


def test_a_collective_of_the_sparsecores_overlaps_from_the_update_on_that_gives_it_its_operands():
    offloaded = (
        "%called_computation.1 (p: f32[4]) -> f32[16] {\n"
        "  %p = f32[4]{0} parameter(0)\n"
        "  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}\n"
        '}, execution_thread="sparsecore"\n\n'
        "%async_computation (q: f32[4]) -> f32[16] {\n"
        "  %q = f32[4]{0} parameter(0)\n"
        "  ROOT %c = f32[16]{0} custom-call(%q), called_computations={%called_computation.1}\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    start, end = "%s = ((), ()) async-start(), calls=%async_computation", "%d = f32[16]{0} async-done(%u)"
    update, kernel = "%u = ((f32[4]{0}), f32[16]{0}) async-update(%s, %a)", "%k = f32[4]{0} negate(%a)"
    for lines, overlaps in [((start, kernel, update, end), False), ((start, update, kernel, end), True)]:
        text = offloaded + entry("%a = f32[4]{0} parameter(0)", *lines)
        assert hlo.collectives(text, MESH) == [Collective("all-gather", ("model",), 4, overlaps, 1, 64)]
        assert [(operation.name, operation.overlaps) for operation in hlo.operations(text)] == [("k", False)]


def test_both_forms_of_a_reduce_scatter_are_recognised():
    plain = entry(
        "%a = bf16[16]{0} parameter(0)",
        "ROOT %r = bf16[4]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
    )
    fused = (
        "%all-reduce-scatter.1 (input: bf16[16]) -> bf16[4] {\n"
        "  %input = bf16[16]{0} parameter(0)\n"
        "  %all-reduce.1 = bf16[16]{0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add\n"
        "  ROOT %s = bf16[4]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={4}\n}\n\n"
    ) + entry(
        "%a = bf16[16]{0} parameter(0)",
        "ROOT %f = bf16[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
    )
    for text in (plain, fused):
        assert hlo.collectives(text, MESH) == [Collective("reduce-scatter", ("model",), 4, False, 1, 32)]


def test_transfers_between_slices_count():
    devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)]).reshape(2, 4)
    text = entry(
        "%a = bf16[4,8]{1,0} parameter(0)",
        "%after-all = token[] after-all()",
        "%s = (bf16[4,8]{1,0}, u32[]{:S(2)}, token[]) send(%a, %after-all), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    mesh = SimpleNamespace(shape=MESH.shape, size=8, devices=devices)
    assert hlo.collectives(text, mesh) == [Collective("all-reduce", ("data",), 2, True, 1, 64)]


def computation(name: str, *lines: str) -> str:
    return f"%{name} (p: f32[4]) -> f32[4] {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n\n"


def traffic(text: str) -> list[int]:
    return [operation.bytes for operation in hlo.operations(text)]


def test_a_kernel_reads_its_operands_and_writes_its_result():
    text = entry(
        "%a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)",
        "%b = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)",  # in the fast memory, which is not counted
        "%c = f32[8,16]{1,0} add(%a, %b)",
        "ROOT %t = (f32[8,16]{1,0}) tuple(%c)",
    )
    assert traffic(text) == [8 * 16 * (2 + 4)]


def test_only_the_slice_of_a_sliced_array_counts():
    fused = computation(
        "slice_and_update",
        "%stack = f32[12,64]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%saved = f32[12,64]{1,0} parameter(2)",
        "%whole = f32[64]{0} parameter(3)",
        "%row = f32[1,64]{1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,64}",
        "%flat = f32[64]{0} bitcast(%row)",
        "%sum = f32[64]{0} add(%flat, %whole)",
        "%new = f32[1,64]{1,0} bitcast(%sum)",
        "ROOT %put = f32[12,64]{1,0} dynamic-update-slice(%saved, %new, %i)",
    )
    text = fused + entry(
        "%a = f32[12,64]{1,0} parameter(0)",
        "%n = s32[] parameter(1)",
        "%b = f32[12,64]{1,0} parameter(2)",
        "%w = f32[64]{0} parameter(3)",
        "ROOT %f = f32[12,64]{1,0} fusion(%a, %n, %b, %w), kind=kLoop, calls=%slice_and_update",
    )
    assert traffic(text) == [3 * 64 * 4 + 4]  # a slice read, a slice written, the whole operand, the index


def test_a_copy_to_the_fast_memory_counts_as_overlapping_traffic():
    text = entry(
        "%a = f32[1024]{0} parameter(0)",
        "%s = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%a)",
        "%d = f32[1024]{0:S(1)} copy-done(%s)",
        "%t = ((f32[1024]{0}), f32[8]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8]}",
        "ROOT %e = f32[8]{0:S(1)} slice-done(%t)",
    )
    assert [(copy.bytes, copy.overlaps) for copy in hlo.operations(text)] == [(4096, True), (32, True)]


@pytest.mark.parametrize(("cycles", "expected"), [("1200", 1200), (str(2**63 - 1), None)])
def test_the_compilers_estimate_is_read_if_there_is_one(cycles, expected):
    text = LOOPS.replace("KNOWN", "").replace(
        "calls=%product", f'calls=%product, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )
    (product,) = (operation for operation in hlo.operations(text) if operation.flops)
    assert (product.cycles, product.times) == (expected, 4)


def test_a_cublas_product_counts_its_two_factors():
    text = entry(
        "%a = bf16[8,16]{1,0} parameter(0)",
        "%b = bf16[16,4]{1,0} parameter(1)",
        "%c = bf16[8,4]{1,0} parameter(2)",
        'ROOT %g = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b, %c), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"beta":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}',
    )
    assert matmul_flops(text) == 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("call", "products", "queries"),
    [
        (
            '%splash_mha_fwd_residuals.1 = bf16[2,4,Q,16]{3,2,1,0} custom-call(%m, %q, %k, %k), "tpu_custom_call"',
            2,
            256,
        ),
        ('%splash_mha_dq_segmented.3 = bf16[2,4,Q,16]{3,2,1,0} custom-call(%m, %q, %k, %k), "tpu_custom_call"', 3, 256),
        ('%splash_mha_dkv.3.clone = bf16[2,4,Q,16]{3,2,1,0} custom-call(%m, %q, %k, %k), "tpu_custom_call"', 4, 128),
        ('%x.1 = bf16[2,4,Q,16]{3,1,2,0} custom-call(%q, %k, %k), "__cudnn$fmhaSoftmax"', 2, 256),
        ('%x.1 = bf16[2,4,Q,16]{3,1,2,0} custom-call(%q, %k, %k, %m), "__cudnn$fmhaScaleBiasSoftmax"', 2, 256),
        ('%x.1 = bf16[2,4,Q,16]{3,1,2,0} custom-call(%q, %k, %k), "__cudnn$fmhaSoftmaxBackward"', 5, 256),
        ('%other.1 = bf16[2,4,Q,16]{3,2,1,0} custom-call(%m, %q, %k, %k), "tpu_custom_call"', 0, 256),
    ],
)
def test_an_attention_kernel_counts_what_the_causal_mask_leaves(call, products, queries):
    """For the last half of the queries, the mask leaves three quarters. The compiler breaks lines with metadata."""
    shape = "[2,4,{},16]{{3,2,1,0}}" if "tpu_" in call else "[2,{},4,16]{{3,2,1,0}}"
    call = call.replace("Q", str(queries)).replace('"', 'custom_call_target="', 1)
    text = (
        "ENTRY %main (q: bf16[]) -> bf16[] {\n"
        f"  %q = bf16{shape.format(queries)} parameter(0)\n  %k = bf16{shape.format(256)} parameter(1)\n"
        "  %m = s8[1,2,2]{2,1,0} parameter(2)\n"
        f"  {call}, frontend_attributes={{kernel_metadata={{\n" + '"block": 128\n}}, metadata={}\n}\n'
    )
    (kernel,) = hlo.operations(text)
    left = {256: 0.5 * 256 * 256, 128: 0.75 * 128 * 256}[queries]
    assert kernel.flops == products * 2 * (2 * 4) * left * 16
    assert kernel.opaque == (products > 0)
