"""Learning-rate schedule, weight-decay mask and the optimizer built from them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_fraction, check_positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or Muon, with clipping, linear warm-up and decay."""

    name: str = "adamw"  # or muon: for the kernels of blocks; the rest as with adamw
    learning_rate: float = 6e-4
    warmup_tokens: float = 0.0
    decay: str = "cosine"  # half a cosine, or linear
    decay_tokens: float = 0.0  # where it ends; 0: at the end of the run
    final_fraction: float = 0.1  # learning rate after the decay, as a fraction of the peak
    b1: float = 0.9
    b2: float = 0.95
    momentum: float = 0.95  # of Muon
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on the kernels only: not on embeddings, norms and biases
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: no clipping

    def __post_init__(self):
        check_positive("optimizer", self, "learning_rate", "epsilon")
        check_choice("optimizer.name", self.name, ("adamw", "muon"))
        check_choice("optimizer.decay", self.decay, ("cosine", "linear"))
        check_fraction("optimizer", self, "b1", "b2", "momentum")
        for name in ("warmup_tokens", "decay_tokens", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction={self.final_fraction} has to lie between 0 and 1.")


def schedule(config: OptimizerConfig, tokens_per_step: int, total_steps: int) -> optax.Schedule:
    """Learning rate of a step (counted from 0): linear warm-up, then half a cosine or a line, then constant.

    The config counts in tokens, which pass 2³¹ in any serious run, while devices count in int32. So
    tokens become fractional steps here, in Python's exact numbers, and the device sees only steps.
    """
    warmup = config.warmup_tokens / tokens_per_step
    end = (config.decay_tokens or total_steps * tokens_per_step) / tokens_per_step

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        # The first step has to move too, hence + 1.
        rising = jnp.minimum((step + 1) / max(warmup, 1.0), 1.0)
        progress = jnp.clip((step - warmup) / max(end - warmup, 1.0), 0.0, 1.0)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.decay == "cosine" else 1 - progress
        return config.learning_rate * rising * (config.final_fraction + (1 - config.final_fraction) * falling)

    return learning_rate


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay shrinks: those named `kernel`, and the `a` and `b` of LoRA.

    These are the matrices that multiply activations; embeddings, norms and biases have other names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "a", "b"), params, is_leaf=lambda x: hasattr(x, "unbox")
    )


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of all numbers in a tree, as products: several times faster than sums on a CPU."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.sqrt(sum(jnp.tensordot(x, x, x.ndim, precision=highest) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of `largest` where theirs is greater."""

    def update(grads, state, params=None):
        scale = largest / jnp.maximum(global_norm(grads), largest)
        return jax.tree.map(lambda g: scale * g, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, logical_axes: Any
) -> optax.GradientTransformation:
    """Clipping, Adam or Muon, masked weight decay and the schedule, in this order.

    Args:
      logical_axes: of each parameter, the names of its axes, as a PartitionSpec.
    """
    scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    if config.name == "muon":

        def kind(path, names) -> str:
            at_the_ends = {"vocab", "classes", "patch"} & set(names)
            return "muon" if path[-1].key == "kernel" and not at_the_ends else "adam"

        kinds = jax.tree_util.tree_map_with_path(kind, logical_axes, is_leaf=lambda x: isinstance(x, P))
        masked = jax.tree.map(lambda kind, names: names if kind == "muon" else optax.MaskedNode(), kinds, logical_axes)
        scale = optax.partition({"adam": scale, "muon": scale_by_muon(config.momentum, masked)}, kinds)
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon(momentum: float, logical_axes: Any) -> optax.GradientTransformation:
    """Muon: the momentum of each matrix made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Updates are scaled to the root mean square of Adam's, about 0.2, so that both share a learning rate
    (arXiv 2502.16982). The matrices of one shape are stacked and spread over all devices of the mesh: each device
    makes its share of them orthogonal, and not all of them again.

    Args:
      momentum: decay of the mean of gradients; Nesterov's form of it.
      logical_axes: of each parameter, the names of its axes, as a PartitionSpec.
    """

    def init(params) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        trace = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.trace, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, trace, grads)
        leaves, structure = jax.tree.flatten(ahead)
        shapes = [matrices(x.shape, names) for x, names in zip(leaves, _specs(logical_axes), strict=True)]
        found = {}
        for shape in {shape[1:] for shape in shapes}:
            members = [i for i, other in enumerate(shapes) if other[1:] == shape]
            stacked = jnp.concatenate([leaves[i].reshape(shapes[i]) for i in members])
            made = 0.2 * max(shape) ** 0.5 * spread(orthogonalize, stacked)
            bounds = np.cumsum([shapes[i][0] for i in members])[:-1]
            found |= dict(zip(members, jnp.split(made, bounds), strict=True))
        updates = [found[i].reshape(x.shape) for i, x in enumerate(leaves)]
        return structure.unflatten(updates), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def _specs(logical_axes: Any) -> list[P]:
    return jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, P))


def matrices(shape: tuple[int, ...], names: P) -> tuple[int, int, int]:
    """[layers, inputs, outputs] of a kernel whose axes have these names: one side of it is `embed`."""
    start = int(names[0] == "layers")
    middle = start + 1 if names[start] == "embed" else len(shape) - 1
    return math.prod(shape[:start]), math.prod(shape[start:middle]), math.prod(shape[middle:])


def orthogonalize(x_NxIxO: jax.Array) -> jax.Array:
    """U·Vᵀ, roughly, of each matrix U·S·Vᵀ: five steps of Newton and Schulz, with Jordan's coefficients."""
    transposed = x_NxIxO.shape[1] > x_NxIxO.shape[2]
    x = x_NxIxO.swapaxes(1, 2) if transposed else x_NxIxO
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(5):
        square = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.swapaxes(1, 2) if transposed else x


def spread(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)`, each device of the mesh in force with its part of the first axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(x)
    rows = len(x)
    x = jnp.pad(x, [(0, -rows % mesh.size), *[(0, 0)] * (x.ndim - 1)])
    x = function(jax.lax.with_sharding_constraint(x, P(mesh.axis_names)))
    return jax.lax.with_sharding_constraint(x, P())[:rows]
