"""Matrix products with factors of 8 bits, for `model.products`. Accelerators compute them at up to twice the speed.

The method is SwitchBack (arXiv 2304.13013): the products of the forward pass and of the gradients of activations have
factors of 8 bits; those of the gradients of kernels, which sum over all tokens, keep the dtype of the activations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# The format of activations and kernels, that of gradients (which have more outliers), and the dtype of the sums.
FORMATS = {
    "int8": (jnp.int8, jnp.int8, jnp.int32),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32),  # arXiv 2209.05433
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, contracted: int, kind: str) -> jax.Array:
    """Returns the product over the last axes of x and the first axes of the kernel, in the dtype of x.

    Args:
      x: [..., *in]. Each row, the numbers of the contracted axes, has its own scale.
      kernel: [*in, *out]. It has one scale.
      contracted: number of axes in `in`.
      kind: a key of `FORMATS`.
    """
    return _forward(x, kernel, contracted, kind)[0]


def _forward(x: jax.Array, kernel: jax.Array, contracted: int, kind: str) -> tuple[jax.Array, Any]:
    kept, _, sums = FORMATS[kind]
    factors, scale = quantized(kernel, kernel.ndim, kept)
    return _scaled_product(x, factors, scale, contracted, kept, sums), (x, factors, scale)


def _backward(contracted: int, kind: str, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, factors, scale = saved
    _, gradients, sums = FORMATS[kind]
    outputs, rows = factors.ndim - contracted, tuple(range(x.ndim - contracted))
    transposed = jnp.moveaxis(factors, range(contracted), range(outputs, factors.ndim))
    dx = _scaled_product(dy, transposed, scale, outputs, gradients, sums)
    return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


product.defvjp(_forward, _backward)


def _scaled_product(
    x: jax.Array, factors: jax.Array, scale: jax.Array, contracted: int, dtype: Any, sums: Any
) -> jax.Array:
    """Returns `product` for a kernel that is quantized already, with x quantized to `dtype`."""
    x_factors, x_scale = quantized(x, contracted, dtype)
    axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    y = jax.lax.dot_general(x_factors, factors, (axes, ((), ())), preferred_element_type=sums)
    return (y * jnp.expand_dims(x_scale * scale, tuple(range(x_scale.ndim, y.ndim)))).astype(x.dtype)


def quantized(x: jax.Array, axes: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns numbers of 8 bits, in the shape of x, and their scales: x is about their product.

    Args:
      axes: number of last axes that share a scale; the scales have the shape of the other axes.
      dtype: an integer or floating-point type of 8 bits, whose largest number becomes that of x.
    """
    shared = tuple(range(x.ndim - axes, x.ndim))
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    largest = jnp.abs(x).max(shared, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / limit, 1.0)
    factors = x / scale
    return (jnp.round(factors) if is_integer else factors).astype(dtype), scale.squeeze(shared)
