"""Layers that the model families share. Every parameter carries the logical names of its axes.

The names (`embed`, `heads`, `kv`, `mlp`, `vocab`, `layers`, …) are mapped to mesh axes by the
one table in `gpt/sharding.py`; nothing here knows about a mesh.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (arXiv 1606.08415), as GPT-2 uses it.

    Written as x·sigmoid(2u), which equals x·(1 + tanh u)/2 and is much faster than tanh on a CPU.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv 2109.08668
    "silu": jax.nn.silu,
}


def mesh_axes(*names: str | None) -> tuple[tuple[str, ...], ...]:
    """For each logical axis of an array, the axes of the mesh in force that shard it: () where none does.

    Of size 1 are none of them: those make no difference.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    spec = nn.logical_to_mesh_axes(names) if sizes else (None,) * len(names)
    every = [(axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else () for axes in spec]
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in every)


def merged_rows(x: jax.Array) -> jax.Array:
    """[..., width] as [rows, width], for products of two axes and sums over one.

    XLA's CPU backend computes a product at half the speed where several axes are contracted, as in its gradient, and
    a sum over several axes, as in the gradient of a bias, at a tenth. Only
    where the mesh shards the length does it stay as it is: an axis merged of two sharded ones has no sharding.
    """
    return x if mesh_axes("length") != ((),) else x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def product(x_RxI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """x·kernel, whose gradient for the kernel is made in the kernel's own layout.

    JAX's own is made transposed, and on a CPU each use of it by the optimizer walks memory across its rows.
    """
    return x_RxI @ kernel_IxO


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return dy @ kernel.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """y = x·kernel + bias over the last `len(in_shape)` axes of x.

    Attributes:
      in_shape, out_shape: sizes of the axes contracted and produced.
      axes: logical names of the kernel's axes, those of `in_shape` and then those of `out_shape`.
      kernel_init: initializer of the kernel, called with the kernel's own shape.
      use_bias: whether to add a bias of shape `out_shape`, initially zero.
      dtype: dtype of the computation; parameters are float32.
      lora_rank, lora_scale: of the adapter that `gpt.lora` tells of; 0: none.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer
    use_bias: bool
    dtype: jnp.dtype
    lora_rank: int = 0
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (*self.in_shape, *self.out_shape))
        rows = x.shape[: x.ndim - len(self.in_shape)]
        width = math.prod(self.in_shape)
        x = merged_rows(x.reshape(*rows, width).astype(self.dtype))
        y = product(x, kernel.astype(self.dtype).reshape(width, -1))
        if self.lora_rank and (self.is_initializing() or self.has_variable("lora", "a")):
            a, b = self._adapter()
            scaled = self.lora_scale * (x @ a.astype(self.dtype).reshape(width, -1))
            y = y + scaled @ b.astype(self.dtype).reshape(self.lora_rank, -1)
        if self.use_bias:
            bias_axes = self.axes[len(self.in_shape) :]
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, bias_axes)
            y = y + self.param("bias", bias_init, self.out_shape).astype(self.dtype).reshape(-1)
        return y.reshape(*rows, *self.out_shape)

    def _adapter(self) -> tuple[jax.Array, jax.Array]:
        """The matrices from the input to the rank and from there to the output; the second begins with zeros."""
        inputs = len(self.in_shape)
        a_init = nn.initializers.normal(math.prod(self.in_shape) ** -0.5)
        shapes = (*self.in_shape, self.lora_rank), (self.lora_rank, *self.out_shape)
        axes = (*self.axes[:inputs], "rank"), ("rank", *self.axes[inputs:])

        def make(i, init):
            return nn.with_logical_partitioning(init, axes[i])(self.make_rng("params"), shapes[i])

        a = self.variable("lora", "a", make, 0, a_init)
        return a.value, self.variable("lora", "b", make, 1, nn.initializers.zeros).value


def unit_rms(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """x over its root mean square along the last axis, computed in float32."""
    x_32 = x.astype(jnp.float32)
    return (x_32 * jax.lax.rsqrt(jnp.square(x_32).mean(axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last axis, in float32.

    Attributes:
      kind: "layernorm" or "rmsnorm".
      use_bias: whether LayerNorm has a bias; RMSNorm has none.
      dtype: dtype of the result.
    """

    kind: str
    use_bias: bool
    dtype: jnp.dtype
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape
        x = merged_rows(x.astype(jnp.float32))
        width = x.shape[-1]
        if self.kind == "layernorm":
            x = x - x.mean(axis=-1, keepdims=True)
        x = unit_rms(x, self.epsilon)
        x = x * self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (width,))
        if self.use_bias and self.kind == "layernorm":
            x = x + self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (width,))
        return x.astype(self.dtype).reshape(shape)


class Embedding(nn.Module):
    """A table of `size` rows of `width` numbers, looked up by index.

    Attributes:
      axis: logical name of the table's first axis.
    """

    size: int
    width: int
    axis: str
    table_init: Initializer
    dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(self.table_init, (self.axis, "embed"))
        self.embedding = self.param("embedding", init, (self.size, self.width))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Rows of the table: [..., width] for integer `indices` of shape [...]."""
        # Rows whole on every device before the look-up: the partitioner cannot do one across a sharded width.
        table = nn.with_logical_constraint(self.embedding.astype(self.dtype), (self.axis, None))
        return jnp.take(table, indices, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with every row, for an output head tied to the embedding: [..., size]."""
        y = product(merged_rows(x.astype(self.dtype)), self.embedding.astype(self.dtype).T)
        return y.reshape(*x.shape[:-1], self.size)


def rotary(x_BxTxHxK: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs (i, i + K/2) of each head by an angle that grows with position (arXiv 2104.09864).

    Args:
      positions: of the tokens: [T], or [B, T] where rows differ.
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [(B,) T, 1, K/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


def stack_layers(tree: Any, stack: Callable[[list], Any] = jnp.stack) -> Any:
    """Arrays of `block_0`, `block_1`, … as those of one `blocks` with an axis for the layer in front.

    The first form is that of an unrolled model, the second that of one that scans over its layers.

    Args:
      tree: arrays in dictionaries and tuples, like parameters or the state of an optimizer.
      stack: makes one array of those of the layers.
    """

    def stack_blocks(tree: dict) -> dict:
        names = sorted((name for name in tree if re.fullmatch(r"block_\d+", name)), key=lambda name: int(name[6:]))
        if not names:
            return tree
        blocks = jax.tree.map(lambda *layers: stack(layers), *(tree[name] for name in names))
        return {name: value for name, value in tree.items() if name not in names} | {"blocks": blocks}

    return _map_dictionaries(stack_blocks, tree)


def unstack_layers(tree: Any) -> Any:
    """The reverse of `stack_layers`."""

    def unstack_blocks(tree: dict) -> dict:
        if "blocks" not in tree:
            return tree
        count = len(jax.tree.leaves(tree["blocks"])[0])
        blocks = {f"block_{i}": jax.tree.map(lambda layers, i=i: layers[i], tree["blocks"]) for i in range(count)}
        return {name: value for name, value in tree.items() if name != "blocks"} | blocks

    return _map_dictionaries(unstack_blocks, tree)


def _map_dictionaries(change: Callable[[dict], dict], tree: Any) -> Any:
    if isinstance(tree, dict):
        return change({name: _map_dictionaries(change, value) for name, value in tree.items()})
    if isinstance(tree, tuple):
        values = [_map_dictionaries(change, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree
