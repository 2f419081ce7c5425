"""Conversion of parameters between the layouts of unrolled and of scanned layers."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(tree: Any, stack: Callable[[list], Any] = jnp.stack) -> Any:
    """Converts parameters from the unrolled layout to the scanned one.

    The unrolled layout has the dictionaries `block_0`, `block_1`, …; the scanned one has one dictionary `blocks`, whose
    arrays have the layers as their first axis.

    Args:
      tree: a tree of arrays, for example parameters or the state of an optimizer.
      stack: makes one array from a list with the arrays of all layers.
    """

    def stacked(x: Any) -> Any:
        if not isinstance(x, dict):
            return x  # an array that is not in a layer
        names = sorted((name for name in x if re.fullmatch(r"block_\d+", name)), key=lambda name: int(name[6:]))
        blocks = jax.tree.map(lambda *layers: stack(list(layers)), *(x[name] for name in names))
        return {name: value for name, value in x.items() if name not in names} | {"blocks": blocks}

    return jax.tree.map(stacked, tree, is_leaf=lambda x: isinstance(x, dict) and "block_0" in x)


def unstack_layers(tree: Any) -> Any:
    """Converts parameters from the scanned layout to the unrolled one, see `stack_layers`."""

    def unstacked(x: Any) -> Any:
        if not isinstance(x, dict):
            return x  # an array that is not in a layer
        count = len(jax.tree.leaves(x["blocks"])[0])
        blocks = {f"block_{i}": jax.tree.map(lambda layers, i=i: layers[i], x["blocks"]) for i in range(count)}
        return {name: value for name, value in x.items() if name != "blocks"} | blocks

    return jax.tree.map(unstacked, tree, is_leaf=lambda x: isinstance(x, dict) and "blocks" in x)
