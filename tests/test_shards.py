"""Tests of token shards: files in the formats of other programs are read exactly, and damaged ones are refused."""

import functools
import json
import pickle
import shutil
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gpt.data import bpe, text
from gpt.data.text import TextConfig
from gpt.data.tokenizers import CharTokenizer, TokenizerConfig
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError

END = 50256  # GPT-2's separator
MODEL = GPTConfig(block_size=16)


@functools.cache
def gpt2() -> bpe.BPETokenizer:
    """GPT-2's tokenizer, which takes a second to read."""
    return bpe.gpt2()


def documents(count: int = 40, seed: int = 0, vocab_size: int = 50256) -> list[np.ndarray]:
    """Returns documents of 5 to 60 random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(5, 60)) for _ in range(count)]


# Writers, each from the description of its format alone.


def nanogpt(path, docs, dtype="<u2"):
    """`prepare.py` of nanoGPT: no header, the separator after each document."""
    path.write_bytes(b"".join(np.append(doc, END).astype(dtype).tobytes() for doc in docs))


def llm_c(path, docs, magic=20240520, version=1, dtype="<u2", count=None):
    """`data_common.py` of llm.c: a header of 256 int32, the separator before each document."""
    body = np.concatenate([np.append(END, doc) for doc in docs]).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(body) if count is None else count
    path.write_bytes(header.tobytes() + body.tobytes())


def megatron(path, docs, code=8, dtype="<u2", end=True, per_document=1):
    """`IndexedDatasetBuilder` of Megatron-LM: bare tokens, and an index of sequences and documents."""
    docs = [np.append(doc, END) if end else doc for doc in docs]
    sequences = [part for doc in docs for part in np.array_split(doc, per_document)]
    path.with_suffix(".bin").write_bytes(b"".join(doc.astype(dtype).tobytes() for doc in docs))
    lengths = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    with open(path.with_suffix(".idx"), "wb") as out:
        out.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(docs) + 1))
        out.write(np.array(lengths, "<i4").tobytes() + offsets.astype("<i8").tobytes())
        out.write(np.arange(0, len(sequences) + 1, per_document).astype("<i8").tobytes())


def array_record(path, docs, length=32, dtype="<u2"):
    """Rows of `length` tokens in the library that grain reads with; what does not fill a row is left out."""
    stream = np.concatenate([np.append(doc, END) for doc in docs])
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in range(len(stream) // length):
        writer.write(stream[row * length : (row + 1) * length].astype(dtype).tobytes())
    writer.close()


def own(path, docs):
    """The shards of `gpt.tokenize`, from a text with the separator between documents."""
    from gpt.data import tokens

    tokenizer = gpt2()
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": tokenizer.decode(doc)}) + "\n" for doc in docs))
    work = tokens.plan(str(path.with_suffix(".jsonl")), "gpt2", 8192, str(path), 0.0, 1 << 20)
    tokens.convert(work, range(len(work.parts)), 1)
    tokens.finish(work)


def expected(docs) -> np.ndarray:
    return np.concatenate([[END], *(np.append(doc, END) for doc in docs)])


@pytest.fixture
def load(tmp_path):
    def load_(path, tokenizer=None, **options):
        config = TextConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options)
        return text.load(config, tokenizer or gpt2(), 16)

    return load_


def check_rows(source, tokens):
    """The first and the last row of a source are those of the tokens."""
    for index in (0, len(source) - 1):
        example = source.example(0, index)
        start = index * 16
        row = tokens[start : start + 17]
        np.testing.assert_array_equal(example["inputs"][: len(row) - 1], row[:-1])
        np.testing.assert_array_equal(example["targets"][: len(row) - 1], row[1:])


FORMATS = {
    "nanogpt": lambda path, docs: nanogpt(path / "train.bin", docs),
    "nanogpt-uint32": lambda path, docs: nanogpt(path / "train.bin", docs, "<u4"),
    "llm.c": lambda path, docs: llm_c(path / "corpus_train_000001.bin", docs),
    "megatron": lambda path, docs: megatron(path / "train_text_document", docs),
    "megatron-int32": lambda path, docs: megatron(path / "train", docs, 4, "<i4"),
    "megatron-sequences": lambda path, docs: megatron(path / "train", docs, per_document=3),
    "megatron-without-separators": lambda path, docs: megatron(path / "train", docs, end=False),
    "own": lambda path, docs: own(path / "train", docs),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_tokens_that_were_written(load, tmp_path, name):
    docs = documents()
    if name == "own":  # whose tokens are those of a text
        docs = [gpt2().encode(gpt2().decode(doc)) for doc in docs]
    (tmp_path / "in").mkdir()
    FORMATS[name](tmp_path / "in", docs)
    corpus = load(tmp_path / "in" / ("train" if name == "own" else ""))
    last = corpus.validation[1:] if corpus.validation[0:1][0] == END else corpus.validation[:]
    found = np.concatenate([corpus.train[:], last])
    tokens = expected(docs)[:-1] if name == "llm.c" else expected(docs)  # which has no separator at the end
    np.testing.assert_array_equal(found, tokens)
    assert corpus.train[-1:][0] == END  # the split is between two documents
    check_rows(corpus.evaluation("train", MODEL), corpus.train[:])
    check_rows(corpus.evaluation("val", MODEL), corpus.validation[:])


def test_rows_of_array_record_are_read(load, tmp_path):
    docs = documents()
    (tmp_path / "in").mkdir()
    array_record(tmp_path / "in" / "train.arrayrecord", docs)
    array_record(tmp_path / "in" / "val.array_record-00000-of-00001", documents(9, seed=1), dtype="<u4")
    corpus = load(tmp_path / "in")
    for found, source in ((corpus.train, docs), (corpus.validation, documents(9, seed=1))):
        tokens = expected(source)
        rows = (len(tokens) - 1) // 32 * 32
        np.testing.assert_array_equal(found[:], tokens[: rows + 1])
        np.testing.assert_array_equal(found[30:70], tokens[30:70])


def test_training_and_validation_shards_are_known_by_their_names(load, tmp_path, capsys):
    """Several shards follow each other in the order of their names, and documents cross them."""
    folder, docs, held_out = tmp_path / "fineweb", documents(), documents(9, seed=1)
    folder.mkdir()
    stream = np.concatenate([np.append(END, doc) for doc in docs])
    for i, part in enumerate(np.array_split(stream, 3)):
        llm_c(folder / f"fineweb_train_{i + 1:06d}.bin", [part])
        content = (folder / f"fineweb_train_{i + 1:06d}.bin").read_bytes()
        body = content[1026:]  # without the separator that the writer adds
        header = np.frombuffer(content[:1024], "<i4").copy()
        header[2] -= 1
        (folder / f"fineweb_train_{i + 1:06d}.bin").write_bytes(header.tobytes() + body)
    llm_c(folder / "fineweb_val_000000.bin", held_out)
    corpus = load(folder, TokenizerConfig())
    messages = capsys.readouterr().out.splitlines()
    np.testing.assert_array_equal(corpus.train[:], stream)
    np.testing.assert_array_equal(corpus.validation[:], np.concatenate([np.append(END, doc) for doc in held_out]))
    assert any("1 of 4 files are for validation" in line for line in messages)
    assert any("tokenizer is GPT-2's" in line for line in messages)
    by_pattern = load(f"{folder}/*_train_*.bin", validation_path=f"{folder}/*_val_*.bin")
    np.testing.assert_array_equal(by_pattern.train[:], stream)
    np.testing.assert_array_equal(by_pattern.validation[:], corpus.validation[:])


def test_a_copy_elsewhere_has_the_same_fingerprint(load, tmp_path):
    (tmp_path / "a").mkdir()
    llm_c(tmp_path / "a" / "train.bin", documents())
    llm_c(tmp_path / "a" / "val.bin", documents(9, 1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = load(tmp_path / "a").fingerprint
    assert load(tmp_path / "b").fingerprint == first
    content = bytearray((tmp_path / "b" / "train.bin").read_bytes())
    content[1024:1026] = b"\1\0"
    (tmp_path / "b" / "train.bin").write_bytes(content)
    assert load(tmp_path / "b").fingerprint != first


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "megatron", "megatron-without-separators"])
def test_borders_are_those_of_the_documents(load, tmp_path, kind):
    docs = documents(12)
    (tmp_path / "in").mkdir()
    FORMATS[kind](tmp_path / "in", docs)
    FORMATS[kind](tmp_path / "in", docs)
    corpus = load(tmp_path / "in", document_borders=True, validation_fraction=0.2)
    source = corpus.evaluation("train", MODEL)
    starts = np.concatenate([source.example(0, i)["starts"] + 16 * i for i in range(len(source))])[
        : len(corpus.train) - 1
    ]
    tokens = corpus.train[:-1]
    begins = np.flatnonzero(tokens == END)
    for place in range(len(tokens)):
        document = begins[np.searchsorted(begins, place, "right") - 1]
        assert starts[place] == max(document, place // 16 * 16)


# Damaged and odd files. The message names the file and what to do.


def write_header(path, *values, body=b"\1\0" * 64):
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    path.write_bytes(header.tobytes() + body)


def broken_index(**changes):
    """Returns a function that writes an index of Megatron-LM in which the bytes at a place are others."""

    def write(folder):
        megatron(folder / "train", documents())
        content = bytearray((folder / "train.idx").read_bytes())
        for place, value in changes.items():
            content[int(place[1:]) : int(place[1:]) + len(value)] = value
        (folder / "train.idx").write_bytes(content)

    return write


def cut(name, count, write):
    def write_(folder):
        write(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:count])

    return write_


def save_npy(array):
    return lambda folder: np.save(folder / "train.npy", array, allow_pickle=True)


def damage_own(name, change):
    def write(folder):
        own(folder / "shards", documents())
        for file in (folder / "shards").iterdir():
            if file.is_file():
                shutil.move(file, folder / file.name)
        shutil.rmtree(folder / "shards")
        (folder / "shards.jsonl").unlink()
        change(folder / name)

    return write


def of_lengths(*lengths):
    def write(folder):
        writer = ArrayRecordWriter(str(folder / "train.arrayrecord"), "group_size:1")
        for length in lengths:
            writer.write(np.arange(length, dtype="<u2").tobytes())
        writer.close()

    return write


def with_pickle(folder):
    nanogpt(folder / "train.bin", [np.arange(60)])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))


DAMAGED = {
    "an odd number of bytes": (lambda f: (f / "train.bin").write_bytes(b"\1\0" * 90 + b"\1"), "truncated or damaged"),
    "an empty file": (lambda f: (f / "train.bin").write_bytes(b""), "holds no files"),
    "a header and no tokens": (lambda f: write_header(f / "train.bin", 20240520, 1, 64, body=b""), "truncated"),
    "fewer tokens than the header tells": (lambda f: write_header(f / "train.bin", 20240520, 1, 99), "99 tokens"),
    "more tokens than the header tells": (lambda f: write_header(f / "train.bin", 20240520, 1, 9), "9 tokens"),
    "a version to come": (lambda f: write_header(f / "train.bin", 20240520, 2, 64), "version 2 .* version 1"),
    "a version of before": (lambda f: write_header(f / "train.bin", 20240801, 6, 64), "version 6 .* version 7"),
    "a header in the other order of bytes": (
        lambda f: (f / "train.bin").write_bytes(struct.pack(">3i", 20240520, 1, 64) + bytes(1140)),
        "order of bytes",
    ),
    "an id that the vocabulary lacks": (
        lambda f: nanogpt(f / "train.bin", [np.full(90, 60_000)]),
        "token 60000, but the vocabulary of the tokenizer has 50,257",
    ),
    "a vocabulary in a pickle": (with_pickle, r"meta\.pkl is a pickle, .*input\.txt"),
    "an index without tokens": (
        lambda f: (megatron(f / "train", documents()), (f / "train.bin").unlink()),
        r"name train\.bin, which has to be beside it",
    ),
    "an index of another format": (broken_index(_0=b"PK"), "does not begin with"),
    "an index of another version": (broken_index(_9=b"\2"), "version 2"),
    "an index of floats": (broken_index(_17=b"\6"), "not an integer type"),
    "a truncated index": (cut("train.idx", 200, lambda f: megatron(f / "train", documents())), "truncated or damaged"),
    "the head of an index": (cut("train.idx", 20, lambda f: megatron(f / "train", documents())), "does not begin"),
    "an index of other lengths": (broken_index(_34=b"\7\7"), "do not follow each other"),
    "a truncated file beside an index": (
        cut("train.bin", 100, lambda f: megatron(f / "train", documents())),
        "truncated or damaged",
    ),
    "an array of floats": (save_npy(np.ones(99)), "integers in one dimension"),
    "an array of two dimensions": (save_npy(np.ones((9, 9), int)), "integers in one dimension"),
    "an array of objects": (save_npy(np.array([{}, {}])), "integers in one dimension"),
    "an array of negative numbers": (save_npy(np.full(99, -1)), "token -1"),
    "text that is called an array": (lambda f: (f / "train.npy").write_text("hello " * 99), "not an array of NumPy"),
    "a truncated array": (cut("train.npy", 150, save_npy(np.arange(99))), "truncated or damaged"),
    "rows of different lengths": (of_lengths(32, 32, 16, 32), "record 2 has 32 bytes, and record 0 has 64"),
    "a truncated ArrayRecord": (cut("train.arrayrecord", 100, of_lengths(*[32] * 99)), "ArrayRecord"),
    "text among tokens": (
        lambda f: (nanogpt(f / "train.bin", documents()), (f / "a.txt").write_text("hello")),
        r"train\.bin belongs to token shards, and .*a\.txt does not",
    ),
    "a missing shard": (
        damage_own("train_000000_000.npy", lambda p: p.unlink()),
        "which .*tokens.json lists, is missing",
    ),
    "a truncated shard": (
        damage_own("train_000000_000.npy", lambda p: p.write_bytes(p.read_bytes()[:-2])),
        "has .* bytes instead of",
    ),
    "a damaged index of shards": (damage_own("tokens.json", lambda p: p.write_text("{}")), "tokens.json is damaged"),
    "a missing tokenizer": (damage_own("tokenizer.json", lambda p: p.unlink()), "tokenizer.json is missing"),
    "a damaged tokenizer": (damage_own("tokenizer.json", lambda p: p.write_text("{}")), "tokenizer.json is damaged"),
}


def read_all(corpus):
    for split in ("train", "val"):
        source = corpus.evaluation(split, MODEL)
        for i in range(len(source)):
            source.example(0, i)


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_and_odd_files_are_refused(load, tmp_path, what):
    write, message = DAMAGED[what]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    with pytest.raises(UserError, match=message) as error:
        read_all(load(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_id_in_the_middle_is_found_when_it_is_read(load, tmp_path):
    """Only the ends of a file are looked at when it is opened."""
    (tmp_path / "in").mkdir()
    tokens = np.arange(40_000) % 50_000
    tokens[20_000] = 50_257
    nanogpt(tmp_path / "in" / "train.bin", [tokens])
    source = load(tmp_path / "in").training(MODEL, 0)
    source.example(0, 1)
    with pytest.raises(UserError, match=r"train\.bin has the token 50257, but the vocabulary"):
        [source.example(0, i) for i in range(len(source))]


def test_tokens_of_llama_need_its_tokenizer(load, tmp_path):
    (tmp_path / "in").mkdir()
    llm_c(tmp_path / "in" / "train.bin", documents(), 20240801, 7, "<u4")
    with pytest.raises(UserError, match=r"not their tokenizer; name it with tokenizer\.name=gpt2"):
        load(tmp_path / "in", TokenizerConfig())
    corpus = load(tmp_path / "in", TokenizerConfig("gpt2"))
    assert corpus.train[1:5].tolist() == documents()[0][:4].tolist()


def test_tokens_of_16_bits_are_refused_with_a_larger_vocabulary(load, tmp_path):
    (tmp_path / "in").mkdir()
    llm_c(tmp_path / "in" / "train.bin", documents())
    large = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 100_000))))
    with pytest.raises(UserError, match=r"type uint16, .* vocabulary of 100,000"):
        load(tmp_path / "in", large)


def test_shards_of_another_tokenizer_are_refused(load, tmp_path):
    own(tmp_path / "shards", documents())
    other = bpe.BPETokenizer.train(["hello world"], 257)
    with pytest.raises(UserError, match=r"tokens\.json was written with another tokenizer"):
        load(tmp_path / "shards", other)


def test_a_run_trains_on_shards_and_resumes_on_a_copy(tmp_path, command):
    own(tmp_path / "shards", documents(300))
    flags = ["--config=configs/char_tiny.py", f"--workdir={tmp_path}/run", "--config.train.batch_size=8"]
    flags += ["--config.model.embed_dim=16", "--config.model.num_layers=1", "--config.train.sample_tokens=0"]
    found = command("main", *flags, f"--config.data.path={tmp_path}/shards", "--config.train.steps=2")
    assert found.returncode == 0, found.stderr
    assert "vocabulary 50257" in found.stdout
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    found = command("main", *flags, f"--config.data.path={tmp_path}/moved", "--config.train.steps=3")
    assert found.returncode == 0, found.stderr
    assert "resuming after step 2" in found.stdout


def test_several_folders_of_shards_follow_each_other(load, tmp_path):
    docs = [[gpt2().encode(gpt2().decode(doc)) for doc in documents(20, seed)] for seed in (0, 1)]
    for i, part in enumerate(docs):
        own(tmp_path / f"part{i}", part)
    corpus = load(f"{tmp_path}/part0,{tmp_path}/part1", validation_path=str(tmp_path / "part1"))
    np.testing.assert_array_equal(corpus.train[:], expected([*docs[0], *docs[1]]))
    np.testing.assert_array_equal(corpus.validation[:], expected(docs[1]))
    assert {*corpus.held_out} == {""}
    (stream,) = corpus.sources.values()
    np.testing.assert_array_equal(stream.find_ends(), np.flatnonzero(corpus.train[1:] == END) + 2)
    mixed = load(f"a={tmp_path}/part0,b={tmp_path}/part1")
    assert {*mixed.sources} == {*mixed.held_out} == {"a", "b"}


def test_short_validation_shards_have_advice(load, tmp_path):
    own(tmp_path / "shards", documents(40))
    index = json.loads((tmp_path / "shards" / "tokens.json").read_text())
    tokens = np.zeros(5, np.uint16)
    np.save(tmp_path / "shards" / "val_000000_000.npy", tokens)
    index["val"] = [{**index["train"][0], "name": "val_000000_000", "tokens": 5, "sha256": {}}]
    (tmp_path / "shards" / "tokens.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"has 6 tokens, .*of gpt\.tokenize, --validation_fraction"):
        load(tmp_path / "shards")


def test_an_index_of_megatron_is_found_beside_a_file_that_is_named(load, tmp_path):
    """The name, or a pattern, may leave it out; the tokens are not those of a file without a header."""
    for name in ("train", "val"):
        megatron(tmp_path / name, documents(20), 4, "<i4", end=False)
    corpus = load(tmp_path / "train.bin", validation_path=str(tmp_path / "val*.bin"))
    np.testing.assert_array_equal(corpus.train[:], expected(documents(20)))
    np.testing.assert_array_equal(corpus.validation[:], expected(documents(20)))
    with pytest.raises(UserError, match=r"name train\.bin, which has to be beside it"):
        load(tmp_path / "train.idx")


def test_nothing_beside_an_index_is_left_out_silently(load, tmp_path):
    own(tmp_path / "shards", documents())
    (tmp_path / "a.txt").write_text("hello " * 999)
    nanogpt(tmp_path / "b.bin", documents())
    for other in ("a.txt", "b.bin"):
        with pytest.raises(UserError, match=rf"tokens\.json belongs to token shards, and .*{other} does not"):
            load(f"{tmp_path}/shards,{tmp_path}/{other}")
    mixed = load(f"a={tmp_path}/shards,b={tmp_path}/a.txt,c={tmp_path}/b.bin")
    assert {*mixed.sources} == {"a", "b", "c"}
