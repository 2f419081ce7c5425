"""Learning-rate schedule, weight-decay mask and the optimizer built from them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt.errors import UserError, check_fraction, check_positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with clipping, linear warm-up and cosine decay."""

    learning_rate: float = 6e-4
    warmup_tokens: float = 0.0
    decay_tokens: float = 0.0  # where the cosine ends; 0: at the end of the run
    final_fraction: float = 0.1  # learning rate after the decay, as a fraction of the peak
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on the kernels only: not on embeddings, norms and biases
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: no clipping

    def __post_init__(self):
        check_positive("optimizer", self, "learning_rate", "epsilon")
        check_fraction("optimizer", self, "b1", "b2")
        for name in ("warmup_tokens", "decay_tokens", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction={self.final_fraction} has to lie between 0 and 1.")


def schedule(config: OptimizerConfig, tokens_per_step: int, total_steps: int) -> optax.Schedule:
    """Learning rate of a step (counted from 0): linear warm-up, then half a cosine, then constant.

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
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * rising * (config.final_fraction + (1 - config.final_fraction) * cosine)

    return learning_rate


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay shrinks: those named `kernel`, and the `a` and `b` of LoRA.

    These are the matrices that multiply activations; embeddings, norms and biases have other names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "a", "b"), params, is_leaf=lambda x: hasattr(x, "unbox")
    )


def make_optimizer(config: OptimizerConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, Adam, masked weight decay and the schedule, in this order."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
