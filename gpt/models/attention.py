"""Attention over [batch, length, heads, head size] tensors: `dense`, the reference, and `decode`, its cached form.

`gpt/models/kernels.py` has other implementations of `dense` with less memory use, which this file does not need.

Shape suffixes: B batch, T query length, S key length, H heads, K head size.
"""

import math

import jax
import jax.numpy as jnp

# Far below any real score, but finite: the softmax of a fully masked row has no NaN.
MASKED = -1e30


def dense(
    q_BxTxHxK: jax.Array,
    k_BxTxHxK: jax.Array,
    v_BxTxHxK: jax.Array,
    starts_BxT: jax.Array | None = None,
    *,
    causal: bool = True,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(q·kᵀ/√K + mask)·v with the softmax in float32 (arXiv 1706.03762).

    Args:
      q_BxTxHxK: queries.
      k_BxTxHxK: keys.
      v_BxTxHxK: values.
      starts_BxT: for each token, the index of the first token of its document. A token attends to its own document
        only. None means that each row is one document.
      causal: whether a token attends only to itself and to earlier tokens.
      dropout_rate: probability of dropping an attention weight.
      dropout_key: random key of the dropout mask. None means no dropout.

    Returns:
      [B, T, H, K] in the dtype of `v_BxTxHxK`.
    """
    length, kv = q_BxTxHxK.shape[1], q_BxTxHxK.shape[-1]
    positions = jnp.arange(length)
    scores_BxHxTxS = jnp.einsum(
        "bthk,bshk->bhts", q_BxTxHxK / math.sqrt(kv), k_BxTxHxK, preferred_element_type=jnp.float32
    )
    mask = causal_mask(positions, positions) if causal else 0.0
    if starts_BxT is not None:
        mask = mask + document_mask(starts_BxT, starts_BxT)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS + mask, axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BxHxTxS.shape)
        weights_BxHxTxS = weights_BxHxTxS * keep / (1 - dropout_rate)
    return jnp.einsum("bhts,bshk->bthk", weights_BxHxTxS.astype(v_BxTxHxK.dtype), v_BxTxHxK)


def causal_mask(q_positions_T: jax.Array, k_positions_S: jax.Array) -> jax.Array:
    """Returns float32 [T, S]: 0 where the key's position is not after the query's, else MASKED."""
    return jnp.where(q_positions_T[:, None] >= k_positions_S[None, :], 0.0, MASKED)


def document_mask(q_starts_BxT: jax.Array, k_starts_BxS: jax.Array) -> jax.Array:
    """Returns float32 [B, 1, T, S]: 0 where the documents of query and key have the same start, else MASKED."""
    return jnp.where(q_starts_BxT[:, None, :, None] == k_starts_BxS[:, None, None, :], 0.0, MASKED)


def cache_axes(rows: int) -> tuple[str | None, ...]:
    """Returns the logical names of the axes of a cache of keys or values, see `cache_shape`."""
    return ("batch", "heads", None, "kv")[rows == 1 :]


def cache_shape(rows: int, capacity: int, heads: int, kv: int) -> tuple[int, ...]:
    """Returns the shape of a cache of keys or values: [B, H, S, K], or [H, S, K] for a batch of one.

    XLA's CPU backend removes axes of size 1, and would then copy the whole cache for each new token.
    """
    return (rows, heads, capacity, kv)[rows == 1 :]


def fill(cache: jax.Array, x_BxTxHxK: jax.Array) -> jax.Array:
    """Returns the cache (see `cache_shape`) with keys or values [B, T, H, K] in its first T slots."""
    x_BxHxTxK = x_BxTxHxK.transpose(0, 2, 1, 3).astype(cache.dtype)
    first = x_BxHxTxK if cache.ndim == 4 else x_BxHxTxK[0]
    return jax.lax.dynamic_update_slice(cache, first, (0,) * cache.ndim)


def decode(
    q_BxHxK: jax.Array,
    k_BxHxK: jax.Array,
    v_BxHxK: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `dense` for one new token in each row, with the keys and values of earlier tokens in a cache.

    Args:
      q_BxHxK: queries of the new tokens.
      k_BxHxK: keys of the new tokens.
      v_BxHxK: values of the new tokens.
      keys: cache of keys (see `cache_shape`), filled in the slots before `position_B`.
      values: cache of values, likewise.
      position_B: positions of the new tokens, less than the capacity of the cache. They may differ between rows.

    Returns:
      [B, H, K] in the dtype of `v_BxHxK`, and the two caches with the new token in slot `position_B`.
    """

    def attend(q_HxK, k_HxK, v_HxK, keys_HxSxK, values_HxSxK, position):
        start = (0, position, 0)
        keys_HxSxK = jax.lax.dynamic_update_slice(keys_HxSxK, k_HxK[:, None].astype(keys_HxSxK.dtype), start)
        values_HxSxK = jax.lax.dynamic_update_slice(values_HxSxK, v_HxK[:, None].astype(values_HxSxK.dtype), start)
        # Without the barrier, XLA repeats the update for each use, into a copy of the whole cache.
        keys_HxSxK, values_HxSxK = jax.lax.optimization_barrier((keys_HxSxK, values_HxSxK))
        scaled_HxK = q_HxK / math.sqrt(q_HxK.shape[-1])
        scores_HxS = jnp.einsum("hk,hsk->hs", scaled_HxK, keys_HxSxK, preferred_element_type=jnp.float32)
        mask_1xS = causal_mask(position[None], jnp.arange(keys_HxSxK.shape[1]))
        weights_HxS = jax.nn.softmax(scores_HxS + mask_1xS, axis=-1).astype(v_HxK.dtype)
        return jnp.einsum("hs,hsk->hk", weights_HxS, values_HxSxK), keys_HxSxK, values_HxSxK

    if keys.ndim == 4:
        return jax.vmap(attend)(q_BxHxK, k_BxHxK, v_BxHxK, keys, values, position_B)
    out_HxK, keys, values = attend(q_BxHxK[0], k_BxHxK[0], v_BxHxK[0], keys, values, position_B[0])
    return out_HxK[None], keys, values
