"""Layers that the model families share. Every parameter declares the logical names of its axes.

`gpt/sharding.py` maps these names (`embed`, `heads`, `kv`, `mlp`, `vocab`, `layers`, …) to mesh axes. The layers do not
know the mesh.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt.models import quantized
from gpt.models.gradients import add_bias, lookup, product
from gpt.models.mesh import merged_rows, on_cpu

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
      products: "dtype", or the format of the factors, a key of `quantized.FORMATS`.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer
    use_bias: bool
    dtype: jnp.dtype
    products: str = "dtype"

    @nn.compact
    def __call__(self, x: jax.Array, parts: tuple[tuple[int, int], ...] = ()) -> Any:
        """Returns [..., *out_shape] for x of shape [..., *in_shape].

        Args:
          x: activations.
          parts: shapes (heads, head size) of parts of the last two axes, see `split`. With them, the result is a list
            of arrays [..., heads, head size].
        """
        inputs, bias = len(self.in_shape), None
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, (*self.in_shape, *self.out_shape))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.axes[inputs:], self.out_shape).astype(self.dtype)
        if on_cpu():
            rows, width = x.shape[: x.ndim - inputs], math.prod(self.in_shape)
            y = multiply(merged_rows(x.reshape(*rows, width)), kernel.reshape(width, -1), 1, self.products)
            y = y if bias is None else add_bias(y, bias.reshape(-1))
            ys = split(y.reshape(*rows, *self.out_shape), parts)
        else:  # a product for each part, which the compiler writes in the memory layout that the next operation reads
            ys = [multiply(x, part, inputs, self.products) for part in split(kernel, parts)]
            ys = ys if bias is None else [add_bias(y, part) for y, part in zip(ys, split(bias, parts), strict=True)]
        ys = [checkpoint_name(y, self.name) for y in ys]
        return ys if parts else ys[0]


def split(x: jax.Array, parts: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """Splits the last axis of x, [..., G, J], and returns an array [..., heads, head size] for each of the parts.

    Each of the G heads of keys and values has as many heads of every part as the others. Without parts, returns [x].
    """
    if not parts:
        return [x]
    bounds = list(itertools.accumulate(heads * size // x.shape[-2] for heads, size in parts))
    return [
        each.reshape(*x.shape[:-2], *part) for each, part in zip(jnp.split(x, bounds[:-1], axis=-1), parts, strict=True)
    ]


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
        return lookup(table, indices)

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


def multiply(x: jax.Array, kernel: jax.Array, contracted: int, products: str) -> jax.Array:
    """Returns the product over the last `contracted` axes of x and the first ones of the kernel; see `Linear`."""
    if products != "dtype":
        return quantized.product(x, kernel, contracted, products)
    return product(x, kernel) if on_cpu() else jnp.tensordot(x, kernel, contracted)
