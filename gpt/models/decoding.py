"""Attention with a cache of keys and values, for generation: each new token costs one pass over that token alone.

Shape suffixes: B batch, T length of the prompt, S capacity of the cache, H heads of queries, G heads of keys and
values, R heads of queries in a group, K head size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models.attention import causal_mask, soft_cap
from gpt.models.base import ModelConfig


def block_cache(config: ModelConfig, rows: int, capacity: int, layers: int | None = None) -> dict[str, Any]:
    """Returns an empty cache for the keys and values of a block.

    Args:
      config: options of the block.
      rows: number of sequences in the batch.
      capacity: number of tokens in each row that the cache has room for.
      layers: the number of blocks if they are scanned: the arrays then have the layers as their first axis.
    """
    axes = cache_axes(rows)
    shape = cache_shape(rows, capacity, config.kv_heads, config.head_dim)
    if layers:
        axes, shape = ("layers", *axes), (layers, *shape)
    zeros = [nn.with_logical_constraint(jnp.zeros(shape, config.dtype), axes) for _ in range(2)]
    return {"attention": dict(zip(("keys", "values"), zeros, strict=True))}


def cache_axes(rows: int) -> tuple[str | None, ...]:
    """Returns the logical names of the axes of a cache of keys or values, see `cache_shape`."""
    return ("batch", "heads", None, "kv")[rows == 1 :]


def cache_shape(rows: int, capacity: int, heads: int, kv: int) -> tuple[int, ...]:
    """Returns the shape of a cache of keys or values: [B, G, S, K], or [G, S, K] for a batch of one.

    XLA's CPU backend removes axes of size 1, and would then copy the whole cache for each new token.
    """
    return (rows, heads, capacity, kv)[rows == 1 :]


def fill(cache: jax.Array, x_BxTxGxK: jax.Array) -> jax.Array:
    """Returns the cache (see `cache_shape`) with keys or values [B, T, G, K] in its first T slots."""
    x_BxGxTxK = x_BxTxGxK.transpose(0, 2, 1, 3).astype(cache.dtype)
    first = x_BxGxTxK if cache.ndim == 4 else x_BxGxTxK[0]
    return jax.lax.dynamic_update_slice(cache, first, (0,) * cache.ndim)


def decode(
    q_BxHxK: jax.Array,
    k_BxGxK: jax.Array,
    v_BxGxK: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position_B: jax.Array,
    *,
    window: int | jax.Array = 0,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `dense` for one new token in each row, with the keys and values of earlier tokens in a cache.

    Args:
      q_BxHxK: queries of the new tokens.
      k_BxGxK: keys of the new tokens.
      v_BxGxK: values of the new tokens.
      keys: cache of keys (see `cache_shape`), filled in the slots before `position_B`.
      values: cache of values, likewise.
      position_B: positions of the new tokens, less than the capacity of the cache. They may differ between rows.
      window: see `dense`; an array cannot mean 0.
      softcap: see `dense`.

    Returns:
      [B, H, K] in the dtype of `v_BxGxK`, and the two caches with the new token in slot `position_B`.
    """

    def attend(q_HxK, k_GxK, v_GxK, keys_GxSxK, values_GxSxK, position):
        start = (0, position, 0)
        keys_GxSxK = jax.lax.dynamic_update_slice(keys_GxSxK, k_GxK[:, None].astype(keys_GxSxK.dtype), start)
        values_GxSxK = jax.lax.dynamic_update_slice(values_GxSxK, v_GxK[:, None].astype(values_GxSxK.dtype), start)
        # Without the barrier, XLA repeats the update for each use, into a copy of the whole cache.
        keys_GxSxK, values_GxSxK = jax.lax.optimization_barrier((keys_GxSxK, values_GxSxK))
        q_GxRxK = q_HxK.reshape(len(k_GxK), -1, q_HxK.shape[-1])
        scores_GxRxS = jnp.einsum("grk,gsk->grs", q_GxRxK, keys_GxSxK, preferred_element_type=jnp.float32)
        mask_1xS = causal_mask(position[None], jnp.arange(keys_GxSxK.shape[1]), window)
        weights_GxRxS = jax.nn.softmax(soft_cap(scores_GxRxS, softcap) + mask_1xS, axis=-1).astype(v_GxK.dtype)
        out_GxRxK = jnp.einsum("grs,gsk->grk", weights_GxRxS, values_GxSxK)
        return out_GxRxK.reshape(q_HxK.shape), keys_GxSxK, values_GxSxK

    if keys.ndim == 4:
        return jax.vmap(attend)(q_BxHxK, k_BxGxK, v_BxGxK, keys, values, position_B)
    out_HxK, keys, values = attend(q_BxHxK[0], k_BxGxK[0], v_BxGxK[0], keys, values, position_B[0])
    return out_HxK[None], keys, values


def fill_cache(module: nn.Module, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array) -> None:
    """Writes keys and values of tokens from position 0 on into the module's cache, if there is one."""
    if module.has_variable("cache", "keys"):
        for name, x_BxTxGxK in (("keys", k_BxTxGxK), ("values", v_BxTxGxK)):
            _put(module, name, fill(module.get_variable("cache", name), x_BxTxGxK), len(x_BxTxGxK))


def decode_with_cache(
    module: Any,
    q_Bx1xHxK: jax.Array,
    k_Bx1xGxK: jax.Array,
    v_Bx1xGxK: jax.Array,
    positions_Bx1: jax.Array,
    window: int | jax.Array = 0,
) -> jax.Array:
    """Returns the attention [B, 1, H, K] of one new token in each row, and writes its key and value to the cache."""
    q_BxHxK, k_BxGxK, v_BxGxK = (x[:, 0] for x in (q_Bx1xHxK, k_Bx1xGxK, v_Bx1xGxK))
    keys: jax.Array = module.get_variable("cache", "keys")
    values: jax.Array = module.get_variable("cache", "values")
    options = {"window": window, "softcap": module.config.attention_softcap}
    out_BxHxK, keys, values = decode(q_BxHxK, k_BxGxK, v_BxGxK, keys, values, positions_Bx1[:, 0], **options)
    _put(module, "keys", keys, len(out_BxHxK))
    _put(module, "values", values, len(out_BxHxK))
    return out_BxHxK[:, None]


def _put(module: nn.Module, name: str, cache: jax.Array, rows: int) -> None:
    module.put_variable("cache", name, nn.with_logical_constraint(cache, cache_axes(rows)))
