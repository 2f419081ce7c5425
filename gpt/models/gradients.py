"""Operations whose gradients JAX would compute too slowly or not exactly enough.

Shape suffixes: R rows, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp

from gpt.models import mesh


@jax.custom_vjp
def product(x_RxI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """Returns x·kernel, with a gradient for the kernel that has the kernel's own memory layout.

    JAX's default gradient is transposed, which makes the optimizer's passes over it slow on a CPU.
    """
    return x_RxI @ kernel_IxO


def _product_backward(saved, dy):
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return dy @ kernel.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


@jax.custom_vjp
def lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns table[indices]. Its gradient is summed in float32: in bfloat16, sums of more than 256 equal terms stop.

    Args:
      table: [size, width].
      indices: integers of any shape, at least 0 and less than `size`.
    """
    return jnp.take(table, indices, axis=0)


def _lookup_backward(saved, dy):
    table, indices = saved
    return jnp.zeros(table.shape, jnp.float32).at[indices].add(dy).astype(table.dtype), None


lookup.defvjp(lambda table, indices: (lookup(table, indices), (table, indices)), _lookup_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x + bias for a bias of the last axes of x. As in `lookup`, the gradient is summed in float32."""
    return x + bias


def _add_bias_backward(axes, dy):
    rows = dy.ndim - axes
    if mesh.platform() == "tpu" and axes > 1 and rows > 1:  # a TPU is slow at sums over the tokens that leave the heads
        ones = jnp.ones((8, *dy.shape[:rows]), dy.dtype)  # of fewer rows than 8, the compiler makes a sum again
        return dy, jnp.tensordot(ones, dy, rows)[0]
    return dy, dy.sum(range(rows), dtype=jnp.float32).astype(dy.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, bias.ndim), _add_bias_backward)
