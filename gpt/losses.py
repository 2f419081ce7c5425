"""The loss of the tokens of a batch, from the logits or from the last activations.

Shape suffixes: B batch, T sequence length, D width, V padded vocabulary, P shards of the batch, Q shards of the length,
R tokens in a shard.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.data.base import IGNORED
from gpt.models.gpt import GPTConfig, finish_logits
from gpt.models.mesh import mesh_axes, num_devices


def token_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each target in nats, [B, T]; 0 where the target is `IGNORED`.

    For classes, the logits are [B, V], and targets and losses [B].
    """
    losses_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - jnp.sum(
        jnp.where(is_target(targets_BxT, logits_BxTxV), logits_BxTxV, 0), axis=-1
    )
    return jnp.where(targets_BxT != IGNORED, losses_BxT, 0)


def is_target(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns a mask of the shape of the logits. It needs no gather across a sharded vocabulary, as indexing would."""
    return targets[..., None] == jnp.arange(logits.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_loss(
    config: GPTConfig, chunks: int, z_loss: float, x_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array
) -> jax.Array:
    """Returns the sum of `token_losses` for the last activations, with less memory than the logits need.

    The gradient is computed together with the loss, while the logits are at hand: the backward pass reads and computes
    none of them again (as in Liger Kernel, arXiv 2410.10989). The tokens can be divided into chunks that are computed
    one after the other, so that only the logits of one chunk exist at a time.

    Args:
      config: the resolved config of the model.
      chunks: number of chunks, which divides the length of a device's shard.
      z_loss: weight of the squared logarithm of the softmax's denominator (arXiv 2204.02311). Only the gradient has it,
        so that the loss remains the cross-entropy.
      x_BxTxD: activations after the last norm.
      head_VxD: the token embedding or the head.
      targets_BxT: int32.
    """
    return _loss_and_gradients(config, chunks, z_loss, x_BxTxD, head_VxD, targets_BxT)[0]


def _loss_and_gradients(
    config: GPTConfig, chunks: int, z_loss: float, x_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array
) -> tuple[jax.Array, Any]:
    """Returns the loss and its gradients for the activations and the head."""
    dtype = x_BxTxD.dtype
    gathered_VxD = nn.with_logical_constraint(head_VxD.astype(dtype), ("vocab", None))
    p, q = map(num_devices, mesh_axes("batch", "length"))
    batch, length, width = x_BxTxD.shape

    def divided(x: jax.Array) -> jax.Array:  # [B, T, …] -> [chunks, P, Q, R, …]
        x = x.reshape(p, batch // p, q, chunks, length // (q * chunks), *x.shape[2:])
        x = jnp.moveaxis(x, (3, 2), (0, 2)).reshape(chunks, p, q, -1, *x.shape[5:])
        return nn.with_logical_constraint(x, (None, "batch", "length") + (None,) * (x.ndim - 3))

    def add(total: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]) -> Any:
        x_PxQxRxD, targets_PxQxR = chunk
        raw = jnp.einsum("pqrd,vd->pqrv", x_PxQxRxD, gathered_VxD)
        raw = nn.with_logical_constraint(raw, ("batch", "length", None, "vocab"))
        logits, finish_gradient = jax.vjp(functools.partial(finish_logits, config), raw)
        counts = (targets_PxQxR != IGNORED)[..., None]
        log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        softmax = jnp.exp(logits - log_sum) * (1 + 2 * z_loss * log_sum)
        (slope,) = finish_gradient(jnp.where(counts, softmax - is_target(targets_PxQxR, logits), 0))
        head_PxQxVxD = jnp.einsum("pqrv,pqrd->pqvd", slope, x_PxQxRxD, preferred_element_type=total[1].dtype)
        total = total[0] + token_losses(logits, targets_PxQxR).sum(), total[1] + head_PxQxVxD
        return total, jnp.einsum("pqrv,vd->pqrd", slope, gathered_VxD)

    # Each shard adds up its own gradient of the head; they are added to each other at the end, not for each chunk.
    head_PxQxVxD = jnp.zeros((p, q, *head_VxD.shape), dtype if chunks == 1 else jnp.float32)
    total = jnp.zeros(()), nn.with_logical_constraint(head_PxQxVxD, ("batch", "length", "vocab", None))
    (loss, head_PxQxVxD), x_gradient = jax.lax.scan(add, total, (divided(x_BxTxD), divided(targets_BxT)))
    x_gradient = x_gradient.reshape(chunks, p, q, batch // p, length // (q * chunks), width)
    x_gradient = jnp.moveaxis(x_gradient, (0, 2), (3, 2)).reshape(x_BxTxD.shape)
    return loss, (x_gradient, head_PxQxVxD.astype(dtype).sum(axis=(0, 1)).astype(head_VxD.dtype))


def _backward(config: GPTConfig, chunks: int, z_loss: float, gradients: tuple, slope: jax.Array) -> tuple:
    return *((slope * gradient).astype(gradient.dtype) for gradient in gradients), None


fused_loss.defvjp(_loss_and_gradients, _backward)
