"""Documents: the texts of files, read in parts that several processes can take independently of each other.

A file of text holds one document, or several with the text `<|endoftext|>` between them. In JSONL and Parquet files
(`gpt.data.records`) each record is a document. Files may be compressed (`.gz`, `.zst`), and may be in a bucket.

A part is a range of the bytes of a file, or of the row groups of a Parquet file. It has the documents that begin in
it, so that each document of a file is in exactly one part. A compressed file is a single part.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import operator
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt.data import paths, records
from gpt.data.paths import File
from gpt.data.tokenizers import SEPARATOR
from gpt.runtime.errors import UserError

MARK = SEPARATOR.encode()
BLOCK = 1 << 22  # bytes to read at a time
LONG = 1 << 24  # bytes; a longer document is read in pieces, and is always for training
FORMATS = tomllib.loads(Path(__file__).with_name("formats.toml").read_text(encoding="utf-8"))

Spans = tuple[tuple[int, int], ...]  # parts of a text, as pairs of first character and end


class Document(NamedTuple):
    """A document.

    Attributes:
      where: its file, or the place of a record in it.
      texts: its text in pieces, each with whether it counts in the loss. Pieces that are not prompts are one text.
      key: a hash of its content; None for a document that is longer than `LONG`.
      is_first: whether it is the first in its file.
      messages: the messages of a conversation, whose text depends on the chat template; None: `texts` has it all.
    """

    where: object
    texts: Iterable[tuple[str, bool]]
    key: int | None
    is_first: bool = True
    messages: list[dict[str, Any]] | None = None

    @property
    def is_record(self) -> bool:
        """Whether it is a record of a JSONL or Parquet file."""
        return not isinstance(self.where, File)

    @property
    def has_prompt(self) -> bool:
        """Whether a part of the document does not count in the loss."""
        return self.messages is not None or (isinstance(self.texts, list) and not all(c for _, c in self.texts))


class Part(NamedTuple):
    """A part of a file.

    Attributes:
      start, end: a range of bytes, or of the row groups of a Parquet file; an end of None is that of the file.
      size: about how many bytes of the file that is.
    """

    file: File
    start: int = 0
    end: int | None = None
    size: int = 0


def parts(files: Sequence[File], size: int) -> list[Part]:
    """Returns the parts of files, of about `size` bytes each; they depend on nothing else."""
    found: list[Part] = []
    for file in files:
        if records.kind(file) == "parquet":
            found += (Part(file, *groups) for groups in records.row_groups(file, size))
        elif file.compression or file.size <= size:
            found.append(Part(file, size=file.size))
        else:
            ranges = ((start, min(start + size, file.size)) for start in range(0, file.size, size))
            found += (Part(file, start, end, end - start) for start, end in ranges)
    return found


def read(part: Part) -> Iterator[Document]:
    """Yields the documents of a part.

    Raises:
      UserError: the file cannot be read, is not text in UTF-8, or has a damaged record.
    """
    file = part.file
    if records.kind(file):
        for where, record in records.read(file, part.start, part.end):
            yield _of_record(where, record)
        return
    with _reading(file), file.open() as opened:
        for begin, pieces in _texts(opened, part.start, part.end):
            document = _of_text(file, pieces, is_first=begin == 0)
            if document.texts:
                yield document


@contextlib.contextmanager
def _reading(file: File) -> Iterator[None]:
    """Raises UserError if the file turns out to be unreadable, or not to be text in UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{file} is not UTF-8 text: {byte}{_format(file) or '; convert it to UTF-8'}.") from None
    except paths.READ_ERRORS as error:
        raise paths.cannot_read(file, error) from None


def _of_record(where: object, record: dict[str, Any]) -> Document:
    key = _key(record["text"] if "text" in record else json.dumps(record, sort_keys=True))
    if "messages" in record:
        return Document(where, [(json.dumps(record), False)], key, messages=record["messages"])
    texts = [(record["prompt"], False)] if record.get("prompt") else []
    return Document(where, [*texts, (record["text" if "text" in record else "completion"], True)], key)


def _of_text(file: File, pieces: Iterator[bytes], is_first: bool) -> Document:
    """Returns a document of a text file, from its content in pieces, of which about `LONG` bytes are held."""
    begin, size = [], 0
    for piece in pieces:
        begin.append(piece)
        size += len(piece)
        if size > LONG:
            return Document(file, _long(file, itertools.chain(begin, pieces), is_first), None, is_first)
    text = _checked(file, b"".join(begin).decode("utf-8-sig" if is_first else "utf-8"))
    return Document(file, [(text, True)] if text else [], _key(text), is_first)


def _long(file: File, pieces: Iterable[bytes], is_first: bool) -> Iterator[tuple[str, bool]]:
    with _reading(file):
        for text in codecs.iterdecode(pieces, "utf-8-sig" if is_first else "utf-8"):
            yield _checked(file, text), True


def _key(text: str) -> int:
    """Returns a hash of 63 bits, of the text without the white space around it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest()) >> 1


def _checked(file: File, text: str) -> str:
    if "\0" in text:
        raise UserError(f"{file} is not a text file: it has NUL bytes{_format(file) or '; name another file'}.")
    return text


def _format(file: File) -> str:
    """Returns the format of a file that is not text, with advice for the user, or "" if the format is not known."""
    start = file.first_bytes(8).decode("latin-1")
    what = next((what for known, what in FORMATS.items() if start.startswith(known)), "")
    advice = "read images with data.kind=images" if "image" in what else "extract its text and name that file"
    return f" ({what}); leave it out, or {advice}" if what else ""


def _texts(file: IO[bytes], start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Yields the documents that begin in a range of the bytes of a text: where each begins, and its bytes in pieces."""
    first = max(0, start - len(MARK))
    for begin, pieces in itertools.groupby(_pieces(file, first), key=operator.itemgetter(0)):
        if end is not None and begin >= end:
            return
        if begin >= start:
            yield begin, (piece for _, piece in pieces)


def _pieces(file: IO[bytes], place: int) -> Iterator[tuple[int, bytes]]:
    """Yields the bytes of a text from a place on, without the marks, each with the place where its document begins."""
    if place:
        file.seek(place)
    begin, rest = place, b""
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(MARK)
        for piece in whole:
            yield begin, piece
            place += len(piece) + len(MARK)
            begin = place
        piece, rest = rest[: 1 - len(MARK)], rest[1 - len(MARK) :]  # a mark may begin in the last bytes
        yield begin, piece
        place += len(piece)
    yield begin, rest
