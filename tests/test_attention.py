"""Tests that two implementations of attention agree, and that the memory of `chunked` is linear in the length."""

import functools

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from gpt.models import attention, kernels

# Skipping LLVM's optimizations takes a third of the compilation time and changes results by rounding only.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

BATCH, HEADS, KV = 2, 3, 8
RATE = 0.3
# (length, query_chunk, key_chunk): chunks that divide the length and others, either chunk larger than the other, chunks
# larger than the length, and a single token.
CHUNKS = [(1, 8, 16), (7, 2, 16), (32, 16, 8), (50, 64, 7), (50, 7, 20)]
ALL = {
    "dense": attention.dense,
    "chunked": functools.partial(kernels.chunked, query_chunk=4, key_chunk=6),
}
every_attention = pytest.mark.parametrize("attend", ALL.values(), ids=ALL)


def random_arrays(count, length, kv=KV, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(BATCH, length, HEADS, kv)).astype(np.float32) for _ in range(count)]


def out_and_gradients(attend, q, k, v, cotangent, **options):
    """Returns the output, and the gradients of its product with `cotangent` for q, k and v."""

    @quick_jit
    def run(q, k, v, cotangent):
        out, pullback = jax.vjp(functools.partial(attend, **options), q, k, v)
        return out, *pullback(cotangent)

    return dict(zip(("out", "dq", "dk", "dv"), run(q, k, v, cotangent), strict=True))


def assert_close(actual, expected, tolerance, name=""):
    """Asserts that errors are small relative to the largest number in the array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def reference(q, k, v, keep=None):
    """Computes attention by its definition, one query at a time, in float64. `keep` has the shape [B, H, T, T]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for b, t, h in np.ndindex(q.shape[:3]):
        scores = k[b, : t + 1, h] @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        if keep is not None:
            weights *= keep[b, h, t, : t + 1] / (1 - RATE)
        out[b, t, h] = weights @ v[b, : t + 1, h]
    return out


def dropout_mask(key, length):
    """Returns the dropout mask of `dense`: one Bernoulli draw for each weight."""
    return np.asarray(jax.random.bernoulli(key, 1 - RATE, (BATCH, HEADS, length, length)))


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("length", [1, 50])
@every_attention
def test_equals_plain_numpy(attend, length, dropout):
    q, k, v = random_arrays(3, length)
    key = jax.random.key(5)
    out = jax.jit(functools.partial(attend, dropout_rate=RATE, dropout_key=key if dropout else None))(q, k, v)
    assert out.dtype == jnp.float32
    assert_close(out, reference(q, k, v, dropout_mask(key, length) if dropout else None), 1e-6)


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize(("length", "query_chunk", "key_chunk"), CHUNKS)
def test_all_three_agree_in_output_and_gradients(length, query_chunk, key_chunk, dropout):
    """The same key drops the same weights, so that a run may change the implementation.

    Only the order of the sums differs: a few float32 roundings (6e-8 each) are allowed, far less than the effect of
    one weight that is dropped differently.
    """
    q, k, v, cotangent = random_arrays(4, length)
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(1)} if dropout else {}
    expected = out_and_gradients(attention.dense, q, k, v, cotangent, **options)
    chunked = functools.partial(kernels.chunked, query_chunk=query_chunk, key_chunk=key_chunk)
    # The only weight of a single token is always 1, so that the gradients of q and k are zero.
    scale = max(np.abs(x).max() for x in expected.values())
    for name, value in out_and_gradients(chunked, q, k, v, cotangent, **options).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("order", ["rising", "falling", "random"])
@every_attention
def test_scores_of_hundreds_do_not_overflow(attend, order):
    """exp(89) overflows float32. Rising scores change the running maximum in each block, falling scores never."""
    length = 20
    q, k, v, cotangent = random_arrays(4, length)
    if order != "random":
        slope = np.arange(length) if order == "rising" else -np.arange(length)
        q, k = np.ones_like(q), np.ones_like(k) * slope[None, :, None, None] / 20
    q = q * 300
    results = out_and_gradients(attend, q, k, v, cotangent)
    assert_close(results["out"], reference(q, k, v), 2e-5)
    assert all(np.isfinite(x).all() for x in results.values())


@every_attention
def test_weights_are_causal_and_sum_to_one(attend):
    """With the identity as values, the output is the weights: a token attends to itself and to all earlier tokens."""
    length = 13
    q, k = random_arrays(2, length, kv=length)
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], q.shape)
    weights = np.asarray(quick_jit(attend)(q, k, v)).transpose(0, 2, 1, 3)
    seen = np.broadcast_to(np.tri(length, dtype=bool), weights.shape)
    np.testing.assert_array_equal(weights > 0, seen)
    np.testing.assert_array_equal(weights[~seen], 0)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


@every_attention
def test_dropout_drops_weights_and_scales_up_the_rest(attend):
    """With the identity as values, the output is the weights after dropout."""
    length = 13
    q, k = random_arrays(2, length, kv=length)
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], q.shape)
    key = jax.random.key(3)
    keep = dropout_mask(key, length).transpose(0, 2, 1, 3)
    dropped = quick_jit(functools.partial(attend, dropout_rate=RATE, dropout_key=key))(q, k, v)
    np.testing.assert_allclose(dropped, quick_jit(attend)(q, k, v) * keep / (1 - RATE), rtol=1e-6)
    assert abs(keep.mean() - (1 - RATE)) < 0.05


@pytest.mark.parametrize("options", [{"dropout_rate": RATE}, {"dropout_key": jax.random.key(0)}], ids=["rate", "key"])
@every_attention
def test_no_dropout_without_both_rate_and_key(attend, options):
    q, k, v = random_arrays(3, 9)
    np.testing.assert_array_equal(quick_jit(functools.partial(attend, **options))(q, k, v), quick_jit(attend)(q, k, v))


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout"])
@every_attention
def test_future_tokens_change_nothing(attend, dropout):
    """The outputs are equal to the bit, with dropout, and wherever in a block the future begins."""
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(2)} if dropout else {}
    run = quick_jit(functools.partial(attend, **options))
    before = random_arrays(3, 20)
    other = [10 * x for x in random_arrays(3, 20, seed=1)]
    out = np.asarray(run(*before))
    for start in (1, 6, 11, 19):
        past = (np.arange(20) < start)[None, :, None, None]
        changed = run(*(np.where(past, x, y) for x, y in zip(before, other, strict=True)))
        np.testing.assert_array_equal(changed[:, :start], out[:, :start])
        assert (np.abs(changed[:, start:] - out[:, start:]).max(axis=(0, 2, 3)) > 0.1).all()


@every_attention
def test_bfloat16_in_bfloat16_out(attend):
    """Outputs and gradients are bfloat16, and differ from float32 results by a few roundings of 2⁻⁸."""
    exact = [x.astype(jnp.bfloat16).astype(np.float32) for x in random_arrays(4, 20)]
    expected = out_and_gradients(attention.dense, *exact)
    short = [x.astype(jnp.bfloat16) for x in exact]
    assert jax.eval_shape(attend, *short[:3]).dtype == jnp.bfloat16
    results = out_and_gradients(attend, *short)
    for name, value in results.items():
        assert value.dtype == jnp.bfloat16, name
        assert_close(value.astype(jnp.float32), expected[name], 0.02, name)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["new-style-key", "old-style-key"])
def test_keep_block_is_a_slice_of_bernoulli(make_key):
    """Blocks lie in the middle and at both ends, and one extends past the end, as the last block may."""
    key, shape, block = make_key(11), (2, 3, 50, 50), (2, 3, 8, 16)
    whole = np.asarray(jax.random.bernoulli(key, 1 - RATE, shape))
    draw = quick_jit(functools.partial(kernels._keep_block, key, 1 - RATE, shape, block))
    for q_start, k_start in [(0, 0), (8, 16), (13, 7), (42, 34), (48, 48)]:
        expected = whole[:, :, q_start : q_start + 8, k_start : k_start + 16]
        actual = draw((0, 0, q_start, k_start))[:, :, : expected.shape[2], : expected.shape[3]]
        np.testing.assert_array_equal(actual, expected)


def test_keep_block_where_the_index_needs_more_than_32_bits():
    """The whole array of 6·10⁹ draws is too large, so the test computes the 64-bit index of each draw with NumPy.

    The block contains the element number 2³², so that the low word of the index wraps around within it.
    """
    shape, block = (5, 12, 10007, 10007), (5, 12, 3, 5)
    b, h, row, column = np.unravel_index(2**32, shape)
    q_start, k_start = int(row) - 1, int(column) - 2
    coordinates = np.indices(block, dtype=np.int64) + np.array([0, 0, q_start, k_start]).reshape(4, 1, 1, 1, 1)
    index = np.ravel_multi_index(tuple(coordinates), shape).astype(np.uint64)
    assert index[b, h, 1, 2] == 2**32
    assert index[b, h, 1, 1] == 2**32 - 1

    key = jax.random.key(7)
    high, low = (index >> 32).astype(np.uint32), index.astype(np.uint32)
    words = jax.extend.random.threefry2x32_p.bind(*jax.random.key_data(key), jnp.asarray(high), jnp.asarray(low))
    uniform = (np.asarray(words[0] ^ words[1]) >> 9) / 2**23
    keep = kernels._keep_block(key, 1 - RATE, shape, block, (0, 0, q_start, k_start))
    np.testing.assert_array_equal(keep, uniform < 1 - RATE)


def test_multiply_32_equals_integer_multiplication():
    edges = [0, 1, 2, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0xFFFFFFFE, 0xFFFFFFFF]
    numbers = edges + np.random.default_rng(0).integers(0, 2**32, 1000).tolist()
    for size in [*edges, 1024, 10007, 50257, 0xDEADBEEF]:
        high, low = kernels._multiply_32(np.array(numbers, np.uint32), size)
        products = [x * size for x in numbers]
        np.testing.assert_array_equal(high, [product >> 32 for product in products])
        np.testing.assert_array_equal(low, [product & 0xFFFFFFFF for product in products])


def training_memory(attend, length, dropout):
    """Returns the bytes of temporaries of the compiled forward and backward pass."""
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)} if dropout else {}

    def loss(q, k, v):
        return attend(q, k, v, **options).sum()

    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    compiled = quick_jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout"])
def test_memory_of_chunked_grows_linearly(dropout):
    """Doubling the length doubles the memory of `chunked` and quadruples that of `dense`. Nothing is executed."""
    lengths = (1024, 2048, 4096)
    chunked = functools.partial(kernels.chunked, query_chunk=64, key_chunk=128)
    linear = [training_memory(chunked, length, dropout) for length in lengths]
    square = [training_memory(attention.dense, length, dropout) for length in (lengths[0], lengths[-1])]
    assert linear[1] < 2.2 * linear[0]
    assert linear[2] < 2.2 * linear[1]
    # The length is doubled twice, so linear growth is a factor of 4. XLA's fusions change how many matrices are alive.
    assert square[1] > 8 * square[0]
    one_matrix = 2 * 4096**2 * 4  # of scores, in bytes
    assert square[1] > one_matrix > 10 * linear[2]
    # Without rematerialization of the inner loop, the weights of a block of queries take over 5 times q, k and v.
    queries_keys_values = 3 * 4096 * 2 * 16 * 4
    assert linear[2] < 3 * queries_keys_values


def test_chunked_refuses_keys_whose_bits_it_cannot_draw_in_blocks():
    q = jnp.ones((1, 4, 1, 8))
    chunked = functools.partial(kernels.chunked, query_chunk=2, key_chunk=2, dropout_rate=0.5)
    with pytest.raises(ValueError, match="partitionable threefry"):
        chunked(q, q, q, dropout_key=jax.random.key(0, impl="rbg"))
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="partitionable threefry"):
        chunked(q, q, q, dropout_key=jax.random.key(0))
