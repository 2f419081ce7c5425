"""The platform and the axes of the current mesh, and the sharding of what flows between layers.

Shape suffixes: B batch, T sequence length, D width.
"""

import math
from collections.abc import Iterable

import flax.linen as nn
import jax


def shard_residual(x_BxTxD: jax.Array) -> jax.Array:
    """Constrains the sharding of the residual stream, with its length over the axes of tensor parallelism too.

    Norms, sums and what they keep are then divided between the devices that share an example, and the all-reduce after
    each of their layers becomes a reduce-scatter, and an all-gather before the next (arXiv 2205.05198). A length that
    these axes do not divide, like the one token of a decoding step, is whole.
    """
    batch, length, embed, tensor = mesh_axes("batch", "length", "embed", "mlp")
    if not tensor or x_BxTxD.shape[1] % num_devices(length + tensor):
        return nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed"))
    return jax.lax.with_sharding_constraint(x_BxTxD, jax.P(batch, length + tensor, embed))


def platform() -> str:
    """Returns what the program is for: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def on_cpu() -> bool:
    """Returns whether the program is for a CPU. The two forms of a layer compute the same from the same parameters."""
    return platform() == "cpu"


def whole_on_cpu() -> bool:
    """Returns whether the program is for a CPU, and the mesh does not divide an example between devices."""
    return on_cpu() and mesh_axes("length", "mlp") == ((), ())


def merged_rows(x: jax.Array) -> jax.Array:
    """Reshapes [..., width] to [rows, width] on a CPU, unless the mesh divides an example between devices.

    XLA's CPU backend is slow where it contracts or sums over several axes, as in the gradients of kernels and biases.
    On an accelerator, merged axes cost copies. A sharded length cannot be merged with a sharded batch: the merged axis
    would have no sharding.
    """
    return x.reshape(-1, x.shape[-1]) if whole_on_cpu() else x


def mesh_axes(*names: str | None) -> tuple[tuple[str, ...], ...]:
    """Returns, for each logical axis, the axes of the current mesh that shard it, without those of size 1."""
    sizes = jax.sharding.get_abstract_mesh().shape
    spec = (nn.logical_to_mesh_axes(names) if sizes else None) or (None,) * len(names)
    every = [(axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else () for axes in spec]
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in every)


def num_devices(axes: Iterable[str]) -> int:
    """Returns the product of the sizes of some axes of the current mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)
