"""Text from a model: the prompts fill a cache at once, then a jitted loop makes one token after the other.

The cache keeps the keys and values of the tokens so far, so a new token costs one pass over that token alone. The
loop runs over segments of a few tokens; between them the host looks at the text, shows it and decides what stops.

The window. The model sees at most `block_size` tokens, at positions from 0 on. When a row has filled them, its
window begins anew with the last three quarters of its text (see `kept`), which fill the cache again: positions are
absolute, so a window that slid by one token would change every key in it. That costs about three passes over a token
in a batch for each token made. A row's text depends on its prompt, the seed, and the numbers of its prompt and of its
sample, and on nothing else.
A model with latents (`num_targets` fewer than `block_size`) begins them anew: when a row has all of them, the last
three quarters of these, and the window with them, fill the cache again.

Shape suffixes: B rows, R rows of a part, T length, N tokens of a segment, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gpt.data.tokenizers import Tokenizer
from gpt.models import attention
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError
from gpt.sharding import Layout

# Each length of a prompt and of a cache is a program to compile, so they are rounded up to one in a few; a new token
# reads all of its cache, filled or not.
MIN_PROMPT, MIN_CAPACITY = 16, 64
MAX_SAMPLES = 1 << 16  # of one prompt: the numbers of prompt and sample share the 32 bits that name a random stream


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits: first the penalty, then temperature, top_k and top_p."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have probability p (arXiv 1904.09751)
    repetition_penalty: float = 1.0  # of tokens that the text has already, its prompt included (arXiv 1909.05858)

    def check(self, vocab_size: int) -> None:
        """Raises UserError for values without meaning."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature} has to be 0 (greedy) or more.")
        if self.top_k is not None and not 0 < self.top_k <= vocab_size:
            raise UserError(f"--top_k={self.top_k} has to lie between 1 and the vocabulary's {vocab_size}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} has to be greater than 0 and at most 1.")
        if not 0 < self.repetition_penalty <= 1e6:
            raise UserError(
                f"--repetition_penalty={self.repetition_penalty} has to be greater than 0 (1: none) and at most 1e6."
            )


def penalise(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: float) -> jax.Array:
    """CTRL's penalty (arXiv 1909.05858, section 4.1): divides the logits of the tokens seen, if negative multiplies."""
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def sample_token(logits_BxV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """[B] int32 token ids drawn from [B, V] logits, each row with a random key of its own."""
    if sampling.temperature == 0:
        return logits_BxV.argmax(axis=-1).astype(jnp.int32)
    # The likeliest at 0, so that a tiny temperature makes no infinities of both signs.
    logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(key_B, logits_BxV).astype(jnp.int32)
    # The candidates, from the likeliest on: the random bits, too, are for them alone.
    logits_BxC, token_BxC = jax.lax.top_k(logits_BxV, sampling.top_k or logits_BxV.shape[-1])
    if sampling.top_p is not None:
        probability_BxC = jax.nn.softmax(logits_BxC, axis=-1)
        # Kept: every token before which the likelier ones have not reached p; so always the first.
        before_BxC = jnp.cumsum(probability_BxC, axis=-1) - probability_BxC
        logits_BxC = jnp.where(before_BxC < sampling.top_p, logits_BxC, attention.MASKED)
    choice_B = jax.vmap(jax.random.categorical)(key_B, logits_BxC)
    return jnp.take_along_axis(token_BxC, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def kept(config: GPTConfig) -> int:
    """Tokens that a window begins anew with, at most, when it is full."""
    return config.block_size - config.num_targets // 4


def first_latent(config: GPTConfig, tokens: int) -> int:
    """Position of the first latent where so many tokens fill the cache; there is room for one more at least."""
    return max(0, tokens - (config.num_targets - max(1, config.num_targets // 4)))


def _round_up(size: int, smallest: int, largest: int) -> int:
    """The least `smallest`·2ⁿ or half as much again that is at least `size`, and `largest` if that is less."""
    while smallest < size:
        half = smallest // 2
        smallest = smallest + half if smallest + half >= size else 2 * smallest
    return min(smallest, largest)


class Generator:
    """Continues prompts with a model, on its mesh: rows over the batch axes if these divide them, heads over `model`.

    Args:
      model: a GPT, or what continues texts as it does, with a resolved config; `scan_layers` works, but copies the
        cache of a layer at each token.
      stop_tokens: a row is over when it has made one of these, like the end of a document.
      logprobs: whether to give the log-probability of each token.
      segment: the most tokens that one call of the compiled program makes.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        sampling: Sampling,
        *,
        stop_tokens: Sequence[int] = (),
        logprobs: bool = False,
        segment: int = 16,
    ):
        self.config, self.layout, self.sampling, self.segment = model.config, layout, sampling, segment
        config = model.config

        def run(params, cache, tokens_BxT, position_B=None):
            variables = {"params": params, "cache": cache}
            logits_BxTxV, changed = model.apply(variables, tokens_BxT, position_B=position_B, mutable=["cache"])
            return logits_BxTxV, changed["cache"]

        def empty(rows, capacity):
            return self._constrain(config.init_cache(jnp.zeros(rows, jnp.int32), capacity), rows)

        def grow(cache, rows, capacity):
            larger = config.init_cache(jnp.zeros(rows, jnp.int32), capacity)
            put = jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), larger, cache)
            return self._constrain(put, rows)

        def fill(params, cache, tokens_RxT, first_R, row_R, rows, capacity):
            """Puts the keys and values of tokens at positions from 0 on into the given rows of a cache."""
            # The logits are of no use, so the compiler leaves them out.
            _, filled = run(params, config.init_cache(first_R, capacity), tokens_RxT)
            if rows > 1:

                def put(path, old, new):
                    # A row number past the end stands for none.
                    where = (slice(None), row_R) if is_stacked(path) else row_R
                    return old.at[where].set(new, mode="drop")

                filled = jax.tree_util.tree_map_with_path(put, cache, filled)
            return self._constrain(filled, rows)

        def extend(params, cache, seen_BxV, token_B, position_B, over_B, key_B, made, count):
            """Makes `count` tokens in each row that is not over, from the last token of each and its position."""
            rows, key_B = len(token_B), jax.random.wrap_key_data(key_B)
            tokens_NxB = jnp.full((segment, rows), -1, jnp.int32)
            logprobs_NxB = jnp.zeros((segment, rows)) if logprobs else None

            def go_on(carry):
                i, *_, over_B, _, _ = carry
                return (i < count) & ~over_B.all()

            def step(carry):
                i, cache, seen_BxV, token_B, position_B, over_B, tokens_NxB, logprobs_NxB = carry
                logits_Bx1xV, cache = run(params, cache, token_B[:, None], position_B)
                logits_BxV = jax.lax.with_sharding_constraint(logits_Bx1xV[:, 0], self._rows(rows))
                chosen_from = logits_BxV
                if seen_BxV is not None:
                    chosen_from = penalise(logits_BxV, seen_BxV, sampling.repetition_penalty)
                draw_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, made + i)
                token_B = jnp.where(over_B, token_B, sample_token(chosen_from, draw_B, sampling))
                tokens_NxB = tokens_NxB.at[i].set(jnp.where(over_B, -1, token_B))
                if seen_BxV is not None:
                    seen_BxV |= token_B[:, None] == jnp.arange(seen_BxV.shape[1])
                if logprobs:
                    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
                    logprobs_NxB = logprobs_NxB.at[i].set(chosen_B - jax.nn.logsumexp(logits_BxV, axis=1))
                position_B = jnp.where(over_B, position_B, position_B + 1)
                over_B |= jnp.isin(token_B, jnp.array(stop_tokens, jnp.int32))
                return i + 1, cache, seen_BxV, token_B, position_B, over_B, tokens_NxB, logprobs_NxB

            carry = jnp.int32(0), cache, seen_BxV, token_B, position_B, over_B, tokens_NxB, logprobs_NxB
            _, cache, seen_BxV, *small = jax.lax.while_loop(go_on, step, carry)
            if seen_BxV is not None:
                seen_BxV = jax.lax.with_sharding_constraint(seen_BxV, self._rows(rows))
            return self._constrain(cache, rows), seen_BxV, jax.lax.with_sharding_constraint(small, layout.replicated)

        self.empty = jax.jit(empty, static_argnums=(0, 1))
        self.grow = jax.jit(grow, static_argnums=(1, 2))
        self.fill = jax.jit(fill, static_argnums=(5, 6), donate_argnums=1)
        self.extend = jax.jit(extend, donate_argnums=(1, 2))

    def _rows(self, rows: int) -> NamedSharding:
        """Sharding of an array whose first axis is the rows."""
        return self.layout.for_decoding(rows).batch

    def _constrain(self, cache: Any, rows: int) -> Any:
        """So that what one program gives is laid out as the next one wants it."""
        layout = self.layout.for_decoding(rows)

        def constrain(path, x):
            axes = ("layers",) * is_stacked(path) + (attention.cache_axes(rows) if x.ndim > 1 else ("batch",))
            return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, layout.spec(*axes)))

        return jax.tree_util.tree_map_with_path(constrain, cache)

    def start(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        num_samples: int = 1,
        seed: int = 0,
        first_prompt: int = 0,
    ) -> "Decoding":
        """Continuations of each prompt, `num_samples` of each one after the other, to be made together.

        Args:
          prompts: token ids, at least one each; of a longer one the last `block_size` count.
          seed: the random numbers of a sample depend on the seed, the prompt's number and the sample's number alone.
          first_prompt: number of the first prompt, where an earlier call with this seed took the numbers below it.
        """
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        numbers = np.add.outer(
            np.arange(first_prompt, first_prompt + len(prompts)) * MAX_SAMPLES, np.arange(num_samples)
        )
        # As plain numbers: an array of JAX's that only this process holds could not be given to all.
        streams = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers.ravel().astype(np.uint32))
        return Decoding(self, params, rows, np.asarray(jax.random.key_data(streams)))


def is_stacked(path: tuple) -> bool:
    """Whether an array of a cache has an axis for the layers in front, which one loop goes over."""
    return path[0].key == "blocks"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some new tokens.

    Attributes:
      tokens_BxN: -1 in a row that is over.
      logprobs_BxN: the logarithm of the probability that the model gave each token, before penalty, temperature
        and limits; None if not asked for.
    """

    tokens_BxN: np.ndarray
    logprobs_BxN: np.ndarray | None = None


class Decoding:
    """Texts in the making: see `Generator.start`.

    Attributes:
      over_B: which rows are over; those that the caller has enough of can be set.
    """

    def __init__(self, generator: Generator, params: Any, prompts: list[np.ndarray], key_B: np.ndarray):
        self._generator, self._params = generator, params
        self._config, self._block_size = generator.config, generator.config.block_size
        self._text = [np.asarray(prompt, np.int32) for prompt in prompts]
        rows = len(prompts)
        self.over_B = np.zeros(rows, bool)
        self._made, self._next_count = 0, 1
        windows = [text[-self._block_size :] for text in self._text]
        # The last token of a window is not in the cache yet: making the next one begins with it.
        self._token_B = np.array([window[-1] for window in windows], np.int32)
        self._position_B = np.array([len(window) - 1 for window in windows], np.int32)
        self._end_B = np.zeros(rows, np.int32)  # the position that a row's window has no room for
        layout = generator.layout
        self._key_B = key_B
        self._seen_BxV = None
        if generator.sampling.repetition_penalty != 1:
            seen_BxV = np.zeros((rows, generator.config.padded_vocab_size), bool)
            for row, text in enumerate(self._text):
                seen_BxV[row, text] = True
            self._seen_BxV = jax.device_put(seen_BxV, layout.for_decoding(rows).batch)
        self._capacity = self._room(self._position_B.max() + 1)
        with layout.for_decoding(rows).use():
            self._cache = generator.empty(rows, self._capacity)
        self._fill(np.arange(rows), [window[:-1] for window in windows])

    def advance(self, most: int) -> Segment:
        """Up to `most` new tokens for each row that is not over; the first call makes one, so that it comes soon.

        Rows make the same number of tokens, unless they are over in between.
        """
        generator, going = self._generator, ~self.over_B
        full = np.flatnonzero(going & (self._position_B == self._end_B))
        if len(full):
            keep_F = np.minimum(kept(self._config), self._position_B[full] + 1)
            self._fill(full, [self._text[row][-keep:-1] for row, keep in zip(full, keep_F, strict=True)])
            self._position_B[full] = keep_F - 1
        furthest = int(self._position_B[going].max(initial=0))
        room = (self._end_B - self._position_B)[going].min(initial=generator.segment)
        count = min(most, self._next_count, generator.segment, int(room))
        self._next_count *= 2
        layout = generator.layout.for_decoding(len(going))
        with layout.use():
            if furthest + count > self._capacity:
                self._capacity = self._room(furthest + count)
                self._cache = generator.grow(self._cache, len(going), self._capacity)
            small = self._token_B, self._position_B, self.over_B, self._key_B, np.int32(self._made), np.int32(count)
            self._cache, self._seen_BxV, small = generator.extend(
                self._params, self._cache, self._seen_BxV, *jax.device_put(small, layout.replicated)
            )
        self._token_B, self._position_B, self.over_B, tokens_NxB, logprobs_NxB = (
            None if x is None else np.array(x) for x in jax.device_get(small)
        )
        self._made += count
        tokens_BxN = tokens_NxB.T[:, :count]
        self._text = [np.append(text, new[new >= 0]) for text, new in zip(self._text, tokens_BxN, strict=True)]
        return Segment(tokens_BxN, None if logprobs_NxB is None else logprobs_NxB.T[:, :count])

    def _room(self, tokens: int) -> int:
        return _round_up(tokens, MIN_CAPACITY, self._block_size)

    def _fill(self, rows: np.ndarray, windows: list[np.ndarray]) -> None:
        """Puts windows into the cache, those of rows that are alike in length (or all) by one program."""
        generator, total = self._generator, len(self._text)
        part = _round_up(len(rows), 2, total)
        length = _round_up(max(map(len, windows)), MIN_PROMPT, self._block_size)
        tokens_RxT = np.zeros((part, length), np.int32)  # what follows a window lies in its future: no mask needed
        for i, window in enumerate(windows):
            tokens_RxT[i, : len(window)] = window
        row_R, first_R = np.full(part, total, np.int32), np.zeros(part, np.int32)
        row_R[: len(rows)] = rows
        first_R[: len(rows)] = [first_latent(self._config, len(window)) for window in windows]
        self._end_B[rows] = np.minimum(first_R[: len(rows)] + self._config.num_targets, self._block_size)
        layout = generator.layout.for_decoding(part)
        with layout.use():
            tokens_RxT, first_R = jax.device_put((tokens_RxT, first_R), layout.batch)
            row_R = jax.device_put(row_R, layout.replicated)
            self._cache = generator.fill(self._params, self._cache, tokens_RxT, first_R, row_R, total, self._capacity)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What became of a prompt so far.

    Attributes:
      text: the new text, up to its end if it was reached.
      tokens: those that the text is of.
      logprobs: of the tokens, as in `Segment`; empty if not asked for.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    over: bool = False

    def settled(self, stop_text: str = "") -> str:
        """The part of the text that more tokens cannot change: to be shown at once.

        A last character may lack bytes, which decodes to U+FFFD, and an end may be the beginning of `stop_text`.
        """
        text = self.text.rstrip("\ufffd")
        begun = (n for n in range(min(len(stop_text), len(text)), 0, -1) if text.endswith(stop_text[:n]))
        return self.text if self.over else text[: len(text) - next(begun, 0)]


class Source(Protocol):
    """What `continuations` needs of a `Decoding`."""

    over_B: np.ndarray

    def advance(self, most: int) -> Segment: ...


def continuations(
    decoding: Source,
    decode: Callable[[np.ndarray], str],
    num_tokens: int,
    *,
    stop_tokens: Sequence[int] = (),
    stop_text: str = "",
    stop_newlines: int = 0,
    check: Callable[[], object] = lambda: None,
) -> Iterator[list[Continuation]]:
    """What each row has become, after each segment, up to its end.

    Args:
      decode: tokens to text.
      num_tokens: length of a sample, in tokens.
      stop_tokens: a sample ends before the first of them, as the decoding does.
      stop_text: a sample ends before the first occurrence of it; "": never.
      stop_newlines: a sample ends with its n-th line feed; 0: never.
      check: called with each segment; it may raise an exception to end the samples.
    """
    rows = len(decoding.over_B)
    found = [Continuation("", np.zeros(0, np.int32), np.zeros(0, np.float32)) for _ in range(rows)]
    made = 0
    while made < num_tokens and not all(row.over for row in found):
        check()
        segment = decoding.advance(num_tokens - made)
        made += segment.tokens_BxN.shape[1]
        for i, row in enumerate(found):
            if row.over:
                continue
            new, logprobs = segment.tokens_BxN[i], row.logprobs
            is_stop = np.isin(new, stop_tokens)
            ended = is_stop.any()
            new = new[: np.argmax(is_stop)] if ended else new
            if segment.logprobs_BxN is not None:
                logprobs = np.append(logprobs, segment.logprobs_BxN[i, : len(new)])
            tokens = np.append(row.tokens, new)
            text, stopped = _end(decode(tokens), stop_text, stop_newlines)
            if stopped:
                needed = next(n for n in range(len(tokens) + 1) if decode(tokens[:n]).startswith(text))
                tokens, logprobs = tokens[:needed], logprobs[:needed]
            found[i] = Continuation(text, tokens, logprobs, ended or stopped or made >= num_tokens)
            decoding.over_B[i] |= found[i].over
        yield list(found)


def _end(text: str, stop_text: str, stop_newlines: int) -> tuple[str, bool]:
    """The text up to its end, and whether the end was reached."""
    ends = [text.find(stop_text)] if stop_text and stop_text in text else []
    if stop_newlines and text.count("\n") >= stop_newlines:
        ends.append(len("\n".join(text.split("\n")[:stop_newlines])) + 1)
    return (text[: min(ends)], True) if ends else (text, False)


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str) -> np.ndarray:
    """Tokens of a prompt, also of an empty one.

    Raises:
      UserError: unknown characters, with `name` as the flag or key that they came by.
    """
    try:
        return tokenizer.encode(prompt) if prompt else tokenizer.opening()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
