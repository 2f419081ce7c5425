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
    axes, shape = cache_axes(rows), (rows, config.kv_heads, capacity, config.head_dim)[rows == 1 :]
    if layers:
        axes, shape = ("layers", *axes), (layers, *shape)
    keys, values = (nn.with_logical_constraint(jnp.zeros(shape, config.dtype), axes) for _ in range(2))
    return {"attention": {"keys": keys, "values": values}}


def cache_axes(rows: int) -> tuple[str | None, ...]:
    """Returns the logical names of the axes of a cache of keys or values: [B, G, S, K], or [G, S, K] for one row.

    XLA's CPU backend removes axes of size 1, and would then copy the whole cache for each new token.
    """
    return ("batch", "heads", None, "kv")[rows == 1 :]


def fill_cache(module: nn.Module, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array) -> None:
    """Writes keys and values of tokens from position 0 on into the module's cache, if there is one."""
    if module.has_variable("cache", "keys"):
        for name, x_BxTxGxK in (("keys", k_BxTxGxK), ("values", v_BxTxGxK)):
            cache: jax.Array = module.get_variable("cache", name)
            x_BxGxTxK = x_BxTxGxK.transpose(0, 2, 1, 3).astype(cache.dtype)
            first = x_BxGxTxK if cache.ndim == 4 else x_BxGxTxK[0]
            _put(module, name, jax.lax.dynamic_update_slice(cache, first, (0,) * cache.ndim), len(x_BxTxGxK))


def decode_with_cache(
    module: Any,
    q_Bx1xHxK: jax.Array,
    k_Bx1xGxK: jax.Array,
    v_Bx1xGxK: jax.Array,
    positions_Bx1: jax.Array,
    window: int | jax.Array = 0,
) -> jax.Array:
    """Returns `attention.dense` [B, 1, H, K] of one new token in each row, and writes its key and value to the cache.

    Args:
      module: has the caches of keys and values, filled in the slots before the new token's.
      q_Bx1xHxK: queries of the new tokens.
      k_Bx1xGxK: keys of the new tokens.
      v_Bx1xGxK: values of the new tokens.
      positions_Bx1: positions of the new tokens, less than the capacity of the cache. They may differ between rows.
      window: see `attention.dense`; an array cannot mean 0.
    """

    def attend(q_HxK, k_GxK, v_GxK, keys_GxSxK, values_GxSxK, position):
        start = (0, position, 0)
        keys_GxSxK = jax.lax.dynamic_update_slice(keys_GxSxK, k_GxK[:, None].astype(keys_GxSxK.dtype), start)
        values_GxSxK = jax.lax.dynamic_update_slice(values_GxSxK, v_GxK[:, None].astype(values_GxSxK.dtype), start)
        # Without the barrier, XLA repeats the update for each use, into a copy of the whole cache.
        keys_GxSxK, values_GxSxK = jax.lax.optimization_barrier((keys_GxSxK, values_GxSxK))
        q_GxRxK = q_HxK.reshape(len(k_GxK), -1, q_HxK.shape[-1])
        scores_GxRxS = jnp.einsum("grk,gsk->grs", q_GxRxK, keys_GxSxK, preferred_element_type=jnp.float32)
        scores_GxRxS = soft_cap(scores_GxRxS, module.config.attention_softcap)
        mask_1xS = causal_mask(position[None], jnp.arange(keys_GxSxK.shape[1]), window)
        weights_GxRxS = jax.nn.softmax(scores_GxRxS + mask_1xS, axis=-1).astype(v_GxK.dtype)
        out_GxRxK = jnp.einsum("grs,gsk->grk", weights_GxRxS, values_GxSxK)
        return out_GxRxK.reshape(q_HxK.shape), keys_GxSxK, values_GxSxK

    q_BxHxK, k_BxGxK, v_BxGxK, position_B = (x[:, 0] for x in (q_Bx1xHxK, k_Bx1xGxK, v_Bx1xGxK, positions_Bx1))
    keys, values = (module.get_variable("cache", name) for name in ("keys", "values"))
    if keys.ndim == 4:
        out_BxHxK, keys, values = jax.vmap(attend)(q_BxHxK, k_BxGxK, v_BxGxK, keys, values, position_B)
    else:
        out_HxK, keys, values = attend(q_BxHxK[0], k_BxGxK[0], v_BxGxK[0], keys, values, position_B[0])
        out_BxHxK = out_HxK[None]
    _put(module, "keys", keys, len(out_BxHxK))
    _put(module, "values", values, len(out_BxHxK))
    return out_BxHxK[:, None]


def _put(module: nn.Module, name: str, cache: jax.Array, rows: int) -> None:
    module.put_variable("cache", name, nn.with_logical_constraint(cache, cache_axes(rows)))
