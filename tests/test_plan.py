"""Plans for absent TPUs: reading compiled programs, and what the real compiler makes of each table of rules."""

import dataclasses
import importlib.util
import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest

from gpt import plan
from gpt.config import Config, TrainConfig, from_tree
from gpt.errors import UserError
from gpt.models.gpt import GPTConfig
from gpt.sharding import MeshConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "gpt-spmd[plan]"'
)
# The tests' compilation cache takes what is compiled for absent TPUs, but cannot give it back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
MESH = SimpleNamespace(shape={"data": 2, "model": 4}, size=8)

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
def test_loops_count_as_often_as_they_run(known, trips):
    text = LOOPS.replace("KNOWN", known)  # 0, 2, 4, 6
    assert plan.matmul_flops(text) == trips * 2 * 8 * 16 * 16
    assert plan.collectives(text, MESH) == [
        plan.Collective("all-reduce", ("model",), group=4, count=trips, bytes=trips * 8 * 16 * 2)
    ]


def test_a_loop_of_unknown_length_is_not_guessed():
    text = LOOPS.replace("KNOWN", "").replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="trip count of the loop loop"):
        plan.matmul_flops(text)


def entry(*lines: str) -> str:
    return "HloModule m\n\nENTRY %main (a: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        # [5, 7, 3] · [5, 3, 2], a batch of 5, as TPUs write it
        (
            ("7,3,5", "5,2,3", "5,7,2"),
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=bf0_0oi->0bf",
            2 * 5 * 7 * 2 * 3,
        ),
        # an ordinary one: 8 outputs of a window of 3, of which one at each end meets the padding
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
    assert plan.matmul_flops(text) == expected


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
    ],
)
def test_mesh_axes_of_replica_groups(groups, axes, size):
    text = entry("%a = f32[4]{0} parameter(0)", f"ROOT %r = f32[4]{{0}} all-reduce(%a), {groups}, to_apply=%add")
    assert plan.collectives(text, MESH) == [plan.Collective("all-reduce", axes, size, 1, 16)]


def test_asynchronous_collectives_count_once():
    groups = "replica_groups=[2,4]<=[8], dimensions={0}"
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        f"%s = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%a), channel_id=1, {groups}",
        "%d = f32[16]{0} all-gather-done(%s)",
        "%p = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%a), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
        "%e = f32[4]{0} collective-permute-done(%p)",
        *(
            f'%c{i} = f32[16]{{0}} all-gather(%a), channel_id=7, {groups}, frontend_attributes={{chain_id="0"}}'
            for i in range(3)  # the parts that the TPU compiler fuses with products
        ),
        f'%c3 = f32[16]{{0}} all-gather(%a), channel_id=8, {groups}, frontend_attributes={{chain_id="1"}}',
    )
    gathers, permute = plan.collectives(text, MESH)
    assert gathers == plan.Collective("all-gather", ("model",), 4, count=3, bytes=3 * 64)
    assert permute == plan.Collective("collective-permute", ("model",), 4, count=1, bytes=16)
    assert (gathers.sent, permute.sent) == (144, 16)


def test_reduce_scatter_is_known_in_its_two_forms():
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
        assert plan.collectives(text, MESH) == [plan.Collective("reduce-scatter", ("model",), 4, 1, 32)]


def test_what_is_sent_between_slices_counts():
    devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)]).reshape(2, 4)
    text = entry(
        "%a = bf16[4,8]{1,0} parameter(0)",
        "%after-all = token[] after-all()",
        "%s = (bf16[4,8]{1,0}, u32[]{:S(2)}, token[]) send(%a, %after-all), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    mesh = SimpleNamespace(shape=MESH.shape, size=8, devices=devices)
    assert plan.collectives(text, mesh) == [plan.Collective("all-reduce", ("data",), 2, 1, 64)]


@pytest.fixture(scope="module")
def report():
    """`plan.measure` of a small model under a table of rules, 4 rows a device, once each."""
    done = {}

    def measured(topology="v5e:2x4", **mesh):
        key = topology, *mesh.items()
        if key not in done:
            devices = len(plan.topology_devices(topology))
            config = Config(model=MODEL, train=TrainConfig(batch_size=4 * devices), mesh=MeshConfig(**mesh))
            done[key] = plan.measure(plan.compile_step(config, topology))
        return done[key]

    return measured


# Widths that fill a tile of the TPU (128), so that nothing is padded.
MODEL = GPTConfig(
    vocab_size=256,
    num_layers=2,
    num_heads=4,
    embed_dim=128,
    block_size=128,
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=0.0,
    scan_layers=True,
)
GRADIENT_BYTES = 2 * MODEL.num_parameters()  # bfloat16, as the compute dtype


def moved(report, kind, *axes):
    return sum(c.bytes for c in report["collectives"] if c.kind == kind and (not axes or c.axes == axes))


@needs_libtpu
@pytest.mark.parametrize("mesh", [{"rules": "dp"}, {"rules": "fsdp"}, {"rules": "fsdp_tp", "model": 2}], ids=str)
def test_flops_are_those_of_the_models_formula(report, mesh):
    assert report(**mesh)["flops"] == 4 * MODEL.block_size * MODEL.flops_per_token()


@needs_libtpu
def test_data_parallelism_reduces_the_gradient_and_gathers_nothing(report):
    found = report(rules="dp")
    assert {(c.kind, c.axes) for c in found["collectives"]} == {("all-reduce", ("data",))}
    # The gradients of the tied embedding's two uses are reduced one by one.
    tied = 2 * MODEL.vocab_size * MODEL.embed_dim
    assert moved(found, "all-reduce") == pytest.approx(GRADIENT_BYTES + tied, rel=0.02)


@needs_libtpu
def test_fsdp_gathers_parameters_twice_and_scatters_gradients_once(report):
    found = report(rules="fsdp")
    assert {c.axes for c in found["collectives"]} == {("fsdp",)}
    around = moved(found, "collective-permute")  # gathers and scatters taken apart
    gathered, scattered = moved(found, "all-gather"), moved(found, "reduce-scatter")
    assert gathered <= 2.5 * GRADIENT_BYTES  # forward and backward pass, and nothing that is no parameter
    assert 2 * GRADIENT_BYTES <= gathered + scattered + around <= 4 * GRADIENT_BYTES
    assert found["argument_bytes"] < report(rules="dp")["argument_bytes"] / 4


@needs_libtpu
def test_tensor_parallelism_reduces_activations_over_model(report):
    found = report(rules="fsdp_tp", model=2)
    # After attention and after the MLP, on the way there and back.
    activations = 4 * MODEL.num_layers * 2 * (4 * 2 * MODEL.block_size) * MODEL.embed_dim
    assert moved(found, "all-reduce", "model") >= activations
    assert moved(found, "all-gather", "fsdp") > 0
    assert moved(found, "all-gather", "fsdp") < moved(report(rules="fsdp"), "all-gather")


@needs_libtpu
def test_weak_scaling_leaves_flops_and_memory_of_a_device_alone(report):
    small, large = report(rules="dp"), report("v5e:8x8", rules="dp")
    assert large["flops"] == small["flops"]
    sizes = [r["argument_bytes"] + r["temporary_bytes"] + r["output_bytes"] for r in (small, large)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert moved(large, "all-reduce") == pytest.approx(moved(small, "all-reduce"), rel=0.05)


def small_flags(model: GPTConfig = MODEL) -> list[str]:
    default = dataclasses.asdict(GPTConfig())
    changed = {name: value for name, value in dataclasses.asdict(model).items() if value != default[name]}
    return ["--config=configs/char.py"] + [f"--config.model.{name}={value}" for name, value in changed.items()]


@needs_libtpu
def test_command_tells_what_fits_and_what_does_not(command):
    result = command("plan", *small_flags(), "--topology=v5e:2x4", "--batch_per_device=400000", "--json")
    assert result.returncode == 1
    assert "exceeds available HBM (15.75G)" in json.loads(result.stdout)["does_not_fit"]
    assert result.stderr == ""


def test_rows_name_every_collective():
    collectives = [
        plan.Collective("all-gather", ("data", "fsdp"), 8, 3, 10**9),
        plan.Collective("all-reduce", ("model",), 2, 1, 4),
    ]
    report = {"topology": "v5e:2x4", "devices": 8, "mesh": {"data": 2, "fsdp": 4, "model": 1}, "batch_size": 64}
    report |= {"flops": 7 * 10**12, "argument_bytes": 10**9, "temporary_bytes": 5 * 10**8, "output_bytes": 0}
    first, second = plan.rows(report | {"collectives": collectives})
    assert first.split() == [
        "v5e:2x4",
        "8",
        "data=2",
        "fsdp=4",
        "64",
        "7.000",
        "1.50",
        "all-gather",
        "data+fsdp",
        "8",
        "3",
        "1.0000",
    ]
    assert second.split() == ["all-reduce", "model", "2", "1", "0.0000"]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ([], 2, "Name a config file and TPUs"),
        (["--config=configs/char.py"], 2, "Name a config file and TPUs"),
        (["--config=configs/char.py", "--config.model.vocab_size=9", "--topology=v5e"], 2, "has to look like v5e"),
        (["--config=configs/char.py", "--topology=v5e:2x4"], 1, "model.vocab_size"),
        pytest.param(["--config=configs/char.py", "--topology=v9:2x2", "--batch_per_device=1"], 2,
                     "--topology=v9:2x2 is refused by libtpu", marks=needs_libtpu),
    ],
)  # fmt: skip
def test_refusals(command, flags, code, says):
    result = command("plan", *flags)
    assert result.returncode == code
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_gpt2_124m_is_gpt2(request):
    get_config = runpy.run_path(str(request.config.rootpath / "configs" / "gpt2_124m.py"))["get_config"]
    config = from_tree(get_config())
    padding = (config.model.padded_vocab_size - 50_257) * 768
    assert config.model.num_parameters() - padding == 124_439_808
    assert config.train.batch_size * config.model.block_size == 2**19
    assert 570_000 < config.train.total_steps(1024, 1) < 600_000


def test_missing_compiler_is_named(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=r'pip install "gpt-spmd\[plan\]"'):
        plan.topology_devices("v5e:2x4")
