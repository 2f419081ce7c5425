"""Generates tokens: the prompts fill a key-value cache in one pass, then a jitted loop generates token after token.

The cache holds the keys and values of the tokens so far, so each new token costs one pass over that token alone. The
loop runs in segments of a few tokens. Between segments the host decodes the text, shows it and decides where it ends.

The model sees at most `block_size` tokens, at positions from 0. When a row has filled this window, the last three
quarters of its text (see `restart_length`) fill the cache again at positions from 0. Positions are absolute, so moving
the window by one token would change every key in it; restarting costs about three passes over a token for each new
token of a batch. A model with latents (`num_targets` less than `block_size`) restarts in the same way when its latents
are used up, with the last three quarters of them.

The text of a row depends only on its prompt, the seed, the number of the prompt and the number of the sample.

Shape suffixes: B rows, R rows of a part, T length, N tokens of a segment, V vocabulary, C candidates.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gpt.data.tokenizers import Tokenizer
from gpt.models import attention, decoding
from gpt.models.gpt import GPTConfig
from gpt.runtime import progress
from gpt.runtime.errors import UserError
from gpt.sharding import Layout

# Each prompt length and each cache size needs a compiled program, so both are rounded up to a few sizes. They are not
# rounded up further, because each new token reads the whole cache, filled or not.
MIN_PROMPT, MIN_CAPACITY = 16, 64
MAX_SAMPLES = 1 << 16  # of a prompt: the numbers of prompt and sample share the 32 bits that select a random stream


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is sampled from the logits. The options apply in this order: penalty, temperature, top_k, top_p.

    Attributes:
      temperature: divides the logits; 0: the most probable token is always chosen.
      top_k: only the k most probable tokens are sampled; None: all.
      top_p: only the most probable tokens whose probabilities sum to p are sampled (arXiv 1904.09751); None: all.
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that are already in the
        prompt or the text (arXiv 1909.05858); 1: no penalty.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def check(self, vocab_size: int) -> None:
        """Raises UserError if a value is out of range."""
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
    """Returns logits with the repetition penalty of CTRL (arXiv 1909.05858, section 4.1) for the tokens seen.

    Positive logits are divided by the penalty; negative logits are multiplied by it.
    """
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def sample_token(logits_BxV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns a token id, int32 [B], for each row of logits, sampled with the row's random key."""
    if sampling.temperature == 0:
        # The same as `argmax`, which is slow on a CPU: XLA reduces pairs of a value and an index one by one.
        is_greatest_BxV = logits_BxV == logits_BxV.max(axis=-1, keepdims=True)
        last = logits_BxV.shape[-1] - 1
        return jnp.where(is_greatest_BxV, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)
    # The greatest logit becomes 0, so that dividing by a tiny temperature gives no infinities of both signs.
    logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(key_B, logits_BxV).astype(jnp.int32)
    # Candidates in order of probability, the most probable first. Random bits are drawn for candidates alone.
    logits_BxC, token_BxC = jax.lax.top_k(logits_BxV, sampling.top_k or logits_BxV.shape[-1])
    if sampling.top_p is not None:
        probability_BxC = jax.nn.softmax(logits_BxC, axis=-1)
        # A token stays if the more probable tokens do not reach p together, so the first one always stays.
        before_BxC = jnp.cumsum(probability_BxC, axis=-1) - probability_BxC
        logits_BxC = jnp.where(before_BxC < sampling.top_p, logits_BxC, attention.MASKED)
    choice_B = jax.vmap(jax.random.categorical)(key_B, logits_BxC)
    return jnp.take_along_axis(token_BxC, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def restart_length(config: GPTConfig) -> int:
    """Returns the greatest number of tokens with which a full window restarts."""
    return config.block_size - config.num_targets // 4


def first_latent(config: GPTConfig, tokens: int) -> int:
    """Returns the position of the first latent when `tokens` tokens fill the cache; at least one latent stays free."""
    return max(0, tokens - (config.num_targets - max(1, config.num_targets // 4)))


def round_up(size: int, smallest: int, largest: int) -> int:
    """Returns the least of `smallest`·2ⁿ and `smallest`·1.5·2ⁿ that is at least `size`, but at most `largest`."""
    while smallest < size:
        half = smallest // 2
        smallest = smallest + half if smallest + half >= size else 2 * smallest
    return min(smallest, largest)


class Generator:
    """The compiled programs that continue prompts with a model, on its mesh.

    Rows are sharded over the batch axes if these divide the number of rows, and heads over the axis `model`.

    Args:
      model: a GPT or a Perceiver AR with a resolved config. `scan_layers` works, but copies a layer's cache for each
        token.
      stop_tokens: a row is finished when it has generated one of these, such as the separator of documents.
      logprobs: compute the log-probability of each token.
      segment: the greatest number of tokens that one call of the compiled program generates.
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
        self.stop_tokens, config = stop_tokens, model.config
        untied = model.clone(config=dataclasses.replace(config, tie_embeddings=False))

        def run(params, cache, tokens_BxT, position_B=None):
            variables, network = {"params": params, "cache": cache}, untied if "head" in params else model
            logits_BxTxV, changed = network.apply(variables, tokens_BxT, position_B=position_B, mutable=["cache"])
            return logits_BxTxV, changed["cache"]

        def empty(rows, capacity):
            return self._constrain(config.init_cache(jnp.zeros(rows, jnp.int32), capacity), rows)

        def grow(cache, rows, capacity):
            larger = empty(rows, capacity)
            put = jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), larger, cache)
            return self._constrain(put, rows)

        def fill(params, cache, tokens_RxT, first_R, row_R, rows, capacity):
            """Writes the keys and values of tokens at positions from 0 into the given rows of a cache."""
            # The logits are not used, so the compiler removes their computation.
            _, filled = run(params, config.init_cache(first_R, capacity), tokens_RxT)
            if rows > 1:

                def put(path, old, new):
                    # Padding has a row number past the end, which "drop" ignores.
                    where = (slice(None), row_R) if is_stacked(path) else row_R
                    return old.at[where].set(new, mode="drop")

                filled = jax.tree_util.tree_map_with_path(put, cache, filled)
            return self._constrain(filled, rows)

        def extend(params, cache, seen_BxV, token_B, position_B, finished_B, key_B, num_generated, count):
            """Generates `count` tokens in each unfinished row, from the row's last token and its position."""
            rows, key_B = len(token_B), jax.random.wrap_key_data(key_B)
            by_row = layout.for_decoding(rows).batch
            tokens_NxB = jnp.full((segment, rows), -1, jnp.int32)
            logprobs_NxB = jnp.zeros((segment, rows)) if logprobs else None

            def is_unfinished(carry):
                i, *_, finished_B, _, _ = carry
                return (i < count) & ~finished_B.all()

            def step(carry):
                i, cache, seen_BxV, token_B, position_B, finished_B, tokens_NxB, logprobs_NxB = carry
                logits_Bx1xV, cache = run(params, cache, token_B[:, None], position_B)
                logits_BxV = jax.lax.with_sharding_constraint(logits_Bx1xV[:, 0], by_row)
                penalised_BxV = logits_BxV
                if seen_BxV is not None:
                    penalised_BxV = penalise(logits_BxV, seen_BxV, sampling.repetition_penalty)
                token_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, num_generated + i)
                token_B = jnp.where(finished_B, token_B, sample_token(penalised_BxV, token_key_B, sampling))
                tokens_NxB = tokens_NxB.at[i].set(jnp.where(finished_B, -1, token_B))
                if seen_BxV is not None:
                    seen_BxV |= token_B[:, None] == jnp.arange(seen_BxV.shape[1])
                if logprobs:
                    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
                    logprobs_NxB = logprobs_NxB.at[i].set(chosen_B - jax.nn.logsumexp(logits_BxV, axis=1))
                position_B = jnp.where(finished_B, position_B, position_B + 1)
                finished_B |= jnp.isin(token_B, jnp.array(stop_tokens, jnp.int32))
                return i + 1, cache, seen_BxV, token_B, position_B, finished_B, tokens_NxB, logprobs_NxB

            carry = jnp.int32(0), cache, seen_BxV, token_B, position_B, finished_B, tokens_NxB, logprobs_NxB
            _, cache, seen_BxV, *rest = jax.lax.while_loop(is_unfinished, step, carry)
            if seen_BxV is not None:
                seen_BxV = jax.lax.with_sharding_constraint(seen_BxV, by_row)
            return self._constrain(cache, rows), seen_BxV, jax.lax.with_sharding_constraint(rest, layout.replicated)

        self.transpose = jax.jit(jnp.transpose)
        self.empty = jax.jit(empty, static_argnums=(0, 1))
        self.grow = jax.jit(grow, static_argnums=(1, 2))
        self.fill = jax.jit(fill, static_argnums=(5, 6), donate_argnums=1)
        self.extend = jax.jit(extend, donate_argnums=(1, 2))

    def _constrain(self, cache: Any, rows: int) -> Any:
        """Constrains the sharding of a cache to the same one in all programs."""
        layout = self.layout.for_decoding(rows)

        def constrain(path, x):
            axes = ("layers",) * is_stacked(path) + (decoding.cache_axes(rows) if x.ndim > 1 else ("batch",))
            return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, layout.spec(*axes)))

        return jax.tree_util.tree_map_with_path(constrain, cache)

    def start(
        self, params: Any, prompts: Sequence[np.ndarray], num_samples: int = 1, seed: int = 0, first_prompt: int = 0
    ) -> "Decoding":
        """Starts continuing prompts together.

        Args:
          prompts: token ids of each prompt, at least one token; the model sees the last `block_size` of them.
          num_samples: number of rows for each prompt; the rows of a prompt follow one another.
          seed: random numbers depend on the seed, the number of the prompt and the number of the sample alone.
          first_prompt: number of the first prompt, if earlier calls with the same seed used the numbers below it.
        """
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        first_numbers = (first_prompt + np.arange(len(prompts))) * MAX_SAMPLES
        numbers = np.add.outer(first_numbers, np.arange(num_samples)).ravel().astype(np.uint32)
        # NumPy arrays, because a jax.Array on this process's devices alone cannot be moved to all processes.
        streams = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        with progress.task("reading the prompt"):
            return Decoding(self, params, rows, np.asarray(jax.random.key_data(streams)))


def is_stacked(path: tuple) -> bool:
    """Returns whether an array of a cache has a leading axis for scanned layers."""
    return path[0].key == "blocks"


@dataclasses.dataclass(frozen=True)
class Segment:
    """New tokens of each row.

    Attributes:
      tokens_BxN: int32 token ids; -1 where a row is finished.
      logprobs_BxN: natural logarithm of the probability that the model gave each token, before penalty, temperature,
        top_k and top_p; None unless the generator computes it.
    """

    tokens_BxN: np.ndarray
    logprobs_BxN: np.ndarray | None = None


class Decoding:
    """Rows of tokens that are being generated; `Generator.start` makes one.

    Attributes:
      finished_B: which rows are finished. The caller may finish a row by setting its element.
      stop_tokens: see `Generator`.
    """

    def __init__(self, generator: Generator, params: Any, prompts: list[np.ndarray], key_B: np.ndarray):
        self._generator, self._params = generator, params
        self._config, self._block_size = generator.config, generator.config.block_size
        self._text = [np.asarray(prompt, np.int32) for prompt in prompts]
        rows = len(prompts)
        self.finished_B, self.stop_tokens = np.zeros(rows, bool), generator.stop_tokens
        self._num_generated, self._next_count = 0, 1
        windows = [text[-self._block_size :] for text in self._text]
        # The last token of a window is not in the cache: it is the input that gives the next token.
        self._token_B = np.array([window[-1] for window in windows], np.int32)
        self._position_B = np.array([len(window) - 1 for window in windows], np.int32)
        self._limit_B = np.zeros(rows, np.int32)  # the first position that is beyond a row's window
        layout = generator.layout.for_decoding(rows)
        if rows > 1 and self._config.tie_embeddings and layout.mesh.devices.flat[0].platform == "cpu":
            # XLA's CPU backend takes many times as long for the product of a few rows with a transposed table.
            kernel = generator.transpose(params["token_embedding"]["embedding"])
            self._params = {**params, "head": {"kernel": kernel}}
        self._key_B, self._seen_BxV = key_B, None
        if generator.sampling.repetition_penalty != 1:
            seen_BxV = np.zeros((rows, generator.config.padded_vocab_size), bool)
            for row, text in enumerate(self._text):
                seen_BxV[row, text] = True
            self._seen_BxV = jax.device_put(seen_BxV, layout.batch)
        self._capacity = round_up(self._position_B.max() + 1, MIN_CAPACITY, self._block_size)
        with layout.use():
            self._cache = generator.empty(rows, self._capacity)
        self._fill(np.arange(rows), [window[:-1] for window in windows])

    def advance(self, most: int) -> Segment:
        """Generates up to `most` tokens for each unfinished row, the same number for all that do not finish meanwhile.

        The first call generates one token, so that it is shown soon; each later call may generate twice as many.
        """
        generator, active_B = self._generator, ~self.finished_B
        full = np.flatnonzero(active_B & (self._position_B == self._limit_B))
        if len(full):
            lengths = np.minimum(restart_length(self._config), self._position_B[full] + 1)
            self._fill(full, [self._text[row][-length:-1] for row, length in zip(full, lengths, strict=True)])
            self._position_B[full] = lengths - 1
        furthest = int(self._position_B[active_B].max(initial=0))
        room = (self._limit_B - self._position_B)[active_B].min(initial=generator.segment)
        count = min(most, self._next_count, generator.segment, int(room))
        self._next_count *= 2
        layout = generator.layout.for_decoding(len(active_B))
        with layout.use():
            if furthest + count > self._capacity:
                self._capacity = round_up(furthest + count, MIN_CAPACITY, self._block_size)
                self._cache = generator.grow(self._cache, len(active_B), self._capacity)
            rows = self._token_B, self._position_B, self.finished_B, self._key_B
            arguments = jax.device_put((*rows, np.int32(self._num_generated), np.int32(count)), layout.replicated)
            self._cache, self._seen_BxV, results = generator.extend(
                self._params, self._cache, self._seen_BxV, *arguments
            )
        *rows, tokens_NxB, logprobs_NxB = jax.device_get(results)
        self._token_B, self._position_B, self.finished_B = map(np.array, rows)
        self._num_generated += count
        tokens_BxN = tokens_NxB.T[:, :count]
        self._text = [np.append(text, new[new >= 0]) for text, new in zip(self._text, tokens_BxN, strict=True)]
        return Segment(tokens_BxN, None if logprobs_NxB is None else logprobs_NxB.T[:, :count])

    def _fill(self, rows: np.ndarray, windows: list[np.ndarray]) -> None:
        """Writes the windows of some rows into the cache."""
        generator, total = self._generator, len(self._text)
        part = round_up(len(rows), 2, total)
        length = round_up(max(map(len, windows)), MIN_PROMPT, self._block_size)
        tokens_RxT = np.zeros((part, length), np.int32)  # causal: padding after a window changes nothing
        for i, window in enumerate(windows):
            tokens_RxT[i, : len(window)] = window
        row_R, first_R = np.full(part, total, np.int32), np.zeros(part, np.int32)
        row_R[: len(rows)] = rows
        first_R[: len(rows)] = [first_latent(self._config, len(window)) for window in windows]
        self._limit_B[rows] = np.minimum(first_R[: len(rows)] + self._config.num_targets, self._block_size)
        layout = generator.layout.for_decoding(part)
        with layout.use():
            tokens_RxT, first_R = jax.device_put((tokens_RxT, first_R), layout.batch)
            row_R = jax.device_put(row_R, layout.replicated)
            self._cache = generator.fill(self._params, self._cache, tokens_RxT, first_R, row_R, total, self._capacity)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The text that has been generated for a prompt so far.

    Attributes:
      text: the new text, cut where it ends.
      tokens: the tokens of the text.
      logprobs: their log-probabilities, as in `Segment`; empty unless the generator computes them.
      finished: the text has ended, and no token will be added.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool = False

    def stable_text(self, stop_text: str = "") -> str:
        """Returns the beginning of the text that later tokens cannot change, which can be shown at once.

        The last character may be incomplete, which decodes to U+FFFD, and the end may be the beginning of `stop_text`.
        """
        if self.finished:
            return self.text
        text = self.text.rstrip("\ufffd")
        overlaps = (n for n in range(min(len(stop_text), len(text)), 0, -1) if text.endswith(stop_text[:n]))
        return text[: len(text) - next(overlaps, 0)]


def continuations(
    decoding: Decoding,
    decode: Callable[[np.ndarray], str],
    num_tokens: int,
    *,
    stop_texts: Sequence[str] = (),
    stop_newlines: int = 0,
    check: Callable[[], object] = lambda: None,
) -> Iterator[list[Continuation]]:
    """Yields the continuation of each row after each segment, until all rows are finished.

    A sample ends before the first stop token of the generator.

    Args:
      decode: converts tokens to text.
      num_tokens: greatest number of tokens in a sample.
      stop_texts: a sample ends before the first occurrence of one of these texts; "" never occurs.
      stop_newlines: a sample ends with its n-th line feed; 0: never.
      check: called before each segment; an exception from it ends the generation.
    """
    rows = [Continuation("", np.zeros(0, np.int32), np.zeros(0, np.float32)) for _ in decoding.finished_B]
    num_generated = 0
    shown = progress.Task("generating", num_tokens)
    while num_generated < num_tokens and not all(row.finished for row in rows):
        check()
        with progress.task(shown):
            segment = decoding.advance(num_tokens - num_generated)
        num_generated += segment.tokens_BxN.shape[1]
        shown.done = num_generated
        for i, row in enumerate(rows):
            if row.finished:
                continue
            new, logprobs = segment.tokens_BxN[i], row.logprobs
            is_stop = np.isin(new, decoding.stop_tokens)
            has_stop = bool(is_stop.any())
            new = new[: np.argmax(is_stop)] if has_stop else new
            if segment.logprobs_BxN is not None:
                logprobs = np.append(logprobs, segment.logprobs_BxN[i, : len(new)])
            tokens = np.append(row.tokens, new)
            text, is_cut = _cut(decode(tokens), stop_texts, stop_newlines)
            if is_cut:
                needed = next(n for n in range(len(tokens) + 1) if decode(tokens[:n]).startswith(text))
                tokens, logprobs = tokens[:needed], logprobs[:needed]
            rows[i] = Continuation(text, tokens, logprobs, has_stop or is_cut or num_generated >= num_tokens)
            decoding.finished_B[i] |= rows[i].finished
        yield list(rows)


def _cut(text: str, stop_texts: Sequence[str], stop_newlines: int) -> tuple[str, bool]:
    """Returns the text up to where it ends, and whether it ends."""
    ends = [text.find(stop) for stop in stop_texts if stop and stop in text]
    if stop_newlines and text.count("\n") >= stop_newlines:
        ends.append(len("\n".join(text.split("\n")[:stop_newlines])) + 1)
    return (text[: min(ends)], True) if ends else (text, False)


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str) -> np.ndarray:
    """Returns the tokens of a prompt; for an empty prompt, those with which a text begins.

    Args:
      name: the flag or config key that holds the prompt, for error messages.

    Raises:
      UserError: the tokenizer does not know a character.
    """
    try:
        return tokenizer.encode_prompt(prompt)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
