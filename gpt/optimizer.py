"""The learning-rate schedule, and the optimizer: clipping, AdamW or Muon, and weight decay."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from gpt.muon import scale_by_muon
from gpt.runtime.fields import Options, option

OPTIMIZERS = ("adamw", "muon")
# Shapes of the decay. Each maps the progress p of the decay, from 0 to 1, and the ratio of its last step to its first
# to the height above the final learning rate, as a fraction of the way from there to the peak.
DECAYS: dict[str, Callable[[jax.Array, float], Any]] = {
    "constant": lambda p, ratio: 1.0,
    "cosine": lambda p, ratio: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "linear": lambda p, ratio: 1 - p,
    "sqrt": lambda p, ratio: 1 - jnp.sqrt(p),  # arXiv 2405.18392
    "inverse_sqrt": lambda p, ratio: jax.lax.rsqrt(1 + (ratio - 1) * p),  # arXiv 1706.03762; comes near the final rate
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Options):
    """Options of AdamW (arXiv 1711.05101) or Muon, with gradient clipping, linear warm-up and decay.

    With `decay_from`, the learning rate stays at its peak between warm-up and decay (WSD, arXiv 2404.06395).
    """

    section: ClassVar[str] = "optimizer"

    name: str = option("adamw", "muon is for the kernels of the blocks, with AdamW for the rest", choices=OPTIMIZERS)
    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    warmup_tokens: float = option(0.0, "tokens over which the learning rate rises from 0 to its peak", least=0)
    decay: str = option("cosine", "shape of the decay; constant: no decay", choices=DECAYS)
    decay_from: float = option(0.0, "part of the decay's end at which it begins; 0: after warm-up", least=0, below=1)
    decay_tokens: float = option(0.0, "tokens after which the decay ends; 0: at the end of the run", least=0)
    final_fraction: float = option(0.1, "learning rate after the decay, relative to the peak", least=0, most=1)
    b1: float = option(0.9, "AdamW's decay rate of the mean of gradients", least=0, below=1)
    b2: float = option(0.95, "AdamW's decay rate of the mean of squared gradients", least=0, below=1)
    momentum: float = option(0.95, "Muon's decay rate of the mean of gradients", least=0, below=1)
    epsilon: float = option(1e-8, "AdamW's number added to the denominator", above=0)
    weight_decay: float = option(0.1, "weight decay of kernels; embeddings, norms and biases have none", least=0)
    clip_norm: float = option(1.0, "largest global norm of the gradient; 0: no clipping", least=0)
    ema: float = option(0.0, "decay rate per step of a moving average of parameters; 0: none", least=0, below=1)


def schedule(config: OptimizerConfig, tokens_per_step: int, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, the peak, decay, and then a constant.

    The config counts tokens, of which a large run has more than an int32 on a device can count. They are converted to
    fractional steps here, so that the device computes with steps only.

    Args:
      config: the options of the schedule.
      tokens_per_step: number of tokens in a batch.
      total_steps: number of steps of the run.
    """
    warmup = config.warmup_tokens / tokens_per_step
    end = (config.decay_tokens or total_steps * tokens_per_step) / tokens_per_step
    start = max(warmup, config.decay_from * end)
    ratio = max(end / max(start, 1.0), 1.0)

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        # + 1, because a learning rate of 0 would waste the first step.
        rising = jnp.minimum((step + 1) / max(warmup, 1.0), 1.0)
        falling = DECAYS[config.decay](jnp.clip((step - start) / max(end - start, 1.0), 0.0, 1.0), ratio)
        return config.learning_rate * rising * (config.final_fraction + (1 - config.final_fraction) * falling)

    return learning_rate


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, logical_axes: Any, width_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Returns the optimizer: clipping, Adam or Muon, weight decay and the learning rate, in this order.

    With µP (arXiv 2203.03466, table 8), the kernels of the blocks have a lower learning rate in a wider model: 1/width
    for Adam, and 1/√width for Muon, whose updates have a spectral norm of √width here. Weight decay is not scaled.

    Args:
      config: the options of the optimizer.
      learning_rate: the learning rate as a function of the step.
      logical_axes: for each parameter, the logical names of its axes as a PartitionSpec. Only Muon and µP read them.
      width_ratio: width of the model relative to that which the learning rate is for.
    """

    def is_inner(path, names) -> bool:
        """Returns whether a parameter is a kernel of a block, whose inputs and outputs both grow with the width."""
        return path[-1].key == "kernel" and not {"vocab", "classes", "patch"} & set(names)

    inner = jax.tree_util.tree_map_with_path(is_inner, logical_axes, is_leaf=lambda x: isinstance(x, jax.P))
    scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    if config.name == "muon":
        masked = jax.tree.map(lambda use, names: names if use else optax.MaskedNode(), inner, logical_axes)
        kinds = jax.tree.map(lambda use: "muon" if use else "adam", inner)
        scale = optax.partition({"adam": scale, "muon": scale_by_muon(config.momentum, masked)}, kinds)
    if (factor := factor_of_kernels(config, width_ratio)) != 1:
        scale = optax.chain(scale, optax.masked(optax.scale(factor), inner))
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def factor_of_kernels(config: OptimizerConfig, width_ratio: float) -> float:
    """Returns the learning rate of the kernels of the blocks as a multiple of that of the other parameters."""
    return width_ratio ** (-0.5 if config.name == "muon" else -1)


def average(old: Any, params: Any, rate: float, count: jax.Array) -> Any:
    """Returns the exponential moving average of parameters after an update.

    Args:
      rate: the decay rate. It is lower at first, as in TensorFlow's ExponentialMovingAverage: otherwise the first
        parameters would be a large part of the average for many steps.
      count: number of updates before this one.
    """
    return optax.incremental_update(params, old, jnp.maximum(1 - rate, 9 / (10 + count)))


def decay_mask(params: Any) -> Any:
    """Returns a tree that is True for the parameters with weight decay: kernels, and the `a` and `b` of LoRA adapters.

    These are the matrices that multiply activations. Embeddings, norms and biases have other names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "a", "b"), params, is_leaf=lambda x: hasattr(x, "unbox")
    )


def global_norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares in a tree. On a CPU, dot products are faster than sums."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.sqrt(sum(jnp.tensordot(x, x, x.ndim, precision=highest) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Returns a transformation that scales gradients down to a global norm of at most `largest`."""

    def update(grads, state, params=None):
        scale = largest / jnp.maximum(global_norm(grads), largest)
        return jax.tree.map(lambda g: scale * g, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
