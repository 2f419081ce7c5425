"""Text as examples: windows of a fixed number of tokens over a tokenised corpus."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from gpt.data import paths, tokenizers
from gpt.data.base import IGNORED, DataConfig, Dataset, ModelShape, Say, Source
from gpt.data.tokenizers import Labels, Tokenizer, TokenizerConfig
from gpt.data.tokens import make_tokenizer, scan, shakespeare, tokenise
from gpt.runtime import cache
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.fields import check_part, harmless


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    """Options of a text, which is tokenised and cut into windows of the context length."""

    kind: str = "text"  # see gpt/data/base.py
    # A file (text, .jsonl or .parquet), several files separated by commas, or a folder; "": Shakespeare's plays
    path: str = harmless("")
    # The same for a separate validation text; "": the last part of `path` is for validation
    validation_path: str = harmless("")
    validation_fraction: float = 0.1  # fraction of the tokens of `path` that is for validation, between 0 and 1
    document_borders: bool = False  # attend within a document only, and count positions from its first token
    # Folder for the cached tokens and vocabulary; "": the common cache folder (GPT_CACHE_DIR)
    cache_dir: str = harmless("")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("data", self, "validation_fraction")

    def load(self, tokenizer, model, say=lambda line: None, status=lambda line: None) -> "Corpus":
        return load(self, tokenizer, model and model.length, say, status)

    def tokenizer(self, saved: dict[str, Any]) -> Tokenizer:
        tokenizer = tokenizers.from_tree(saved)
        if isinstance(tokenizer, Labels):
            raise ValueError("the file has names of classes instead of a tokenizer")
        return tokenizer

    def opened(self, path: str | None = None) -> "TextConfig":
        # The author of a workdir must not choose where files are written.
        config = dataclasses.replace(self, cache_dir="")
        return config if path is None else dataclasses.replace(config, path=path, validation_path="")

    @property
    def extras(self) -> tuple[str, ...]:
        return ("starts",) if self.document_borders else ()


@dataclasses.dataclass(frozen=True)
class Corpus(Dataset):
    """A tokenised corpus.

    Attributes:
      train, validation: token ids of the two splits.
      fingerprint: a digest that changes with the text, the tokenizer and the split.
      border: the first token of documents if attention stays within documents, else None.
      train_counts, validation_counts: for each token, whether it counts in the loss; None: all tokens count.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    border: int | None
    train_counts: np.ndarray | None = None
    validation_counts: np.ndarray | None = None

    def split(self, name: str) -> np.ndarray:
        """Returns the tokens of the split "train" or "val", or of both in this order, "all"."""
        return _choose(name, self.train, self.validation)

    def counts(self, name: str) -> np.ndarray | None:
        """Returns for each token of a split whether it counts in the loss; None: all tokens count."""
        if self.train_counts is None and self.validation_counts is None:
            return None
        sides = (self.train, self.train_counts), (self.validation, self.validation_counts)
        return _choose(name, *(np.ones(len(tokens), bool) if counts is None else counts for tokens, counts in sides))

    def training(self, model: ModelShape, seed: int) -> Source:
        return TrainingWindows(
            self.train, model.length, seed, border=self.border, counts=self.train_counts, num_targets=model.num_targets
        )

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> "EvaluationWindows":
        if stride and stride > model.num_targets:
            raise UsageError(
                f"--stride={stride} is more than {model.length_key}={model.num_targets} and would leave gaps; "
                "choose a smaller stride."
            )
        tokens, counts = self.split(split), self.counts(split)
        if len(tokens) < 2:
            raise UserError(f"The {split} split has {len(tokens)} tokens: too few to predict any; try --split=all.")
        if counts is not None and not counts[1:].any():
            raise UserError(f"The {split} split has no completions, only prompts; try --split=all.")
        return EvaluationWindows(
            tokens, model.length, border=self.border, counts=counts, num_targets=model.num_targets, stride=stride
        )

    def describe(self) -> str:
        sizes = f"{len(self.train):,} training and {len(self.validation):,} validation tokens"
        return f"{sizes}, vocabulary {self.tokenizer.vocab_size}"

    def report(self, source: Any, result: dict[str, Any]) -> dict[str, float]:
        """Returns the number of targets, the loss in nats per token, its perplexity, and bits per byte of the text."""
        loss, targets, lengths = result["loss"], source.tokens[1:], self.tokenizer.byte_lengths
        if source.counts is not None:
            targets = targets[source.counts[1:]]
        size = sum(lengths[targets[i : i + 2**20]].sum() for i in range(0, len(targets), 2**20))
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = loss * result["targets"] / math.log(2)
        return {"tokens": result["targets"], "loss": loss, "perplexity": perplexity, "bits_per_byte": bits / size}


def _choose(split: str, train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    return np.concatenate([train, validation]) if split == "all" else {"train": train, "val": validation}[split]


def load(
    config: TextConfig,
    tokenizer: Tokenizer | TokenizerConfig,
    block_size: int | None,
    say: Say = lambda line: None,
    status: Say = lambda line: None,
) -> Corpus:
    """Tokenises the corpus that the config names, or reads its tokens from the cache.

    Args:
      tokenizer: an existing tokenizer, or the options of one to create for this text.
      block_size: context length in tokens, which both splits have to exceed; None: splits of any length are accepted.
      say: receives lines for the user.
      status: receives lines about the progress; each line replaces the previous one.

    Raises:
      UserError: a file is missing, empty, not UTF-8 or too short, or has characters that an existing tokenizer does not
        know; or the tokenizer cannot be created, or has no separator although `document_borders` needs one.
    """
    store = Cache(config.cache_dir, say)
    train_paths = paths.named(config.path, "data.path", say) if config.path else [shakespeare(store)]
    val_paths = paths.named(config.validation_path, "data.validation_path", say) if config.validation_path else []
    train_files = [scan(path, store, say) for path in train_paths]
    validation_files = [scan(path, store, say) for path in val_paths]

    is_new = isinstance(tokenizer, TokenizerConfig)
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = make_tokenizer(tokenizer, train_files, validation_files, store, say, status)
    if config.document_borders and tokenizer.begin is None:
        raise UserError(
            "data.document_borders needs a tokenizer with a separator of documents: tokenizer.name=bpe or gpt2."
        )

    train, train_counts = tokenise(train_files, tokenizer, store, status)
    if validation_files:
        validation, validation_counts = tokenise(validation_files, tokenizer, store, status)
    else:
        end = _training_tokens(len(train), config.validation_fraction)
        train, validation, validation_counts = train[:end], train[end:], None
        if train_counts is not None:
            train_counts, validation_counts = train_counts[:end], train_counts[end:]
    if block_size is not None:
        _check_length(config, train, validation, block_size, is_new)
    digests = [file.sha256 for file in train_files], [file.sha256 for file in validation_files]
    fingerprint = cache.digest(tokenizer.to_json(), digests, len(train))
    border = tokenizer.begin if config.document_borders else None
    return Corpus(train, validation, tokenizer, fingerprint, border, train_counts, validation_counts)


def _training_tokens(tokens: int, validation_fraction: float) -> int:
    """Returns how many of the tokens of a text are for training."""
    return int(tokens * (1 - validation_fraction))


def _check_length(config: TextConfig, train: np.ndarray, validation: np.ndarray, block_size: int, is_new: bool) -> None:
    """Raises UserError unless both splits are longer than a window.

    Args:
      is_new: whether the model is new, so that its context length can still be changed.
    """
    needed, total = block_size + 1, len(train) + len(validation)
    name, tokens = ("training", train) if len(train) < needed else ("validation", validation)
    if len(tokens) >= needed:
        return
    if config.validation_path:
        key = "data.path" if name == "training" else "data.validation_path"
        advice = f"give more text in {key}={config.path if name == 'training' else config.validation_path}"
    else:
        fits = [n / 1000 for n in range(1, 1000) if needed <= _training_tokens(total, n / 1000) <= total - needed]
        nearest = min(fits, key=lambda fraction: abs(fraction - config.validation_fraction), default=None)
        advice = f"give at least {2 * needed} tokens of text in data.path={config.path}"
        advice = f"set data.validation_fraction={nearest}" if nearest else advice
    raise UserError(
        f"The {name} text has {len(tokens)} tokens, but model.block_size={block_size} needs at least {needed}; "
        f"{advice}{' or a smaller model.block_size' * is_new}."
    )


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows of `block_size` input tokens.

    Attributes:
      tokens: the tokens of a split.
      block_size: number of inputs in a window.
      border: the first token of documents if attention stays within documents, else None.
      counts: for each token whether it counts in the loss as a target; None: all tokens count.
      num_targets: number of tokens at the end of a window that have a target; None: all.
    """

    tokens: np.ndarray
    block_size: int
    border: int | None = dataclasses.field(default=None, kw_only=True)
    counts: np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    num_targets: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def _num_targets(self) -> int:
        return self.num_targets or self.block_size

    def _window(self, start: int, has_starts: bool) -> dict[str, np.ndarray]:
        """Returns the window whose first input is token `start`.

        Where it exceeds the tokens, which it does on the left if `start` is negative, inputs are 0 and targets
        `IGNORED`.

        A separator is the first input of its document and the last target of the document before. So every target,
        including the end of a document, is predicted from its own document alone.

        Args:
          has_starts: whether to add "starts", the position in the window at which the document of each input begins.
        """
        first, empty = max(0, start), max(0, -start)
        tokens = self.tokens[first : start + self.block_size + 1]
        place = slice(empty, empty + len(tokens) - 1)
        inputs, targets = np.zeros(self.block_size, np.int32), np.full(self.block_size, IGNORED, np.int32)
        inputs[place], targets[place] = tokens[:-1], tokens[1:]
        if self.counts is not None:
            targets[place][~self.counts[first + 1 : first + len(tokens)]] = IGNORED
        example = {"inputs": inputs, "targets": targets[-self._num_targets :]}
        if has_starts:
            starts = np.zeros(self.block_size, np.int32)
            if self.border is not None:
                (places,) = np.nonzero(inputs == self.border)
                starts[places] = places
            starts[empty] = empty
            example["starts"] = np.maximum.accumulate(starts)
        return example


@dataclasses.dataclass(frozen=True)
class TrainingWindows(_Windows):
    """Windows whose targets tile the corpus, from another offset in each epoch.

    Attributes:
      seed: seed of the offsets.
    """

    seed: int

    def __len__(self) -> int:
        """Returns the number of windows in an epoch."""
        return max(1, (len(self.tokens) - self.block_size) // self._num_targets)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns "inputs" [block_size] and "targets" [num_targets], int32: the token that follows each input.

        If there is a border, "starts" [block_size] holds for each input the position at which its document begins.
        """
        slack = len(self.tokens) - (self.block_size - self._num_targets) - len(self) * self._num_targets
        start = _epoch_offset(self.seed, epoch, slack) + index * self._num_targets
        return self._window(start, has_starts=self.border is not None)


@dataclasses.dataclass(frozen=True)
class EvaluationWindows(_Windows):
    """Windows over a split from its first token to its last, in which every target counts once.

    A window begins `stride` tokens after the previous one. Of its targets, only the last `stride` count, each of which
    is predicted from at least block_size - stride tokens; the others, which count in an earlier window, are `IGNORED`.

    Attributes:
      stride: tokens between the beginnings of two windows; None: num_targets, so that the targets tile the split.
    """

    stride: int | None = dataclasses.field(default=None, kw_only=True)

    def __len__(self) -> int:
        after_the_first = max(0, len(self.tokens) - 1 - self._num_targets)
        return 1 + -(-after_the_first // (self.stride or self._num_targets))

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns the same as `TrainingWindows.example`, in each epoch.

        If not all inputs have a target, the first windows begin before the first token. Attention to the inputs that
        are missing there is masked by "starts".
        """
        stride, unpredicted = self.stride or self._num_targets, self.block_size - self._num_targets
        has_starts = self.border is not None or unpredicted > 0
        example = self._window(index * stride - unpredicted, has_starts)
        if index > 0:
            example["targets"][: self._num_targets - stride] = IGNORED
        return example


@functools.lru_cache(maxsize=8)
def _epoch_offset(seed: int, epoch: int, slack: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(slack))
