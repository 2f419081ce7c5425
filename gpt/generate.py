"""Text from a model: a jitted loop that samples one token after the other.

The loop runs over segments of a few tokens, all by one compiled program; between segments the
host looks at the text, shows it and decides whether to stop.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt.errors import UserError
from gpt.models.attention import MASKED
from gpt.sharding import Layout
from gpt.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have probability p (arXiv 1904.09751)

    def check(self, vocab_size: int) -> None:
        """Raises UserError for values without meaning."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature} has to be 0 (greedy) or more.")
        if self.top_k is not None and not 0 < self.top_k <= vocab_size:
            raise UserError(f"--top_k={self.top_k} has to lie between 1 and the vocabulary's {vocab_size}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} has to be greater than 0 and at most 1.")


def sample_token(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """[B] int32 token ids drawn from [B, V] logits."""
    if sampling.temperature == 0:
        return logits_BxV.argmax(axis=-1).astype(jnp.int32)
    # The likeliest at 0, so that a tiny temperature makes no infinities of both signs.
    logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth, MASKED, logits_BxV)
    if sampling.top_p is not None:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        probabilities = jax.nn.softmax(sorted_BxV, axis=-1)
        # Kept: every token before which the likelier ones have not reached p; so always the first.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(kept, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < smallest, MASKED, logits_BxV)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)


class Generator:
    """Continues prompts with a model.

    The model sees the last `block_size` tokens. Each new token costs one forward pass over that window.

    Args:
      model: a module that maps [B, T] tokens to [B, T, V] logits, causally.
      layout: where it runs; the samples are spread over the batch axes if these divide their number.
      segment: tokens made by one call of the compiled program.
    """

    def __init__(self, model: nn.Module, layout: Layout, sampling: Sampling, segment: int = 16):
        self._block_size = model.config.block_size
        self._layout, self._segment = layout, segment

        def extend(params, window_BxT, length, key, position):
            """Appends `segment` tokens to windows that are filled up to `length`, and returns them."""

            def step(carry, i):
                window_BxT, length = carry
                logits_BxTxV = model.apply({"params": params}, window_BxT)
                logits_BxV = jax.lax.dynamic_index_in_dim(logits_BxTxV, length - 1, axis=1, keepdims=False)
                token_B = sample_token(logits_BxV, jax.random.fold_in(key, position + i), sampling)
                is_full = length == self._block_size
                window_BxT = jnp.where(is_full, jnp.roll(window_BxT, -1, axis=1), window_BxT)
                place = jnp.where(is_full, length - 1, length)
                window_BxT = jax.lax.dynamic_update_slice_in_dim(window_BxT, token_B[:, None], place, axis=1)
                return (window_BxT, place + 1), token_B

            (window_BxT, length), tokens_SxB = jax.lax.scan(step, (window_BxT, length), jnp.arange(segment))
            return window_BxT, length, tokens_SxB.T

        everywhere = layout.replicated
        self._extend = jax.jit(extend, out_shardings=(None, everywhere, everywhere), donate_argnums=1)

    def __call__(self, params: Any, prompt: np.ndarray, num_samples: int, seed: int) -> Iterator[np.ndarray]:
        """Yields [num_samples, segment] new tokens without end.

        Args:
          prompt: [length] token ids, at least one; the last `block_size` of them count.
          seed: equal seeds give equal tokens.
        """
        prompt = np.asarray(prompt)[-self._block_size :]
        window = np.zeros((num_samples, self._block_size), np.int32)
        window[:, : len(prompt)] = prompt
        key, position = jax.random.key(seed), 0
        layout = self._layout
        target = layout.replicated if num_samples % layout.batch_shards else layout.batch
        window = jax.device_put(window, target)
        length = jax.device_put(np.int32(len(prompt)), layout.replicated)
        while True:
            with layout.use(num_samples):  # not across the yield: it is the caller's then
                window, length, tokens = self._extend(params, window, length, key, position)
            position += self._segment
            yield np.asarray(tokens)


def continuations(
    segments: Iterator[np.ndarray],
    decode: Callable[[np.ndarray], str],
    num_samples: int,
    num_tokens: int,
    stop_text: str = "",
    stop_newlines: int = 0,
) -> Iterator[list[str]]:
    """The text of each sample so far, after each segment, up to its end.

    Args:
      segments: as from `Generator`.
      decode: tokens to text.
      num_tokens: length of a sample, in tokens.
      stop_text: a sample ends before the first occurrence of it; "": never.
      stop_newlines: a sample ends with its n-th line feed; 0: never.
    """
    tokens = np.zeros((num_samples, 0), np.int32)
    while tokens.shape[1] < num_tokens:
        tokens = np.concatenate([tokens, next(segments)], axis=1)[:, :num_tokens]
        ends = [_end(decode(row), stop_text, stop_newlines) for row in tokens]
        yield [text for text, _ in ends]
        if all(stopped for _, stopped in ends):
            return


def _end(text: str, stop_text: str, stop_newlines: int) -> tuple[str, bool]:
    """The text up to its end, and whether the end was reached."""
    ends = [text.find(stop_text)] if stop_text and stop_text in text else []
    if stop_newlines and text.count("\n") >= stop_newlines:
        ends.append(len("\n".join(text.split("\n")[:stop_newlines])) + 1)
    return (text[: min(ends)], True) if ends else (text, False)


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str) -> np.ndarray:
    """Tokens of a prompt; for an empty one the separator, with which documents begin, where there is one.

    Else a line feed, or the first token where that is unknown.

    Raises:
      UserError: unknown characters, with `name` as the flag or key that they came by.
    """
    if not prompt and tokenizer.separator is not None:
        return np.array([tokenizer.separator], np.int32)
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError as error:
        if not prompt:
            return np.zeros(1, np.int32)
        raise UserError(f"{name}: {error}") from None
