"""Records of JSONL and Parquet files: a `text`, a `prompt` and `completion`, or the `messages` of a conversation."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from gpt.data import paths
from gpt.data.paths import File
from gpt.runtime.errors import UserError, one_line
from gpt.runtime.files import LARGEST_JSON

COLUMNS = ("text", "prompt", "completion", "messages", "tools")
FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})
ROLE = ("role", "content")  # keys of a message
FORM = (
    'has to hold a "text", or a "prompt" and a "completion", each a string, or "messages", a list of objects with a '
    '"role" and a "content"'
)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a record, for messages.

    Attributes:
      start: byte of the file from which lines are counted.
      number: number of the line or row from there, from 1.
    """

    file: File
    number: int
    start: int = 0

    def __str__(self) -> str:
        if kind(self.file) == "parquet":
            return f"{self.file}, row {self.number:,}"
        before = 0
        if self.start:
            with self.file.open() as opened:
                blocks = iter(lambda: opened.read(min(1 << 20, self.start - opened.tell())), b"")
                before = sum(block.count(b"\n") for block in blocks)
        return f"{self.file}, line {before + self.number:,}"


def kind(file: File) -> str:
    """Returns "jsonl" or "parquet" if the name of a file says that it holds such records, else ""."""
    return file.suffix[1:] if file.suffix in (".jsonl", ".parquet") else ""


def read(file: File, start: int = 0, end: int | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yields each record with its place; the keys of a record are one of `FORMS`.

    Args:
      start, end: only the records that begin in this range of bytes, or of row groups of Parquet; None: to the end.

    Raises:
      UserError: the file or a record is damaged; the message names the file and the line (JSONL) or row (Parquet).
    """
    is_empty = True
    try:
        for place, record in (_jsonl if kind(file) == "jsonl" else _parquet)(file, start, end):
            is_empty = False
            yield place, _checked(record, place)
    except paths.READ_ERRORS as error:
        raise paths.cannot_read(file, error) from None
    if is_empty and not start and end is None:
        raise UserError(f"{file} holds no records: each {FORM}.")


def row_groups(file: File, size: int) -> list[tuple[int, int, int]]:
    """Returns (start, end, bytes) of ranges of the row groups of a Parquet file, of about `size` bytes each."""
    with _opened(file) as table:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    ranges, start = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[start:end]) >= size:
            ranges.append((start, end, sum(sizes[start:end])))
            start = end
    return ranges or [(0, 0, file.size)]


def _checked(record: Any, where: Place) -> dict[str, Any]:
    values = {name: record.get(name) for name in COLUMNS} if isinstance(record, dict) else {}
    values = {name: value for name, value in values.items() if value is not None}
    if values.pop("tools", None):
        raise UserError(f'{where} has "tools", which are not supported; leave out this record.')
    texts = list(values.values())
    if isinstance(messages := values.get("messages"), list) and all(isinstance(message, dict) for message in messages):
        # transformers leaves out keys without a value too.
        messages = [{key: item for key, item in message.items() if item is not None} for message in messages]
        texts, values = [message.get(key) for message in messages for key in ROLE], values | {"messages": messages}
    is_known = values.keys() in FORMS and isinstance(messages, list) == ("messages" in values)
    if not is_known or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} {FORM}.")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has {error.object[error.start]!r}, half of a surrogate pair.") from None
    return values


def _jsonl(file: File, start: int, end: int | None) -> Iterator[tuple[Place, Any]]:
    with file.open() as opened:
        if start:
            opened.seek(start - 1)
            opened.readline()  # the rest of a line that begins before the range
        first = at = opened.tell() if start else 0
        number = 0
        while (end is None or at < end) and (line := opened.readline(LARGEST_JSON + 1)):
            number += 1
            where = Place(file, number, first)
            if len(line) > LARGEST_JSON:
                raise UserError(f"{where} has more than {LARGEST_JSON >> 20} MiB; split it into shorter records.")
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8" if at else "utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{where} is not UTF-8: byte 0x{line[error.start]:02x}.") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON ({error}); each line {FORM}, in one JSON object.") from None
                yield where, record
            at += len(line)


def _parquet(file: File, start: int, end: int | None) -> Iterator[tuple[Place, Any]]:
    with _opened(file) as table:
        groups = range(start, table.num_row_groups if end is None else end)
        columns = [name for name in COLUMNS if name in table.schema_arrow.names]
        if not columns:
            raise UserError(f"{file}: each row {FORM}, but the columns are {', '.join(table.schema_arrow.names)}.")
        before = sum(table.metadata.row_group(group).num_rows for group in range(start))
        batches = table.iter_batches(batch_size=1024, columns=columns, row_groups=groups)
        for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), before + 1):
            yield Place(file, number), record


@contextlib.contextmanager
def _opened(file: File) -> Iterator[Any]:
    """Opens a Parquet file. Raises UserError if it is damaged, also inside the context."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{file} needs the package pyarrow: pip install -e ".[parquet]".') from None
    try:
        with file.open() as opened, parquet.ParquetFile(opened) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} cannot be read as Parquet: {one_line(error)[:200]}.") from None
