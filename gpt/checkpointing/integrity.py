"""Digests of arrays, which show whether restored values are those that were saved and whether all replicas are equal.

The digest of an array is a 32-bit integer that depends on its elements and their positions, but not on its sharding:
the sum of the elements' bits, each combined with its position and mixed by the finalizer of MurmurHash3 (A. Appleby).
The digests of the shards therefore add up to the digest of the array, and a part can be checked without the rest. A
change of one element always changes the digest; a change of several elements is missed with a probability of 2⁻³².
"""

import collections
import functools
import itertools
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt.runtime.errors import UserError
from gpt.sharding import axes_of_entry, path_name

MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # shifts and factors of MurmurHash3's finalizer
BLOCK = 1 << 18  # elements that the host mixes at a time, few enough to stay in a core's cache


class ReplicasDiffer(UserError):
    """Devices that have to hold the same values hold different ones."""


def digests(tree: Any) -> dict[str, int]:
    """Returns the digest of each array of a tree, by its path. Every process calls this.

    Args:
      tree: tree of jax.Array with shardings over one mesh.

    Raises:
      ReplicasDiffer: devices that hold the same part of an array hold different values.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names, arrays = [path_name(path) for path, _ in leaves], [leaf for _, leaf in leaves]
    mesh = arrays[0].sharding.mesh
    specs = tuple(array.sharding.spec for array in arrays)
    table = jax.device_get(_digest_on_each_device(mesh, specs)(*arrays)).reshape(*mesh.devices.shape, len(arrays))
    result = {}
    for i, (name, spec) in enumerate(zip(names, specs, strict=True)):
        sharded = {axis for axes in spec for axis in axes_of_entry(axes)}
        first = tuple(slice(None if axis in sharded else 1) for axis in mesh.axis_names)
        values = table[..., i]
        if (values != values[first]).any():
            raise ReplicasDiffer(f"{name} differs {_describe_differing(mesh, values, sharded)}")
        result[name] = int(values[first].sum(dtype=np.uint32))
    return result


def on_host(array: np.ndarray, origin: Sequence[int] = (), shape: Sequence[int] = ()) -> int:
    """Returns the digest of an array on the host, or of a part of a larger array.

    Args:
      origin: indices of the part's first element in the larger array.
      shape: shape of the larger array.
    """
    array = np.atleast_1d(array).view(f"u{array.dtype.itemsize}")
    shape, origin = shape or array.shape, origin or (0,) * array.ndim
    rows = max(1, BLOCK // max(1, math.prod(array.shape[1:])))
    blocks = ((start, array[start : start + rows].astype(np.uint32)) for start in range(0, len(array), rows))
    return sum(int(_digest(bits, (origin[0] + start, *origin[1:]), shape, np)) for start, bits in blocks) % 2**32


def chunks(shape: Sequence[int], chunk: Any) -> Iterator[tuple[slice, ...]]:
    """Yields the indices of each chunk of an array, row by row, from the shapes of the array and of a chunk."""
    grid = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for origin in itertools.product(*grid):
        yield tuple(slice(start, start + step) for start, step in zip(origin, chunk, strict=True))


@functools.lru_cache(maxsize=8)
def _digest_on_each_device(mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]):
    """Returns a jitted function (*arrays) -> uint32 [devices, arrays]: the digest of each shard of each array."""

    def on_device(*shards: jax.Array) -> jax.Array:
        result = []
        for shard, spec in zip(shards, specs, strict=True):
            names = [axes_of_entry(axes) for axes in spec] + [()] * (shard.ndim - len(spec))
            sizes = list(zip(names, shard.shape, strict=True))
            origin = [jax.lax.axis_index(axes) * size if axes else 0 for axes, size in sizes]
            shape = [size * math.prod(mesh.shape[axis] for axis in axes) for axes, size in sizes]
            bits = jax.lax.bitcast_convert_type(shard, f"uint{8 * shard.dtype.itemsize}").astype(jnp.uint32)
            result.append(_digest(bits, origin, shape, jnp))
        return jnp.stack(result)[None]

    each = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=jax.P(mesh.axis_names), check_vma=False)
    return jax.jit(each, out_shardings=jax.NamedSharding(mesh, jax.P()))


def _digest(bits: Any, origin: Sequence[Any], shape: Sequence[int], numpy: types.ModuleType) -> Any:
    """Returns the digest of a part of an array.

    Args:
      bits: the elements as uint32; overwritten if it is an array of NumPy.
      origin: indices of the part's first element in the array.
      shape: shape of the array.
      numpy: the module `numpy` or `jax.numpy`.
    """
    for axis, (size, first) in enumerate(zip(bits.shape, origin, strict=True)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) * 0x9E3779B9 % 2**32)  # of the number for a position
        positions = (numpy.arange(size, dtype=np.uint32) + numpy.uint32(first)) * stride
        bits ^= positions.reshape(-1, *(1,) * (bits.ndim - axis - 1))
    for shift, factor in MIX:
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    return bits.sum(dtype=np.uint32)


def _describe_differing(mesh: jax.sharding.Mesh, digests: np.ndarray, sharded: set[str]) -> str:
    """Returns which devices hold other values than the majority of the devices with the same part of an array.

    Args:
      digests: digest of each device's shard, in the shape of the mesh.
      sharded: mesh axes that the array is sharded over.
    """
    groups = collections.defaultdict(list)
    for index, device in np.ndenumerate(mesh.devices):
        part = tuple(i for i, axis in zip(index, mesh.axis_names, strict=True) if axis in sharded)
        groups[part].append((int(digests[index]), f"{device} (process {device.process_index})"))
    group = next(group for group in groups.values() if len({digest for digest, _ in group}) > 1)
    (common, count), *_ = collections.Counter(digest for digest, _ in group).most_common()
    if 2 * count > len(group):
        return f"on {', '.join(name for digest, name in group if digest != common)} from {count} other devices"
    return f"between {' and '.join(name for _, name in group)}"
