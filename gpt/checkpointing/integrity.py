"""Digests of arrays: are the numbers that were restored those that were saved, and do all devices hold the same?

The digest of an array is a number of 32 bits that depends on its elements and their places, and not on how the array
is sharded: the elements' bits, mixed by the finalizer of MurmurHash3 (A. Appleby), are added up as integers. So the
digests of its shards add up to the array's own, and a part can be checked without the rest. A change of one element
always changes the sum; a change of several goes unnoticed once in 2³² times.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt.runtime.errors import UserError
from gpt.sharding import path_name

MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
BLOCK = 1 << 18  # elements that the host mixes at a time: they stay in a core's cache


class ReplicasDiffer(UserError):
    """Devices that have to hold the same numbers hold different ones."""


def digests(tree: Any) -> dict[str, int]:
    """The digest of each array of a tree, by its path, after a comparison of all replicas on all devices.

    Args:
      tree: arrays of jax.Array with shardings over one mesh. Called by every process.

    Raises:
      ReplicasDiffer: a device holds other numbers than those that hold the same part of an array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names, arrays = [path_name(path) for path, _ in leaves], [leaf for _, leaf in leaves]
    mesh = arrays[0].sharding.mesh
    specs = tuple(array.sharding.spec for array in arrays)
    table = jax.device_get(_digest_on_each_device(mesh, specs)(*arrays)).reshape(*mesh.devices.shape, len(arrays))
    found = {}
    for i, (name, spec) in enumerate(zip(names, specs, strict=True)):
        sharded = {axis for axes in spec for axis in _axes(axes)}
        first = tuple(slice(None if axis in sharded else 1) for axis in mesh.axis_names)
        values = table[..., i]
        if (values != values[first]).any():
            raise ReplicasDiffer(f"{name} differs {_which(mesh, values, sharded)}")
        found[name] = int(values[first].sum(dtype=np.uint32))
    return found


def on_host(array: np.ndarray, origin: Sequence[int] = (), shape: Sequence[int] = ()) -> int:
    """The digest of an array on the host, or of the part of an array of `shape` that begins at `origin`."""
    array = np.atleast_1d(array).view(f"u{array.dtype.itemsize}")
    shape, origin = shape or array.shape, origin or (0,) * array.ndim
    rows = max(1, BLOCK // max(1, math.prod(array.shape[1:])))
    result = 0
    for start in range(0, len(array), rows):
        bits = array[start : start + rows].astype(np.uint32)
        for axis, (size, first) in enumerate(zip(bits.shape, (origin[0] + start, *origin[1:]), strict=True)):
            places = np.arange(first, first + size, dtype=np.uint32) * _stride(shape, axis)
            bits ^= places.reshape(-1, *(1,) * (bits.ndim - axis - 1))
        for shift, factor in MIX:
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        bits ^= bits >> np.uint32(16)
        result += int(bits.sum(dtype=np.uint32))
    return result % 2**32


@functools.lru_cache(maxsize=8)
def _digest_on_each_device(mesh: Mesh, specs: tuple[P, ...]):
    """Compiles (*arrays) -> uint32 [devices, arrays]: each device's digest of the parts that it holds itself."""

    def on_device(*parts: jax.Array) -> jax.Array:
        found = []
        for part, spec in zip(parts, specs, strict=True):
            names = [_axes(axes) for axes in spec] + [()] * (part.ndim - len(spec))
            origin = [
                jax.lax.axis_index(axes) * size if axes else 0 for axes, size in zip(names, part.shape, strict=True)
            ]
            shape = [
                size * math.prod(mesh.shape[axis] for axis in axes)
                for axes, size in zip(names, part.shape, strict=True)
            ]
            found.append(_digest(part, origin, shape))
        return jnp.stack(found)[None]

    each = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)
    return jax.jit(each, out_shardings=jax.NamedSharding(mesh, P()))


def _digest(part: jax.Array, origin: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}").astype(jnp.uint32)
    for axis, first in enumerate(origin):
        places = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + jnp.uint32(first)
        bits ^= places * _stride(shape, axis)
    for shift, factor in MIX:
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def _stride(shape: Sequence[int], axis: int) -> np.uint32:
    return np.uint32(math.prod(shape[axis + 1 :]) * 0x9E3779B9 % 2**32)


def _axes(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _which(mesh: Mesh, values: np.ndarray, sharded: set[str]) -> str:
    """Says which devices hold other numbers than most of those that have to hold the same."""
    groups = collections.defaultdict(list)
    for place, device in np.ndenumerate(mesh.devices):
        part = tuple(i for i, axis in zip(place, mesh.axis_names, strict=True) if axis in sharded)
        groups[part].append((int(values[place]), f"{device} (process {device.process_index})"))
    group = next(group for group in groups.values() if len({value for value, _ in group}) > 1)
    (common, count), *_ = collections.Counter(value for value, _ in group).most_common()
    if 2 * count > len(group):
        return f"on {', '.join(name for value, name in group if value != common)} from {count} other devices"
    return f"between {' and '.join(name for _, name in group)}"
