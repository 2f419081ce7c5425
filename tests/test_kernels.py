"""Tests that the attention kernels equal `dense`, what they refuse, and what `auto` selects.

Splash attention is interpreted here, and XLA computes cuDNN's arguments; tests/test_plan.py compiles both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding, step, train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.interop import huggingface
from gpt.models import attention, kernels
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BATCH, HEADS, KV = 4, 4, 8
# Groups of heads that share keys and values, windows that end within a block and beyond it, and limits of the scores.
OPTIONS = [(2, {}), (4, {"window": 50}), (4, {"softcap": 2.0}), (2, {"window": 130, "softcap": 3.0})]
TENSOR, SEQUENCE = MeshConfig("fsdp_tp", data=2, fsdp=2, model=2), MeshConfig("sp", fsdp=2, sequence=2, model=2)
interpreted = functools.partial(kernels.splash, interpret=True)


def random_arrays(length, dtype=np.float32, groups=HEADS):
    """Returns q, k and v (of `groups` heads), the cotangent, and document starts: several in rows but the last."""
    rng = np.random.default_rng(0)
    sizes = HEADS, groups, groups, HEADS
    arrays = [jnp.asarray(rng.normal(size=(BATCH, length, heads, KV)), dtype) for heads in sizes]
    begins = (rng.random((BATCH, length)) < 0.03) & (np.arange(BATCH) < BATCH - 1)[:, None]
    return *arrays, np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1).astype(np.int32)


def out_and_gradients(attend, arrays, starts=None, mesh=None):
    def run(q, k, v, cotangent, starts):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, starts), q, k, v)
        return out, *pullback(cotangent)

    if mesh is None:
        return quick_jit(run)(*arrays, starts)
    layout = sharding.make_layout(mesh)
    with layout.use():
        spec = jax.NamedSharding(layout.mesh, layout.spec("batch", "length", "heads", "kv"))
        return quick_jit(run)(*(jax.device_put(x, spec) for x in arrays), starts)


def assert_close(actual, expected, tolerance=2e-6):
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert one.dtype == other.dtype, name
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "length", "borders"),
    [(None, 384, False), (None, 384, True), (TENSOR, 128, False), (TENSOR, 128, True), (SEQUENCE, 256, True)],
    ids=["one device", "one device, borders", "tensor", "tensor, borders", "sequence, borders"],
)
def test_splash_equals_dense(mesh, length, borders):
    """One device has three blocks of 128. Meshes shard the batch and the heads, and the queries in two."""
    *arrays, starts = random_arrays(length)
    starts = starts if borders else None
    expected = out_and_gradients(attention.dense, arrays, starts)
    assert_close(out_and_gradients(interpreted, arrays, starts, mesh), expected)


@pytest.mark.parametrize(("groups", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("mesh", [None, TENSOR, SEQUENCE], ids=["one device", "tensor", "sequence"])
def test_splash_and_chunked_with_groups_windows_and_softcap(mesh, groups, options):
    *arrays, starts = random_arrays(256, groups=groups)
    expected = out_and_gradients(functools.partial(attention.dense, **options), arrays, starts)
    chunked = functools.partial(kernels.chunked, query_chunk=48, key_chunk=32)
    for attend in (interpreted, chunked):
        actual = out_and_gradients(functools.partial(attend, **options), arrays, starts, mesh)
        assert_close(actual, expected, 4e-6)


def test_splash_in_bfloat16():
    *arrays, starts = random_arrays(128, jnp.bfloat16)
    exact = out_and_gradients(attention.dense, [x.astype(jnp.float32) for x in arrays], starts)
    actual = out_and_gradients(interpreted, arrays, starts)
    assert_close(actual, [x.astype(jnp.bfloat16) for x in exact], 0.02)


def test_splash_of_a_prompt_of_any_length():
    q, k, v, _, starts = random_arrays(77)
    actual = quick_jit(interpreted)(q, k, v, starts)
    np.testing.assert_allclose(actual, quick_jit(attention.dense)(q, k, v, starts), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mesh", [None, TENSOR], ids=["one device", "tensor"])
@pytest.mark.parametrize("borders", [False, True], ids=["", "borders"])
@pytest.mark.parametrize(("groups", "window"), [(HEADS, 0), (2, 0), (2, 5)])
def test_what_cudnn_is_asked_for_equals_dense(monkeypatch, mesh, borders, groups, window):
    ours, asked = jax.nn.dot_product_attention, []

    def by_xla(*arrays, **options):
        asked.append((options["implementation"], options["is_causal"]))
        return ours(*arrays, **options | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    *arrays, starts = random_arrays(24, groups=groups)
    starts = starts if borders else None
    actual = out_and_gradients(functools.partial(kernels.cudnn, window=window), arrays, starts, mesh)
    assert_close(actual, out_and_gradients(functools.partial(attention.dense, window=window), arrays, starts))
    assert set(asked) == {("cudnn", True)}


KERNEL = GPTConfig(
    num_layers=1,
    num_heads=2,
    embed_dim=16,
    block_size=128,
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=0.0,
)


@pytest.mark.parametrize(
    ("name", "platform", "changes", "parts", "says"),
    [
        ("splash", "cpu", {}, 1, "model.attention=splash runs on a TPU, and this is a CPU"),
        ("splash", "gpu", {}, 1, "runs on a TPU"),
        ("cudnn", "tpu", {}, 1, "model.attention=cudnn runs on a GPU, and this is a TPU"),
        ("splash", "tpu", {"attention_dropout": 0.1}, 1, "model.attention_dropout=0.1"),
        ("cudnn", "gpu", {"attention_dropout": 0.1}, 1, "model.attention_dropout=0.1"),
        ("splash", "tpu", {"block_size": 192}, 1, "multiple of 128 tokens, not model.block_size=192"),
        ("splash", "tpu", {}, 2, "not model.block_size=128 in 2 parts"),
        ("cudnn", "gpu", {}, 2, "mesh.sequence"),
        ("cudnn", "gpu", {"dtype": "float32"}, 1, "model.dtype=float32"),
        ("cudnn", "gpu", {"attention_softcap": 30.0, "dtype": "bfloat16"}, 1, "has no model.attention_softcap"),
        ("cudnn", "gpu", {"num_heads": 4}, 1, "up to 128, not 4"),
        ("cudnn", "gpu", {"embed_dim": 272}, 1, "up to 128, not 136"),
    ],
)
def test_what_a_kernel_cannot_compute_is_refused_by_name_and_auto_is_dense(name, platform, changes, parts, says):
    config = dataclasses.replace(KERNEL, attention=name, **changes)
    with pytest.raises(UserError) as refused:
        config.resolve(9, platform, parts)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    if "runs on" not in says:
        assert dataclasses.replace(config, attention="auto").resolve(9, platform, parts).attention == "dense"


@pytest.mark.parametrize(("platform", "name"), [("cpu", "dense"), ("gpu", "cudnn"), ("tpu", "splash")])
def test_auto_is_the_kernel_of_the_platform_and_the_model_runs_it(monkeypatch, platform, name):
    config = dataclasses.replace(KERNEL, attention="auto").resolve(9, platform)
    assert config.attention == name
    called = []
    monkeypatch.setitem(kernels.ATTENTION, name, lambda q, k, v, starts, **options: called.append(options) or v)
    jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 128), jnp.int32))
    assert called == [{"window": 0, "softcap": 0.0}]


def test_a_mesh_with_parts_of_the_length_is_refused_or_dense(tiny):
    """`build` passes the number of shards of the length to `resolve`."""
    layout = sharding.make_layout(MeshConfig("sp", sequence=2))
    assert layout.length_shards == 2
    assert sharding.make_layout(TENSOR).length_shards == 1
    seen = []

    class Spy(GPTConfig):
        def resolve(self, *arguments):
            seen.append(arguments)
            return super().resolve(*arguments)

    step.build(dataclasses.replace(tiny, model=Spy(**dataclasses.asdict(tiny.model))), 64, layout, 1)
    assert seen == [(64, "cpu", 2)]


def test_a_run_with_a_kernel_is_evaluated_and_converted_anywhere(tiny, tmp_path):
    """The recorded attention is edited, as if the run had been trained on a TPU."""
    model = dataclasses.replace(KERNEL, embed_dropout=0.1, residual_dropout=0.1)
    config = dataclasses.replace(
        tiny, model=model, train=dataclasses.replace(tiny.train, batch_size=8, steps=1, eval_every=0, sample_tokens=0)
    )
    workdir = Workdir(tmp_path / "run")
    assert train.train(config, workdir) == 0
    (record,) = (path for path in (tmp_path / "run").glob("*.json") if '"attention"' in path.read_text())
    record.write_text(record.read_text().replace('"attention": "auto"', '"attention": "splash"'))
    assert workdir.read().config.model.attention == "splash"
    assert loading.load(workdir, "last").model_config.attention == "dense"
    assert huggingface.to_hf(workdir, "last", tmp_path / "hf")[0].attention == "dense"
