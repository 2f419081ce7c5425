"""Rotary position encoding (RoPE, arXiv 2104.09864), and the ways to stretch it beyond the context of the training.

`model.rotary_scaling` names one of these ways with its numbers, by the names that Hugging Face's config.json has for
them, like "llama3:factor=8,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=8192".
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gpt.runtime.errors import UserError

LENGTH = "original_max_position_embeddings"  # context length in tokens of the training before the scaling
# The numbers that each kind needs, and those that it may have with their defaults (None: see `frequencies`).
KINDS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "linear": ({"factor"}, {}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", LENGTH}, {}),
    "yarn": ({"factor", LENGTH}, {"beta_fast": 32, "beta_slow": 1, "truncate": 1, "attention_factor": None}),
}


def parse(scaling: str) -> tuple[str, dict[str, Any]]:
    """Returns the kind of scaling and its numbers by name.

    Raises:
      UserError: the text does not describe a scaling.
    """
    kind, _, text = scaling.partition(":")
    try:
        required, optional = KINDS[kind]
        values = {name: float(value) for name, value in (item.split("=") for item in text.split(","))}
        if not required <= values.keys() <= required | optional.keys():
            raise ValueError
        if not all(math.isfinite(value) for value in values.values()) or min(values[name] for name in required) <= 0:
            raise ValueError
    except (KeyError, ValueError):
        forms = "; ".join(f"{kind}:{'=…,'.join(sorted(names))}=…" for kind, (names, _) in KINDS.items())
        raise UserError(f"model.rotary_scaling={scaling!r} is not of one of these forms: {forms}.") from None
    return kind, optional | values


def format(kind: str, values: dict[str, float]) -> str:
    """Returns the text that `parse` reads."""
    return f"{kind}:{','.join(f'{name}={float(value):.17g}' for name, value in values.items())}"


def frequencies(size: int, base: float, scaling: str) -> tuple[jax.Array, float]:
    """Returns the angle per position of each pair of numbers, [size/2], and a factor for the rotated numbers.

    Without scaling, the angle of pair i is base^(-2i/size). "linear" divides all angles by the factor (arXiv
    2306.15595); "llama3" divides those that turn less than `low_freq_factor` times within the original context, and
    "yarn" (arXiv 2309.00071) does so by the number of turns as well and scales the attention.
    """
    half = size // 2
    angles = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not scaling:
        return angles, 1.0
    kind, numbers = parse(scaling)
    factor, length = numbers["factor"], numbers.get(LENGTH, 0.0)
    if kind == "linear":
        return angles / factor, 1.0
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        kept = jnp.clip((length * angles / (2 * math.pi) - low) / (high - low), 0, 1)
        return angles * (kept + (1 - kept) / factor), 1.0

    def pair(turns: float) -> float:
        """Returns the pair that turns so many times within the original context."""
        return half * math.log(length / (2 * math.pi * turns)) / math.log(base)

    first, last = pair(numbers["beta_fast"]), pair(numbers["beta_slow"])
    if numbers["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    kept = 1 - jnp.clip((jnp.arange(half) - first) / ((last - first) or 0.001), 0, 1)
    attention = numbers["attention_factor"]
    if attention is None:
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return angles * (kept + (1 - kept) / factor), attention


def rotary(x_BxTxHxK: jax.Array, positions: jax.Array, angles: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Rotates pairs of numbers of each head by angles proportional to the position.

    A pair is (i, i + size/2), where size is the number of rotated numbers at the beginning of a head.

    Args:
      x_BxTxHxK: queries or keys.
      positions: positions of the tokens, [T], or [B, T] if they differ between examples.
      angles: angle per position of each pair, [size/2].
      factor: see `frequencies`.
    """
    half = len(angles)
    angles = positions.astype(jnp.float32)[..., None, None] * angles  # [(B,) T, 1, size/2]
    sin, cos = factor * jnp.sin(angles), factor * jnp.cos(angles)
    first, second, rest = jnp.split(x_BxTxHxK.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)
