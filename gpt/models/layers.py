"""Layers that the model families share. Every parameter declares the logical names of its axes.

`gpt/sharding.py` maps these names (`embed`, `heads`, `kv`, `mlp`, `vocab`, `layers`, …) to mesh axes. The layers do not
know the mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


class Linear(nn.Module):
    """y = x·kernel + bias over the last `len(in_shape)` axes of x.

    Attributes:
      in_shape: sizes of the axes of x that are contracted.
      out_shape: sizes of the axes that take their place.
      axes: logical names of the kernel's axes, those of `in_shape` followed by those of `out_shape`.
      kernel_init: initializer of the kernel, which has the shape (*in_shape, *out_shape).
      use_bias: whether to add a bias of shape `out_shape`, initialized with zeros.
      dtype: dtype of the computation. Parameters are float32.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., *out_shape] for x of shape [..., *in_shape]."""
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, (*self.in_shape, *self.out_shape))
        rows = x.shape[: x.ndim - len(self.in_shape)]
        width = math.prod(self.in_shape)
        x = merged_rows(x.reshape(*rows, width).astype(self.dtype))
        y = product(x, kernel.astype(self.dtype).reshape(width, -1))
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.axes[len(self.in_shape) :], self.out_shape)
            y = y + bias.astype(self.dtype).reshape(-1)
        return y.reshape(*rows, *self.out_shape)


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last axes, computed in float32.

    Attributes:
      kind: "layernorm", "rmsnorm" or, with a scale of 1 + parameter as in Gemma (arXiv 2403.08295), "rmsnorm_plus1".
      use_bias: whether LayerNorm adds a bias. RMSNorm never does.
      dtype: dtype of the result.
      epsilon: number added to the variance or mean square.
      axes: logical names of the axes that are normalized together.
    """

    kind: str
    use_bias: bool
    dtype: jnp.dtype
    epsilon: float = 1e-5
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalized, in the same shape."""
        shape, rows = x.shape, x.ndim - len(self.axes)
        sizes = shape[rows:]
        x = x.astype(jnp.float32).reshape(*shape[:rows], -1)
        if rows == 2:  # batch and length; heads may be sharded, so that they are not merged with these
            x = merged_rows(x)
        if self.kind == "layernorm":
            x = x - x.mean(axis=-1, keepdims=True)
        is_offset = self.kind == "rmsnorm_plus1"
        init = nn.initializers.zeros if is_offset else nn.initializers.ones
        scale = parameter(self, "scale", init, self.axes, sizes).reshape(-1)
        x = unit_rms(x, self.epsilon) * (1 + scale if is_offset else scale)
        if self.use_bias and self.kind == "layernorm":
            x = x + parameter(self, "bias", nn.initializers.zeros, self.axes, sizes).reshape(-1)
        return x.astype(self.dtype).reshape(shape)


class Embedding(nn.Module):
    """A table of `size` vectors of `width` numbers, looked up by index.

    Attributes:
      axis: logical name of the table's first axis. The second is `embed`.
      table_init: initializer of the table.
      dtype: dtype of the result.
    """

    size: int
    width: int
    axis: str
    table_init: Initializer
    dtype: jnp.dtype

    def setup(self):
        self.embedding = parameter(self, "embedding", self.table_init, (self.axis, "embed"), (self.size, self.width))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Returns the vectors [..., width] of the integer `indices` [...]."""
        # The partitioner cannot look up in a table that is sharded over its width, so the width is gathered first.
        table = nn.with_logical_constraint(self.embedding.astype(self.dtype), (self.axis, None))
        return jnp.take(table, indices, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """Returns the products [..., size] of x [..., width] with every vector, for a tied output head."""
        y = product(merged_rows(x.astype(self.dtype)), self.embedding.astype(self.dtype).T)
        return y.reshape(*x.shape[:-1], self.size)


def parameter(module: nn.Module, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple) -> jax.Array:
    """Returns the float32 parameter `name` of `module`, whose axes have the logical names `axes`."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return value


def unit_rms(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Divides x by its root mean square along the last axis, computed in float32."""
    x_32 = x.astype(jnp.float32)
    return (x_32 * jax.lax.rsqrt(jnp.square(x_32).mean(axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Computes the tanh approximation of GELU (arXiv 1606.08415), as in GPT-2.

    The form x·sigmoid(2u) equals x·(1 + tanh u)/2 and is much faster on a CPU.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv 2109.08668
    "silu": jax.nn.silu,
}


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


def merged_rows(x: jax.Array) -> jax.Array:
    """Reshapes [..., width] to [rows, width], unless the mesh shards the length.

    XLA's CPU backend is slow where it contracts or sums over several axes, as in the gradients of kernels and biases.
    A sharded length cannot be merged with a sharded batch: the merged axis would have no sharding.
    """
    return x if mesh_axes("length") != ((),) else x.reshape(-1, x.shape[-1])


def mesh_axes(*names: str | None) -> tuple[tuple[str, ...], ...]:
    """Returns, for each logical axis, the axes of the current mesh that shard it, without those of size 1."""
    sizes = jax.sharding.get_abstract_mesh().shape
    spec = (nn.logical_to_mesh_axes(names) if sizes else None) or (None,) * len(names)
    every = [(axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else () for axes in spec]
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in every)
