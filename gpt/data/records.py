"""Records of JSONL and Parquet files: a `text`, a `prompt` and `completion`, or the `messages` of a conversation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data import paths
from gpt.runtime.errors import UserError
from gpt.runtime.files import LARGEST_JSON

COLUMNS = ("text", "prompt", "completion", "messages", "tools")
FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})
ROLE = ("role", "content")  # keys of a message
FORM = (
    'has to hold a "text", or a "prompt" and a "completion", each a string, or "messages", a list of objects with a '
    '"role" and a "content"'
)


def is_for(path: Path) -> bool:
    """Returns whether the name of a file says that it holds records."""
    return path.suffix.lower() in (".jsonl", ".parquet")


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields for each record its place, "FILE, line N", and its content, whose keys are one of `FORMS`.

    Raises:
      UserError: the file or a record is damaged; the message names the file and the line (JSONL) or row (Parquet),
        counted from 1.
    """
    is_jsonl, place = path.suffix.lower() == ".jsonl", 0
    try:
        for place, record in _jsonl(path) if is_jsonl else _parquet(path):
            where = f"{path}, {'line' if is_jsonl else 'row'} {place:,}"
            yield where, _checked(record, where)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    if not place:
        raise UserError(f"{path} holds no records: each {FORM}.")


def _checked(record: Any, where: str) -> dict[str, Any]:
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


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with paths.open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_JSON + 1), b""), start=1):
            where = f"{path}, line {number:,}"
            if len(line) > LARGEST_JSON:
                raise UserError(f"{where} has more than {LARGEST_JSON >> 20} MiB; split it into shorter records.")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8: byte 0x{line[error.start]:02x}.") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}); each line {FORM}, in one JSON object.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path} needs the package pyarrow: pip install -e ".[parquet]".') from None
    try:
        with paths.open_regular(path) as opened, parquet.ParquetFile(opened) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            if not columns:
                raise UserError(f"{path}: each row {FORM}, but the columns are {', '.join(file.schema_arrow.names)}.")
            batches = file.iter_batches(batch_size=1024, columns=columns)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}.") from None
