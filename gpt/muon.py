"""Muon, an optimizer for matrices, with the work spread over the devices of a mesh."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt.models.mesh import mesh_axes, num_devices


def scale_by_muon(momentum: float, logical_axes: Any) -> optax.GradientTransformation:
    """Returns Muon: it orthogonalizes the momentum of each matrix (Jordan et al. 2024).

    See https://kellerjordan.github.io/posts/muon. Updates are scaled to a root mean square of about 0.2, like Adam's,
    so that both share a learning rate (arXiv 2502.16982). Matrices of the same shape and sharding are stacked, and each
    device orthogonalizes a part of them.

    Args:
      momentum: decay rate of the mean of gradients. The momentum is Nesterov's.
      logical_axes: for each parameter, the logical names of its axes as a PartitionSpec.
    """

    def orthogonalized(updates, params=None):
        names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, jax.P))
        leaves, structure = jax.tree.flatten(updates)
        groups = collections.defaultdict(list)
        for i, (x, axes) in enumerate(zip(leaves, names, strict=True)):
            start = int(axes[0] == "layers")
            groups[x.shape[start:], tuple(axes[start:])].append(i)
        for (shape, axes), members in groups.items():
            parts = [leaves[i].reshape(-1, *shape) for i in members]
            stacked = spread_over_devices(functools.partial(orthogonal_update, axes), jnp.concatenate(parts), axes)
            bounds = np.cumsum([len(part) for part in parts])[:-1]
            for i, part in zip(members, jnp.split(stacked, bounds), strict=True):
                leaves[i] = part.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, leaves)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(orthogonalized))


def orthogonal_update(axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    """Returns Muon's update for stacked kernels, [number, *shape], of which each is orthogonalized as a matrix.

    Optax's Muon has no momentum here: that of `scale_by_muon` is sharded like the parameters.

    Args:
      axes: logical names of a kernel's axes. It has `embed` as its inputs or as its outputs.
    """
    middle = 2 if axes[0] == "embed" else x.ndim - 1
    sides = optax.contrib.MuonDimensionNumbers(tuple(range(1, middle)), tuple(range(middle, x.ndim)))
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, eps=1e-7, weight_dimension_numbers=sides)
    largest = max(math.prod(x.shape[1:middle]), math.prod(x.shape[middle:]))
    return 0.2 * largest**0.5 * muon.update(x, muon.init(x))[0]


def spread_over_devices(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, axes: tuple[str | None, ...]
) -> jax.Array:
    """Returns `function(x)`, for a function of each item of x, with the items spread over the current mesh.

    The devices exchange shards of all items for some items as a whole, and shards of the results after the function. If
    there are fewer items than devices, mesh axes that are not needed shard the function as they shard the items.

    Args:
      x: items of one shape, [number, *shape].
      axes: logical names of an item's axes.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes:
        return function(x)
    over = mesh_axes(*axes)
    sharding = [axis for axes in over for axis in reversed(axes)]
    used: list[str] = []
    for axis in dict.fromkeys([*sharding, *sizes]):
        if num_devices(used) < len(x):
            used.append(axis)
    # The mesh axes move to the number one by one: each is an all-to-all, but several at once would be all-gathers.
    layouts = [[(), *over], [tuple(axis for axis in used if axis not in sharding), *over]]
    for axis in used:
        if axis in sharding:
            first, *rest = layouts[-1]
            layouts.append([(*first, axis), *(tuple(a for a in axes if a != axis) for axes in rest)])
    rows = len(x)
    x = jnp.pad(x, [(0, -rows % num_devices(used)), *[(0, 0)] * (x.ndim - 1)])
    for layout in layouts[1:]:
        x = jax.lax.with_sharding_constraint(x, jax.P(*layout))
    x = function(x)
    for layout in reversed(layouts):
        x = jax.lax.with_sharding_constraint(x, jax.P(*layout))
    return x[:rows]
