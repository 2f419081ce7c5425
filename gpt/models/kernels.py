"""Causal self-attention over [batch, length, heads, kv] tensors, five ways, chosen by name.

All compute the same function, so that one can be exchanged for another in the middle of a run; the first three
dropout bits included, and the kernels without dropout:

- `dense`: written from scratch; the whole [length, length] score matrix in memory.
- `flax`: Flax's own `nn.dot_product_attention`, as an independent reference.
- `chunked`: queries and keys in blocks with a running softmax; memory linear in the length.
- `cudnn`, `splash`: the same as `chunked` as one kernel, of NVIDIA's for its GPUs, and in Pallas for TPUs.

Beside them is `decode`, for the queries of one new token a row, with the keys and values of those before it
in a cache.

Shape suffixes: B batch, T query length, S key length, H heads, K size of a head.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.extend.random
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from gpt.models.attention import MASKED, causal_mask, dense, document_mask
from gpt.models.layers import mesh_axes

# The lanes of a TPU: the length that `splash` computes has to be a multiple.
LANES = 128


def flax(
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT=None, *, causal: bool = True, dropout_rate=0.0, dropout_key=None
) -> jax.Array:
    """`dense` by `flax.linen.dot_product_attention`; same arguments and result."""
    length = q_BxTxHxK.shape[1]
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if causal else None
    if starts_BxT is not None:
        mask = nn.combine_masks(mask, nn.make_attention_mask(starts_BxT, starts_BxT, jnp.equal), dtype=bool)
    out_BxTxHxK = nn.dot_product_attention(
        q_BxTxHxK,
        k_BxTxHxK,
        v_BxTxHxK,
        mask=mask,
        broadcast_dropout=False,
        dropout_rng=dropout_key,
        dropout_rate=dropout_rate,
        deterministic=dropout_key is None,
        force_fp32_for_softmax=True,
    )
    return out_BxTxHxK.astype(v_BxTxHxK.dtype)


def chunked(
    q_BxTxHxK: jax.Array,
    k_BxTxHxK: jax.Array,
    v_BxTxHxK: jax.Array,
    starts_BxT: jax.Array | None = None,
    *,
    query_chunk: int,
    key_chunk: int,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`dense` in memory linear in the length, after Rabe & Staats (arXiv 2112.05682).

    An outer loop over blocks of queries and an inner one over blocks of keys, which keeps the
    running maximum, denominator and numerator of the softmax. Both bodies are rematerialised in the
    backward pass, so that it stays linear too. Blocks of keys that lie wholly in the future are skipped.

    Args:
      query_chunk, key_chunk: block sizes; they need not divide the length.
      starts_BxT, dropout_rate, dropout_key: as in `dense`, and the same weights are dropped.

    Returns:
      [B, T, H, K] in the dtype of `v`.
    """
    batch, length, heads, _ = q_BxTxHxK.shape
    attend = functools.partial(
        _chunked_shard,
        query_chunk=query_chunk,
        key_chunk=key_chunk,
        dropout_rate=dropout_rate,
        full_shape=(batch, heads, length, length),
    )
    batch_axes, length_axes, heads_axes = mesh_axes("batch", "length", "heads")
    if not length_axes:
        return attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT, starts_BxT, dropout_key, offsets=(0, 0, 0))

    def shard(q, k, v, q_starts, k_starts, dropout_key):
        # A loop over blocks of a sharded axis would be run by all devices: each has to loop over its own.
        sizes = q.shape[0], q.shape[2], q.shape[1]
        axes = batch_axes, heads_axes, length_axes
        offsets = tuple(size * jax.lax.axis_index(axis) if axis else 0 for size, axis in zip(sizes, axes, strict=True))
        return attend(q, k, v, q_starts, k_starts, dropout_key, offsets=offsets)

    queries, keys = jax.P(batch_axes, length_axes, heads_axes), jax.P(batch_axes, None, heads_axes)
    starts = jax.P(batch_axes, length_axes), jax.P(batch_axes, None)
    # The loops start from constants, which differ from device to device only later: hence no check of this.
    in_specs = queries, keys, keys, *starts, jax.P()
    mapped = jax.shard_map(shard, in_specs=in_specs, out_specs=queries, check_vma=False)
    return mapped(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT, starts_BxT, dropout_key)


def _chunked_shard(
    q_BxTxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    starts_BxT: jax.Array | None,
    starts_BxS: jax.Array | None,
    dropout_key: jax.Array | None,
    *,
    query_chunk: int,
    key_chunk: int,
    dropout_rate: float,
    full_shape: tuple[int, int, int, int],
    offsets: tuple[int | jax.Array, int | jax.Array, int | jax.Array],
) -> jax.Array:
    """`chunked` for a part of the batch, heads and queries, and all keys.

    Args:
      full_shape: (B, H, T, S) of the whole.
      offsets: where the part begins in the first three of these.
    """
    batch, length, heads, kv = q_BxTxHxK.shape
    batch_start, heads_start, first_query = offsets
    query_chunk, key_chunk = min(query_chunk, length), min(key_chunk, k_BxSxHxK.shape[1])

    def blocks(x_BxTxHxK, size):  # -> [blocks, B, H, size, K], zeros after the end
        count = -(-x_BxTxHxK.shape[1] // size)
        x = jnp.pad(x_BxTxHxK, ((0, 0), (0, count * size - x_BxTxHxK.shape[1]), (0, 0), (0, 0)))
        return x.reshape(batch, count, size, heads, kv).transpose(1, 0, 3, 2, 4)

    def starts_of_blocks(starts_BxT, size):  # -> [blocks, B, size]
        if starts_BxT is None:
            return None
        count = -(-starts_BxT.shape[1] // size)
        x = jnp.pad(starts_BxT, ((0, 0), (0, count * size - starts_BxT.shape[1])))
        return x.reshape(batch, count, size).swapaxes(0, 1)

    def add_keys(q, q_place, q_starts, carry, k, v, k_place, k_starts):
        numerator, denominator, maximum = carry
        # Keys past the end need no mask of their own: they lie in the future of every real query.
        mask = causal_mask(q_place + jnp.arange(query_chunk), k_place + jnp.arange(key_chunk))
        if q_starts is not None:
            # Keys of other documents that come first leave weights behind; the first key of its own rescales them to 0.
            mask = mask + document_mask(q_starts, k_starts)
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) + mask
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        rescale = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum)
        denominator = denominator * rescale + weights.sum(axis=-1, keepdims=True)
        if dropout_key is not None and dropout_rate > 0:
            block_starts = batch_start, heads_start, q_place, k_place
            keep = _keep_block(dropout_key, 1 - dropout_rate, full_shape, scores.shape, block_starts)
            weights = weights * keep / (1 - dropout_rate)
        update = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return numerator * rescale + update, denominator, new_maximum

    k_blocks, v_blocks = blocks(k_BxSxHxK, key_chunk), blocks(v_BxSxHxK, key_chunk)
    k_places = jnp.arange(len(k_blocks)) * key_chunk
    k_block_starts = starts_of_blocks(starts_BxS, key_chunk)

    @jax.checkpoint
    def one_query_block(q, q_place, q_starts):
        @jax.checkpoint
        def one_key_block(carry, block):
            k, v, k_place, k_starts = block
            in_the_future = k_place > q_place + query_chunk - 1
            add = functools.partial(add_keys, q, q_place, q_starts)
            return jax.lax.cond(in_the_future, lambda c: c, lambda c: add(c, k, v, k_place, k_starts), carry), None

        shape = (batch, heads, query_chunk)
        zero = (jnp.zeros((*shape, kv)), jnp.zeros((*shape, 1)), jnp.full((*shape, 1), MASKED))
        (numerator, denominator, _), _ = jax.lax.scan(
            one_key_block, zero, (k_blocks, v_blocks, k_places, k_block_starts)
        )
        return (numerator / denominator).astype(v_BxSxHxK.dtype)

    q_blocks = blocks(q_BxTxHxK / math.sqrt(kv), query_chunk)
    q_places = first_query + jnp.arange(len(q_blocks)) * query_chunk
    q_block_starts = starts_of_blocks(starts_BxT, query_chunk)
    out = jax.lax.map(lambda block: one_query_block(*block), (q_blocks, q_places, q_block_starts))
    out_BxTxHxK = out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, kv)
    return out_BxTxHxK[:, :length]


def _keep_block(key, keep_probability, full_shape, block_shape, starts) -> jax.Array:
    """The block at `starts` of `jax.random.bernoulli(key, p, full_shape)`, without the rest.

    Partitionable threefry is a counter-based generator: the bits of an element depend only on
    the key and the element's flat index, so a block can be drawn where it is needed.
    """
    if not (jax.config.jax_threefry_partitionable and str(jax.random.key_impl(key)) == "threefry2x32"):
        raise ValueError("chunked attention with dropout needs JAX's default random keys: partitionable threefry")
    index_hi, index_lo = jnp.zeros(block_shape, jnp.uint32), jnp.zeros(block_shape, jnp.uint32)
    for axis, (size, start) in enumerate(zip(full_shape, starts, strict=True)):
        # index = index * size + coordinate in 64 bits, made of two 32-bit words.
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, block_shape, axis) + jnp.asarray(start, jnp.uint32)
        carry, product = _multiply_32(index_lo, size)
        index_lo = product + coordinate
        index_hi = index_hi * jnp.uint32(size) + carry + (index_lo < product)
    key_hi, key_lo = jax.random.key_data(key)
    words = jax.extend.random.threefry2x32_p.bind(key_hi, key_lo, index_hi, index_lo)
    bits = words[0] ^ words[1]
    # As jax.random.uniform: the 23 high bits become the mantissa of a number in [1, 2).
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return uniform < keep_probability


def _multiply_32(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of the 64-bit product of uint32 `x` and a size below 2³²."""
    mask = jnp.uint32(0xFFFF)
    x_hi, x_lo = x >> 16, x & mask
    s_hi, s_lo = jnp.uint32(size >> 16), jnp.uint32(size & 0xFFFF)
    middle = x_hi * s_lo + ((x_lo * s_lo) >> 16)
    middle_2 = x_lo * s_hi + (middle & mask)
    return x_hi * s_hi + (middle >> 16) + (middle_2 >> 16), x * jnp.uint32(size)


def cudnn(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT=None, *, dropout_rate: float = 0.0, dropout_key=None):
    """`dense` by cuDNN's flash attention (arXiv 2307.08691), in bfloat16 on NVIDIA GPUs; same arguments and result.

    Memory is linear in the length, but with document borders: these are a [B, 1, T, T] mask.

    Raises:
      ValueError: there is dropout.
    """
    _refuse_dropout(dropout_rate, dropout_key)
    batch_axes, heads_axes = mesh_axes("batch", "heads")

    def attend(q, k, v, starts):
        mask = None if starts is None else starts[:, None, :, None] == starts[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")

    rows = jax.P(batch_axes, None, heads_axes)
    mapped = _on_each_device(attend, (rows, rows, rows, jax.P(batch_axes)), rows)
    return mapped(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT)


def splash(
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT=None, *, dropout_rate=0.0, dropout_key=None, interpret: bool = False
) -> jax.Array:
    """`dense` by JAX's splash attention, a flash attention (arXiv 2307.08691) in Pallas; same arguments and result.

    Memory is linear in the length. A length that is no multiple of 128, as of a prompt, is padded to one: what is
    added lies in the future. The largest block of 512, 256 or 128 tokens that divides a device's part is taken.

    Args:
      interpret: run it where there is no TPU, slowly.

    Raises:
      ValueError: there is dropout, or the mesh divides the length into parts that are no multiple of 128.
    """
    _refuse_dropout(dropout_rate, dropout_key)
    batch_axes, length_axes, heads_axes = mesh_axes("batch", "length", "heads")
    sizes = jax.sharding.get_abstract_mesh().shape
    parts, heads_parts = (math.prod(sizes[axis] for axis in axes) for axes in (length_axes, heads_axes))
    real_length, heads, kv = q_BxTxHxK.shape[1:]
    length = -(-real_length // LANES) * LANES
    block = next((size for size in (512, 256, 128) if length % (parts * size) == 0), None)
    if block is None:
        raise ValueError(f"splash attention needs a multiple of {LANES} tokens a device, not {length} / {parts}")
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    causal = splash_attention.CausalMask((length, length), shard_count=parts)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=heads_parts,
        q_seq_shards=parts,
        interpret=interpret,
    )

    def attend(kernel, q, k, v, q_starts, k_starts):
        q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(kv), k, v))
        documents = None if q_starts is None else splash_attention.SegmentIds(q_starts, k_starts)
        return jax.vmap(kernel)(q, k, v, documents).swapaxes(1, 2)

    queries, keys = jax.P(batch_axes, length_axes, heads_axes), jax.P(batch_axes, None, heads_axes)
    starts = jax.P(batch_axes, length_axes), jax.P(batch_axes, None)
    parts_of_kernel = None
    if sizes:
        of_mask = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(heads_axes, length_axes))
        parts_of_kernel = kernel.manual_sharding_spec(of_mask)
    mapped = _on_each_device(attend, (parts_of_kernel, queries, keys, keys, *starts), queries)

    def padded(x):
        return x if x is None else jnp.pad(x, ((0, 0), (0, length - real_length)) + ((0, 0),) * (x.ndim - 2))

    q, k, v, starts_BxT = map(padded, (q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT))
    return mapped(kernel, q, k, v, starts_BxT, starts_BxT)[:, :real_length]


def _refuse_dropout(rate: float, key: jax.Array | None) -> None:
    if key is not None and rate > 0:
        raise ValueError("kernels of attention have no dropout")


def _on_each_device(attend: Callable, in_specs: tuple, out_specs: jax.P) -> Callable:
    """`attend` for the part that a device has, which the compiler cannot tell from a kernel."""
    if not jax.sharding.get_abstract_mesh().shape:
        return attend
    return jax.shard_map(attend, in_specs=in_specs, out_specs=out_specs, check_vma=False)


ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "dense": dense,
    "flax": flax,
    "chunked": chunked,
    "cudnn": cudnn,
    "splash": splash,
}
KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # and the platform of each


def by_name(name: str, *, query_chunk: int, key_chunk: int) -> Callable[..., jax.Array]:
    """The attention function of that name; the chunk sizes go to the one that has chunks."""
    if name == "chunked":
        return functools.partial(chunked, query_chunk=query_chunk, key_chunk=key_chunk)
    return ATTENTION[name]
