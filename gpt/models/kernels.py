"""Implementations of causal self-attention, chosen by `model.attention`. All compute the function of `attention.dense`.

A run may change from one to another. `dense` and `chunked` also draw the same dropout masks; `cudnn` and `splash` have
no dropout.

- `dense`: in `gpt/models/attention.py`; stores the whole [length, length] matrix of scores.
- `chunked`: loops over blocks of queries and keys with a running softmax; its memory is linear in the length.
- `cudnn`: cuDNN's flash attention on NVIDIA GPUs; its memory is linear in the length.
- `splash`: JAX's flash attention for TPUs, in Pallas; its memory is linear in the length.

Shape suffixes: B batch, T query length, S key length, H heads of queries, G heads of keys and values, K head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from gpt.models.attention import MASKED, causal_mask, dense, document_mask, soft_cap
from gpt.models.mesh import mesh_axes, num_devices

LANES = 128  # of a TPU's vector unit: `splash` needs a sequence length that is a multiple of them


def chunked(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    starts_BxT: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Computes `attention.dense` with memory linear in the length (Rabe and Staats, arXiv 2112.05682).

    An outer loop goes over blocks of queries. An inner loop goes over blocks of keys, with the running maximum,
    denominator and numerator of the softmax, and skips the blocks of which no query sees a key. The backward pass
    recomputes both loop bodies, so its memory is linear too.

    Args:
      q_BxTxHxK: queries.
      k_BxTxGxK: keys.
      v_BxTxGxK: values.
      starts_BxT: see `attention.dense`.
      dropout_key: see `attention.dense`. The same weights are dropped as there.
      options: `query_chunk`, `key_chunk`, and those of `attention.dense`; see `_chunked_shard`.

    Returns:
      [B, T, H, K] in the dtype of `v_BxTxGxK`.

    Raises:
      ValueError: there is dropout, and the random key is not JAX's default, partitionable threefry.
    """
    batch, length, heads, _ = q_BxTxHxK.shape
    shape: Any = batch, heads, length, length
    attend: Callable[..., jax.Array] = functools.partial(_chunked_shard, full_shape=shape, **options)
    batch_axes, length_axes, heads_axes = mesh_axes("batch", "length", "heads")
    if not length_axes:
        return attend(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT, starts_BxT, dropout_key, offsets=(0, 0, 0))

    def shard(q, k, v, q_starts, k_starts, dropout_key):
        # Every device would run a loop over blocks of a sharded axis in full, so each loops over its own shard.
        sizes = q.shape[0], q.shape[2], q.shape[1]
        axes = batch_axes, heads_axes, length_axes
        offsets = tuple(size * jax.lax.axis_index(axis) if axis else 0 for size, axis in zip(sizes, axes, strict=True))
        return attend(q, k, v, q_starts, k_starts, dropout_key, offsets=offsets)

    queries, keys = jax.P(batch_axes, length_axes, heads_axes), jax.P(batch_axes, None, heads_axes)
    starts = jax.P(batch_axes, length_axes), jax.P(batch_axes, None)
    # The loops start from constants and then differ between devices, which the check of varying axes refuses.
    in_specs = queries, keys, keys, *starts, jax.P()
    mapped = jax.shard_map(shard, in_specs=in_specs, out_specs=queries, check_vma=False)
    return mapped(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT, starts_BxT, dropout_key)


def _chunked_shard(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    starts_BxT: jax.Array | None,
    starts_BxS: jax.Array | None,
    dropout_key: jax.Array | None,
    *,
    query_chunk: int,
    key_chunk: int,
    window: int = 0,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    full_shape: tuple[int, int, int, int],
    offsets: tuple[int | jax.Array, ...],
) -> jax.Array:
    """Computes `chunked` for a shard of the batch, heads and queries, and all keys.

    Args:
      query_chunk: number of queries in a block. It does not have to divide the length.
      key_chunk: number of keys in a block, likewise.
      window: see `attention.dense`.
      softcap: see `attention.dense`.
      dropout_rate: see `attention.dense`.
      full_shape: (B, H, T, S) of the unsharded tensors.
      offsets: the index of the shard's first element along the first three of these axes.
    """
    batch, length, heads, kv = q_BxTxHxK.shape
    k_BxSxHxK, v_BxSxHxK = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BxSxGxK, v_BxSxGxK))
    batch_start, heads_start, first_query = offsets
    query_chunk, key_chunk = min(query_chunk, length), min(key_chunk, k_BxSxHxK.shape[1])

    def blocks(x_BxTx, size):  # -> [blocks, B, size, ...], padded with zeros
        count = -(-x_BxTx.shape[1] // size)
        padding = [(0, 0), (0, count * size - x_BxTx.shape[1])] + [(0, 0)] * (x_BxTx.ndim - 2)
        return jnp.pad(x_BxTx, padding).reshape(batch, count, size, *x_BxTx.shape[2:]).swapaxes(0, 1)

    def add_keys(q, q_position, q_starts, carry, k, v, k_position, k_starts):
        numerator, denominator, maximum = carry
        # The causal mask also hides the padding of keys, which is in the future of every real query.
        mask = causal_mask(q_position + jnp.arange(query_chunk), k_position + jnp.arange(key_chunk), window)
        if q_starts is not None:
            # Where every key so far was masked, the sums are meaningless; the first unmasked key rescales them to 0.
            mask = mask + document_mask(q_starts, k_starts)
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores, softcap) + mask
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        rescale = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum)
        denominator = denominator * rescale + weights.sum(axis=-1, keepdims=True)
        if dropout_key is not None and dropout_rate > 0:
            block_starts = batch_start, heads_start, q_position, k_position
            keep = _keep_block(dropout_key, 1 - dropout_rate, full_shape, scores.shape, block_starts)
            weights = weights * keep / (1 - dropout_rate)
        update = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return numerator * rescale + update, denominator, new_maximum

    k_blocks, v_blocks = (blocks(x, key_chunk).swapaxes(2, 3) for x in (k_BxSxHxK, v_BxSxHxK))
    k_positions = jnp.arange(len(k_blocks)) * key_chunk
    k_block_starts = None if starts_BxS is None else blocks(starts_BxS, key_chunk)

    @jax.checkpoint
    def one_query_block(q, q_position, q_starts):
        @jax.checkpoint
        def one_key_block(carry, block):
            k, v, k_position, k_starts = block
            is_skipped = k_position > q_position + query_chunk - 1
            if window:
                is_skipped |= k_position + key_chunk - 1 <= q_position - window
            add = functools.partial(add_keys, q, q_position, q_starts)
            return jax.lax.cond(is_skipped, lambda c: c, lambda c: add(c, k, v, k_position, k_starts), carry), None

        shape = (batch, heads, query_chunk)
        zero = (jnp.zeros((*shape, kv)), jnp.zeros((*shape, 1)), jnp.full((*shape, 1), MASKED))
        (numerator, denominator, _), _ = jax.lax.scan(
            one_key_block, zero, (k_blocks, v_blocks, k_positions, k_block_starts)
        )
        return (numerator / denominator).astype(v_BxSxHxK.dtype)

    q_blocks = blocks(q_BxTxHxK, query_chunk).swapaxes(2, 3)
    q_positions = first_query + jnp.arange(len(q_blocks)) * query_chunk
    q_block_starts = None if starts_BxT is None else blocks(starts_BxT, query_chunk)
    out = jax.lax.map(lambda block: one_query_block(*block), (q_blocks, q_positions, q_block_starts))
    out_BxTxHxK = out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, kv)
    return out_BxTxHxK[:, :length]


def _keep_block(key, keep_probability, full_shape, block_shape, starts) -> jax.Array:
    """Returns the block of `jax.random.bernoulli(key, keep_probability, full_shape)` that begins at `starts`.

    Partitionable threefry is a counter-based generator: the bits of an element depend only on the key and the element's
    flat index, so that a block can be drawn without the rest.
    """
    is_partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]  # JAX defines it at run time
    if not (is_partitionable and str(jax.random.key_impl(key)) == "threefry2x32"):
        raise ValueError("chunked attention with dropout needs JAX's default random keys: partitionable threefry")
    index_hi, index_lo = jnp.zeros(block_shape, jnp.uint32), jnp.zeros(block_shape, jnp.uint32)
    for axis, (size, start) in enumerate(zip(full_shape, starts, strict=True)):
        # index = index * size + coordinate, in 64 bits as two 32-bit words.
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, block_shape, axis) + jnp.asarray(start, jnp.uint32)
        carry, product = _multiply_32(index_lo, size)
        index_lo = product + coordinate
        index_hi = index_hi * jnp.uint32(size) + carry + (index_lo < product)
    key_hi, key_lo = jax.random.key_data(key)
    words = jax.extend.random.threefry2x32_p.bind(key_hi, key_lo, index_hi, index_lo)
    bits = words[0] ^ words[1]
    # Like jax.random.uniform, take the 23 high bits as the mantissa of a number in [1, 2).
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return uniform < keep_probability


def _multiply_32(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the high and low words of the 64-bit product of a uint32 array and a size below 2³².

    `jax.lax.mulhi` cannot be compiled within `shard_map` (jax 0.10.2).
    """
    mask = jnp.uint32(0xFFFF)
    x_hi, x_lo = x >> 16, x & mask
    s_hi, s_lo = jnp.uint32(size >> 16), jnp.uint32(size & 0xFFFF)
    middle = x_hi * s_lo + ((x_lo * s_lo) >> 16)
    middle_2 = x_lo * s_hi + (middle & mask)
    return x_hi * s_hi + (middle >> 16) + (middle_2 >> 16), x * jnp.uint32(size)


def cudnn(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT=None, *, window=0, softcap=0.0) -> jax.Array:
    """Computes `attention.dense` with cuDNN's flash attention (arXiv 2307.08691), in bfloat16 on NVIDIA GPUs.

    Memory is linear in the length, except for document borders, which need a [B, 1, T, T] mask.

    Raises:
      ValueError: a softcap is on.
    """
    if softcap:
        raise ValueError("cuDNN's attention has no softcap; choose another implementation")
    batch_axes, heads_axes = mesh_axes("batch", "heads")
    options: Any = {"implementation": "cudnn", "scale": 1.0, "local_window_size": (window - 1, 0) if window else None}

    def attend(q, k, v, starts):
        mask = None if starts is None else starts[:, None, :, None] == starts[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, **options)

    rows = jax.P(batch_axes, None, heads_axes)
    mapped = _on_each_device(attend, (rows, rows, rows, jax.P(batch_axes)), rows)
    return mapped(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT)


def splash(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT=None, *, window=0, softcap=0.0, interpret: bool = False
) -> jax.Array:
    """Computes `attention.dense` with JAX's splash attention, a flash attention (arXiv 2307.08691) for TPUs in Pallas.

    Memory is linear in the length. The length is padded to a multiple of 128; the causal mask hides the padding.

    Args:
      q_BxTxHxK: queries; the arguments before `interpret` are those of `attention.dense`.
      interpret: whether to interpret the kernel, slowly, on a platform other than TPU.

    Raises:
      ValueError: a device's shard of the length is not a multiple of 128.
    """
    batch_axes, length_axes, heads_axes = mesh_axes("batch", "length", "heads")
    sizes = jax.sharding.get_abstract_mesh().shape
    length_shards, head_shards = map(num_devices, (length_axes, heads_axes))
    real_length, heads = q_BxTxHxK.shape[1:3]
    length = -(-real_length // LANES) * LANES
    block = splash_block(length, length_shards)
    if not block:
        raise ValueError(
            f"splash attention needs a multiple of {LANES} tokens on each device, not {length} / {length_shards}"
        )
    block_sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    causal: Any = splash_attention.CausalMask((length, length), shard_count=length_shards)
    if window:
        causal = splash_attention.LocalMask((length, length), (window - 1, 0), 0, shard_count=length_shards)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([causal] * heads),
        block_sizes=block_sizes,
        head_shards=head_shards,
        q_seq_shards=length_shards,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def attend(kernel, q, k, v, q_starts, k_starts):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        documents = None if q_starts is None else splash_attention.SegmentIds(q_starts, k_starts)
        return jax.vmap(kernel)(q, k, v, documents).swapaxes(1, 2)

    queries, keys = jax.P(batch_axes, length_axes, heads_axes), jax.P(batch_axes, None, heads_axes)
    starts = jax.P(batch_axes, length_axes), jax.P(batch_axes, None)
    kernel_spec = None
    if sizes:
        mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))  # without axes of an outer `shard_map`
        mask_sharding = jax.NamedSharding(mesh, jax.P(heads_axes, length_axes))
        kernel_spec = kernel.manual_sharding_spec(mask_sharding)
    mapped = _on_each_device(attend, (kernel_spec, queries, keys, keys, *starts), queries)

    def padded(x):
        return x if x is None else jnp.pad(x, ((0, 0), (0, length - real_length)) + ((0, 0),) * (x.ndim - 2))

    q, k, v, starts_BxT = map(padded, (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT))
    return mapped(kernel, q, k, v, starts_BxT, starts_BxT)[:, :real_length]


def splash_block(length: int, shards: int = 1) -> int:
    """Returns the number of queries, and of keys, of a block of `splash`, which divides a shard of the length; or 0.

    Large blocks are faster, but compute more masked scores. 1,024 for 4,096 tokens are in MaxText's tuned configs
    (benchmarks/maxtext_trillium_model_configs.py); 2,048 exceed the vector memory that v5e and v5p give by default.
    """
    sizes = (1024,) * (length >= 4096) + (512, 256, LANES)
    return next((size for size in sizes if length % (shards * size) == 0), 0)


def attention_share(config: Any) -> float:
    """Returns how many scores the kernels of a program compute, on average, per score under a causal mask.

    A kernel computes all blocks that its mask does not hide. If windows differ between scanned layers, each iteration
    of the program has a kernel of each of the two kinds.

    Args:
      config: the resolved `ModelConfig`.
    """
    length, block = config.length, splash_block(config.length) if config.attention == "splash" else 1

    def computed(window: int, block: int) -> int:
        firsts = (max(0, (i * block - window + 1) // block) for i in range(-(-length // block)))
        return block**2 * sum(i - first + 1 for i, first in enumerate(firsts))

    windows = [min(window or length, length) for window in config.windows]
    kinds = 2 if config.scan_layers and len(set(windows)) > 1 else 1
    return sum(computed(window, block) for window in windows) / (len(windows) * kinds * computed(length, 1))


def _on_each_device(attend: Callable, in_specs: tuple, out_specs: jax.P) -> Callable:
    """Returns `attend` mapped over the shards of the current mesh: the compiler cannot partition a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape:
        return attend
    axes = set(mesh.auto_axes)  # those that a surrounding `jax.shard_map` does not map over
    return jax.shard_map(attend, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "dense": dense,
    "chunked": chunked,
    "cudnn": cudnn,
    "splash": splash,
}
KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # the implementations that are compiled kernels, and their platforms


def obstacle(name: str, config: Any, platform: str, length_shards: int) -> str | None:
    """Returns why an implementation of attention cannot compute a model, as the predicate of a sentence, or None.

    Args:
      name: a key of `ATTENTION`.
      config: the `ModelConfig`, with a resolved dtype.
      platform: JAX's name of the platform, for example "cpu".
      length_shards: the number of shards of the sequence length on the mesh.
    """
    if name not in KERNELS:
        return None
    if platform != (expected := KERNELS[name]):
        return f"runs on a {expected.upper()}, and this is a {platform.upper()}"
    if config.attention_dropout:
        return f"has no dropout, but model.attention_dropout={config.attention_dropout}"
    if name == "splash":
        if config.num_targets % (LANES * length_shards) == 0:
            return None
        shards = f" in {length_shards} parts" if length_shards > 1 else ""
        return f"needs a multiple of {LANES} tokens, not {config.length_key}={config.num_targets}{shards}"
    if config.attention_softcap:
        return "has no model.attention_softcap"
    if config.dtype == "float32":
        return "computes in bfloat16, not in model.dtype=float32"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"takes head sizes that are multiples of 8 up to 128, not {config.head_dim}"
    return "does not support a sequence length that mesh.sequence shards" if length_shards > 1 else None
