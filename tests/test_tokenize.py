"""Tests of `gpt.tokenize`: the same shards however many processes make them and however often they are killed."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gpt.data import bpe, documents, paths, text, tokens
from gpt.data.paths import File
from gpt.data.text import TextConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
WORDS = "the of and to a in that is was he for it with as his on be at by I".split()  # noqa: SIM905


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 80))) + f" {i}." for i in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with JSONL, compressed JSONL, text with separators, a text that is one document, and Parquet."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("corpus") / "in"
    folder.mkdir()
    lines = [json.dumps({"text": each}) for each in sentences(3000)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": each}) for each in sentences(500, 1)))
    (folder / "c.txt").write_text("<|endoftext|>".join(sentences(2000, 2)))
    (folder / "d.txt").write_text("\n".join(sentences(3000, 3)))
    table = pyarrow.table({"text": sentences(2000, 4)})
    parquet.write_table(table, folder / "e.parquet", row_group_size=300)
    with pyarrow.CompressedOutputStream(str(folder / "f.jsonl.zst"), "zstd") as file:
        file.write("\n".join(json.dumps({"text": each}) for each in sentences(400, 5)).encode())
    return folder


ALL = [sentences(3000), sentences(500, 1), sentences(2000, 2), ["\n".join(sentences(3000, 3))], sentences(2000, 4)]
ALL = [each for part in [*ALL, sentences(400, 5)] for each in part]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(corpus, out, workers=1, numbers=None, fraction=0.01, tokenizer="gpt2", size=100_000):
    work = tokens.plan(str(corpus), tokenizer, 300, str(out), fraction, size)
    tokens.convert(work, range(len(work.parts)) if numbers is None else numbers(work), workers)
    return tokens.finish(work)


def in_documents(found, separator=50256):
    return [part.tolist() for part in np.split(found, np.flatnonzero(found == separator) + 1) if len(part)]


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    assert convert(corpus, out).startswith("Done: ")
    return out


def test_the_tokens_are_those_of_the_library(corpus, shards):
    """Each document is encoded alone, followed by the separator, and is in one split, in the order of the files."""
    found = text.load(TextConfig(path=str(shards)), TokenizerConfig(), 16)
    library = tokenizers.Tokenizer.from_str(json.dumps(bpe.gpt2().files["tokenizer.json"]))
    expected = [[*each.ids, 50256] for each in library.encode_batch(ALL)]
    train, held_out = in_documents(found.train[1:]), in_documents(found.validation[1:])
    assert sorted(train + held_out) == sorted(expected)
    in_order = iter(expected)
    assert all(document in in_order for document in train)
    assert 0.003 < len(held_out) / len(expected) < 0.03
    index = json.loads((shards / "tokens.json").read_text())
    assert sum(shard["documents"] for shard in index["train"] + index["val"]) == len(ALL)
    assert {shard["dtype"] for shard in index["train"]} == {"uint16"}


def test_ends_of_documents_are_in_the_index(shards):
    found = text.load(TextConfig(path=str(shards)), TokenizerConfig(), 16)
    for stream in (found.sources[""], found.held_out[""]):
        places = np.flatnonzero(stream.tokens[:] == 50256)
        np.testing.assert_array_equal(stream.find_ends(), places[1:] + 1)


@pytest.mark.process
def test_several_processes_write_the_same_bytes(corpus, shards, tmp_path):
    convert(corpus, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(shards)


def test_several_hosts_in_any_order_write_the_same_bytes(corpus, shards, tmp_path):
    for host in (2, 0, 1):
        found = convert(corpus, tmp_path / "out", numbers=lambda work: range(host, len(work.parts), 3))  # noqa: B023
        assert found.startswith("Done: ") == (host == 1)
    assert contents(tmp_path / "out") == contents(shards)


@pytest.mark.process
def test_a_killed_command_goes_on_with_the_same_bytes_at_the_end(corpus, shards, tmp_path):
    """It is killed twice, with its workers at work, which end as well."""
    command = [sys.executable, "-m", "gpt.tokenize", f"--data={corpus}", f"--out={tmp_path}/out", "--workers=2"]
    command += ["--validation_fraction=0.01", "--shard_mb=1"]
    size = 10
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        deadline, started = time.monotonic() + 60, len(list((tmp_path / "out").glob("parts/*.json")))
        while len(list((tmp_path / "out").glob("parts/*.json"))) == started and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "Done: " in finished.stdout
    convert(corpus, tmp_path / "undisturbed", size=1_000_000)
    left = contents(tmp_path / "out")
    assert {name: content for name, content in left.items() if not name.endswith(".partial")} == contents(
        tmp_path / "undisturbed"
    )
    assert size


def test_parts_have_each_document_once(corpus, tmp_path):
    """Ranges of any size begin and end anywhere: in a mark, in a character of several bytes, in a line."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    texts = ["é€😀", "", "x", *sentences(20), "<|endoftex", "|>", "last"]
    (mixed / "a.txt").write_text("<|endoftext|>".join(texts))
    (mixed / "b.jsonl").write_text(
        "\r\n\n".join(json.dumps({"text": each}, ensure_ascii=False) for each in texts if each)
    )
    files = [file for file, _ in paths.named(str(mixed), "--data")]
    whole = [[[t for t, _ in d.texts] for d in documents.read(documents.Part(file))] for file in files]
    assert [part[0] for part in whole[0]] == [each for each in texts if each]
    for size in (1, 2, 3, 7, 13, 50, 1000):
        for file, expected in zip(files, whole, strict=True):
            found = [d for part in documents.parts([file], size) for d in documents.read(part)]
            assert [[t for t, _ in d.texts] for d in found] == expected
            assert [d.is_first for d in found if not d.is_record] in ([], [True] + [False] * (len(found) - 1))


@pytest.mark.parametrize("block", [1, 5, 13, 64])
def test_blocks_of_any_size_give_the_same_documents(tmp_path, monkeypatch, block):
    content = "<|endoftext|>".join(["é€😀" * 5, "b", *sentences(5)])
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setattr(documents, "BLOCK", block)
    found = documents.read(documents.Part(File.of(tmp_path / "a.txt")))
    assert [text for d in found for text, _ in d.texts] == content.split("<|endoftext|>")


def test_a_long_document_is_read_in_pieces(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("short<|endoftext|>" + "long " * 100 + "<|endoftext|>end")
    monkeypatch.setattr(documents, "BLOCK", 16)
    monkeypatch.setattr(documents, "LONG", 64)
    found = [
        (d.key is None, "".join(text for text, _ in d.texts))
        for d in documents.read(documents.Part(File.of(tmp_path / "a.txt")))
    ]
    assert found == [(False, "short"), (True, "long " * 100), (False, "end")]
    work = tokens.plan(str(tmp_path / "a.txt"), "gpt2", 300, str(tmp_path / "out"), 0.0, 1000)
    tokens.convert(work, range(len(work.parts)), 1)
    tokens.finish(work)
    corpus = text.load(TextConfig(path=str(tmp_path / "out")), TokenizerConfig(), 2)
    everything = np.concatenate([corpus.train[:], corpus.validation[:]])
    assert (
        bpe.gpt2().decode(everything)
        == "<|endoftext|>short<|endoftext|>" + "long " * 100 + "<|endoftext|>end<|endoftext|>"
    )


def test_equal_documents_are_in_one_split(tmp_path):
    """Half of the text is for validation, and each text occurs 3 times, with other white space around it."""
    texts = sentences(300)
    lines = [json.dumps({"text": space + each}) for space in ("", " ", "\n") for each in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for path, options in ((tmp_path / "a.jsonl", {"validation_fraction": 0.4}), (tmp_path / "out", {})):
        if path.name == "out":
            convert(tmp_path / "a.jsonl", path, fraction=0.4)
        corpus = text.load(
            TextConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options), TokenizerConfig("gpt2"), 4
        )
        decode = corpus.tokenizer.decode
        sides = [
            {decode(np.array(d)).strip() for d in in_documents(side[1:])} for side in (corpus.train, corpus.validation)
        ]
        assert not sides[0] & sides[1]
        assert len(sides[0]) + len(sides[1]) == 300
        assert 0.3 < len(sides[1]) / 300 < 0.5


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_other_tokenizers(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n".join(sentences(300)))
    convert(tmp_path / "in", tmp_path / "out", tokenizer=tokenizer, fraction=0.0)
    corpus = text.load(TextConfig(path=str(tmp_path / "out")), TokenizerConfig(), 16)
    skip = 0 if corpus.tokenizer.separator is None else 1
    found = np.concatenate([corpus.train[skip:], corpus.validation[:]])
    assert corpus.tokenizer.decode(found).removesuffix("<|endoftext|>") == (tmp_path / "in" / "a.txt").read_text()
    convert(tmp_path / "in", tmp_path / "again", tokenizer=str(tmp_path / "out"), fraction=0.0)
    assert contents(tmp_path / "again")["tokens.json"] == contents(tmp_path / "out")["tokens.json"]


def test_a_damaged_shard_is_found(shards, tmp_path, command):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(shards, out)
    found = command("tokenize", f"--out={out}", "--verify")
    assert found.returncode == 0, found.stderr
    assert "are intact" in found.stdout
    name = next(out.glob("train_*_000.npy"))
    content = bytearray(name.read_bytes())
    content[-1] ^= 1
    name.write_bytes(content)
    found = command("tokenize", f"--out={out}", "--verify")
    assert found.returncode == 1
    assert f"{name} is missing or damaged" in found.stderr


def test_folders_with_other_content_are_refused(corpus, shards, tmp_path):
    with pytest.raises(UserError, match="has shards of other files, options or versions"):
        convert(corpus, shards, fraction=0.02)
    with pytest.raises(UserError, match="holds tokens already"):
        convert(shards, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"--out=.*mine holds other files \(thesis\.tex\)"):
        convert(corpus, tmp_path / "mine")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--out=x"], 2, "--data is missing"),
        (["--data=missing", "--out=x"], 1, "--data: there is no file or folder missing"),
        (["--data=x", "--out=x", "--process_id=2", "--num_processes=2"], 2, "--process_id=2 has to be less than"),
        (["--data={corpus}", "--out=x", "--tokenizer=missing"], 1, "--tokenizer: there is no folder missing"),
        (["--data={corpus}", "--out=x", "--tokenizer={corpus}"], 1, "--tokenizer: .* has neither tokenizer.json nor"),
        (["--out={corpus}", "--verify"], 1, "has no tokens.json"),
        (["--data={corpus}", "--out={corpus}/a.jsonl"], 1, "a.jsonl"),
        (["--data=ftp://host/file", "--out=x"], 1, "ftp://host/file is not on a disk or in a bucket"),
    ],
)
def test_mistakes_are_sentences(corpus, tmp_path, command, flags, code, message):
    import re

    found = command("tokenize", *(flag.format(corpus=corpus) for flag in flags), cwd=tmp_path)
    assert found.returncode == code, found.stderr
    assert re.search(message, found.stderr), found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "x").exists()


def test_a_bad_record_names_its_line_in_any_part(tmp_path):
    lines = [json.dumps({"text": each}) for each in sentences(300)]
    lines[250] = '{"txt": "oops"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 251 has to hold"):
        convert(tmp_path / "a.jsonl", tmp_path / "out", size=5000)


@pytest.mark.process
def test_an_error_in_a_process_is_a_sentence(tmp_path):
    lines = [json.dumps({"text": each}) for each in sentences(300)]
    lines[250] = '{"txt": "oops"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 251 has to hold"):
        convert(tmp_path / "a.jsonl", tmp_path / "out", workers=2, size=5000)


def test_a_slurm_array_shares_the_work(corpus, tmp_path):
    command = [sys.executable, "-m", "gpt.tokenize", f"--data={corpus}", f"--out={tmp_path}/out", "--workers=1"]
    for task in (3, 5):
        array = {"COUNT": 2, "ID": task, "MIN": 3, "STEP": 2}
        array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | array, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("Done: " in done.stdout) == (task == 5)


def test_ray_does_the_same_work(corpus, shards, tmp_path):
    pytest.importorskip("ray")
    work = tokens.plan(str(corpus), "gpt2", 300, str(tmp_path / "out"), 0.01, 100_000)
    tokens.convert(work, range(len(work.parts)), 1, is_on_ray=True)
    tokens.finish(work)
    assert contents(tmp_path / "out") == contents(shards)
