"""TODO."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt.data import paths, tokenizers
from gpt.data.base import IGNORED, DataConfig, Dataset, ModelShape, Source
from gpt.data.tokenizers import Tokenizer, TokenizerConfig
from gpt.data.tokens import make_tokenizer, scan, shakespeare, tokenise
from gpt.runtime import cache
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.fields import harmless


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    kind: str = "text"  # see gpt/data/base.py
    path: str = harmless(
        ""
    )  # a file (text, .jsonl, .parquet), several joined by commas, or a folder; "": Shakespeare's plays
    validation_path: str = harmless("")  # the same, for validation; "": the last part of `path`
    validation_fraction: float = 0.1  # that part, as a fraction of the tokens
    document_borders: bool = False  # each token sees its own document only, and positions count from its beginning
    cache_dir: str = harmless(
        ""
    )  # cache folder for what is made of the text; "": the one that all caches share, GPT_CACHE_DIR
    prefetch: int = harmless(4)  # batches prepared ahead

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} has to lie between 0 and 1.")
        if self.prefetch < 0:
            raise UserError(f"data.prefetch={self.prefetch} must not be negative.")

    def load(self, tokenizer, model, say=lambda line: None, status=lambda line: None) -> "Corpus":
        return load(self, tokenizer, model and model.length, say, status)

    def tokenizer(self, saved: dict) -> Tokenizer:
        if isinstance(found := super().tokenizer(saved), tokenizers.Labels):
            raise ValueError("names of classes in the place of a tokenizer")
        return found

    def opened(self, path: str | None = None) -> "TextConfig":
        other = {} if path is None else {"path": path, "validation_path": ""}
        return dataclasses.replace(self, cache_dir="", **other)  # a stranger is not to say where to write

    @property
    def extras(self) -> tuple[str, ...]:
        return ("starts",) if self.document_borders else ()


@dataclasses.dataclass(frozen=True)
class Corpus(Dataset):
    """A tokenised corpus.

    Attributes:
      fingerprint: changes with the text, the tokenizer and the split.
      border: the token that begins another document, if documents are not to see each other; else None.
      train_counts, validation_counts: for each token whether it counts in the loss; None: all do.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    border: int | None
    train_counts: np.ndarray | None = None
    validation_counts: np.ndarray | None = None

    def split(self, name: str) -> np.ndarray:
        """The tokens of "train", of "val", or of both one after the other, "all"."""
        if name == "all":
            return np.concatenate([self.train, self.validation])
        return {"train": self.train, "val": self.validation}[name]

    def counts(self, name: str) -> np.ndarray | None:
        """Which of the tokens of `split` count."""
        if self.train_counts is None and self.validation_counts is None:
            return None
        sides = {"train": (self.train, self.train_counts), "val": (self.validation, self.validation_counts)}
        sides = [sides[side] for side in (("train", "val") if name == "all" else (name,))]
        return np.concatenate([np.ones(len(tokens), bool) if counts is None else counts for tokens, counts in sides])

    def training(self, model: ModelShape, seed: int) -> Source:
        return TrainingWindows(self.train, model.length, seed, self.border, self.train_counts, model.num_targets)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Source:
        if stride and stride > model.num_targets:
            raise UsageError(
                f"--stride={stride} is more than {model.length_key}={model.num_targets}: it would leave gaps."
            )
        tokens, counts = self.split(split), self.counts(split)
        if len(tokens) < 2:
            raise UserError(f"The {split} split has {len(tokens)} tokens: too few to predict any; try --split=all.")
        if counts is not None and not counts[1:].any():
            raise UserError(f"The {split} split has no completions, only prompts; try --split=all.")
        return EvaluationWindows(tokens, model.length, self.border, stride, counts, model.num_targets)

    def describe(self) -> str:
        sizes = f"{len(self.train):,} training and {len(self.validation):,} validation tokens"
        return f"{sizes}, vocabulary {self.tokenizer.vocab_size}"

    def report(self, source: "EvaluationWindows", result: dict[str, Any]) -> dict[str, float]:
        loss, targets, lengths = result["loss"], source.tokens[1:], self.tokenizer.byte_lengths
        if source.counts is not None:
            targets = targets[source.counts[1:]]
        size = sum(lengths[targets[i : i + 2**20]].sum() for i in range(0, len(targets), 2**20))
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = loss * result["targets"] / math.log(2)
        return {"tokens": result["targets"], "loss": loss, "perplexity": perplexity, "bits_per_byte": bits / size}


def load(
    config: TextConfig,
    tokenizer: Tokenizer | TokenizerConfig,
    block_size: int | None,
    say: Callable[[str], object] = lambda line: None,
    status: Callable[[str], object] = lambda line: None,
) -> Corpus:
    """The corpus that the config names, tokenised now or found in the cache.

    Args:
      tokenizer: one that exists (of a workdir), or the kind to be made from this text.
      block_size: context length in tokens; both splits have to be longer. None: what is there will do.
      say: called with a line for the user where there is something to say.
      status: called with lines that each replace the one before, while something takes long.

    Raises:
      UserError: a file that is missing, empty, not UTF-8, too short, or has characters unknown to
        an existing tokenizer; or a tokenizer that cannot be made, or has no separator where borders are wanted.
    """
    kept = Cache(config.cache_dir, say)
    found = paths.named(config.path, "data.path", say) if config.path else [shakespeare(kept)]
    train_files, validation_files = [scan(path, kept, say) for path in found], []
    if config.validation_path:
        found = paths.named(config.validation_path, "data.validation_path", say)
        validation_files = [scan(path, kept, say) for path in found]

    is_new = isinstance(tokenizer, TokenizerConfig)
    if is_new:
        tokenizer = make_tokenizer(tokenizer, train_files, validation_files, kept, say, status)
    if config.document_borders and tokenizer.separator is None:
        raise UserError(
            "data.document_borders needs a tokenizer with a separator of documents: tokenizer.name=bpe or gpt2."
        )

    train, train_counts = tokenise(train_files, tokenizer, kept, status)
    if validation_files:
        validation, validation_counts = tokenise(validation_files, tokenizer, kept, status)
    else:
        split = _split_place(len(train), config.validation_fraction)
        train, validation, validation_counts = train[:split], train[split:], None
        if train_counts is not None:
            train_counts, validation_counts = train_counts[:split], train_counts[split:]
    if block_size is not None:
        _check_length(config, train, validation, block_size, is_new)
    digests = [file.sha256 for file in train_files], [file.sha256 for file in validation_files]
    fingerprint = cache.digest(tokenizer.to_json(), digests, len(train))
    border = tokenizer.separator if config.document_borders else None
    return Corpus(train, validation, tokenizer, fingerprint, border, train_counts, validation_counts)


def _split_place(tokens: int, validation_fraction: float) -> int:
    """How many of the tokens are for training."""
    return int(tokens * (1 - validation_fraction))


def _check_length(config: TextConfig, train: np.ndarray, validation: np.ndarray, block_size: int, is_new: bool) -> None:
    """Raises UserError unless both splits are longer than a block.

    Args:
      is_new: whether the model may still get another block size, which weights that exist may not.
    """
    needed, total = block_size + 1, len(train) + len(validation)
    name, tokens = ("training", train) if len(train) < needed else ("validation", validation)
    if len(tokens) >= needed:
        return
    if config.validation_path:
        key = "data.path" if name == "training" else "data.validation_path"
        advice = f"give more text in {key}={config.path if name == 'training' else config.validation_path}"
    else:
        fits = [n / 1000 for n in range(1, 1000) if needed <= _split_place(total, n / 1000) <= total - needed]
        nearest = min(fits, key=lambda fraction: abs(fraction - config.validation_fraction), default=None)
        advice = f"give at least {2 * needed} tokens of text in data.path={config.path}"
        advice = f"set data.validation_fraction={nearest}" if nearest else advice
    raise UserError(
        f"The {name} text has {len(tokens)} tokens, but model.block_size={block_size} needs at least {needed}; "
        f"{advice}{' or a smaller block' * is_new}."
    )


@dataclasses.dataclass(frozen=True)
class TrainingWindows:
    """Rows of `block_size` tokens, whose targets tile the corpus, from another offset in each epoch.

    A pure function of (seed, epoch, row): see `gpt.data.pipeline`.

    Attributes:
      num_targets: how many of the last tokens of a row have a target; None: all.
    """

    tokens: np.ndarray
    block_size: int
    seed: int
    border: int | None = None
    counts: np.ndarray | None = None  # whether a token counts as a target; None: all do
    num_targets: int | None = None

    def __len__(self) -> int:
        """Rows in an epoch."""
        return max(1, (len(self.tokens) - self.block_size) // (self.num_targets or self.block_size))

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """{"inputs": [block_size] int32, "targets": the tokens that follow each of the last `num_targets`}.

        With a border also "starts": for each input, where in the row its document begins.
        """
        num_targets = self.num_targets or self.block_size
        slack = len(self.tokens) - (self.block_size - num_targets) - len(self) * num_targets
        start = _epoch_offset(self.seed, epoch, slack) + index * num_targets
        end = start + self.block_size + 1
        window = self.tokens[start:end].astype(np.int32)
        targets = window[1:] if self.counts is None else np.where(self.counts[start + 1 : end], window[1:], IGNORED)
        return _with_starts({"inputs": window[:-1], "targets": targets[-num_targets:]}, self.border)


@dataclasses.dataclass(frozen=True)
class EvaluationWindows:
    """Rows over a split from its first token to its last, in which every target counts once.

    A row begins `stride` tokens after the one before, and of its targets only those count that no row before it
    has: the last `stride`, each predicted from the block_size - stride tokens before it and more. The others, and what
    fills up the last row, are `IGNORED`. With the default stride, num_targets, the targets tile the split.

    Attributes:
      num_targets: how many of the last tokens of a row have a target; None: all. Where it is not all, the first rows
        are filled up from the left, with what is another document.
    """

    tokens: np.ndarray
    block_size: int
    border: int | None = None
    stride: int | None = None
    counts: np.ndarray | None = None
    num_targets: int | None = None

    @property
    def _targets(self) -> int:
        return self.num_targets or self.block_size

    def __len__(self) -> int:
        after_the_first = max(0, len(self.tokens) - 1 - self._targets)
        return 1 + -(-after_the_first // (self.stride or self._targets))

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """As in `TrainingWindows`, with "starts" also where rows are filled up; every epoch is the same."""
        stride = self.stride or self._targets
        start = index * stride - (self.block_size - self._targets)
        before, start, end = max(0, -start), max(0, start), start + self.block_size + 1
        window = self.tokens[start:end].astype(np.int32)
        padding = (before, self.block_size + 1 - before - len(window))
        targets = window[1:] if self.counts is None else np.where(self.counts[start + 1 : end], window[1:], IGNORED)
        targets = np.pad(targets, padding, constant_values=IGNORED)[-self._targets :]
        if index > 0:
            targets[: self._targets - stride] = IGNORED
        row = _with_starts({"inputs": np.pad(window[:-1], padding), "targets": targets}, self.border)
        if self._targets < self.block_size:
            places = np.arange(self.block_size, dtype=np.int32)
            row["starts"] = np.maximum(row.get("starts", 0), np.where(places >= before, before, 0)).astype(np.int32)
        return row


def _with_starts(row: dict[str, np.ndarray], border: int | None) -> dict[str, np.ndarray]:
    """The row with "starts", if there is a border.

    A separator is the first input of the document after it and the last target of the one before. So every target is
    predicted from its own document alone, its end included, and none has to be left out of the loss.
    """
    if border is None:
        return row
    places = np.arange(len(row["inputs"]), dtype=np.int32)
    return row | {"starts": np.maximum.accumulate(np.where(row["inputs"] == border, places, 0))}


@functools.lru_cache(maxsize=8)
def _epoch_offset(seed: int, epoch: int, slack: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(slack))
