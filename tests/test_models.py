"""Tests the GPT against published sizes and an independent NumPy forward pass, and tests the effect of each option."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_options import FAMILIES

from gpt.models import kernels, layers, mesh, rotary
from gpt.models.gpt import GPT, GPTConfig
from gpt.models.perceiver import PerceiverIOConfig
from gpt.models.sizes import SIZES, named_size
from gpt.models.vit import ViTConfig
from gpt.runtime.errors import UserError

# Skipping LLVM's optimizations takes a third of the compilation time and changes results by rounding only.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

VOCAB, LENGTH = 11, 10
NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
TINY = GPTConfig(num_layers=2, num_heads=2, embed_dim=16, block_size=12, query_chunk=4, key_chunk=3)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)


def make(vocab_size=VOCAB, **options) -> GPTConfig:
    return dataclasses.replace(TINY, **options).resolve(vocab_size, "cpu")


def abstract_variables(config):
    """Returns the shapes of the parameters, in Flax's boxes with axis names, without allocating them."""
    return jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def by_path(tree) -> dict:
    """Returns {"block_0/mlp/up/kernel": leaf, …}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))[0]
    return {"/".join(key.key for key in path if key.key != "params"): leaf for path, leaf in leaves}


def random_variables(config, seed=1):
    """Returns parameters far from their initial values, so that every scale, bias and weight has an effect."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        mean, std = {"scale": (1, 0.2), "bias": (0, 0.3), "kernel": (0, 0.3), "embedding": (0, 0.6)}.get(
            path[-1].key, (0, 0.3)
        )
        return rng.normal(mean, std, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_variables(config)))


def stacked(variables, num_layers):
    """Converts parameters of the unrolled model to those of the model with scan_layers."""
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{i}") for i in range(num_layers)]
    return {"params": params | {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}}


def logits_of(config, variables, tokens=TOKENS, **options):
    return np.asarray(quick_jit(functools.partial(GPT(config).apply, **options))(variables, tokens))


def assert_close(actual, expected, tolerance=2e-6):
    """Asserts that errors are small relative to the largest number in the array. Rounding in float32 is 6e-8."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Sizes.

# With GPT-2's vocabulary and context, a tied head and all biases. GPT-2's numbers are published. The smaller ones are
# the sum of the embeddings, 12·D² + 13·D for each layer and 2·D for the final norm.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gopher-44m": 51_475_968,
    "gpt-mini": 12_515_520,
    "gpt-micro": 7_357_312,
    "gpt-nano": 2_546_400,
}


def count(config):
    return sum(x.size for x in jax.tree.leaves(abstract_variables(config)))


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_numbers_of_parameters(name, parameters):
    config = GPTConfig(block_size=1024, **named_size(name)).resolve(50257, "cpu")
    assert config.num_parameters() == parameters
    assert count(config) == parameters


def test_openai_gpt_has_its_published_parameters_and_a_final_norm():
    config = GPTConfig(block_size=512, **named_size("openai-gpt")).resolve(40478, "cpu")
    assert config.num_parameters() == count(config) == 116_534_784 + 2 * 768


def test_sizes_are_those_of_mingpt():
    """Sizes are (layers, heads, width). No number of parameters depends on the number of heads."""
    assert {name: tuple(size) for name, size in SIZES["gpt"].items()} == {
        "openai-gpt": (12, 12, 768),
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
        "gopher-44m": (8, 16, 512),
        "gpt-mini": (6, 6, 192),
        "gpt-micro": (4, 4, 128),
        "gpt-nano": (3, 3, 48),
    }
    assert named_size("gpt2-xl") == {"num_layers": 48, "num_heads": 25, "embed_dim": 1600}


def test_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'gpt3'.*gpt2-xl"):
        named_size("gpt3")


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": False},
        {"bias": "none"},
        {"norm": "rmsnorm"},
        {"norm": "rmsnorm", "bias": "none", "positions": "rotary", "tie_embeddings": False},
        {"positions": "rotary"},
        {"vocab_multiple": 128},
        {"vocab_multiple": 128, "tie_embeddings": False},
        {"mlp_size": 43},
        *FAMILIES.values(),
    ],
    ids=str,
)
def test_counted_parameters_are_those_made(options, scan_layers):
    config = GPTConfig(block_size=1024, scan_layers=scan_layers, **named_size("gpt2") | options)
    config = config.resolve(50257, "cpu")
    assert config.num_parameters() == count(config)
    assert config.num_parameters() != PARAMETERS["gpt2"]


def test_flops_of_gpt2():
    """FLOPs are 6 for each weight of the 12 blocks and of the head, and 12·layers·width·length for attention."""
    config = GPTConfig(block_size=1024, **named_size("gpt2")).resolve(50257, "cpu")
    assert config.flops_per_token() == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_share_of_scores_within_windows(scan_layers):
    """Counted pair by pair; scanned layers of two kinds run one of two kernels, both of which the program has."""
    options = {"num_layers": 6, "block_size": 64, "window": 10, "scan_layers": scan_layers}
    config = dataclasses.replace(TINY, **options, window_pattern="LLG")
    local = np.tri(64) - np.tri(64, k=-10)
    expected = (4 * local.sum() + 2 * np.tri(64).sum()) / (6 * np.tri(64).sum())
    assert kernels.attention_share(config) == pytest.approx(expected / (2 if scan_layers else 1), rel=0.02)
    assert kernels.attention_share(dataclasses.replace(config, window=0)) == 1
    assert kernels.attention_share(dataclasses.replace(config, window=100)) == 1
    assert config.flops_per_token() == dataclasses.replace(config, window=0).flops_per_token() - 12 * 16 * 4 * 54


@pytest.mark.parametrize(("length", "window"), [(1024, 0), (2048, 600), (8192, 0), (8192, 3000)])
def test_splash_computes_whole_blocks(length, window):
    """Counted block by block from the mask."""
    config = dataclasses.replace(TINY, block_size=length, window=window, attention="splash")
    side = {1024: 512, 2048: 512, 8192: 1024}[length]
    mask = np.tri(length, dtype=bool) & ~np.tri(length, k=-(window or length), dtype=bool)
    blocks = mask.reshape(length // side, side, -1, side).any(axis=(1, 3)).sum()
    assert kernels.splash_block(length) == side
    assert kernels.attention_share(config) == pytest.approx(blocks * side**2 / np.tri(length, dtype=bool).sum())


# Values.


def numpy_activation(name, x):
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "relu":
        return np.where(x > 0, x, 0)
    if name == "relu_squared":
        return np.where(x > 0, x, 0) ** 2
    return x / (1 + np.exp(-x))  # silu


def numpy_logits(config, variables, tokens):
    """Computes the forward pass of the GPT-2 paper in float64 from the parameters alone."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])

    def linear(p, x, axes):
        return np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)

    def rms(x, axes=-1):
        return x / np.sqrt((x**2).mean(axes, keepdims=True) + config.norm_epsilon)

    def norm(p, x):
        if config.norm == "layernorm":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        else:
            x = rms(x)
        return x * (p["scale"] + (config.norm == "rmsnorm_plus1")) + p.get("bias", 0)

    def rotated(x, is_local):
        """Rotates the pairs (i, i + size/2), as complex numbers, by position·base^(-2i/size)."""
        size = int(x.shape[-1] * config.rotary_fraction)
        half = size // 2
        base = config.rotary_base_local if is_local and config.rotary_base_local else config.rotary_base
        angles = np.arange(x.shape[1])[:, None] * base ** (-2 * np.arange(half) / size)
        if config.rotary_scaling and not (is_local and config.rotary_base_local):
            angles = angles / float(config.rotary_scaling.removeprefix("linear:factor="))
        z = (x[..., :half] + 1j * x[..., half:size]) * np.exp(1j * angles)[:, None, :]
        return np.concatenate([z.real, z.imag, x[..., size:]], axis=-1)

    def attend(p, is_local, x):
        heads, groups, kv = config.num_heads, config.num_kv_heads or config.num_heads, p["out"]["kernel"].shape[1]
        packed = linear(p["qkv"], x, 1)  # [B, T, G, R·K + 2·K]
        q = packed[..., : heads // groups * kv].reshape(*x.shape[:2], heads, kv)
        k, v = np.split(packed[..., heads // groups * kv :], 2, axis=-1)
        if config.qk_norm != "none":
            axes = (2, 3) if config.qk_norm == "all" else 3
            offset = float(config.norm == "rmsnorm_plus1")
            scales = [p[f"{name}_norm"]["scale"] + offset if f"{name}_norm" in p else 1 for name in ("query", "key")]
            q, k = (rms(x, axes) * scale for x, scale in zip((q, k), scales, strict=True))
        if config.positions == "rotary":
            q, k = rotated(q, is_local), rotated(k, is_local)
        k, v = (np.repeat(x, heads // groups, axis=2) for x in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) * (config.attention_scale or kv**-0.5)
        if cap := config.attention_softcap:
            scores = cap * np.tanh(scores / cap)
        distance = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
        visible = (distance >= 0) & (distance < (config.window if is_local else np.inf))
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return linear(p["out"], np.einsum("bhts,bshk->bthk", weights, v), 2)

    def mlp(p, x):
        up = linear(p["up"], x, 1)
        h = numpy_activation(config.activation, linear(p["gate"], x, 1)) * up if config.gated_mlp else None
        return linear(p["down"], numpy_activation(config.activation, up) if h is None else h, 1)

    def branch(p, number, x, layer):
        y = layer(x if config.norm_places == "post" else norm(p[f"norm_{number}"], x))
        return y if config.norm_places == "pre" else norm(p[f"post_norm_{number}"], y)

    x = params["token_embedding"]["embedding"][tokens] * config.embed_multiplier
    if config.positions == "learned":
        x = x + params["position_embedding"]["embedding"][: tokens.shape[1]]
    for i in range(config.num_layers):
        p = params[f"block_{i}"]
        is_local = bool(config.window) and config.window_pattern[i % len(config.window_pattern)] == "L"
        y = x + branch(p, 1, x, functools.partial(attend, p["attention"], is_local))
        x = y + branch(p, 2, x if config.parallel_block else y, functools.partial(mlp, p["mlp"]))
    x = norm(params["final_norm"], x)
    logits = x @ (params["token_embedding"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"])
    return config.logit_softcap * np.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rmsnorm"},
        {"bias": "none"},
        {"tie_embeddings": False},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"activation": "relu_squared"},
        {"activation": "silu"},
        {"positions": "rotary"},
        {"qk_norm": "unit"},
        {"mlp_size": 24, "num_heads": 4, "num_layers": 3},
        {"norm": "rmsnorm", "bias": "none", "tie_embeddings": False, "activation": "silu", "positions": "rotary"},
        {"qk_norm": "unit", "norm": "rmsnorm", "bias": "none", "activation": "relu_squared", "positions": "rotary"},
        *FAMILIES.values(),
        FAMILIES["gemma2"] | {"attention": "chunked", "query_chunk": 2, "key_chunk": 3},
    ],
    ids=str,
)
def test_logits_equal_an_independent_forward_pass(options):
    config = make(**options)
    variables = random_variables(config)
    logits = logits_of(config, variables)
    assert logits.shape == (*TOKENS.shape, VOCAB)
    assert_close(logits, numpy_logits(config, variables, TOKENS), 5e-6)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_and_their_gradients_far_from_zero(name):
    """The cube in gelu_tanh must not cause a NaN at ±50, in the value or in the gradient."""
    x = np.concatenate([np.linspace(-50, 50, 101), np.linspace(-1, 1, 21)]).astype(np.float32)
    values, slopes = jax.vmap(jax.value_and_grad(layers.ACTIVATIONS[name]))(x)
    expected = numpy_activation(name, x.astype(np.float64))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    step = 1e-5
    sides = (numpy_activation(name, x.astype(np.float64) + d) for d in (step, -step))
    differences = (next(sides) - next(sides)) / (2 * step)
    smooth = np.abs(x) > 1e-3 if "relu" in name else np.full(x.shape, True)
    np.testing.assert_allclose(slopes[smooth], differences[smooth], rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    angles = rotary.frequencies(8, 1e4, "")
    q, k = (np.broadcast_to(x, (1, 64, 1, 8)) for x in (q, k))
    q, k = (np.asarray(rotary.rotary(x, np.arange(64), *angles))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in (-40, -3, 0, 1, 17):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
    assert np.ptp(scores[0]) > 1


# Causality.


@pytest.mark.parametrize(
    ("attention", "positions", "scan_layers"),
    [*itertools.product(["dense", "chunked"], ["learned", "rotary"], [False]), ("chunked", "rotary", True)],
)
def test_future_tokens_change_no_logits(attention, positions, scan_layers):
    """Earlier logits are equal to the bit; the changed token changes the logits from its own position on."""
    config = make(attention=attention, positions=positions, scan_layers=scan_layers)
    variables = random_variables(config)
    apply = quick_jit(GPT(config).apply)
    logits = np.asarray(apply(variables, TOKENS))
    for start in (1, 5, LENGTH - 1):
        changed = TOKENS.copy()
        changed[:, start:] = (changed[:, start:] + 1) % VOCAB
        other = np.asarray(apply(variables, changed))
        np.testing.assert_array_equal(other[:, :start], logits[:, :start])
        assert (np.abs(other - logits)[:, start:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_prefix_has_the_logits_it_has_within_the_whole(positions):
    """A model trained at block_size can therefore continue a shorter prompt."""
    config = make(positions=positions)
    variables = random_variables(config)
    whole = logits_of(config, variables)
    for length in (1, 7):
        assert_close(logits_of(config, variables, TOKENS[:, :length]), whole[:, :length])


# Scan and rematerialisation.


@pytest.mark.parametrize("family", [{}, FAMILIES["gemma3"]], ids=["", "alternating windows"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_layers_give_the_logits_of_unrolled_ones(remat, family):
    config = make(**family | {"num_layers": 3})
    variables = random_variables(config)
    scanned = dataclasses.replace(config, scan_layers=True, remat=remat)
    parameters = stacked(variables, 3)
    assert jax.tree.map(np.shape, parameters) == jax.tree.map(np.shape, nn.unbox(abstract_variables(scanned)))
    assert_close(logits_of(scanned, parameters), logits_of(config, variables))


def loss(config, variables, dropout_key=None):
    """Returns the mean cross-entropy, with dropout if there is a key."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits = GPT(config).apply(variables, TOKENS[:, :-1], deterministic=dropout_key is None, rngs=rngs)
    return -jnp.take_along_axis(nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("options", [{}, *FAMILIES.values()], ids=["gpt2", *FAMILIES])
@pytest.mark.parametrize(("platform", "lora_rank"), [("tpu", 0), ("gpu", 0), ("tpu", 2)])
def test_the_layout_of_accelerators_computes_the_same(options, platform, lora_rank, monkeypatch):
    """The layers have one form for CPUs and one for accelerators, with the same parameters."""
    config = make(**options, lora_rank=lora_rank, lora_targets="qkv,up")
    variables = random_variables(config)

    def loss_and_gradients():
        return jax.value_and_grad(functools.partial(loss, config))(variables, jax.random.key(4))

    expected = loss_and_gradients()
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), loss_and_gradients(), expected)


IMAGES = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "image_size": 4, "patch_size": 2}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    "config", [TINY, ViTConfig(**IMAGES, pooling="class_token"), PerceiverIOConfig(**IMAGES, num_latents=3)]
)
def test_gradients_in_bfloat16_are_summed_in_float32(config, platform, monkeypatch):
    """A sum of ones in bfloat16 ends at 256, because 256 + 1 is rounded to 256. Here, 1,024 rows are equal."""
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    config = dataclasses.replace(config, **NO_DROPOUT, dtype="bfloat16").resolve(VOCAB, "cpu")
    model, row, rng = config.module(), config.blank(1), np.random.default_rng(0)
    row = rng.integers(0, VOCAB, row.shape, row.dtype)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), row))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), variables)
    of_sum = jax.grad(lambda variables, inputs: model.apply(variables, inputs)[..., :3].sum())
    single, summed = (by_path(quick_jit(of_sum)(variables, np.repeat(row, rows, axis=0))) for rows in (1, 1024))
    for name, gradient in single.items():
        assert np.linalg.norm(summed[name] - 1024 * gradient) <= 0.01 * np.linalg.norm(1024 * gradient), name


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_gives_the_same_gradients(scan_layers):
    """Dropout is on: the recomputation has to draw the same masks."""
    config = make(scan_layers=scan_layers)
    variables = random_variables(config)
    gradients = {}
    for remat in ("none", "dots", "full", "out,up"):
        of_loss = jax.grad(functools.partial(loss, dataclasses.replace(config, remat=remat)))
        gradients[remat] = by_path(quick_jit(of_loss)(variables, jax.random.key(4)))
    for remat, (name, expected) in itertools.product(("dots", "full", "out,up"), gradients["none"].items()):
        # Relative to the largest gradient, because the terms of a gradient may cancel.
        np.testing.assert_allclose(gradients[remat][name], expected, rtol=1e-5, atol=1e-6, err_msg=f"{remat} {name}")


@pytest.mark.parametrize("family", [{}, FAMILIES["gemma2"]], ids=["", "alternating windows"])
def test_scanned_layers_give_the_gradients_of_unrolled_ones(family):
    config = make(**NO_DROPOUT, **family)
    scanned = dataclasses.replace(config, scan_layers=True)
    variables = random_variables(config)
    expected = stacked(quick_jit(jax.grad(functools.partial(loss, config)))(variables), 2)
    gradients = quick_jit(jax.grad(functools.partial(loss, scanned)))(stacked(variables, 2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, expected)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_keeps_less_for_the_backward_pass(scan_layers):
    """The saved residuals are the leaves of the vjp function. `full` saves little more than the input of each block."""

    def kept_bytes(remat):
        config = make(num_layers=4, scan_layers=scan_layers, remat=remat)
        of_variables = functools.partial(loss, config, dropout_key=jax.random.key(0))
        residuals = jax.eval_shape(lambda variables: jax.vjp(of_variables, variables)[1], random_variables(config))
        parameters = 4 * config.num_parameters()  # always saved
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals)) - parameters

    none, dots, full = (kept_bytes(remat) for remat in ("none", "dots", "full"))
    assert dots < 0.6 * none
    assert full < 0.4 * dots


# Padded vocabulary.


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_padding_of_the_vocabulary_has_no_probability(tie_embeddings):
    """The added rows of the table contain arbitrary numbers here. The logits of real tokens do not change."""
    config = make(tie_embeddings=tie_embeddings)
    padded = dataclasses.replace(config, vocab_multiple=8)
    assert padded.padded_vocab_size == 16
    variables = random_variables(config)
    larger = random_variables(padded, seed=2)
    larger["params"] |= {name: value for name, value in variables["params"].items() if name.startswith("block")}
    larger["params"] |= {name: variables["params"][name] for name in ("position_embedding", "final_norm")}
    larger["params"]["token_embedding"]["embedding"][:VOCAB] = variables["params"]["token_embedding"]["embedding"]
    if not tie_embeddings:
        larger["params"]["head"]["kernel"][:, :VOCAB] = variables["params"]["head"]["kernel"]
    logits = logits_of(padded, larger)
    assert logits.shape == (*TOKENS.shape, 16)
    assert_close(logits[..., :VOCAB], logits_of(config, variables))
    assert (logits[..., VOCAB:] <= -1e29).all()
    assert (nn.softmax(logits)[..., VOCAB:] == 0).all()


def test_padded_size_is_the_next_multiple():
    config = GPTConfig(vocab_size=50257)
    padded = {n: dataclasses.replace(config, vocab_multiple=n).padded_vocab_size for n in (1, 2, 128, 50257, 60000)}
    assert padded == {1: 50257, 2: 50258, 128: 50304, 50257: 50257, 60000: 60000}


# Dropout.


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_each_dropout_follows_its_key(name):
    config = make(**NO_DROPOUT | {name: 0.4})
    variables = random_variables(config)

    @quick_jit
    def with_dropout(key):
        return GPT(config).apply(variables, TOKENS, deterministic=False, rngs={"dropout": key})

    plain = logits_of(config, variables)
    first = with_dropout(jax.random.key(0))
    np.testing.assert_array_equal(first, with_dropout(jax.random.key(0)))
    assert np.abs(first - with_dropout(jax.random.key(1))).max() > 0.1
    assert np.abs(first - plain).max() > 0.1
    # If deterministic, rate and key have no effect.
    np.testing.assert_array_equal(logits_of(config, variables, rngs={"dropout": jax.random.key(0)}), plain)
    np.testing.assert_array_equal(logits_of(make(**NO_DROPOUT), variables), plain)


def test_no_dropout_needs_no_key():
    config = make(**NO_DROPOUT)
    variables = random_variables(config)
    np.testing.assert_array_equal(
        logits_of(config, variables, deterministic=False), logits_of(config, variables, deterministic=True)
    )


@pytest.mark.parametrize("attention", ["chunked"])
def test_attention_may_be_exchanged_in_the_middle_of_a_run(attention):
    """With all three dropouts on, every implementation gives the same logits for the same parameters and key."""
    config = make()
    variables = random_variables(config)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(6)}}
    other = dataclasses.replace(config, attention=attention)
    assert_close(logits_of(other, variables, **options), logits_of(config, variables, **options))


@pytest.mark.parametrize("name", ["dense", "chunked"])
def test_the_chosen_attention_is_the_one_that_runs(name, monkeypatch):
    """The test watches the calls, because all implementations give the same result."""
    config = make(attention=name, query_chunk=5, key_chunk=7)
    calls = []

    def spy(called, q, k, v, starts, **options):
        calls.append((called, {key: value for key, value in options.items() if key.endswith("chunk")}))
        return v

    for other in kernels.ATTENTION:
        monkeypatch.setitem(kernels.ATTENTION, other, functools.partial(spy, other))
    monkeypatch.setattr(kernels, "chunked", functools.partial(spy, "chunked"))
    jax.eval_shape(GPT(config).apply, random_variables(config), TOKENS)
    expected = (name, {"query_chunk": 5, "key_chunk": 7} if name == "chunked" else {})
    assert len(calls) >= config.num_layers  # JAX may trace more than once
    assert all(call == expected for call in calls)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_residual_dropouts_are_independent_and_scaled(scan_layers):
    """The model makes its masks visible: each of its four branches adds 1 to every channel but the first.

    A channel that survives k of the four dropouts of rate 1/4 is 1 + 4/3·k, and k is binomial. If the layers
    of a scan shared their mask, k would always be even.
    """
    width = 32
    options = NO_DROPOUT | {"residual_dropout": 0.25, "norm": "rmsnorm", "positions": "rotary"}
    config = make(width, embed_dim=width, scan_layers=scan_layers, tie_embeddings=False, **options)
    values = {"embedding": np.ones, "scale": np.ones, "kernel": np.zeros, "bias": np.zeros}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: values[path[-1].key](x.shape, np.float32), nn.unbox(abstract_variables(config))
    )
    for name, parameter in by_path(variables).items():
        if name.endswith(("attention/out/bias", "mlp/down/bias")):
            parameter[..., 1:] = 1
    variables["params"]["head"]["kernel"] += np.eye(width, dtype=np.float32)
    tokens = np.zeros((32, 12), np.int32)
    logits = logits_of(config, variables, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})
    # The final norm divides all channels by the same number, which the first channel shows.
    survived = (logits[..., 1:] / logits[..., :1] - 1) * 3 / 4
    assert np.abs(survived - survived.round()).max() < 1e-4
    frequencies = np.bincount(survived.round().astype(int).ravel(), minlength=5) / survived.size
    binomial = [math.comb(4, k) * 0.75**k * 0.25 ** (4 - k) for k in range(5)]
    np.testing.assert_allclose(frequencies, binomial, atol=0.02)


# Parameters: their axes and their initial values.

BLOCK_AXES = {
    "norm_1/scale": ("embed",),
    "norm_1/bias": ("embed",),
    "attention/qkv/kernel": ("embed", "heads", "kv"),
    "attention/qkv/bias": ("heads", "kv"),
    "attention/out/kernel": ("heads", "kv", "embed"),
    "attention/out/bias": ("embed",),
    "norm_2/scale": ("embed",),
    "norm_2/bias": ("embed",),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/up/bias": ("mlp",),
    "mlp/down/kernel": ("mlp", "embed"),
    "mlp/down/bias": ("embed",),
}
OTHER_AXES = {
    "token_embedding/embedding": ("vocab", "embed"),
    "position_embedding/embedding": ("length", "embed"),
    "final_norm/scale": ("embed",),
    "final_norm/bias": ("embed",),
    "head/kernel": ("embed", "vocab"),
}


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_logical_axes_of_every_parameter(scan_layers, remat):
    """The test covers the axes of all parameters. A scan adds `layers` as the first axis."""
    config = make(tie_embeddings=False, scan_layers=scan_layers, remat=remat)
    if scan_layers:
        blocks = {f"blocks/{name}": ("layers", *axes) for name, axes in BLOCK_AXES.items()}
    else:
        blocks = {f"block_{i}/{name}": axes for i in range(2) for name, axes in BLOCK_AXES.items()}
    expected = {name: P(*axes) for name, axes in (OTHER_AXES | blocks).items()}
    variables = abstract_variables(config)
    assert by_path(nn.get_partition_spec(variables)) == expected
    # The axes fit the shapes.
    sizes = {"embed": 16, "heads": 2, "mlp": 64, "vocab": VOCAB, "length": 12, "layers": 2}
    for name, x in by_path(nn.unbox(variables)).items():
        kv = 24 if "qkv" in name else 8
        assert x.shape == tuple((sizes | {"kv": kv})[axis] for axis in expected[name]), name


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def fresh(request):
    """Returns the config and the initial parameters of a model that is wide enough for statistics."""
    config = make(100, num_layers=3, embed_dim=64, block_size=64, scan_layers=request.param, tie_embeddings=False)
    variables = quick_jit(GPT(config).init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    return config, nn.unbox(variables)


def test_initial_parameters(fresh):
    """The deviations are GPT-2's: 0.02, and 0.02/√(2·layers) for projections onto the residual stream."""
    for name, x in by_path(fresh[1]).items():
        assert x.dtype == jnp.float32, name
        if name.endswith(("bias", "scale")):
            np.testing.assert_array_equal(x, float(name.endswith("scale")), err_msg=name)
            continue
        expected = 0.02 / math.sqrt(6) if name.endswith(("out/kernel", "down/kernel")) else 0.02
        # With at least 4096 draws, one sigma of the sample's deviation is at most 1.1 %.
        assert x.size >= 4096
        assert x.std() == pytest.approx(expected, rel=0.05), name
        assert abs(x.mean()) < 0.1 * expected, name


def test_zero_init_makes_each_block_the_identity():
    config = make(zero_init=True)
    params = nn.unbox(quick_jit(GPT(config).init)(jax.random.key(0), TOKENS))["params"]
    changed = [name for name, x in by_path(params).items() if not name.endswith("bias") and not np.asarray(x).any()]
    assert changed == [name for name in by_path(params) if name.endswith(("out/kernel", "down/kernel"))]
    others = jax.tree_util.tree_map_with_path(lambda path, x: 3 * x if path[-2].key in ("qkv", "up") else x, params)
    assert_close(logits_of(config, {"params": params}), logits_of(config, {"params": others}))


def test_layers_start_different(fresh):
    kernels = {name: x for name, x in by_path(fresh[1]).items() if name.endswith("mlp/up/kernel")}
    layers_ = [*next(iter(kernels.values()))] if len(kernels) == 1 else [*kernels.values()]
    assert len(layers_) == 3
    for a, b in itertools.combinations(layers_, 2):
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.05


def test_a_fresh_model_knows_nothing(fresh):
    """The loss of an untrained model is that of the uniform distribution, log(vocabulary)."""
    config, variables = fresh
    tokens = np.random.default_rng(0).integers(0, 100, (4, 65), dtype=np.int32)
    log_probabilities = nn.log_softmax(logits_of(config, variables, tokens[:, :-1]))
    mean = -np.take_along_axis(np.asarray(log_probabilities), tokens[:, 1:, None], axis=-1).mean()
    assert mean == pytest.approx(math.log(100), abs=0.05)


def test_a_fresh_model_with_a_tied_head_knows_nothing():
    config = make(100, embed_dim=64)
    variables = quick_jit(GPT(config).init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    tokens = np.random.default_rng(0).integers(0, 100, (16, 13), dtype=np.int32)
    log_probabilities = nn.log_softmax(logits_of(config, nn.unbox(variables), tokens[:, :-1]))
    mean = -np.take_along_axis(np.asarray(log_probabilities), tokens[:, 1:, None], axis=-1).mean()
    assert mean == pytest.approx(math.log(100), abs=0.05)


# Precision.


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_bfloat16_computes_in_bfloat16_between_float32_ends(attention):
    config = make(attention=attention, dtype="bfloat16", vocab_multiple=8)
    assert {x.dtype for x in jax.tree.leaves(abstract_variables(config))} == {jnp.dtype("float32")}
    variables = random_variables(config)

    @quick_jit
    def run(variables):
        return GPT(config).apply(variables, TOKENS, capture_intermediates=True, mutable=["intermediates"])

    logits, captured = run(variables)
    assert logits.dtype == jnp.float32
    outputs = {name: x for name, x in by_path_of_calls(captured["intermediates"]).items() if name}
    parts = {"norm_1", "attention/qkv", "attention/out", "norm_2", "mlp/up", "mlp/down"}
    assert {f"block_{i}/{part}" for i in range(2) for part in parts} <= outputs.keys()
    assert {"token_embedding", "position_embedding", "block_0", "block_1", "final_norm"} <= outputs.keys()
    assert {name: x.dtype for name, x in outputs.items() if x.dtype != jnp.bfloat16} == {}
    expected = logits_of(dataclasses.replace(config, dtype="float32"), variables)
    # Each of several tens of roundings contributes up to 2⁻⁸.
    assert_close(logits[..., :VOCAB], expected[..., :VOCAB], 0.05)
    assert (logits[..., VOCAB:] <= -1e29).all()


def by_path_of_calls(intermediates) -> dict:
    """Returns {"block_0/mlp": its output, …, "": the logits}."""
    calls = {}
    for path, x in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        names = [getattr(key, "key", key.idx if hasattr(key, "idx") else key) for key in path]
        if "__call__" in names:
            calls["/".join(names[: names.index("__call__")])] = x
    return calls


def test_gradients_of_bfloat16_are_float32():
    """The optimizer needs float32 gradients for its small steps."""
    config = make(dtype="bfloat16")
    gradients = jax.eval_shape(jax.grad(functools.partial(loss, config)), random_variables(config))
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


# The config.


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"num_heads": 3, "embed_dim": 16}, ["model.num_heads=3", "model.embed_dim=16"]),
        ({"attention": "sparse"}, ["model.attention='sparse'", "dense, chunked"]),
        ({"activation": "swish"}, ["model.activation='swish'", "gelu_tanh"]),
        ({"norm": "batchnorm"}, ["model.norm='batchnorm'", "layernorm, rmsnorm"]),
        ({"positions": "alibi"}, ["model.positions='alibi'", "learned, rotary"]),
        ({"remat": "some"}, ["model.remat='some'", "none, dots, full"]),
        ({"remat": "qkv,upp@host"}, ["model.remat='qkv,upp'", "gate,up,down"]),
        ({"dtype": "float16"}, ["model.dtype='float16'", "bfloat16"]),
        ({"num_layers": 0}, ["model.num_layers=0"]),
        ({"num_heads": 0}, ["model.num_heads=0"]),
        ({"embed_dim": -8}, ["model.embed_dim=-8"]),
        ({"block_size": 0}, ["model.block_size=0"]),
        ({"mlp_size": -1}, ["model.mlp_size=-1"]),
        ({"vocab_multiple": 0}, ["model.vocab_multiple=0"]),
        ({"query_chunk": 0}, ["model.query_chunk=0"]),
        ({"key_chunk": -1}, ["model.key_chunk=-1"]),
        ({"vocab_size": -1}, ["model.vocab_size=-1"]),
        ({"embed_dropout": 1.0}, ["model.embed_dropout=1.0"]),
        ({"residual_dropout": 1.0}, ["model.residual_dropout=1.0"]),
        ({"attention_dropout": 1.0}, ["model.attention_dropout=1.0"]),
        ({"attention_dropout": -0.1}, ["model.attention_dropout=-0.1"]),
        ({"residual_dropout": math.nan}, ["model.residual_dropout=nan"]),
        ({"positions": "rotary", "embed_dim": 12, "num_heads": 4}, ["model.rotary_fraction=1.0", "head size of 3"]),
        ({"num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=8"]),
        ({"window_pattern": "LX"}, ["model.window_pattern='LX'"]),
        ({"bias": "qkv,mlp"}, ["model.bias='qkv,mlp'", "all, none, or some of qkv,"]),
        ({"lora_targets": "gate"}, ["model.lora_targets='gate'"]),
        ({"positions": "rotary", "rotary_scaling": "ntk:factor=2"}, ["model.rotary_scaling='ntk:factor=2'", "llama3:"]),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(options, keys):
    with pytest.raises(UserError) as error:
        GPTConfig(**options)
    for key in keys:
        assert key in str(error.value)


def test_resolve_fills_in_vocabulary_and_dtype():
    config = GPTConfig()
    assert config.resolve(65, "cpu") == dataclasses.replace(config, vocab_size=65, dtype="float32", attention="dense")
    assert [config.resolve(65, platform).dtype for platform in ("gpu", "tpu")] == ["bfloat16", "bfloat16"]
    assert GPTConfig(dtype="float32").resolve(65, "tpu").dtype == "float32"
    assert GPTConfig(dtype="bfloat16").resolve(65, "cpu").dtype == "bfloat16"
    assert GPTConfig(vocab_size=65).resolve(65, "cpu").vocab_size == 65


def test_resolve_refuses_another_vocabulary():
    with pytest.raises(UserError, match=r"model\.vocab_size=64.* 65 "):
        GPTConfig(vocab_size=64).resolve(65, "cpu")


def test_more_tokens_than_the_block_are_refused():
    model = GPT(GPTConfig(num_layers=1, num_heads=1, embed_dim=8, block_size=4).resolve(5, "cpu"))
    with pytest.raises(ValueError, match="5 tokens are more than block_size=4"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
