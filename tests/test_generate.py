"""Sampling against naive loops and exact probabilities, on any mesh, and where a text ends."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_options import FAMILIES

from gpt import sharding
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.inference import generation
from gpt.inference.generation import (
    Continuation,
    Generator,
    Sampling,
    Segment,
    continuations,
    encode_prompt,
    restart_length,
    sample_token,
)
from gpt.models.attention import MASKED
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

# 11 tokens, and 5 more that pad the table.
SIZES = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "block_size": 8, "vocab_size": 11, "vocab_multiple": 8}
MODEL = GPT(GPTConfig(**SIZES, tie_embeddings=False, attention="dense", dtype="float32"))
BLOCK = MODEL.config.block_size
PROMPT = np.array([1, 2, 3], np.uint8)
MESHES = {
    "1": MeshConfig("fsdp_tp", 1, 1, 1, 1),
    "8x1x1": MeshConfig("fsdp_tp", 8, 1, 1, 1),
    "2x2x2": MeshConfig("fsdp_tp", 2, 2, 1, 2),
    "sp": MeshConfig("sp", 1, 2, 2, 2),
}


@functools.cache
def layout_of(name):
    devices = jax.devices()[:1] if name == "1" else None
    return sharding.make_layout(MESHES[name], devices)


@functools.cache
def params_of(name, model=MODEL):
    """Parameters so large that the next token depends on all that went before, sharded over the mesh."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, BLOCK), jnp.int32))["params"]
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        spread = {"scale": 0.0, "bias": 0.1, "kernel": 1.0, "embedding": 1.0}[path[-1].key]
        return ((path[-1].key == "scale") + rng.normal(0, spread, leaf.shape)).astype(np.float32)

    arrays = jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed))
    return jax.device_put(arrays, layout_of(name).state_shardings(boxed))


# Compiled once for all tests.
generator_of = functools.cache(lambda name, sampling, **how: Generator(MODEL, layout_of(name), sampling, **how))


def rows_of(decoding, num_tokens) -> np.ndarray:
    """The first tokens of each row: [rows, num_tokens]."""
    found = np.zeros((len(decoding.finished_B), 0), int)
    while found.shape[1] < num_tokens:
        found = np.concatenate([found, decoding.advance(num_tokens - found.shape[1]).tokens_BxN], axis=1)
    return found


def tokens_of(generator, num_tokens, *, name="1", prompt=PROMPT, num_samples=1, seed=0):
    """The first tokens of each sample of a prompt: [num_samples, num_tokens]."""
    return rows_of(generator.start(params_of(name), [prompt], num_samples, seed), num_tokens)


# The loop.


@functools.cache
def uncached(model=MODEL):
    """Logits [T, V] of a text, with no cache."""
    params = params_of("1", model)
    return jax.jit(lambda tokens: model.apply({"params": params}, tokens[None])[0])


def naive(prompt, num_tokens, model=MODEL):
    """Greedy tokens and their log-probabilities by the model's window alone, run anew for each token."""
    window, found, logprobs = list(prompt[-BLOCK:]), [], []
    for _ in range(num_tokens):
        padded = jnp.array(window + [0] * (BLOCK - len(window)), jnp.int32)  # causal: what follows is not seen
        logits = np.asarray(uncached(model)(padded)[len(window) - 1])
        first, second = np.sort(logits)[[-1, -2]]
        assert first - second > 1e-3  # no tie that rounding could decide
        found.append(int(logits.argmax()))
        logprobs.append(np.log(softmax(logits)[found[-1]]))
        window.append(found[-1])
        if len(window) > BLOCK:
            window = window[-restart_length(MODEL.config) :]
    return found, logprobs


def random_prompt(length):
    return np.random.default_rng(length).integers(0, 11, length)


@pytest.mark.parametrize("length", [1, 3, BLOCK - 1, BLOCK, BLOCK + 3])
def test_greedy_text_and_logprobs_are_those_of_the_naive_loop(length):
    """Which begins its window anew where the cached one does; the text goes on past the block."""
    decoding = generator_of("1", Sampling(0.0), logprobs=True).start(params_of("1"), [random_prompt(length)])
    tokens, logprobs = [], []
    while len(tokens) < 30:
        segment = decoding.advance(30 - len(tokens))
        tokens += segment.tokens_BxN[0].tolist()
        logprobs += segment.logprobs_BxN[0].tolist()
    expected, expected_logprobs = naive(random_prompt(length), 30)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-4)
    assert len(set(expected)) > 2


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"positions": "rotary", "qk_norm": "unit"}, 3),
        ({"attention": "chunked", "query_chunk": 3, "key_chunk": 2}, 3),
        (FAMILIES["gemma3"], 3),
        (FAMILIES["gemma3"] | {"scan_layers": True}, 1),
        (FAMILIES["gemma2"] | {"logit_softcap": 50.0}, 1),
        (FAMILIES["neox"], 3),
        ({"scan_layers": True, "remat": "full"}, 1),
        ({"scan_layers": True}, 3),
        ({"tie_embeddings": True}, 1),
        ({"tie_embeddings": True}, 3),
    ],
    ids=str,
)
def test_every_model_decodes_as_it_runs_uncached(options, rows):
    model = GPT(dataclasses.replace(MODEL.config, **options))
    params = params_of("1", model)
    prompts = [random_prompt(length) for length in (2, 7, 5)[:rows]]
    found = rows_of(Generator(model, layout_of("1"), Sampling(0.0)).start(params, prompts), 20)
    for prompt, row in zip(prompts, found, strict=True):
        assert row.tolist() == naive(prompt, 20, model)[0]


@pytest.mark.parametrize("block_size", [1, 3])
def test_smallest_windows(block_size):
    model = GPT(dataclasses.replace(MODEL.config, block_size=block_size))
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    rows_of(Generator(model, layout_of("1"), Sampling()).start(params, [PROMPT]), 7)


@pytest.mark.parametrize("name", ["1", "2x2x2"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(name):
    """Random draws included, though they pass their blocks at different times."""
    prompts = [random_prompt(length) for length in (1, 4, 7, 20)]
    generator = generator_of(name, Sampling())
    found = rows_of(generator.start(params_of(name), prompts, num_samples=2, seed=3), 30)
    for i, prompt in enumerate(prompts):
        alone = generator_of("1", Sampling()).start(params_of("1"), [prompt], 2, seed=3, first_prompt=i)
        np.testing.assert_array_equal(found[2 * i : 2 * i + 2], rows_of(alone, 30))


@pytest.mark.parametrize("name", ["1", "8x1x1", "2x2x2"])
def test_each_prompt_and_each_sample_has_random_numbers_of_its_own(name):
    """Equal prompts give different samples, and more prompts or samples do not change the others."""
    many = rows_of(generator_of(name, Sampling()).start(params_of(name), [PROMPT] * 3, num_samples=4, seed=5), 20)
    many = many.reshape(3, 4, 20)
    assert len(np.unique(many.reshape(12, 20), axis=0)) == 12
    fewer = rows_of(generator_of("1", Sampling()).start(params_of("1"), [PROMPT] * 2, num_samples=3, seed=5), 20)
    np.testing.assert_array_equal(many[:2, :3], fewer.reshape(2, 3, 20))
    np.testing.assert_array_equal(many[0, :1], tokens_of(generator_of("1", Sampling()), 20, seed=5))


def test_cache_grows_with_the_text(monkeypatch):
    """By half steps between powers of two, up to the block; the tokens stay the same."""
    expected = tokens_of(generator_of("1", Sampling()), 12, num_samples=3)
    monkeypatch.setattr(generation, "MIN_CAPACITY", 2)
    monkeypatch.setattr(generation, "MIN_PROMPT", 2)
    decoding = generator_of("1", Sampling()).start(params_of("1"), [PROMPT], num_samples=3)
    found, sizes = np.zeros((3, 0), int), []
    while found.shape[1] < 12:
        found = np.concatenate([found, decoding.advance(1).tokens_BxN], axis=1)
        sizes.append(jax.tree.leaves(decoding._cache)[0].shape[2])
    np.testing.assert_array_equal(found, expected)
    assert sizes == [3, 4, 6, 6] + [8] * 8


def test_stop_token_ends_a_row_while_others_go_on():
    free = tokens_of(generator_of("1", Sampling()), 24, num_samples=3)
    stop = int(free[0, 5])
    decoding = generator_of("1", Sampling(), stop_tokens=(stop,)).start(params_of("1"), [PROMPT], num_samples=3)
    found = rows_of(decoding, 24)
    for row, freely in zip(found, free, strict=True):
        end = int(np.argmax(freely == stop)) + 1 if stop in freely else 24
        assert row[:end].tolist() == freely[:end].tolist()
        assert (row[end:] == -1).all()
    assert decoding.finished_B.tolist() == [stop in row for row in free]


def test_loop_ends_when_all_rows_are_over():
    """The compiled one: with nothing left to do, nothing is computed, and so nothing written."""
    decoding = generator_of("1", Sampling()).start(params_of("1"), [PROMPT], num_samples=2)
    decoding.finished_B[:] = True
    before = jax.device_get(decoding._cache)
    assert (decoding.advance(4).tokens_BxN == -1).all()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(decoding._cache), before)


def test_repetition_penalty_is_that_of_the_naive_loop():
    generator = generator_of("1", Sampling(0.0, repetition_penalty=3.0))
    found = tokens_of(generator, BLOCK - 3)[0]
    text = PROMPT.tolist()
    for token in found:
        padded = jnp.array(text + [0] * (BLOCK - len(text)), jnp.int32)
        logits = np.array(uncached()(padded)[len(text) - 1])
        for seen in set(text):
            logits[seen] = logits[seen] / 3 if logits[seen] > 0 else logits[seen] * 3
        assert token == logits.argmax()
        text.append(token)
    assert found.tolist() != tokens_of(generator_of("1", Sampling(0.0)), BLOCK - 3)[0].tolist()


def test_prompt_longer_than_the_block_is_cut_to_its_end():
    generator = generator_of("1", Sampling())
    prompt = np.random.default_rng(0).integers(0, 11, 30)
    found = tokens_of(generator, 12, prompt=prompt, seed=3)
    np.testing.assert_array_equal(found, tokens_of(generator, 12, prompt=prompt[-BLOCK:], seed=3))
    assert (found != tokens_of(generator, 12, prompt=prompt[:BLOCK], seed=3)).any()


def test_seed_decides_the_tokens():
    generator = generator_of("1", Sampling())
    first, again, other = (tokens_of(generator, 20, num_samples=3, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()


def test_samples_of_one_prompt_differ():
    samples = tokens_of(generator_of("1", Sampling()), 20, num_samples=3)
    assert len({tuple(sample) for sample in samples}) == 3


def test_each_token_is_drawn_anew():
    """A key used again would tie the tokens of one segment, or those of the segments, together."""
    uniform = jax.tree.map(jnp.zeros_like, params_of("1"))
    tokens = rows_of(generator_of("1", Sampling()).start(uniform, [PROMPT], num_samples=3), 20)
    assert len({tuple(column) for column in tokens.T}) > 15
    assert all(len(set(row)) > 4 for row in tokens)


def test_length_of_the_segments_does_not_matter():
    expected = tokens_of(generator_of("1", Sampling()), 14, num_samples=3)
    found = tokens_of(generator_of("1", Sampling(), segment=3), 14, num_samples=3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "num_samples"), [("8x1x1", 3), ("8x1x1", 8), ("2x2x2", 1), ("sp", 4)])
def test_every_mesh_gives_the_tokens_of_one_device(name, num_samples):
    """Also where the number of samples cannot be divided over the devices."""
    expected = tokens_of(generator_of("1", Sampling()), 16, num_samples=num_samples)
    found = tokens_of(generator_of(name, Sampling()), 16, name=name, num_samples=num_samples)
    np.testing.assert_array_equal(found, expected)


def test_cache_is_sharded_over_rows_and_heads():
    decoding = generator_of("2x2x2", Sampling()).start(params_of("2x2x2"), [PROMPT], num_samples=4)
    for _ in range(2):
        for leaf in jax.tree.leaves(decoding._cache):
            assert leaf.sharding.shard_shape(leaf.shape) == (1, 1, BLOCK, 8)
        decoding.advance(4)


def test_padding_of_the_vocabulary_is_never_drawn():
    """Though temperature flattens everything else."""
    tokens = tokens_of(generator_of("1", Sampling(temperature=1e4)), 100, num_samples=3)
    assert set(tokens.flat) == set(range(11))


@pytest.mark.parametrize("name", ["1", "8x1x1"])
def test_segments_and_prompts_share_one_compiled_program(caplog, name):
    """What comes back from one segment has to be laid out as what went in, or the second compiles anew."""
    generator = Generator(MODEL, layout_of(name), Sampling(temperature=0.7))
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        tokens_of(generator, 12, name=name, num_samples=8)
        tokens_of(generator, 12, name=name, num_samples=8, prompt=np.arange(11), seed=1)
    compiled = [record.getMessage().split()[1] for record in caplog.records if "Compiling jit(" in record.getMessage()]
    assert [compiled.count(f"jit({program})") for program in ("extend", "fill", "empty")] == [1, 1, 1]


@pytest.mark.parametrize("rows", [1, 3])
def test_loop_copies_no_cache(rows):
    """Each copy would cost as much as the attention itself, at every token."""
    decoding = generator_of("1", Sampling()).start(params_of("1"), [PROMPT], num_samples=rows)
    small = decoding._token_B, decoding._position_B, decoding.finished_B, decoding._key_B, np.int32(0), np.int32(4)
    with layout_of("1").use():
        program = decoding._generator.extend.lower(params_of("1"), decoding._cache, None, *small).compile().as_text()
    shape = ",".join(map(str, jax.tree.leaves(decoding._cache)[0].shape))
    assert f"f32[{shape}]" in program
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program)


# One token.

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0, MASKED], np.float32)  # the last: padding
ORDER = [1, 3, 6, 0, 4, 2, 5]  # from the likeliest on
DRAWS = 20_000


def softmax(logits) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def frequencies(logits, sampling) -> np.ndarray:
    draws = sample_token(
        jnp.tile(jnp.asarray(logits), (DRAWS, 1)), jax.random.split(jax.random.key(0), DRAWS), sampling
    )
    return np.bincount(np.asarray(draws), minlength=len(logits)) / DRAWS


def check_frequencies(found, expected) -> None:
    """Five standard deviations; none at all where the probability is 0."""
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    check_frequencies(frequencies(LOGITS, Sampling(temperature)), softmax(LOGITS / temperature))


@pytest.mark.parametrize("k", range(1, 8))
def test_top_k_keeps_the_k_likeliest(k):
    kept = np.isin(np.arange(8), ORDER[:k])
    found = frequencies(LOGITS, Sampling(2.0, top_k=k))
    assert set(np.flatnonzero(found)) == set(ORDER[:k])
    check_frequencies(found, softmax(np.where(kept, LOGITS / 2, -np.inf)))


# Probabilities at temperature 1, likeliest first: 0.424, 0.257, 0.156, 0.095, 0.057, 0.021, 0.003 (sums .68, .84, .93).
@pytest.mark.parametrize(
    ("p", "k"), [(1e-6, 1), (0.4, 1), (0.45, 2), (0.65, 2), (0.7, 3), (0.9, 4), (0.95, 5), (0.999, 7), (1.0, 7)]
)
def test_top_p_keeps_the_fewest_that_reach_p(p, k):
    sums = np.cumsum(softmax(LOGITS)[ORDER])
    assert k == 1 + (sums[:-1] < min(p, 1 - 1e-9)).sum()  # the table above is right
    kept = np.isin(np.arange(8), ORDER[:k])
    found = frequencies(LOGITS, Sampling(top_p=p))
    assert set(np.flatnonzero(found)) == set(ORDER[:k])
    check_frequencies(found, softmax(np.where(kept, LOGITS, -np.inf)))


def test_top_p_is_of_what_temperature_and_top_k_leave():
    """At temperature 2, the three likeliest have 0.42, 0.33, 0.25 among themselves."""
    found = frequencies(LOGITS, Sampling(2.0, top_k=3, top_p=0.7))
    check_frequencies(found, softmax(np.where(np.isin(np.arange(8), ORDER[:2]), LOGITS / 2, -np.inf)))


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.0, 3, 0.5), Sampling(1e-4), Sampling(top_k=1), Sampling(top_p=1e-9)], ids=str
)
def test_likeliest_token_alone(sampling):
    """Greedy, or as good as; for each row its own."""
    rows = jnp.asarray(np.random.default_rng(0).permuted(np.tile(LOGITS, (200, 1)), axis=1))
    found = sample_token(rows, jax.random.split(jax.random.key(0), 200), sampling)
    np.testing.assert_array_equal(found, rows.argmax(axis=1))
    assert found.dtype == jnp.int32


def test_greedy_takes_the_first_of_equal_logits():
    logits_BxV = jnp.array([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [-5.0, MASKED, MASKED, -4.0]])
    token_B = sample_token(logits_BxV, jax.random.split(jax.random.key(0), 3), Sampling(0.0))
    assert token_B.dtype == jnp.int32
    assert token_B.tolist() == [1, 0, 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-50])
def test_smallest_temperatures_are_greedy(temperature):
    """Quotients pass the range of float32; the last temperature is 0 in it."""
    Sampling(temperature).check(7)
    np.testing.assert_array_equal(frequencies(LOGITS * 10, Sampling(temperature)), np.eye(8)[1])


@pytest.mark.parametrize(
    ("sampling", "kept"), [(Sampling(top_k=3), (3, 3, 3)), (Sampling(top_p=0.7), (4, 3, 2))], ids=str
)
def test_each_row_has_its_own_limits(sampling, kept):
    """Three rows, in another order each, and the flatter the more tokens it takes to a probability of 0.7."""
    orders = [np.random.default_rng(i).permutation(8) for i in range(3)]
    rows = [scale * LOGITS[order] for scale, order in zip((0.5, 1, 2), orders, strict=True)]
    keys = jax.random.split(jax.random.key(0), 6000)
    found = sample_token(jnp.repeat(jnp.asarray(rows), 2000, axis=0), keys, sampling)
    for order, drawn, k in zip(orders, np.asarray(found).reshape(3, -1), kept, strict=True):
        assert {int(order[token]) for token in drawn} == set(ORDER[:k])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(100.0), Sampling(100.0, top_k=7), Sampling(100.0, top_p=1.0), Sampling(100.0, top_k=7, top_p=1.0)],
    ids=str,
)
def test_padding_is_never_drawn(sampling):
    assert set(np.flatnonzero(frequencies(LOGITS, sampling))) == set(range(7))


@pytest.mark.parametrize(
    ("sampling", "flag"),
    [
        (Sampling(temperature=-0.1), "--temperature=-0.1"),
        (Sampling(temperature=float("nan")), "--temperature=nan"),
        (Sampling(temperature=float("inf")), "--temperature=inf"),
        (Sampling(top_k=0), "--top_k=0"),
        (Sampling(top_k=-3), "--top_k=-3"),
        (Sampling(top_k=12), "--top_k=12 has to lie between 1 and the vocabulary's 11"),
        (Sampling(top_p=0.0), "--top_p=0.0"),
        (Sampling(top_p=1.01), "--top_p=1.01"),
        (Sampling(top_p=float("nan")), "--top_p=nan"),
        (Sampling(repetition_penalty=0.0), "--repetition_penalty=0.0"),
        (Sampling(repetition_penalty=-1.0), "--repetition_penalty=-1.0"),
        (Sampling(repetition_penalty=float("nan")), "--repetition_penalty=nan"),
    ],
    ids=str,
)
def test_sampling_without_meaning_is_refused(sampling, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        sampling.check(11)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0), Sampling(5.0, 1, 1.0), Sampling(0.1, 11, 1e-9, 1e6)], ids=str
)
def test_sampling_at_the_limits_is_accepted(sampling):
    sampling.check(11)


# Where a text ends.


class Scripted:
    """Gives character codes as tokens, by segments: those of the texts, and then dots."""

    def __init__(self, *texts: str, size: int = 4, stop_tokens: Sequence[int] = ()):
        self.finished_B, self.stop_tokens = np.zeros(len(texts), bool), stop_tokens
        self.made, self._texts, self._size = 0, texts, size

    def advance(self, most: int) -> Segment:
        span = slice(self.made, self.made + min(most, self._size))
        self.made = span.stop
        tokens = np.array([[ord(c) for c in text.ljust(span.stop, ".")[span]] for text in self._texts])
        return Segment(tokens, -tokens / 1000)


def decode(ids) -> str:
    return "".join(map(chr, ids))


def samples(*texts, num_tokens=12, size=4, **stops) -> list[list[str]]:
    """What is known after each segment."""
    return [
        [row.text for row in rows] for rows in continuations(Scripted(*texts, size=size), decode, num_tokens, **stops)
    ]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 10])
def test_number_of_tokens_is_exact(num_tokens):
    shown = samples("abcdefghijkl", "ABCDEFGHIJKL", num_tokens=num_tokens)
    assert shown[-1] == ["abcdefghijkl"[:num_tokens], "ABCDEFGHIJKL"[:num_tokens]]
    assert len(shown) == -(-num_tokens // 4)


def test_text_grows_by_segments():
    assert samples("abcdefghijkl", num_tokens=10) == [["abcd"], ["abcdefgh"], ["abcdefghij"]]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("fg", ["abcd", "abcde"]),  # within a segment
        ("de", ["abcd", "abc"]),  # across two: its beginning was shown already, and is taken back
        ("cdefghi", ["abcd", "abcdefgh", "ab"]),  # across three
        ("a", [""]),
        ("h", ["abcd", "abcdefg"]),  # the last of a segment
        ("l", ["abcd", "abcdefgh", "abcdefghijk"]),
        ("xyz", ["abcd", "abcdefgh", "abcdefghijkl"]),  # never
        ("lm", ["abcd", "abcdefgh", "abcdefghijkl"]),  # the second half would come too late
        ("", ["abcd", "abcdefgh", "abcdefghijkl"]),
    ],
)
def test_stop_text_ends_a_sample_before_it(stop, expected):
    assert samples("abcdefghijklm", stop_texts=[stop]) == [[text] for text in expected]


def test_first_of_several_stop_texts_counts():
    assert samples("ab--cd--", stop_texts=["--"])[-1] == ["ab"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, ["a\n"]), (2, ["a\nb\n"]), (3, ["a\nb\n", "a\nb\n\n"]), (4, ["a\nb\n", "a\nb\n\ncd\n"])],
)
def test_line_feed_ends_a_sample_with_it(count, expected):
    assert samples("a\nb\n\ncd\ne\n\n\n", stop_newlines=count) == [[text] for text in expected]


def test_whichever_end_comes_first_counts():
    """Both lie in the segment that was made."""
    assert samples("ab--\ncde", size=9, stop_texts=["--"], stop_newlines=1) == [["ab"]]
    assert samples("ab\ncd--e", size=9, stop_texts=["--"], stop_newlines=1) == [["ab\n"]]
    assert samples("ab\ncd--e\n", size=10, stop_texts=["--"], stop_newlines=2) == [["ab\ncd"]]


def test_sample_that_ended_stays_while_others_go_on():
    shown = samples("ab|de|ghijkl", "ABCDEFG|IJKL", stop_texts=["|"])
    assert shown == [["ab", "ABCD"], ["ab", "ABCDEFG"]]


def test_nothing_is_made_after_all_samples_ended():
    """On a large model, each segment costs seconds."""
    script = Scripted("ab|d" * 9, "ABCDE|" * 9)
    shown = list(continuations(script, decode, 1000, stop_texts=["|"]))
    assert script.made == 8
    assert script.finished_B.all()
    assert all(row.finished for row in shown[-1])
    script = Scripted("ab|d" * 9, "ABCDE|" * 9)
    list(continuations(script, decode, 6))
    assert script.made == 6


def test_stop_token_ends_a_sample_before_it():
    *_, (first, second) = continuations(Scripted("abcde|gh", "|", stop_tokens=[ord("|")]), decode, 8)
    assert (first.text, second.text) == ("abcde", "")
    assert first.finished
    assert second.finished


@pytest.mark.parametrize(("stop_tokens", "stop_texts", "count"), [([], [], 8), ([], ["ef"], 4), ([ord("g")], [], 6)])
def test_tokens_and_logprobs_are_those_of_the_text(stop_tokens, stop_texts, count):
    script = Scripted("abcdefghij", size=8, stop_tokens=stop_tokens)
    *_, (row,) = continuations(script, decode, 8, stop_texts=stop_texts)
    assert decode(row.tokens) == row.text == "abcdefgh"[:count]
    np.testing.assert_allclose(row.logprobs, -row.tokens / 1000)


class Bytes(Scripted):
    """The UTF-8 bytes of a text as tokens, one at a time."""

    def __init__(self, text: str):
        super().__init__(text.encode().decode("latin-1"), size=1)


@pytest.mark.parametrize("stop", ["", "😀c", "b€"])
def test_streamed_text_is_never_taken_back(stop):
    """No half character, and no beginning of the text that ends the sample, is shown."""
    text = "a€b😀bb€😀b"
    shown = ""
    for (row,) in continuations(Bytes(text), ByteTokenizer().decode, len(text.encode()), stop_texts=[stop]):
        stable = row.stable_text(stop)
        assert stable.startswith(shown)
        shown = stable
    assert shown == (text.split(stop)[0] if stop else text)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab", "", "ab"),
        ("ab\ufffd", "", "ab"),
        ("ab-", "--", "ab"),
        ("ab-a", "--", "ab-a"),
        ("xaba", "abac", "x"),
        ("x", "xy", ""),
    ],
)
def test_stable_text(text, stop, expected):
    assert Continuation(text, np.zeros(0), np.zeros(0)).stable_text(stop) == expected
    assert Continuation(text, np.zeros(0), np.zeros(0), finished=True).stable_text(stop) == text


def test_model_and_text_together():
    """Tokens of the model as the text that they stand for."""
    tokenizer = CharTokenizer.from_text("abcdefghijk")
    decoding = generator_of("1", Sampling()).start(params_of("1"), [PROMPT], num_samples=3)
    *_, found = continuations(decoding, tokenizer.decode, 10)
    expected = tokens_of(generator_of("1", Sampling()), 10, num_samples=3)
    assert [row.text for row in found] == [tokenizer.decode(row) for row in expected]


# Prompts.


def test_prompt_is_encoded():
    np.testing.assert_array_equal(encode_prompt(CharTokenizer("\nabc"), "cab", "--prompt"), [3, 1, 2])
    assert encode_prompt(ByteTokenizer(), "é", "--prompt").tobytes() == "é".encode()


@pytest.mark.parametrize(
    ("tokenizer", "token"), [(CharTokenizer("\t\nab"), 1), (CharTokenizer("abc"), 0), (ByteTokenizer(), 10)]
)
def test_empty_prompt_is_a_line_feed_or_the_first_token(tokenizer, token):
    assert encode_prompt(tokenizer, "", "--prompt").tolist() == [token]


@pytest.mark.parametrize("name", ["--prompt", "train.sample_prompt"])
def test_unknown_character_in_a_prompt_is_refused_by_the_flag(name):
    with pytest.raises(UserError, match=rf"^{name}: unknown characters 'é' \(U\+00E9\)"):
        encode_prompt(CharTokenizer("\nabc"), "abé", name)
