"""Tests the Perceivers against independent NumPy passes and the GPT, and tests what a token attends to."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding
from gpt.data.text import EvaluationWindows, TrainingWindows
from gpt.inference.generation import Generator, Sampling, restart_length
from gpt.models.gpt import GPT, GPTConfig
from gpt.models.perceiver import PerceiverAR, PerceiverARConfig, PerceiverIO, PerceiverIOConfig
from gpt.runtime.errors import UserError

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

VOCAB, LENGTH, LATENTS = 11, 12, 5
EPSILON = 1e-5
TINY = PerceiverARConfig(
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    block_size=LENGTH,
    num_latents=LATENTS,
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=0.0,
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)


def make(**options) -> PerceiverARConfig:
    return dataclasses.replace(TINY, **options).resolve(VOCAB, "cpu")


def random_params(model, *inputs, seed=1):
    """Returns parameters far from their initial values, so that every scale, bias and weight has an effect."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        mean, std = {"scale": (1, 0.2), "bias": (0, 0.3), "kernel": (0, 0.3)}.get(path[-1].key, (0, 0.6))
        return rng.normal(mean, std, x.shape).astype(np.float32)

    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    return jax.tree_util.tree_map_with_path(draw, variables["params"])


def stacked(params):
    """Converts parameters of the unrolled model to those of the model with scan_layers."""
    blocks = jax.tree.map(lambda *x: np.stack(x), params["block_0"], params["block_1"])
    return {name: params[name] for name in ("token_embedding", "read", "final_norm")} | {"blocks": blocks}


def logits_of(config, params, tokens=TOKENS, *arguments, **options):
    apply = quick_jit(functools.partial(PerceiverAR(config).apply, **options))
    return np.asarray(apply({"params": params}, tokens, *arguments))


def assert_close(actual, expected, tolerance=3e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# An independent forward pass in float64, one row and one head at a time.


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * p["scale"] + p["bias"]


def rotated(x, position):
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attended(q, keys, values):
    scores = np.array([q @ k for k in keys]) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ np.array(values)


def projected(p, x):
    return np.einsum("td,dhk->thk", x, p["kernel"]) + p["bias"]


def mlp(p, x):
    h = x @ p["up"]["kernel"] + p["up"]["bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return h @ p["down"]["kernel"] + p["down"]["bias"]


def block(p, z, q, keys, values, seen, positions=None):
    """Returns z after attention and MLP.

    Args:
      q: queries, [L, H, K].
      seen: for each query, the number of keys that it attends to, from the first.
      positions: positions of the queries and of the keys for rotary encoding.
    """
    out = np.zeros_like(q)
    for h in range(q.shape[1]):
        own, others = q[:, h], keys[:, h]
        if positions:
            own, others = (
                np.array([rotated(x, at) for x, at in zip(xs, places, strict=True)])
                for xs, places in zip((own, others), positions, strict=True)
            )
        for i in range(len(q)):
            out[i, h] = attended(own[i], others[: seen[i]], values[: seen[i], h])
    z = z + np.einsum("thk,hkd->td", out, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"]
    return z + mlp(p["mlp"], norm(p["norm_2"], z))


def cross_block(p, z, x, seen, positions=None):
    q = projected(p["attention"]["query"], norm(p["norm_1"], z))
    keys, values = np.split(projected(p["attention"]["key_value"], norm(p["norm_context"], x)), 2, axis=-1)
    return block(p, z, q, keys, values, seen, positions)


def self_block(p, z, seen, positions=None):
    return block(p, z, *np.split(projected(p["attention"]["qkv"], norm(p["norm_1"], z)), 3, axis=-1), seen, positions)


def reference(p, tokens, config):
    """Returns the logits [L, V] of one row."""
    p = jax.tree.map(lambda x: x.astype(np.float64), p)
    table, places = p["token_embedding"]["embedding"], np.arange(len(tokens))
    x, latents = table[tokens], places[max(0, len(tokens) - config.num_latents) :]
    z = cross_block(p["read"], x[latents], x, latents + 1, (latents, places))
    numbers = np.arange(len(latents))
    for layer in range(config.num_layers):
        z = self_block(p[f"block_{layer}"], z, numbers + 1, (numbers, numbers))
    return norm(p["final_norm"], z) @ table.T


@pytest.fixture(scope="module")
def params():
    return random_params(PerceiverAR(make()), TOKENS)


@pytest.mark.parametrize("length", [LENGTH, LATENTS + 1, 3])
def test_logits_are_those_of_an_independent_pass(params, length):
    """The test includes fewer tokens than latents."""
    logits = logits_of(make(), params, TOKENS[:, :length])
    assert logits.shape == (2, min(length, LATENTS), VOCAB)
    for row in range(2):
        assert_close(logits[row], reference(params, TOKENS[row, :length], make()))


def test_no_output_changes_with_a_later_token_and_each_with_every_earlier_one(params):
    """The changed token is at each position: in the prefix, among the latents, and at the end."""
    before = logits_of(make(), params)
    changed = np.repeat(TOKENS[:1], LENGTH, axis=0)
    changed[np.arange(LENGTH), np.arange(LENGTH)] = (changed.diagonal() + 1) % VOCAB
    after = logits_of(make(), params, changed)
    for place in range(LENGTH):
        for latent in range(LATENTS):
            is_same = (after[place, latent] == before[0, latent]).all()
            assert is_same == (place > LENGTH - LATENTS + latent), (place, latent)


def test_with_as_many_latents_as_tokens_it_is_a_gpt_of_one_block_more(params):
    """The cross-attention gets the GPT's first block, with its packed kernel divided and its norm used twice."""
    config = make(num_latents=LENGTH)
    own = params | {"read": params["read"] | {"norm_context": params["read"]["norm_1"]}}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    gpt = GPT(GPTConfig(**values | {"num_layers": 3}))
    read = dict(own["read"])
    read.pop("norm_context")
    attention = dict(read["attention"])
    parts = attention.pop("query"), attention.pop("key_value")
    attention["qkv"] = jax.tree.map(lambda q, kv: np.concatenate([q, kv], axis=-1), *parts)
    blocks = {"block_0": read | {"attention": attention}} | {f"block_{i + 1}": params[f"block_{i}"] for i in range(2)}
    theirs = {name: params[name] for name in ("token_embedding", "final_norm")} | blocks
    assert_close(logits_of(config, own), quick_jit(gpt.apply)({"params": theirs}, TOKENS))


def test_each_of_two_documents_in_a_row_has_the_logits_that_it_has_alone(params):
    """The test includes a second document that begins before the latents, as in the first rows of an evaluation."""
    for start in (3, LENGTH - LATENTS + 2):
        starts = np.where(np.arange(LENGTH) >= start, start, 0)[None]
        together = logits_of(make(), params, TOKENS[:1], starts)
        alone = logits_of(make(), params, TOKENS[:1, start:])
        assert_close(together[:, -alone.shape[1] :], alone)


def test_dropout_of_the_prefix_cuts_it_anywhere_before_the_latents_in_that_part_of_the_rows(params):
    rows = 2000
    config = make(prefix_dropout=0.4)
    model = PerceiverAR(config)
    arguments = {}, None, (rows, LENGTH), False
    cut = functools.partial(model.apply, *arguments, method="documents", rngs={"dropout": jax.random.key(3)})
    starts = np.asarray(jax.jit(cut)())
    places = starts[:, -1]
    assert abs((places > 0).mean() - 0.4) < 0.04
    assert set(places) == set(range(LENGTH - LATENTS + 1))
    assert (starts == np.where(np.arange(LENGTH) >= places[:, None], places[:, None], 0)).all()
    one = logits_of(config, params, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(5)})
    assert not np.array_equal(one, logits_of(config, params))


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"remat": "full"}, {"positions": "learned"}], ids=str)
def test_counted_parameters_are_those_made(options):
    config = make(**options)
    variables = jax.eval_shape(PerceiverAR(config).init, jax.random.key(0), TOKENS)
    assert config.num_parameters() == sum(x.size for x in jax.tree.leaves(variables))


def test_flops_with_as_many_latents_as_tokens_are_those_of_a_gpt_of_one_block_more():
    sizes = {"num_heads": 2, "embed_dim": 16, "block_size": 64, "vocab_size": VOCAB}
    whole = PerceiverARConfig(num_layers=2, num_latents=64, **sizes).flops_per_token()
    assert whole == pytest.approx(GPTConfig(num_layers=3, **sizes).flops_per_token())
    few = PerceiverARConfig(num_layers=2, num_latents=16, **sizes).flops_per_token()
    # All FLOPs fall to a quarter, except for the context's keys and values; the scores in blocks to a sixteenth.
    keys, scores = 6 * 2 * 16**2, 12 * 2 * 16 * 64
    assert few == pytest.approx((whole - keys - scores) / 4 + keys + scores / 16)


def test_more_latents_than_tokens_are_refused():
    with pytest.raises(UserError, match=r"model.num_latents=13.*model.block_size=12"):
        make(num_latents=13)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_row_continued_with_a_cache_has_the_logits_that_it_has_without(params, scan_layers):
    """Rows of different lengths fill the cache together; their latents begin at `first` and grow by one token each."""
    config = make(scan_layers=scan_layers)
    ours = stacked(params) if scan_layers else params
    model = PerceiverAR(config)
    filled, first = np.array([6, 3]), np.array([4, 0])
    texts = np.where(np.arange(8) < filled[:, None], TOKENS[:, :8], 0)  # tokens after the end have no effect
    apply = quick_jit(functools.partial(model.apply, mutable=["cache"]))
    _, changed = apply({"params": ours, "cache": config.init_cache(jnp.array(first), LENGTH)}, texts)
    for step in range(2):
        position = filled + step
        token = np.take_along_axis(TOKENS, position[:, None], axis=1)
        logits, changed = apply({"params": ours} | changed, token, position_B=position)
        for row in range(2):
            seen = TOKENS[row : row + 1, : position[row] + 1]
            alone = make(num_latents=int(position[row] + 1 - first[row]))
            assert_close(logits[row, 0], logits_of(alone, params, seen)[0, -1])


def naive(params, config, prompt, num_tokens):
    """Returns greedy tokens by the independent pass over the window, and how often the window was shortened."""
    window, actual, restarts = list(prompt[-config.block_size :]), [], 0
    room = max(1, config.num_latents // 4)  # number of latents that can be added before the window is shortened
    first = max(0, len(window) - 1 - (config.num_latents - room))
    for _ in range(num_tokens):
        latents = dataclasses.replace(config, num_latents=len(window) - first)
        logits = reference(params, np.array(window), latents)[-1]
        second, best = np.sort(logits)[-2:]
        assert best - second > 1e-3  # rounding cannot change the best token
        actual.append(int(logits.argmax()))
        window.append(actual[-1])
        if len(window) > min(first + config.num_latents, config.block_size):
            window = window[-restart_length(config) :]
            first = max(0, len(window) - 1 - (config.num_latents - room))
            restarts += 1
    return actual, restarts


@pytest.mark.parametrize(("scan_layers", "mesh"), [(False, (1, 1, 1, 1)), (True, (2, 2, 1, 2))], ids=["1", "2x2x2"])
def test_prompts_are_continued_as_by_running_the_model_on_the_window_for_each_token(params, scan_layers, mesh):
    """Prompts shorter than the latents, shorter than the context and longer are continued past the context's end."""
    config = make(scan_layers=scan_layers)
    prompts = [np.random.default_rng(length).integers(0, VOCAB, length) for length in (1, 4, LENGTH - 3, LENGTH + 2)]
    devices = jax.devices()[: np.prod(mesh)]
    layout = sharding.make_layout(sharding.MeshConfig("fsdp_tp", *mesh), devices)
    decoding = Generator(PerceiverAR(config), layout, Sampling(0.0)).start(
        stacked(params) if scan_layers else params, prompts
    )
    tokens = np.zeros((len(prompts), 0), int)
    while tokens.shape[1] < 14:
        tokens = np.concatenate([tokens, decoding.advance(14 - tokens.shape[1]).tokens_BxN], axis=1)
    for prompt, actual in zip(prompts, tokens, strict=True):
        expected, restarts = naive(params, make(), prompt, 14)
        assert actual.tolist() == expected
        assert restarts >= 3


# Examples of a text in which only the last tokens have targets.


def pairs(row):
    """Returns, for each target in the loss, the tokens that it is predicted from, and the target."""
    inputs, targets = row["inputs"], row["targets"]
    starts = row.get("starts", np.zeros(len(inputs), int))
    ends = range(len(inputs) - len(targets) + 1, len(inputs) + 1)
    return [
        (inputs[starts[end - 1] : end].tolist(), int(target))
        for end, target in zip(ends, targets, strict=True)
        if target >= 0
    ]


@pytest.mark.parametrize("size", [2, 5, 6, 12, 13, 40, 41])
@pytest.mark.parametrize("stride", [None, 1, 3])
def test_evaluation_predicts_each_token_once_from_all_that_there_is_before_it(size, stride):
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    windows = EvaluationWindows(tokens, LENGTH, stride=stride, num_targets=LATENTS)
    actual = [pair for index in range(len(windows)) for pair in pairs(windows.example(0, index))]
    assert [target for _, target in actual] == tokens[1:].tolist()
    for context, target in actual:
        before = list(range(100, target))
        assert len(context) >= min(len(before), LENGTH - (stride or LATENTS) + 1)
        assert context == before[len(before) - len(context) :]


def test_targets_of_training_tile_the_text_anew_in_each_epoch():
    tokens = np.arange(100, 161, dtype=np.uint16)
    windows = TrainingWindows(tokens, LENGTH, 0, num_targets=LATENTS)
    assert len(windows) == (61 - LENGTH) // LATENTS
    first_targets = set()
    for epoch in range(20):
        rows = [windows.example(epoch, index) for index in range(len(windows))]
        assert {(row["inputs"].shape, row["targets"].shape) for row in rows} == {((LENGTH,), (LATENTS,))}
        targets = [target for row in rows for _, target in pairs(row)]
        assert targets == list(range(targets[0], targets[0] + len(windows) * LATENTS))
        assert all(
            context == list(range(target - len(context), target)) for row in rows for context, target in pairs(row)
        )
        first_targets.add(targets[0])
    assert len(first_targets) > 1
    assert min(first_targets) > 100 + LENGTH - LATENTS


# Perceiver IO.

IO = PerceiverIOConfig(
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    image_size=4,
    channels=1,
    num_latents=3,
    activation="gelu_tanh",
    norm_epsilon=EPSILON,
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=0.0,
).resolve(7, "cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)


def test_class_logits_are_those_of_an_independent_pass():
    params = random_params(PerceiverIO(IO), IMAGES)
    logits = quick_jit(PerceiverIO(IO).apply)({"params": params}, IMAGES)
    assert logits.shape == (2, 7)
    p = jax.tree.map(lambda x: x.astype(np.float64), params)
    for row, image in enumerate(IMAGES):
        pixels = (image.reshape(16, 1) / 255 - 0.5) / 0.5
        x = pixels @ p["patch_embedding"]["kernel"] + p["patch_embedding"]["bias"] + p["position_embedding"]
        z = cross_block(p["read"], p["latents"], x, [16] * 3)
        for layer in range(2):
            z = self_block(p[f"block_{layer}"], z, [3] * 3)
        (y,) = cross_block(p["answer"], p["query"][None], norm(p["final_norm"], z), [3])
        assert_close(logits[row], y @ p["head"]["kernel"] + p["head"]["bias"])


def test_counted_parameters_of_the_classifier_are_those_made():
    variables = jax.eval_shape(PerceiverIO(IO).init, jax.random.key(0), IMAGES)
    assert IO.num_parameters() == sum(x.size for x in jax.tree.leaves(variables))
