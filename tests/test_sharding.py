"""The same training on every mesh, and the shards that the rules promise."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt import sharding, train
from gpt.data import pipeline, text
from gpt.errors import UserError
from gpt.sharding import MeshConfig

MESHES = [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)]
ids = [f"{m.data}x{m.fsdp}x{m.model}" for m in MESHES]


def run_steps(config, mesh, steps):
    """Losses and final state of a run without checkpoints."""
    corpus = text.load(config.data, config.tokenizer, config.model.block_size)
    source = text.TrainingWindows(corpus.train, config.model.block_size, config.seed)
    program = train.build(config, corpus.tokenizer.vocab_size, mesh, steps)
    rows = sharding.local_rows(mesh, config.train.batch_size)
    batches = pipeline.to_devices(pipeline.training_batches(source, config.train.batch_size, config.seed, rows), mesh)
    losses = []
    with sharding.use(mesh):
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
def one_device_run():
    """`run_steps` on one device, once for a config."""
    return functools.cache(lambda config: run_steps(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), 20))


@pytest.mark.parametrize("mesh_config", MESHES, ids=ids)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mesh_gives_the_losses_of_one_device(tiny, one_device_run, mesh_config, variant):
    """20 steps with dropout on: the bits of a dropout mask must not depend on the mesh either."""
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **VARIANTS[variant]))
    expected, state_1 = one_device_run(config)
    losses, state = run_steps(config, sharding.make_mesh(mesh_config), 20)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state_1.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)


# Path of a parameter -> PartitionSpec under the rules.
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


@pytest.mark.parametrize("mesh_config", MESHES, ids=ids)
def test_each_parameter_and_its_moments_are_sharded_as_the_rules_say(tiny, mesh_config):
    mesh = sharding.make_mesh(mesh_config)
    _, state = run_steps(tiny, mesh, 1)  # after a step: the shardings have to survive it
    moments = state.opt_state[1]
    for path, spec in EXPECTED.items():
        for tree in (state.params, moments.mu, moments.nu):
            leaf = tree
            for key in path.split("/"):
                leaf = leaf[key]
            assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), leaf.ndim), path
            parts = math.prod(mesh.shape[axis] for axis in spec if axis)
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


def bytes_on_first_device(state) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("axis", ["fsdp", "model"])
def test_bytes_per_device_fall_with_the_axis(tiny, axis):
    """What is left unsharded are scalars and, for `model`, norms, positions and the biases onto the residual stream."""
    held = {}
    for size in (1, 2, 4, 8):
        program = train.build(tiny, 64, sharding.make_mesh(dataclasses.replace(MeshConfig(), **{axis: size})), 1)
        with sharding.use(program.mesh):
            state = program.init()
        held[size] = bytes_on_first_device(state)
        abstract = program.abstract_state
        assert held[size] == sharding.bytes_per_device(abstract, jax.tree.map(lambda x: x.sharding, abstract))
    params = program.abstract_state.params
    unsharded = (
        3 * 4 * sum(x.size for x in jax.tree.leaves(params) if axis not in jax.tree.leaves(tuple(x.sharding.spec)))
    )
    assert unsharded < 0.1 * held[1]
    for size in (2, 4, 8):
        scalars = 3 * 4
        assert held[size] == pytest.approx((held[1] - unsharded) / size + unsharded, abs=scalars)


def test_no_device_holds_the_whole_state_while_it_is_made(tiny):
    """The compiled initialisation needs, a device, about its share and far from the whole."""
    model = dataclasses.replace(tiny.model, embed_dim=256, num_layers=4)
    program = train.build(dataclasses.replace(tiny, model=model), 64, sharding.make_mesh(MeshConfig(1, 8, 1)), 1)
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(program.abstract_state))
    with sharding.use(program.mesh):
        memory = program.init.lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.05 * whole / 8
    assert memory.temp_size_in_bytes < whole / 4


def test_constraints_on_activations_are_in_force(tiny):
    """Without them the compiler would choose: see what the hidden layers' shardings are, not only the parameters'."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    program = train.build(tiny, 64, mesh, 1)
    seen = {}

    def note(name):
        return lambda s: seen.__setitem__(name, s)

    class Spy:
        """Looks at each constrained activation, by way of Flax's own function."""

        original = staticmethod(nn.with_logical_constraint)

        def __call__(self, x, axes, *args, **kwargs):
            y = self.original(x, axes, *args, **kwargs)
            jax.debug.inspect_array_sharding(y, callback=note((axes, y.shape)))
            return y

    tokens = jax.device_put(jnp.zeros((16, 16), jnp.int32), sharding.batch_sharding(mesh))
    patch = pytest.MonkeyPatch()
    patch.setattr(nn, "with_logical_constraint", Spy())
    with sharding.use(mesh):
        params = program.init().params
        jax.jit(lambda p, t: program.model.apply({"params": p}, t)).lower(params, tokens).compile()
    patch.undo()
    batch = ("data", "fsdp")
    expected = {
        (("batch", "length", "embed"), (16, 16, 32)): P(batch, None, None),
        (("batch", "length", "heads", "kv"), (16, 16, 8, 12)): P(batch, None, "model", None),
        (("batch", "length", "heads", "kv"), (16, 16, 8, 4)): P(batch, None, "model", None),
        (("batch", "length", "mlp"), (16, 16, 128)): P(batch, None, "model"),
        (("batch", "length", "vocab"), (16, 16, 64)): P(batch, None, "model"),
    }
    for key, spec in expected.items():
        assert seen[key].is_equivalent_to(jax.NamedSharding(mesh, spec), len(key[1])), (key, seen[key])


def test_big_logits_are_never_gathered(tiny):
    """The loss over a vocabulary on `model` exchanges sums, not logits."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    program = train.build(tiny, 64, mesh, 1)
    batch = {name: jax.ShapeDtypeStruct((16, 16), jnp.int32) for name in ("inputs", "targets")}
    with sharding.use(mesh):
        compiled = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    gathers = [line for line in compiled.splitlines() if " all-gather(" in line]
    assert "all-reduce(" in compiled
    assert not [line for line in gathers if "16,16,64]" in line or "256,64]" in line]


@pytest.mark.parametrize(
    ("mesh_config", "message"),
    [
        (MeshConfig(16, 1, 1), "there are 8"),
        (MeshConfig(3, 1, 1), "there are 8"),
        (MeshConfig(2, 2, 1), "takes 4 devices"),
        (MeshConfig(-1, 16, 1), "needs a multiple of 16"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(mesh_config, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(mesh_config)


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=0"):
        MeshConfig(fsdp=0)
    with pytest.raises(UserError, match="Only one"):
        MeshConfig(fsdp=-1)


def test_what_the_mesh_does_not_divide_is_refused_by_name(tiny):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    for change, named in (
        ({"num_heads": 4}, "the 4 heads of params/block_0"),
        ({"vocab_multiple": 1}, "the 65 vocab .*vocab_multiple"),
    ):
        config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **change))
        with pytest.raises(UserError, match=named):
            train.build(config, 65, mesh, 1)
    train_config = dataclasses.replace(tiny.train, batch_size=12)
    with pytest.raises(UserError, match=r"train\.batch_size=12 is not a multiple of 8"):
        train.build(dataclasses.replace(tiny, train=train_config), 64, sharding.make_mesh(MeshConfig()), 1)
