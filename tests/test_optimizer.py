"""Tests the schedule, AdamW and Muon against independent formulas, and tests which parameters are decayed."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt import muon, optimizer, sharding
from gpt.models.gpt import GPT, GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.planning import hlo
from gpt.runtime.errors import UserError

# The learning-rate schedule.


def expected_rate(config: OptimizerConfig, tokens_per_step: int, total_steps: int, step: int) -> float:
    """Computes the schedule in tokens and in double precision."""
    before, after = step * tokens_per_step, (step + 1) * tokens_per_step
    if after < config.warmup_tokens:
        return config.learning_rate * after / config.warmup_tokens
    end = config.decay_tokens or total_steps * tokens_per_step
    start = max(config.warmup_tokens, config.decay_from * end)
    lowest = config.learning_rate * config.final_fraction
    now = min(max(before, start), end)
    progress = (now - start) / (end - start)
    first = max(start, tokens_per_step)
    falling = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "inverse_sqrt": math.sqrt(first / (first + progress * (end - first))),
        "constant": 1,
    }[config.decay]
    return lowest + (config.learning_rate - lowest) * falling


# Tokens per step, number of steps, warm-up tokens, and tokens to the end of the decay (0: the end of the run).
LENGTHS = {
    "short": (2048, 500, 1e5, 0),
    "warmup_of_part_of_a_step": (2048, 500, 5000, 0),
    "no_warmup": (2048, 500, 0, 0),
    "decay_before_the_end": (2048, 500, 1e5, 5e5),
    "decay_after_the_end": (2048, 500, 1e5, 5e6),
    "past_int32": (1 << 19, 5000, 2**27, 0),  # 2.6e9 tokens
    "past_uint32": (1 << 21, 5000, 2**27, 2**33 + 1),  # 10.5e9 tokens
    "gpt3": (3_200_000, 93_750, 375e6, 260e9),  # 300e9 tokens
    "past_float32_steps": (
        2048,
        146_484_375,
        375e6,
        260e9,
    ),  # the same number of tokens in more steps than float32 can count
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("decay_kind", "final_fraction", "decay_from"),
    [
        ("cosine", 0.0, 0.0),
        ("cosine", 0.1, 0.0),
        ("cosine", 1.0, 0.0),
        ("linear", 0.1, 0.0),
        ("sqrt", 0.0, 0.8),
        ("inverse_sqrt", 0.0, 0.0),
        ("constant", 0.1, 0.0),
    ],
)
def test_schedule_is_the_formula(length, decay_kind, final_fraction, decay_from):
    tokens_per_step, total_steps, warmup, decay = LENGTHS[length]
    config = OptimizerConfig(
        learning_rate=6e-4,
        warmup_tokens=warmup,
        decay=decay_kind,
        decay_from=decay_from,
        decay_tokens=decay,
        final_fraction=final_fraction,
    )
    edges = [int(tokens / tokens_per_step) for tokens in (warmup, decay or 0)] + [total_steps]
    steps = {edge + near for edge in edges for near in range(-2, 3)} | set(np.linspace(0, total_steps, 101).astype(int))
    steps = np.array(sorted(step for step in steps if 0 <= step <= 1.2 * total_steps), np.int32)
    # Compiled, with an int32 step, as in the training step.
    actual = np.asarray(jax.jit(optimizer.schedule(config, tokens_per_step, total_steps))(steps))
    expected = [expected_rate(config, tokens_per_step, total_steps, int(step)) for step in steps]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * config.learning_rate)
    assert (actual >= 0).all()
    assert (actual <= config.learning_rate * (1 + 1e-6)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_schedule_rises_then_falls_then_stays(length):
    tokens_per_step, total_steps, warmup, decay = LENGTHS[length]
    config = OptimizerConfig(warmup_tokens=warmup, decay_tokens=decay)
    rate = jax.jit(optimizer.schedule(config, tokens_per_step, total_steps))
    top, end = warmup / tokens_per_step, (decay or total_steps * tokens_per_step) / tokens_per_step

    def rates(first, last):
        return np.asarray(rate(np.unique(np.linspace(first, last, 50).astype(np.int32))))

    assert rate(0) > 0  # otherwise the first step would have no effect
    if top > 2:
        assert (np.diff(rates(0, top - 1)) > 0).all()
    assert rates(0, end).max() == pytest.approx(config.learning_rate, rel=1e-3)
    assert (np.diff(rates(math.ceil(top), end)) < 0).all()
    np.testing.assert_allclose(rates(math.ceil(end), 1.3 * end), 0.1 * config.learning_rate, rtol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_peak_lasts_until_the_decay_begins(shape):
    """Warm-up, stable phase, decay: the last fifth of a run falls from the peak to zero."""
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=1000, decay=shape, decay_from=0.8, final_fraction=0.0)
    rates = np.asarray(optimizer.schedule(config, 100, 100)(np.arange(101)))
    np.testing.assert_array_equal(rates[9:81], 1)
    assert (np.diff(rates[80:]) < 0).all()
    assert rates[100] == pytest.approx(0, abs=1e-6)
    longer = np.asarray(optimizer.schedule(config, 100, 1000)(np.arange(81)))
    np.testing.assert_array_equal(rates[:81], longer)  # so that a run can be made longer before its decay


def test_inverse_square_root_does_not_depend_on_the_length_of_the_run():
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=1000, decay="inverse_sqrt", final_fraction=0.0)
    for steps in (200, 5000):
        rates = optimizer.schedule(config, 100, steps)(np.array([10, 40, 160]))
        np.testing.assert_allclose(rates, [1, 1 / 2, 1 / 4], rtol=1e-5)


def test_decay_that_ends_within_the_warmup_stays_in_range():
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=5000, decay_tokens=2000)
    rates = np.asarray(optimizer.schedule(config, 100, 100)(np.arange(120)))
    np.testing.assert_allclose(rates[:50], np.arange(1, 51) / 50, rtol=1e-6)
    np.testing.assert_allclose(rates[51:], 0.1, rtol=1e-6)
    assert 0.1 * (1 - 1e-6) <= rates[50] <= 1


# Weight decay.

SHAPE = GPTConfig(
    num_layers=2, num_heads=2, embed_dim=8, block_size=4, vocab_size=5, attention="dense", dtype="float32"
)


def boxed_params(**options):
    """Returns abstract parameters of a GPT in boxes with the names of their axes."""
    model = GPT(dataclasses.replace(SHAPE, **options))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def names(tree, is_leaf=None) -> dict:
    """Returns {"block_0/mlp/up/kernel": leaf, …}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


KERNELS = ("attention/qkv/kernel", "attention/out/kernel", "mlp/up/kernel", "mlp/down/kernel")


@pytest.mark.parametrize(
    ("options", "blocks", "head"),
    [
        ({}, ("block_0", "block_1"), set()),
        ({"scan_layers": True}, ("blocks",), set()),
        ({"tie_embeddings": False}, ("block_0", "block_1"), {"head/kernel"}),
        ({"bias": "none", "norm": "rmsnorm", "positions": "rotary"}, ("block_0", "block_1"), set()),
    ],
    ids=["unrolled", "scanned", "untied", "rms"],
)
@pytest.mark.parametrize("boxed", [True, False], ids=["boxed", "unboxed"])
def test_matrices_are_decayed_and_nothing_else(options, blocks, head, boxed):
    """The mask is the same for parameters with and without Flax's boxes."""
    abstract = boxed_params(**options)
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    params = abstract if boxed else nn.unbox(abstract)
    mask = names(optimizer.decay_mask(params))
    assert set(mask) == set(names(params, is_leaf=is_box))
    assert {name for name, decayed in mask.items() if decayed} == {f"{b}/{k}" for b in blocks for k in KERNELS} | head


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_without_gradient_only_the_matrices_shrink(scan_layers):
    """The optimizer applies the mask, with a state that was initialized from the boxed parameters."""
    boxed = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), boxed_params(scan_layers=scan_layers))
    params = nn.unbox(boxed)
    tx = optimizer.make_optimizer(OptimizerConfig(weight_decay=0.5), lambda step: 0.1, None)

    @jax.jit
    def step(params, opt_state):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        return optax.apply_updates(params, updates)

    for name, value in names(step(params, nn.unbox(tx.init(boxed)))).items():
        np.testing.assert_allclose(value, 1.9 if name.endswith("kernel") else 2.0, rtol=1e-6, err_msg=name)


# The whole update.


def adamw(config: OptimizerConfig, rates, params, gradients):
    """Computes clipping, Adam with bias correction, and decoupled decay in NumPy and double precision."""
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (rate, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = config.clip_norm / norm if config.clip_norm and norm > config.clip_norm else 1.0
        for name, g in gradient.items():
            m[name] = config.b1 * m[name] + (1 - config.b1) * scale * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * (scale * g) ** 2
            m_hat, v_hat = m[name] / (1 - config.b1**t), v[name] / (1 - config.b2**t)
            step = m_hat / (np.sqrt(v_hat) + config.epsilon)
            decay = config.weight_decay * params[name] if name == "kernel" else 0.0
            params = params | {name: params[name] - rate * (step + decay)}
    return params


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(),
        OptimizerConfig(clip_norm=0.0),
        OptimizerConfig(clip_norm=1e-3, epsilon=0.1),  # large enough to show where epsilon is added
        OptimizerConfig(clip_norm=4.0),  # between the norms of the gradients below
        OptimizerConfig(b1=0.0, b2=0.0),
        OptimizerConfig(b1=0.8, b2=0.999, weight_decay=0.0),
        OptimizerConfig(weight_decay=3.0),
    ],
    ids=["default", "unclipped", "epsilon", "clipped_sometimes", "no_memory", "no_decay", "much_decay"],
)
def test_update_is_adamw(config):
    """Five steps have different learning rates and gradients of norm 0.4 to 40, clipped by their global norm."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "embedding": (5, 3)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: s * rng.normal(size=p.shape) for name, p in params.items()} for s in (0.1, 1, 10, 0.3, 1)]
    rates = [0.3, 0.1, 0.2, 0.05, 0.4]
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731

    tx = optimizer.make_optimizer(config, lambda step: jnp.asarray(rates)[step], None)
    actual = single(params)
    state = tx.init(actual)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(single(gradient), state, actual)
        actual = optax.apply_updates(actual, updates)
    expected = adamw(config, rates, params, gradients)
    for name in shapes:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_clipping_bounds_what_one_wild_gradient_does():
    """The moments after a gradient of norm 1,000 are those after its direction with norm 1."""
    tx = optimizer.make_optimizer(OptimizerConfig(b1=0.0), lambda step: 1.0, None)
    params = {"kernel": jnp.zeros(4)}
    _, state = tx.update({"kernel": jnp.full(4, 500.0)}, tx.init(params), params)
    assert float(optax.tree.norm(state[1].mu)) == pytest.approx(1.0)


# Muon.


def newton_schulz(x):
    """Computes Jordan's quintic iteration for one matrix in double precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / np.linalg.norm(wide)
    for _ in range(5):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalized_is_near_the_nearest_orthogonal_matrix(shape):
    x = np.random.default_rng(0).normal(size=(3, *shape))
    actual = muon.orthogonal_update(("embed", "mlp"), jnp.asarray(x, jnp.float32)) / (0.2 * max(shape) ** 0.5)
    for one, result in zip(x, actual, strict=True):
        np.testing.assert_allclose(result, newton_schulz(one), atol=1e-4)
        u, _, v = np.linalg.svd(one, full_matrices=False)
        inside = u.T @ result @ v.T  # diagonal where the singular vectors are kept
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4
        assert (np.diag(inside) > 0.6).all()
        assert (np.diag(inside) < 1.3).all()


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 8}], ids=["one", "mesh", "fsdp"])
def test_update_is_muon_for_kernels_of_blocks_and_adam_for_the_rest(scan_layers, mesh):
    """Three steps equal those of NumPy, one matrix at a time, on one device and on a mesh."""
    boxed = boxed_params(scan_layers=scan_layers, tie_embeddings=False)
    axes = nn.get_partition_spec(boxed)
    config = OptimizerConfig(name="muon", clip_norm=0.0, weight_decay=0.1)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), nn.unbox(boxed))
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(3)]
    layout = sharding.make_layout(sharding.MeshConfig("fsdp_tp", **(mesh or {})), None if mesh else jax.devices()[:1])

    def updated(config):
        tx = optimizer.make_optimizer(config, lambda step: 0.1, axes)
        actual, state = params, tx.init(params)
        with layout.use():
            for gradient in gradients:
                updates, state = jax.jit(tx.update)(gradient, state, actual)
                actual = optax.apply_updates(actual, updates)
        return names(actual)

    width = SHAPE.embed_dim
    actual, adam = updated(config), updated(dataclasses.replace(config, name="adamw"))
    for name, start in names(params).items():
        if not name.endswith("kernel") or name.startswith("head"):
            np.testing.assert_allclose(actual[name], adam[name], atol=1e-6, err_msg=name)
            continue
        layers = len(start) if scan_layers else 1
        inputs = 4 * width if "down" in name else width
        expected = np.asarray(start, np.float64).reshape(layers, inputs, -1)
        momentum = np.zeros_like(expected)
        for gradient in gradients:
            g = np.asarray(names(gradient)[name], np.float64).reshape(expected.shape)
            momentum = 0.95 * momentum + 0.05 * g
            steps = [newton_schulz(0.95 * m + 0.05 * one) for m, one in zip(momentum, g, strict=True)]
            expected = expected - 0.1 * (0.2 * max(expected.shape[1:]) ** 0.5 * np.stack(steps) + 0.1 * expected)
        np.testing.assert_allclose(actual[name].reshape(expected.shape), expected, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("rules", "mesh", "layers"),
    [
        ("fsdp", {"fsdp": 8}, 2),
        ("fsdp", {"fsdp": 4, "data": 2}, 8),
        ("fsdp_tp", {"fsdp": 4, "model": 2}, 16),
        ("sp", {"fsdp": 2, "sequence": 2, "model": 2}, 8),
    ],
    ids=["few", "data", "model", "sequence"],
)
def test_muon_exchanges_shards_and_gathers_no_sharded_axis(rules, mesh, layers):
    """The compiled update has all-to-alls, and gathers only what each group of replicas computed a part of."""
    layout = sharding.make_layout(sharding.MeshConfig(rules, **mesh))
    boxed = {"blocks": boxed_params(scan_layers=True, num_layers=layers)["blocks"]}
    tx = muon.scale_by_muon(0.95, {"up": nn.get_partition_spec(boxed)["blocks"]["mlp"]["up"]["kernel"]})
    up = nn.unbox(boxed)["blocks"]["mlp"]["up"]["kernel"]
    sharded = layout.state_shardings(boxed)["blocks"]["mlp"]["up"]["kernel"]
    with layout.use():
        params = {"up": jax.ShapeDtypeStruct(up.shape, up.dtype, sharding=sharded)}
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded), jax.eval_shape(tx.init, params)
        )
        compiled = jax.jit(tx.update, out_shardings=({"up": sharded}, None)).lower(params, state).compile()
    found = {(c.kind, axis) for c in hlo.collectives(compiled.as_text(), layout.mesh) for axis in c.axes}
    exchanged = set(mesh) - {"data"}
    assert {axis for kind, axis in found if kind == "all-to-all"} == exchanged
    assert {axis for kind, axis in found if kind != "all-to-all"} == set(mesh) - exchanged


# What is refused.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("epsilon", 0.0),
        ("b1", 1.0),
        ("b1", -0.1),
        ("b1", float("nan")),
        ("b2", 1.0),
        ("b2", 1.5),
        ("decay_from", 1.0),
        ("warmup_tokens", -1.0),
        ("decay_tokens", -1.0),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("final_fraction", -0.1),
        ("final_fraction", 1.1),
        *((name, float("nan")) for name in ("warmup_tokens", "decay_tokens", "weight_decay", "clip_norm")),
    ],
)
def test_value_without_meaning_is_refused(name, value):
    with pytest.raises(UserError, match=rf"optimizer\.{name}={value}"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("name", "adam"), ("decay", "step")])
def test_unknown_name_is_refused(name, value):
    with pytest.raises(UserError, match=rf"optimizer\.{name}='?{value}"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_values_at_the_border_are_accepted(fraction):
    OptimizerConfig(b1=0.0, b2=0.0, final_fraction=fraction, weight_decay=0.0, clip_norm=0.0)
