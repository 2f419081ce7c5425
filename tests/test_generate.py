"""Sampling against naive loops and exact probabilities, on any mesh, and where a text ends."""

import functools
import itertools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding
from gpt.errors import UserError
from gpt.generate import Generator, Sampling, continuations, encode_prompt, sample_token
from gpt.models.attention import MASKED
from gpt.models.gpt import GPT, GPTConfig
from gpt.sharding import MeshConfig
from gpt.tokenizers import ByteTokenizer, CharTokenizer

# 11 tokens, and 5 more that pad the table.
SIZES = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "block_size": 8, "vocab_size": 11, "vocab_multiple": 8}
MODEL = GPT(GPTConfig(**SIZES, tie_embeddings=False, dtype="float32"))
BLOCK = MODEL.config.block_size
PROMPT = np.array([1, 2, 3], np.uint8)
MESHES = {
    "1": MeshConfig("fsdp_tp", 1, 1, 1, 1),
    "8x1x1": MeshConfig("fsdp_tp", 8, 1, 1, 1),
    "2x2x2": MeshConfig("fsdp_tp", 2, 2, 1, 2),
}


@functools.cache
def layout_of(name):
    devices = jax.devices()[:1] if name == "1" else None
    return sharding.make_layout(MESHES[name], devices)


@functools.cache
def params_of(name):
    """Parameters so large that the next token depends on all that went before, sharded over the mesh."""
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, BLOCK), jnp.int32))["params"]
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        spread = {"scale": 0.0, "bias": 0.1, "kernel": 1.0, "embedding": 1.0}[path[-1].key]
        return ((path[-1].key == "scale") + rng.normal(0, spread, leaf.shape)).astype(np.float32)

    arrays = jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed))
    return jax.device_put(arrays, layout_of(name).state_shardings(boxed))


# Compiled once for all tests.
generator_of = functools.cache(lambda name, sampling: Generator(MODEL, layout_of(name), sampling, segment=4))


def tokens_of(generator, num_tokens, *, name="1", prompt=PROMPT, num_samples=1, seed=0):
    """The first tokens of each sample: [num_samples, num_tokens]."""
    found, segments = np.zeros((num_samples, 0), int), generator(params_of(name), prompt, num_samples, seed)
    while found.shape[1] < num_tokens:
        found = np.concatenate([found, next(segments)], axis=1)
    return found[:, :num_tokens]


# The loop.


@jax.jit
def last_logits(tokens):
    return MODEL.apply({"params": params_of("1")}, tokens[None])[0, -1]


@pytest.mark.parametrize("length", [1, 3, BLOCK - 1, BLOCK, BLOCK + 3])
def test_greedy_text_is_that_of_the_naive_loop(length):
    """Which runs the model on the last `block_size` tokens, each time anew; the text goes on past the block."""
    tokens = list(np.random.default_rng(length).integers(0, 11, length))
    found = tokens_of(generator_of("1", Sampling(0.0)), 18, prompt=np.array(tokens, np.uint8))[0]
    expected = []
    for _ in range(18):
        logits = np.asarray(last_logits(jnp.array(tokens[-BLOCK:], jnp.int32)))
        first, second = np.sort(logits)[[-1, -2]]
        assert first - second > 1e-3  # no tie that rounding could decide
        expected.append(int(logits.argmax()))
        tokens.append(expected[-1])
    assert list(found) == expected
    assert len(set(expected)) > 2


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
    segments = generator_of("1", Sampling())(uniform, PROMPT, 3, 0)
    tokens = np.concatenate([next(segments) for _ in range(5)], axis=1)
    assert all(len({tuple(column) for column in tokens[:, i::4].T}) > 3 for i in range(4))
    assert all(len(set(row)) > 4 for row in tokens)


def test_length_of_the_segments_does_not_matter():
    expected = tokens_of(generator_of("1", Sampling()), 14, num_samples=3)
    found = tokens_of(Generator(MODEL, layout_of("1"), Sampling(), segment=7), 14, num_samples=3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "num_samples"), [("8x1x1", 3), ("8x1x1", 8), ("2x2x2", 3), ("2x2x2", 4)])
def test_every_mesh_gives_the_tokens_of_one_device(name, num_samples):
    """Also where the number of samples cannot be divided over the devices."""
    expected = tokens_of(generator_of("1", Sampling()), 16, num_samples=num_samples)
    found = tokens_of(generator_of(name, Sampling()), 16, name=name, num_samples=num_samples)
    np.testing.assert_array_equal(found, expected)


def test_padding_of_the_vocabulary_is_never_drawn():
    """Though temperature flattens everything else."""
    tokens = tokens_of(generator_of("1", Sampling(temperature=1e4)), 100, num_samples=3)
    assert set(tokens.flat) == set(range(11))


@pytest.mark.parametrize("name", ["1", "8x1x1"])
def test_segments_and_prompts_share_one_compiled_program(caplog, name):
    """What comes back from one segment has to be laid out as what went in, or the second compiles anew."""
    generator = Generator(MODEL, layout_of(name), Sampling(temperature=0.7), segment=4)
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        tokens_of(generator, 12, name=name, num_samples=8)
        tokens_of(generator, 12, name=name, num_samples=8, prompt=np.arange(11), seed=1)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling jit(extend)")]
    assert len(compiled) == 1


# One token.

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0, MASKED], np.float32)  # the last: padding
ORDER = [1, 3, 6, 0, 4, 2, 5]  # from the likeliest on
DRAWS = 20_000


def softmax(logits) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def frequencies(logits, sampling) -> np.ndarray:
    draws = sample_token(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), jax.random.key(0), sampling)
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
    found = sample_token(rows, jax.random.key(0), sampling)
    np.testing.assert_array_equal(found, rows.argmax(axis=1))
    assert found.dtype == jnp.int32


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
    found = sample_token(jnp.repeat(jnp.asarray(rows), 2000, axis=0), jax.random.key(0), sampling)
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
    ],
    ids=str,
)
def test_sampling_without_meaning_is_refused(sampling, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        sampling.check(11)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0), Sampling(5.0, 1, 1.0), Sampling(0.1, 11, 1e-9)], ids=str
)
def test_sampling_at_the_limits_is_accepted(sampling):
    sampling.check(11)


# Where a text ends.


def segmented(*texts: str, size: int = 4):
    """Endless segments of character codes: the texts, and then dots."""
    for start in itertools.count(0, size):
        yield np.array([[ord(c) for c in text.ljust(start + size, ".")[start : start + size]] for text in texts])


def decode(ids) -> str:
    return "".join(map(chr, ids))


def samples(*texts, num_tokens=12, size=4, **stops) -> list[list[str]]:
    """What is shown after each segment."""
    return list(continuations(segmented(*texts, size=size), decode, len(texts), num_tokens, **stops))


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
    assert samples("abcdefghijklm", stop_text=stop) == [[text] for text in expected]


def test_first_of_several_stop_texts_counts():
    assert samples("ab--cd--", stop_text="--")[-1] == ["ab"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, ["a\n"]), (2, ["a\nb\n"]), (3, ["a\nb\n", "a\nb\n\n"]), (4, ["a\nb\n", "a\nb\n\ncd\n"])],
)
def test_line_feed_ends_a_sample_with_it(count, expected):
    assert samples("a\nb\n\ncd\ne\n\n\n", stop_newlines=count) == [[text] for text in expected]


def test_whichever_end_comes_first_counts():
    """Both lie in the segment that was made."""
    assert samples("ab--\ncde", size=9, stop_text="--", stop_newlines=1) == [["ab"]]
    assert samples("ab\ncd--e", size=9, stop_text="--", stop_newlines=1) == [["ab\n"]]
    assert samples("ab\ncd--e\n", size=10, stop_text="--", stop_newlines=2) == [["ab\ncd"]]


def test_sample_that_ended_stays_while_others_go_on():
    shown = samples("ab|de|ghijkl", "ABCDEFG|IJKL", stop_text="|")
    assert shown == [["ab", "ABCD"], ["ab", "ABCDEFG"]]


def test_nothing_is_made_after_all_samples_ended():
    """On a large model, each segment costs seconds."""
    made = []

    def counted():
        for segment in segmented("ab|d" * 9, "ABCDE|" * 9):
            made.append(segment)
            yield segment

    list(continuations(counted(), decode, 2, 1000, stop_text="|"))
    assert len(made) == 2
    list(continuations(counted(), decode, 2, 8))
    assert len(made) == 4


def test_character_across_two_segments_is_whole_in_the_end():
    ids = ByteTokenizer().encode("a€😀b")
    segments = iter(np.array_split(ids[None].astype(np.int32), len(ids), axis=1))
    shown = [text for (text,) in continuations(segments, ByteTokenizer().decode, 1, len(ids))]
    assert shown[-1] == "a€😀b"
    assert shown[1] == "a\ufffd"


def test_model_and_text_together():
    """Tokens of the model as the text that they stand for."""
    tokenizer = CharTokenizer.from_text("abcdefghijk")
    segments = generator_of("1", Sampling())(params_of("1"), PROMPT, 3, 0)
    *_, found = continuations(segments, tokenizer.decode, 3, 10)
    expected = tokens_of(generator_of("1", Sampling()), 10, num_samples=3)
    assert found == [tokenizer.decode(row) for row in expected]


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
