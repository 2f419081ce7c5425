"""Tests that training is the same on every mesh, and that arrays are sharded as the rules say."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt import config_files, parameters, sharding, step
from gpt.data import pipeline, text
from gpt.models import mesh
from gpt.planning import compiling, hlo
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

MESHES = [
    MeshConfig("dp"),
    MeshConfig("fsdp"),
    MeshConfig("fsdp_tp", data=2, model=2),
    MeshConfig("fsdp_tp", model=8),
    MeshConfig("sp", data=2, sequence=2, model=2),
    MeshConfig("sp", sequence=8),
    MeshConfig("sp", data=2, fsdp=2, sequence=2, zero1=True),
    MeshConfig("dp", zero1=True),
]


def name_of(config: MeshConfig) -> str:
    sizes = "x".join(str(size) for size in config.shape(8).values())
    return f"{config.rules}-{sizes}" + "-zero1" * config.zero1


def run_steps(config, layout, steps):
    """Returns the losses and the final state of a run without checkpoints."""
    corpus = text.load(config.data, config.tokenizer, config.model.block_size)
    source = text.TrainingWindows(corpus.train, config.model.block_size, config.seed)
    program = step.build(config, corpus.tokenizer.vocab_size, layout, steps)
    size = config.train.batch_size
    rows = layout.local_rows(size)
    batches = pipeline.to_devices(pipeline.training_batches(source, size, config.seed, rows), layout, size)
    losses = []
    with layout.use():
        state = program.init()
        for _ in range(steps):
            state, measured = program.train_step(state, next(batches))
            losses.append(float(measured["loss"]))
    return losses, state


VARIANTS = {
    "plain": {},
    "scan": {"scan_layers": True},
    "chunked-scan-remat": {
        "attention": "chunked",
        "query_chunk": 4,
        "key_chunk": 6,
        "scan_layers": True,
        "remat": "full",
        "norm": "rmsnorm",
        "positions": "rotary",
        "tie_embeddings": False,
    },
}


@pytest.fixture(scope="module")
def run_20_steps():
    """Returns `run_steps` for a number of devices, cached for each config and mesh."""
    return functools.cache(
        lambda config, mesh, devices: run_steps(config, sharding.make_layout(mesh, jax.devices()[:devices]), 20)
    )


# Compilation takes most of the time, so not every variant runs on every mesh, and some only in the slow tests.
MESHES_OF = {"plain": [*MESHES[:3], *MESHES[4:7]], "chunked-scan-remat": [MESHES[2], MESHES[5]]}
CASES = [(variant, mesh) for variant, meshes in MESHES_OF.items() for mesh in meshes]
SLOW_MESHES_OF = {
    "plain": [MESHES[3], MESHES[7]],
    "scan": MESHES[2:3],
    "chunked-scan-remat": [MESHES[1], MESHES[4], MESHES[6]],
}
CASES += [
    pytest.param(variant, mesh, marks=pytest.mark.slow) for variant, meshes in SLOW_MESHES_OF.items() for mesh in meshes
]


@pytest.mark.parametrize(("variant", "mesh_config"), CASES, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_every_mesh_gives_the_losses_of_one_device(tiny, run_20_steps, variant, mesh_config):
    """Dropout is on for 20 steps: its masks must not depend on the mesh either."""
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **VARIANTS[variant]))
    expected, state_1 = run_20_steps(config, MeshConfig(), 1)
    losses, state = run_20_steps(config, mesh_config, 8)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state_1.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)


# Path of a parameter -> PartitionSpec under the rules fsdp_tp.
EXPECTED = {
    "token_embedding/embedding": P("model", "fsdp"),
    "position_embedding/embedding": P(None, "fsdp"),
    "block_0/norm_1/scale": P("fsdp"),
    "block_0/norm_2/bias": P("fsdp"),
    "block_0/attention/qkv/kernel": P("fsdp", "model", None),
    "block_0/attention/qkv/bias": P("model", None),
    "block_0/attention/out/kernel": P("model", None, "fsdp"),
    "block_0/attention/out/bias": P("fsdp"),
    "block_0/mlp/up/kernel": P("fsdp", "model"),
    "block_0/mlp/up/bias": P("model"),
    "block_0/mlp/down/kernel": P("model", "fsdp"),
    "block_1/mlp/down/bias": P("fsdp"),
    "final_norm/scale": P("fsdp"),
}


def expected_spec(path: str, spec: P, rules: str) -> P:
    """Returns the spec of `EXPECTED`, which is for fsdp_tp, converted to other rules."""
    if rules == "sp":
        if path.startswith("position_embedding"):
            return P("sequence", "fsdp")
        return P(*(("fsdp", "sequence") if axis == "fsdp" else axis for axis in spec))
    kept = {"dp": (), "fsdp": ("fsdp",), "fsdp_tp": ("fsdp", "model")}[rules]
    return P(*(axis if axis in kept else None for axis in spec))


@pytest.mark.parametrize("mesh_config", MESHES, ids=name_of)
def test_each_parameter_and_its_moments_are_sharded_as_the_rules_say(tiny, run_20_steps, mesh_config):
    mesh = sharding.make_layout(mesh_config).mesh
    _, state = run_20_steps(tiny, mesh_config, 8)  # after steps, which must keep the shardings
    moments = state.opt_state[1]
    for path, spec in EXPECTED.items():
        spec = expected_spec(path, spec, mesh_config.rules)
        leaves = [
            functools.reduce(lambda tree, key: tree[key], path.split("/"), tree)
            for tree in (state.params, moments.mu, moments.nu)
        ]
        for i, leaf in enumerate(leaves):
            parts = math.prod(
                mesh.shape[axis] for axes in spec for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis
            )
            if i > 0 and mesh_config.zero1:
                parts *= mesh.shape["data"]  # on any axis of the array
            else:
                assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), leaf.ndim), path
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


def bytes_on_first_device(state) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("axis", ["fsdp", "model", "sequence"])
def test_bytes_per_device_fall_with_the_axis(tiny, axis):
    """Only scalars are not sharded and, for `model`, norms, positions and the biases onto the residual stream."""
    held = {}
    for size in (1, 2, 4, 8):
        config = MeshConfig("sp", data=8 // size, **({"fsdp": 1, "sequence": 1, "model": 1} | {axis: size}))
        program = step.build(tiny, 64, sharding.make_layout(config), 1)
        with program.layout.use():
            state = program.init()
        held[size] = bytes_on_first_device(state)
        assert held[size] == sharding.bytes_per_device(program.abstract_state) == sharding.bytes_per_device(state)
    params = program.abstract_state.params
    unsharded = (
        3 * 4 * sum(x.size for x in jax.tree.leaves(params) if axis not in jax.tree.leaves(tuple(x.sharding.spec)))
    )
    assert unsharded < 0.1 * held[1]
    for size in (2, 4, 8):
        scalars = 3 * 4
        assert held[size] == pytest.approx((held[1] - unsharded) / size + unsharded, abs=scalars)


def test_zero1_divides_the_optimizer_state_by_the_data_axis(tiny):
    plain, zero1 = (
        step.build(tiny, 64, sharding.make_layout(MeshConfig("dp", zero1=zero1)), 1).abstract_state
        for zero1 in (False, True)
    )
    assert sharding.bytes_per_device(zero1.params) == sharding.bytes_per_device(plain.params)
    scalars = 2 * 4
    assert sharding.bytes_per_device(zero1.opt_state) == pytest.approx(
        sharding.bytes_per_device(plain.opt_state) / 8, abs=scalars
    )


@pytest.mark.parametrize("mesh_config", MESHES, ids=name_of)
def test_optimizer_state_is_sharded_at_least_as_finely_as_the_parameters(tiny, mesh_config):
    state = step.build(tiny, 64, sharding.make_layout(mesh_config), 1).abstract_state
    for moments in (state.opt_state[1].mu, state.opt_state[1].nu):
        for moment, param in zip(jax.tree.leaves(moments), jax.tree.leaves(state.params), strict=True):
            assert math.prod(moment.sharding.shard_shape(moment.shape)) <= math.prod(
                param.sharding.shard_shape(param.shape)
            )


def test_no_device_holds_the_whole_state_while_it_is_made(tiny):
    """The compiled initialization needs little more memory than a device's share of the state."""
    model = dataclasses.replace(tiny.model, embed_dim=256, num_layers=4)
    program = step.build(dataclasses.replace(tiny, model=model), 64, sharding.make_layout(MeshConfig("fsdp")), 1)
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(program.abstract_state))
    with program.layout.use():
        memory = program.init.lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.05 * whole / 8
    assert memory.temp_size_in_bytes < whole / 4


class Spy:
    """Inspects the sharding of each constrained activation through Flax's function."""

    def __init__(self, monkeypatch):
        self.seen, self._original = {}, nn.with_logical_constraint
        monkeypatch.setattr(nn, "with_logical_constraint", self)

    def __call__(self, x, axes, *args, **kwargs):
        y = self._original(x, axes, *args, **kwargs)
        jax.debug.inspect_array_sharding(y, callback=lambda s: self.seen.__setitem__((axes, y.shape), s))
        return y


BATCH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("mesh_config", "length"),
    [(MeshConfig("fsdp_tp", data=2, model=2), None), (MeshConfig("sp", sequence=2, model=2), "sequence")],
    ids=["fsdp_tp", "sp"],
)
@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_constraints_on_activations_are_in_force(tiny, monkeypatch, mesh_config, length, attention):
    """The compiler would otherwise choose the shardings of activations, so the test inspects these too."""
    layout = sharding.make_layout(mesh_config)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, attention=attention, key_chunk=4))
    program = step.build(config, 64, layout, 1)
    spy = Spy(monkeypatch)
    tokens = jax.device_put(jnp.zeros((16, 16), jnp.int32), layout.batch)
    with layout.use():
        params = program.init().params
        jax.jit(lambda p, t: program.model.apply({"params": p}, t)).lower(params, tokens).compile()
    expected = {
        (("batch", "length", "embed"), (16, 16, 32)): P(BATCH, length, None),
        (("batch", "length", "heads", "kv"), (16, 16, 8, 4)): P(BATCH, length, "model", None),
        (("batch", "keys", "heads", "kv"), (16, 16, 8, 4)): P(BATCH, None, "model", None),
        (("batch", "length", "mlp"), (16, 16, 128)): P(BATCH, length, "model"),
        (("batch", "length", "vocab"), (16, 16, 64)): P(BATCH, length, "model"),
    }
    for key, spec in expected.items():
        assert spy.seen[key].is_equivalent_to(jax.NamedSharding(layout.mesh, spec), len(key[1])), (key, spy.seen[key])


@pytest.mark.parametrize(
    ("mesh_config", "length", "expected"),
    [
        (MeshConfig("fsdp_tp", data=2, model=2), 16, "model"),
        (MeshConfig("fsdp_tp", data=2, model=2), 1, None),  # a step of decoding
        (MeshConfig("sp", sequence=2, model=2), 16, ("sequence", "model")),
        (MeshConfig("sp", sequence=2, model=2), 6, "sequence"),  # which 2 × 2 devices do not divide
        (MeshConfig("fsdp"), 16, None),
    ],
)
def test_tensor_parallelism_shards_the_residual_stream_over_its_length(mesh_config, length, expected):
    layout = sharding.make_layout(mesh_config)
    x_BxTxD = np.arange(8 * length * 32, dtype=np.float32).reshape(8, length, 32)
    with layout.use():
        y_BxTxD = jax.jit(lambda x: mesh.shard_residual(2 * x))(x_BxTxD)
    np.testing.assert_array_equal(y_BxTxD, 2 * x_BxTxD)
    assert y_BxTxD.sharding.is_equivalent_to(jax.NamedSharding(layout.mesh, P(BATCH, expected, None)), 3)


@pytest.mark.parametrize("attention", ["dense", pytest.param("chunked", marks=pytest.mark.slow)])
def test_memory_of_a_long_block_falls_with_the_sequence_axis(tiny, attention):
    """Activations take most of the memory at this length. Only keys and values are not sharded over it."""
    model = dataclasses.replace(tiny.model, block_size=2048, attention=attention, positions="rotary")
    config = dataclasses.replace(tiny, model=model, train=dataclasses.replace(tiny.train, batch_size=1))
    needed = {}
    for size in (1, 4):
        layout = sharding.make_layout(MeshConfig("sp", sequence=size), jax.devices()[:size])
        program = step.build(config, 64, layout, 1)
        tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        with layout.use():
            lowered = program.train_step.lower(program.abstract_state, {"inputs": tokens, "targets": tokens})
            needed[size] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert needed[4] < {"dense": 0.35, "chunked": 0.55}[attention] * needed[1]


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig("fsdp_tp", model=8), MeshConfig("sp", sequence=2, model=4)], ids=name_of
)
def test_big_logits_are_never_gathered(tiny, mesh_config):
    """The loss over a vocabulary that `model` shards exchanges sums, not logits."""
    vocabulary = 1024  # more than the width, because activations are gathered
    layout = sharding.make_layout(mesh_config)
    program = step.build(tiny, vocabulary, layout, 1)
    batch = {name: jax.ShapeDtypeStruct((16, 16), jnp.int32) for name in ("inputs", "targets")}
    with layout.use():
        compiled = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    gathers = re.findall(r" = \w+\[([\d,]*)\]\S* all-gather", compiled)
    assert "all-reduce(" in compiled
    largest = max((math.prod(map(int, filter(None, shape.split(",")))) for shape in gathers), default=0)
    assert largest < 16 * 16 * vocabulary / layout.batch_shards / layout.mesh.shape["sequence"]


@pytest.mark.parametrize(
    ("mesh_config", "message"),
    [
        (MeshConfig(data=16), "there are 8"),
        (MeshConfig(data=3), "there are 8"),
        (MeshConfig("fsdp", data=2, fsdp=2), "takes 4 devices"),
        (MeshConfig("fsdp", data=-1, fsdp=16), "needs a multiple of 16"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(mesh_config, message):
    with pytest.raises(UserError, match=message):
        sharding.make_layout(mesh_config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": -2}, r"mesh\.data=-2"),
        ({"rules": "fsdp", "data": -1, "fsdp": -1}, "Only one"),
        ({"fsdp": 2}, r"mesh\.fsdp=2, but mesh\.rules=dp does not use the axis fsdp; choose mesh\.rules=fsdp or"),
        ({"rules": "fsdp", "model": 2}, "mesh.model=2, but .* choose mesh.rules=fsdp_tp or sp"),
        ({"rules": "tp"}, "'tp' is not known; choose one of dp, fsdp, fsdp_tp, sp"),
        ({"rules": "fsdp,widht=fsdp"}, "'widht=fsdp' is not of the form"),
        ({"rules": "fsdp,embed=disk"}, "'embed=disk' is not of the form"),
        ({"rules": "fsdp,embed"}, "'embed' is not of the form"),
    ],
)
def test_rules_and_sizes_without_meaning_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**options)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"rules": "fsdp"}, (1, 8, 1, 1)),
        ({"rules": "fsdp", "data": 2}, (2, 4, 1, 1)),
        ({"rules": "fsdp", "fsdp": 2}, (4, 2, 1, 1)),
        ({"rules": "fsdp_tp", "model": 4}, (1, 2, 1, 4)),
        ({"rules": "fsdp_tp", "data": -1, "model": 4}, (2, 1, 1, 4)),
        ({"rules": "sp", "sequence": 4}, (1, 2, 4, 1)),
        ({"rules": "sp", "data": 2, "fsdp": 2, "sequence": 2, "model": 1}, (2, 2, 2, 1)),
    ],
)
def test_what_is_not_set_follows_from_the_rules(options, shape):
    assert tuple(MeshConfig(**options).shape(8).values()) == shape


def test_rules_may_be_changed(tiny):
    """The changes shard parameters over both axes of the batch, and do not shard the vocabulary."""
    layout = sharding.make_layout(MeshConfig("fsdp_tp,embed=fsdp+data,vocab=", data=2, fsdp=2, model=2))
    params = step.build(tiny, 64, layout, 1).abstract_state.params
    assert params["block_0"]["mlp"]["up"]["kernel"].sharding.spec == P(("fsdp", "data"), "model")
    assert params["token_embedding"]["embedding"].sharding.spec == P(None, ("fsdp", "data"))
    # The batch still has precedence, and a change can add a rule that the preset lacks.
    assert layout.spec("batch", "length", "embed") == P(("data", "fsdp"), None, None)
    assert sharding.make_layout(MeshConfig("fsdp,layers=fsdp")).spec("layers", "mlp") == P("fsdp", None)
    assert sharding.make_layout(MeshConfig("sp,embed=fsdp")).spec("embed", "mlp") == P("fsdp", "model")


class Chip:
    """A device of a slice, with the attributes that a mesh reads."""

    platform = device_kind = "accelerator"

    def __init__(self, number, slice_index):
        self.id, self.process_index, self.slice_index = number, number // 2, slice_index

    def __repr__(self):
        return f"Chip({self.id})"


@pytest.mark.parametrize(
    ("config", "slices"),
    [
        (MeshConfig("fsdp_tp", data=2, fsdp=2, model=2), 2),
        (
            MeshConfig("fsdp_tp", data=2, fsdp=2, model=2),
            4,
        ),  # twice the size of `data`, so that `fsdp` crosses them too
        (MeshConfig("dp"), 4),
    ],
)
def test_slow_links_are_crossed_by_the_outer_axes(config, slices):
    """The order of the devices mixes the slices."""
    chips = [Chip(i, i % slices) for i in range(8)]
    grid = sharding.make_layout(config, chips).mesh.devices
    inner = grid.reshape(slices, -1)
    assert {len({chip.slice_index for chip in row}) for row in inner} == {1}
    assert len({row[0].slice_index for row in inner}) == slices


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(UserError, match=r"data=8 × .* does not fit 3 groups"):
        sharding.make_layout(MeshConfig("dp"), [Chip(i, i // 3) for i in range(8)])


def test_table_shows_every_parameter(tiny):
    layout = sharding.make_layout(MeshConfig("fsdp_tp", data=2, model=2))
    program = step.build(tiny, 64, layout, 1)
    header, *lines = parameters.table(parameters.of_program(program))
    assert re.split("  +", header) == ["parameter", "shape", "logical axes", "sharded over", "bytes a device"]
    cells = {line.split()[0]: re.split("  +", line)[1:] for line in lines}
    assert cells["token_embedding/embedding"] == ["64 × 32", "vocab, embed", "model, fsdp", "2,048"]
    assert cells["block_*/mlp/up/kernel"] == ["32 × 128", "embed, mlp", "fsdp, model", "2 × 4,096"]
    total = sum(math.prod(int(n.replace(",", "")) for n in row[-1].split(" × ")) for row in cells.values())
    assert total == sharding.bytes_per_device(program.abstract_state.params)


UNEVEN = {"num_heads": 6, "embed_dim": 36}  # fsdp=8 divides neither, but it divides the MLP (144) and the vocabulary


@pytest.mark.parametrize(
    "mesh", [MeshConfig("fsdp"), MeshConfig("sp", fsdp=4, sequence=2, zero1=True)], ids=["fsdp", "sp"]
)
def test_a_width_that_the_mesh_does_not_divide_trains_the_same(tiny, run_20_steps, mesh):
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **UNEVEN))
    (expected, _), (losses, _) = run_20_steps(config, MeshConfig(), 1), run_20_steps(config, mesh, 8)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("mesh", "name", "spec", "note"),
    [
        (MeshConfig("fsdp"), "mlp/up/kernel", P(None, "fsdp"), "36 is not divisible by fsdp=8"),
        (MeshConfig("fsdp"), "attention/qkv/kernel", P(), "whole over fsdp: 36 is not divisible by fsdp=8"),
        (MeshConfig("fsdp"), "attention/qkv/bias", P(), ""),
        (
            MeshConfig("sp", fsdp=4, sequence=2),
            "mlp/up/kernel",
            P("fsdp", ("model", "sequence")),
            "36 is not divisible by fsdp=4 × sequence=2",
        ),
        (
            MeshConfig("sp", fsdp=4, sequence=2),
            "norm_1/scale",
            P("fsdp"),
            "whole over sequence: 36 is not divisible by fsdp=4 × sequence=2",
        ),
    ],
)
def test_what_does_not_divide_the_width_shards_another_axis(tiny, mesh, name, spec, note):
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, scan_layers=True, **UNEVEN))
    program = step.build(config, 64, sharding.make_layout(mesh), 1)
    found = {p.name: p for p in parameters.of_program(program)}["blocks/" + name]
    axes = [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in spec]
    assert list(found.over[1:]) == axes + [()] * (len(found.shape) - 1 - len(axes))
    assert (found.over[0], found.note) == ((), note)  # never over the axis of layers
    assert any(line.startswith(found.name) and line.endswith(note) for line in parameters.table([found]))


def test_the_largest_gpt_2_is_sharded_over_256_devices():
    config = config_files.read("configs/pretrain.py:gpt2-1558m")
    assert config.mesh.shape(256) == {"data": 4, "fsdp": 64, "sequence": 1, "model": 1}  # 64 divides its width of 1,600
    layout = sharding.make_layout(MeshConfig("fsdp", fsdp=256), [Chip(i, 0) for i in range(256)])
    program = step.build(config, 50_257, layout, 1)
    over = {p.name: p.over for p in parameters.of_program(program)}
    assert over["block_*/mlp/down/kernel"] == (("fsdp",), ())
    assert over["block_*/attention/qkv/kernel"] == ((), (), ())


def without_dropout(config, **train_options):
    model = dataclasses.replace(config.model, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train_options))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig("dp"),
        pytest.param(MeshConfig("fsdp_tp", data=2, model=2, zero1=True), marks=pytest.mark.slow),
        pytest.param(MeshConfig("sp", data=2, sequence=2), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_micro_batches_give_the_losses_of_one_batch(tiny, run_20_steps, mesh):
    expected, _ = run_20_steps(without_dropout(tiny), MeshConfig(), 1)
    losses, _ = run_20_steps(without_dropout(tiny, micro_batches=2), mesh, 8)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.parametrize("mesh", [MeshConfig("dp"), MeshConfig("fsdp", data=2)], ids=name_of)
def test_micro_batches_sum_gradients_over_replicas_once(tiny, mesh):
    config = without_dropout(tiny, micro_batches=2)
    program = step.build(config, 64, sharding.make_layout(mesh), 1)
    with program.layout.use():
        lowered = program.train_step.lower(program.abstract_state, compiling.batch(config, program))
    found = hlo.collectives(lowered.compile().as_text(), program.layout.mesh)
    gradients = sharding.bytes_per_device(program.abstract_state.params)
    assert gradients <= sum(c.bytes for c in found if c.axes == ("data",)) < 1.1 * gradients


def test_what_the_mesh_does_not_divide_is_refused_by_name(tiny):
    layout = sharding.make_layout(MeshConfig("fsdp_tp", model=8))
    for change, named in (
        ({"num_heads": 4}, "mesh.model=8 does not divide the 4 heads of params/block_0"),
        ({"vocab_multiple": 1}, "the 65 vocab .*vocab_multiple"),
    ):
        config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **change))
        with pytest.raises(UserError, match=named):
            step.build(config, 65, layout, 1)
    train_config = dataclasses.replace(tiny.train, batch_size=12)
    with pytest.raises(UserError, match=r"train\.batch_size=12 is not a multiple of 8"):
        step.build(dataclasses.replace(tiny, train=train_config), 64, sharding.make_layout(MeshConfig()), 1)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, block_size=12))
    with pytest.raises(UserError, match=r"mesh\.sequence=8 does not divide the 12 tokens of an example"):
        step.build(config, 64, sharding.make_layout(MeshConfig("sp", sequence=8)), 1)
