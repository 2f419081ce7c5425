"""Norms and histograms of the single parameters of each layer, whether the layers are unrolled or scanned."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt.sharding import Layout, path_name

BINS = 30  # of a histogram; TensorBoard shows as many


def names(params: Any, logical_axes: Any) -> list[str]:
    """Returns the names of the parameters of each layer, such as "block_0/mlp/up/kernel".

    Args:
      params: a tree of parameters, or of their shapes.
      logical_axes: for each parameter, the logical names of its axes as a PartitionSpec.
    """
    found = []
    for (path, x), axes in zip(jax.tree_util.tree_leaves_with_path(params), _leaves(logical_axes), strict=True):
        layers = range(x.shape[0]) if "layers" in axes else [0]
        found += [path_name(path).replace("blocks/", f"block_{i}/", 1) for i in layers]
    return found


def norms(tree: Any, logical_axes: Any) -> jax.Array:
    """Returns the norms of arrays with the shapes of the parameters, [number], in the order of `names`."""
    highest = jax.lax.Precision.HIGHEST  # these are the products of `optimizer.global_norm`, which XLA computes once
    squares = _of_each(lambda x: jnp.tensordot(x, x, x.ndim, precision=highest), tree, logical_axes)
    return jnp.sqrt(jnp.concatenate([each.reshape(-1) for each in squares]))


def histograms(params: Any, logical_axes: Any, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields counts, [BINS], and bounds of the bins, [BINS + 1], of each parameter, in the order of `names`.

    All processes have to call this function, because the devices of all of them compute the histograms.
    """
    with layout.use():
        found = jax.device_get(_of_each(_histogram, params, logical_axes))
    for row in np.concatenate([each.reshape(-1, 2 * BINS + 1) for each in found]):
        yield row[:BINS], row[BINS:]


@jax.jit
def _histogram(x: jax.Array) -> jax.Array:
    """Returns counts and bounds of a histogram of an array, [2 * BINS + 1].

    It compares with one bound after the other: unlike a sort, this leaves a sharded array where it is.
    """
    x = x.astype(jnp.float32)
    bounds = jnp.linspace(x.min(), x.max(), BINS + 1)
    below = jax.lax.map(lambda bound: jnp.sum(x < bound), bounds[1:-1])
    counts = jnp.diff(below, prepend=0, append=x.size)
    return jax.lax.with_sharding_constraint(jnp.concatenate([counts, bounds]), jax.P())


def _of_each(function: Callable[[jax.Array], jax.Array], tree: Any, logical_axes: Any) -> list[jax.Array]:
    """Returns the results of a function of an array for all arrays of a tree, of each layer where they are scanned."""
    arrays = zip(jax.tree.leaves(tree), _leaves(logical_axes), strict=True)
    return [(jax.vmap(function) if "layers" in axes else function)(x) for x, axes in arrays]


def _leaves(logical_axes: Any) -> list[jax.P]:
    return jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, jax.P))
