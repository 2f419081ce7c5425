"""Attention over [batch, length, heads, head size] tensors.

`gpt/models/kernels.py` has other implementations of `dense` with less memory use, and `gpt/models/decoding.py` its form
for one new token, which this file does not need.

Keys and values may have fewer heads than queries (grouped-query attention, arXiv 2305.13245): with H = G·R, each of
their G heads serves R consecutive heads of queries.

Shape suffixes: B batch, T query length, S key length, H heads of queries, G heads of keys and values, R heads of
queries in a group, K head size.
"""

import jax
import jax.numpy as jnp

from gpt.models.mesh import whole_on_cpu

# Far below any real score, but finite: the softmax of a fully masked row has no NaN.
MASKED = -1e30


def dense(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    starts_BxT: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(q·kᵀ + mask)·v with the softmax in float32 (arXiv 1706.03762).

    Args:
      q_BxTxHxK: queries, which are divided by √K already.
      k_BxTxGxK: keys.
      v_BxTxGxK: values.
      starts_BxT: for each token, the index of the first token of its document. A token attends to its own document
        only. None means that each row is one document.
      causal: whether a token attends only to itself and to earlier tokens.
      window: number of tokens that a token attends to, itself included; 0: all. Only for causal attention.
      softcap: see `soft_cap`.
      dropout_rate: probability of dropping an attention weight.
      dropout_key: random key of the dropout mask. None means no dropout.

    Returns:
      [B, T, H, K] in the dtype of `v_BxTxGxK`.
    """
    batch, length, heads, _ = q_BxTxHxK.shape
    groups, positions = v_BxTxGxK.shape[2], jnp.arange(length)
    keep_BxHxTxT = None
    if dropout_key is not None and dropout_rate > 0:
        keep_BxHxTxT = jax.random.bernoulli(dropout_key, 1 - dropout_rate, (batch, heads, length, length))
    # On a CPU, each of up to four blocks of queries takes only the keys that one of them may see.
    size = max(64, -(-length // 4)) if causal and whole_on_cpu() else length
    outs = []
    for start in range(0, length, size):
        queries, keys = slice(start, start + size), slice(max(0, start - window + 1) if window else 0, start + size)
        mask = causal_mask(positions[queries], positions[keys], window) if causal else 0.0
        if starts_BxT is not None:
            mask = mask + document_mask(starts_BxT[:, queries], starts_BxT[:, keys])
        weights_BxHxTxS = attention_weights(q_BxTxHxK[:, queries], k_BxTxGxK[:, keys], mask, softcap)
        if keep_BxHxTxT is not None:
            weights_BxHxTxS = weights_BxHxTxS * keep_BxHxTxT[:, :, queries, keys] / (1 - dropout_rate)
        shape = batch, groups, heads // groups, *weights_BxHxTxS.shape[2:]
        weights_BxGxRxTxS = weights_BxHxTxS.astype(v_BxTxGxK.dtype).reshape(shape)
        outs.append(jnp.einsum("bgrts,bsgk->btgrk", weights_BxGxRxTxS, v_BxTxGxK[:, keys]))
    return jnp.concatenate(outs, axis=1).reshape(q_BxTxHxK.shape)


def attention_weights(q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, mask: jax.Array | float, softcap: float) -> jax.Array:
    """Returns the attention weights of `dense` before dropout, float32 [B, H, T, S], from scores plus the mask."""
    batch, length, heads, kv = q_BxTxHxK.shape
    groups = k_BxSxGxK.shape[2]
    q_BxTxGxRxK = q_BxTxHxK.reshape(batch, length, groups, heads // groups, kv)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxSxGxK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(soft_cap(scores.reshape(batch, heads, length, -1), softcap) + mask, axis=-1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Returns cap·tanh(x/cap), which lies between -cap and cap, as in Gemma 2 (arXiv 2408.00118); 0: returns x."""
    return cap * jnp.tanh(x / cap) if cap else x


def causal_mask(q_positions_T: jax.Array, k_positions_S: jax.Array, window: int | jax.Array = 0) -> jax.Array:
    """Returns float32 [T, S]: 0 where the query may attend to the key, else MASKED.

    The key's position must not be after the query's and, with a window, must be one of the last `window` positions.
    """
    distance_TxS = q_positions_T[:, None] - k_positions_S[None, :]
    is_visible = distance_TxS >= 0
    if not isinstance(window, int) or window:
        is_visible &= distance_TxS < window
    return jnp.where(is_visible, 0.0, MASKED)


def document_mask(q_starts_BxT: jax.Array, k_starts_BxS: jax.Array) -> jax.Array:
    """Returns float32 [B, 1, T, S]: 0 where the documents of query and key have the same start, else MASKED."""
    return jnp.where(q_starts_BxT[:, None, :, None] == k_starts_BxS[:, None, None, :], 0.0, MASKED)
