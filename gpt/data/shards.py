"""Token shards: token ids in many files, on a disk or in a bucket, that are read as one array.

The formats, by what is in the files:

| files | content |
|---|---|
| `tokens.json` | the index of shards of `gpt.tokenize` (`.npy`); their tokenizer is in `tokenizer.json` |
| `*.bin` that begins with 20240520 or 20240801 | llm.c, modded-nanogpt: 1,024 bytes, then uint16 or uint32 |
| `*.bin` beside `*.idx` | Megatron-LM: tokens, and an index of sequences and documents |
| other `*.bin` | nanoGPT: tokens without a header |
| `*.npy` | an array of NumPy with one dimension |
| ArrayRecord | rows of tokens, all of the same length |

Files on a disk are memory-mapped; of files in buckets, a read transfers the bytes of its tokens alone.
"""

import bisect
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import struct
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from gpt.data import storage
from gpt.data.paths import File
from gpt.data.tokenizers import Tokenizer
from gpt.runtime import cache
from gpt.runtime.errors import UserError, one_line

INDEX, TOKENIZER, PICKLE = "tokens.json", "tokenizer.json", "meta.pkl"
NUMPY_HEADER = 128  # bytes before the tokens in the files that `gpt.tokenize` writes
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # {magic number: (version, dtype)}
LLM_C_HEADER = 1024
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
ARRAY_RECORD = bytes.fromhex("83af70d10d884a3f")  # the first bytes of a file of Riegeli, on which ArrayRecord rests
SAMPLE = 1 << 15  # bytes at the beginning and the end of a file that are looked at when it is opened
SCAN = 1 << 22  # tokens to read at a time
MAPPED = 1024  # files that are open at a time
READERS = 64  # files to open at a time

Array = Any  # an object with a length and slices that are arrays of NumPy


def is_for(file: File) -> bool:
    """Returns whether the name of a file says that it belongs to token shards."""
    name = file.path.name
    return (
        file.path.suffix in (".bin", ".idx", ".npy")
        or name in (INDEX, PICKLE)
        or ("array" in name and "record" in name)
    )


class Tokens:
    """Arrays of tokens, one after the other, as one array of which slices are read.

    Args:
      parts: the arrays.
      vocab_size: number of tokens of the tokenizer; None: ids are not checked.
      start, stop: a part of all tokens.
    """

    def __init__(self, parts: Sequence[Array], vocab_size: int | None = None, start: int = 0, stop: int | None = None):
        self.parts, self._vocab_size = [part for part in parts if len(part)], vocab_size
        self._ends = list(itertools.accumulate(map(len, self.parts)))
        self._places = range(self._ends[-1] if self._ends else 0)[start:stop]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: slice) -> np.ndarray:
        """Returns tokens. Raises UserError if they cannot be read, or are not ids of the tokenizer."""
        start, stop = self._places[place].start, self._places[place].stop
        found, number = [], bisect.bisect_right(self._ends, start)
        while start < stop:
            begin, end = self._ends[number - 1] if number else 0, self._ends[number]
            found.append(self.parts[number][start - begin : min(stop, end) - begin])
            start, number = end, number + 1
        if not found:
            return self.parts[0][:0] if self.parts else np.zeros(0, np.uint8)
        tokens = found[0] if len(found) == 1 else np.concatenate(found)
        if self._vocab_size is not None:
            for part, array in zip(self.parts[number - len(found) :], found, strict=False):
                _check_ids(part, array, self._vocab_size)
        return tokens

    def between(self, start: int, stop: int) -> "Tokens":
        """Returns a part of the tokens, without reading them."""
        places = self._places[start:stop]
        return Tokens(self.parts, self._vocab_size, places.start, max(places.start, places.stop))

    @property
    def is_remote(self) -> bool:
        """Whether some are in a bucket."""
        return any(getattr(part, "is_remote", False) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Shard:
    """An array in a file.

    Attributes:
      first: number of bytes before it.
      size: number of its values.
    """

    file: File
    dtype: str
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(self.size)
        if not self.is_remote:
            return np.asarray(_mapped(self)[start:stop])
        width = np.dtype(self.dtype).itemsize
        return np.frombuffer(self.file.read(self.first + start * width, self.first + stop * width), self.dtype)

    @property
    def is_remote(self) -> bool:
        """Whether the file is in a bucket."""
        return storage.is_address(self.file.place)


@functools.lru_cache(maxsize=MAPPED)
def _mapped(shard: Shard) -> np.ndarray:
    try:
        return np.memmap(shard.file.place, shard.dtype, "r", shard.first, (shard.size,))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {shard.file}: {getattr(error, 'strerror', None) or error}.") from None


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens of an ArrayRecord file, whose records are rows of `length` tokens."""

    file: File
    dtype: str
    length: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(self.size)
        first = start // self.length
        numbers = list(range(first, -(-stop // self.length)))
        rows = _records(self.file, numbers) if numbers else []
        width = np.dtype(self.dtype).itemsize
        for number, row in zip(numbers, rows, strict=True):
            if len(row) != self.length * width:
                raise UserError(
                    f"{self.file}: record {number} has {len(row)} bytes, and record 0 has {self.length * width}; all "
                    "rows need the same number of tokens."
                )
        tokens = np.frombuffer(b"".join(rows), self.dtype)
        return tokens[start - first * self.length : stop - first * self.length]


@dataclasses.dataclass(frozen=True, eq=False)
class _Separated(Shard):
    """Tokens with a separator after each document, which their file does not have.

    Attributes:
      ends: the end of each document in the file.
    """

    ends: np.ndarray
    separator: int

    def __len__(self) -> int:
        return self.size + len(self.ends)

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(len(self))
        numbers = range(len(self.ends))
        before, until = (bisect.bisect_left(numbers, at, key=lambda d: self.ends[d] + d) for at in (start, stop))
        tokens = super().__getitem__(slice(start - before, stop - until))
        return np.insert(tokens, self.ends[before:until] - (start - before), self.separator)


@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens of a split of a source.

    Attributes:
      counts: for each token whether it counts in the loss; None: all tokens count.
      find_ends: returns the end of each document.
      fingerprint: changes with the tokens.
    """

    tokens: Tokens
    counts: Tokens | None
    find_ends: Callable[[], np.ndarray]
    fingerprint: Any

    def between(self, start: int, stop: int) -> "Stream":
        """Returns a part of the stream."""

        def find_ends() -> np.ndarray:
            ends = self.find_ends()
            return np.append(ends[(ends > start) & (ends < stop)] - start, stop - start)

        counts = self.counts and self.counts.between(start, stop)
        return Stream(self.tokens.between(start, stop), counts, find_ends, [self.fingerprint, start, stop])


def joined(streams: Sequence[Stream]) -> Stream:
    """Returns streams one after the other."""
    if len(streams) == 1:
        return streams[0]
    counts = [np.broadcast_to(True, len(each.tokens)) if each.counts is None else each.counts for each in streams]

    def find_ends() -> np.ndarray:
        before = itertools.accumulate((len(each.tokens) for each in streams), initial=0)
        ends = (each.find_ends() + at for each, at in zip(streams, before, strict=False))
        return np.concatenate([np.zeros(0, np.int64), *ends])

    return Stream(
        Tokens([each.tokens for each in streams]),
        None if all(each.counts is None for each in streams) else Tokens(counts),
        find_ends,
        [each.fingerprint for each in streams],
    )


def of_index(index: File, files: dict[str, File], vocab_size: int) -> tuple[Stream, Stream | None]:
    """Returns the streams for training and validation, if any, of the shards that `gpt.tokenize` wrote.

    Args:
      index: the file `tokens.json`.
      files: the files beside it, by place.

    Raises:
      UserError: the index is damaged, or a shard is missing or has another size.
    """
    folder = storage.folder(index.place)

    def shard(name: str, dtype: str, size: int) -> Shard:
        file, expected = files.get(f"{folder}/{name}.npy"), NUMPY_HEADER + size * np.dtype(dtype).itemsize
        if file is None or file.size != expected:
            found = f"has {file.size:,} bytes instead of {expected:,}" if file else "is missing"
            raise UserError(f"{folder}/{name}.npy, which {index} lists, {found}; copy it again, or tokenise again.")
        return Shard(file, dtype, NUMPY_HEADER, size)

    def stream(each: dict[str, Any]) -> Stream:
        name, size, ends = each["name"], each["tokens"], each["documents"]
        tokens = Tokens([shard(name, each["dtype"], size)], vocab_size)
        counts = Tokens([shard(f"{name}.counts", "bool", size)]) if each["has_counts"] else None
        return Stream(tokens, counts, lambda: shard(f"{name}.ends", "int64", ends)[:], [*each["sha256"].values()])

    try:
        saved = json.loads(index.read(0, index.size))
        train, val = ([stream(each) for each in saved[split]] for split in ("train", "val"))
        return joined(train), joined(val) if val else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({one_line(error)[:100]}); copy it again, or tokenise again.") from None


def of_files(files: Sequence[File], tokenizer: Tokenizer) -> Stream:
    """Returns the stream of files in the formats of other programs.

    Raises:
      UserError: a file is damaged, has no known format, or has tokens that the tokenizer does not have.
    """
    by_place = {file.place: file for file in files}
    separator, bins = tokenizer.separator, [file for file in files if file.path.suffix == ".bin"]
    has_indices = bool(bins) and bins[0].sibling(".idx") is not None  # which a pattern or name may leave out

    def opened(file: File) -> tuple[Array, list] | None:
        if file.path.suffix == ".idx":
            if f"{file.place[:-4]}.bin" not in by_place:
                raise UserError(f"{file} is an index of tokens; name {file.path.stem}.bin, which has to be beside it.")
            return None
        index = by_place.get(f"{file.place[:-4]}.idx") or (file.sibling(".idx") if has_indices else None)
        sample = file.first_bytes(SAMPLE) + file.read(max(0, file.size - SAMPLE), file.size)
        return _opened(file, sample, index, tokenizer), [file.path.name, file.size, cache.digest(sample.hex())]

    with futures.ThreadPoolExecutor(READERS) as threads:  # a bucket takes long to answer
        found = [each for each in threads.map(opened, files) if each]
    tokens = Tokens([part for part, _ in found], tokenizer.vocab_size)
    return Stream(tokens, None, lambda: _find_ends(tokens, separator), [fingerprint for _, fingerprint in found])


def _opened(file: File, sample: bytes, index: File | None, tokenizer: Tokenizer) -> Array:
    """Returns the tokens of a file, of which the first and last are in the vocabulary."""
    start, vocab_size = sample[: min(LLM_C_HEADER, file.size)], tokenizer.vocab_size
    part: Array
    if file.path.suffix == ".npy":
        part = _numpy(file, start)
    elif start.startswith(ARRAY_RECORD):
        part = _array_record(file, vocab_size)
    elif index is not None:
        part = _megatron(file, index, tokenizer.separator)
    elif file.path.suffix == ".bin":
        part = _llm_c(file, start) or _shard(file, _guessed(sample, file.size, vocab_size), 0)
    else:
        raise UserError(f"{file} is among token shards, but has no known format; leave it out.")
    for place in (slice(0, SAMPLE // 8), slice(max(0, len(part) - SAMPLE // 8), None)):
        _check_ids(part, part[place], vocab_size)
    if vocab_size > 1 << 16 and np.dtype(part.dtype if isinstance(part, Shard | Rows) else "i8").itemsize < 4:
        raise UserError(
            f"{file} has tokens of type {np.dtype(part.dtype).name}, which cannot be those of a tokenizer with a "
            f"vocabulary of {vocab_size:,}; choose the tokenizer with which the file was written."
        )
    return part


def refuse_pickle(files: Sequence[File]) -> None:
    """Raises UserError if the vocabulary of tokens is in a pickle, as nanoGPT writes it for characters."""
    for file in files:
        if file.path.name == PICKLE:
            raise UserError(
                f"{file} is a pickle, which can run code when it is read, so the vocabulary of these tokens is not "
                "known. Name the text itself instead, like input.txt beside it, in data.path."
            )


def are_of_gpt2(files: Sequence[File]) -> bool:
    """Returns whether the format of shards tells that the tokens are GPT-2's: nanoGPT's, and one of llm.c."""
    is_bin = all(file.path.suffix == ".bin" for file in files)
    return is_bin and files[0].first_bytes(4) != struct.pack("<i", 20240801)


def verify(folder: str) -> str:
    """Compares the shards of `gpt.tokenize` in a folder with their digests; returns a sentence.

    Raises:
      UserError: there are no shards, or one is missing or damaged.
    """
    index = storage.contents(folder, INDEX)
    if not index:
        raise UserError(f"{folder} has no {INDEX}: it holds no shards of gpt.tokenize, or not all of them yet.")
    splits = json.loads(index[INDEX])
    digests = {name: sha for split in splits.values() for shard in split for name, sha in shard["sha256"].items()}
    for name, digest in digests.items():
        content = storage.contents(folder, name).get(name, b"")
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(
                f"{folder}/{name} is missing or damaged: its SHA-256 is not that in {INDEX}; copy it again."
            )
    return f"{len(digests):,} files in {folder} are intact."


def with_separator(stream: Stream, separator: int | None) -> Stream:
    """Returns a stream whose first token is the separator, so that the first document begins as the others do."""
    if separator is None or not len(stream.tokens) or stream.tokens[:1][0] == separator:
        return stream
    first = np.array([separator], stream.tokens[:1].dtype)
    counts = stream.counts and Tokens([np.ones(1, bool), stream.counts])
    return Stream(Tokens([first, stream.tokens]), counts, lambda: stream.find_ends() + 1, stream.fingerprint)


def _check_ids(part: Array, tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) and not 0 <= (least := tokens.min()) <= (most := tokens.max()) < vocab_size:
        raise UserError(
            f"{getattr(part, 'file', 'The data')} has the token {least if least < 0 else most}, but the vocabulary of "
            f"the tokenizer has {vocab_size:,} tokens, from 0; choose the tokenizer with which it was written."
        )


def _find_ends(tokens: Tokens, separator: int | None) -> np.ndarray:
    """Returns the places after the separators, and the end of the tokens."""
    found = [np.flatnonzero(tokens[at : at + SCAN] == separator) + at + 1 for at in range(0, len(tokens), SCAN)]
    ends = np.concatenate([np.zeros(0, np.int64), *found])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def _shard(file: File, dtype: str, first: int, size: int | None = None) -> Shard:
    """Returns the array of a file, whose size is exactly as it has to be."""
    width, content = np.dtype(dtype).itemsize, file.size - first
    if content <= 0 or content % width or (size is not None and size * width != content):
        expected = f"{size:,} tokens" if size is not None else f"a multiple of {width}"
        raise UserError(
            f"{file} has {max(0, content):,} bytes of tokens of type {np.dtype(dtype).name}, not {expected}: it is "
            "truncated or damaged; copy or write it again."
        )
    return Shard(file, dtype, first, content // width)


def _numpy(file: File, start: bytes) -> Shard:
    opened = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(opened)
    except ValueError as error:
        raise UserError(f"{file} is not an array of NumPy: {one_line(error)[:100]}.") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(f"{file} has an array {list(shape)} of type {dtype}; tokens are integers in one dimension.")
    return _shard(file, dtype.str, opened.tell(), shape[0])


def _llm_c(file: File, start: bytes) -> Shard | None:
    magic, version, count = struct.unpack("<3i", start[:12]) if len(start) >= 12 else (0, 0, 0)
    if magic not in LLM_C:
        if struct.unpack(">i", start[:4].ljust(4))[0] in LLM_C:
            raise UserError(f"{file} has a header of llm.c in the order of bytes of another machine; write it again.")
        return None
    expected, dtype = LLM_C[magic]
    if version != expected:
        raise UserError(f"{file} has version {version} of the format of llm.c; version {expected} is supported.")
    return _shard(file, dtype, LLM_C_HEADER, count)


def _guessed(content: bytes, size: int, vocab_size: int) -> str:
    """Returns the widest type by which all tokens of a sample of `size` bytes are in the vocabulary.

    Tokens of a narrower type, read as those of a wider one, would need a 0 in every second place.
    """
    for dtype in ("<u8", "<u4", "<u2"):
        width = np.dtype(dtype).itemsize
        if size % width == 0 and len(content) % width == 0:
            tokens = np.frombuffer(content, dtype)
            if len(tokens) and tokens.max() < vocab_size:
                return dtype
    return "<u2"


def _megatron(file: File, index: File, separator: int | None) -> Array:
    head = index.first_bytes(34)
    if len(head) < 34 or not head.startswith(MEGATRON):
        raise UserError(f"{index} is not an index of Megatron-LM: it does not begin with {MEGATRON!r}.")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        raise UserError(f"{index} has version {version} of Megatron-LM's format; version 1 is supported.")
    dtype = MEGATRON_TYPES.get(code, "")
    if not dtype or "f" in dtype:
        raise UserError(f"{index} has tokens of type {code}, which is not an integer type of Megatron-LM.")
    expected = 34 + 12 * sequences + 8 * documents
    if index.size != expected:
        raise UserError(
            f"{index} has {index.size:,} bytes, but {expected:,} are needed for {sequences:,} sequences and "
            f"{documents:,} borders of documents: it is truncated or damaged; copy or write it again."
        )
    lengths = Shard(index, "<i4", 34, sequences)[:]
    offsets = Shard(index, "<i8", 34 + 4 * sequences, sequences)[:]
    borders = Shard(index, "<i8", 34 + 12 * sequences, documents)[:]
    width = np.dtype(dtype).itemsize
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or not np.array_equal(offsets, starts[:-1] * width):
        raise UserError(f"{index}: the sequences do not follow each other in {file.path.name}; write the files again.")
    if not len(borders) or borders[0] or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise UserError(f"{index}: the borders of documents are damaged; write the files again.")
    shard = _shard(file, dtype, 0, int(starts[-1]))
    ends = np.unique(starts[borders[1:]])
    ends = ends[ends > 0]
    some = ends[:: max(1, len(ends) // 16)]
    if separator is None or all(shard[end - 1 : end][0] == separator for end in some):
        return shard
    return _Separated(**vars(shard), ends=ends, separator=separator)


def _array_record(file: File, vocab_size: int) -> Rows:
    if storage.is_address(file.place):
        raise UserError(f"{file}: ArrayRecord is read from disks only; download it first, or use gpt.tokenize.")
    (row,) = _records(file, [0])
    dtype = _guessed(row, len(row), vocab_size)
    width = np.dtype(dtype).itemsize
    if not row or len(row) % width:
        raise UserError(f"{file}: record 0 has {len(row)} bytes, which are no tokens of type {np.dtype(dtype).name}.")
    length = len(row) // width
    return Rows(file, dtype, length, length * _reader(file).num_records())


def _records(file: File, numbers: list[int]) -> list[bytes]:
    try:
        return _reader(file).read(numbers)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{file} cannot be read as ArrayRecord: {one_line(error)[:200]}.") from None


@functools.lru_cache(maxsize=MAPPED)
def _reader(file: File) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(file.place, "readahead_buffer_size:0")
    if not reader.ok() or not reader.num_records():
        raise ValueError("it has no records, or is truncated")
    return reader
