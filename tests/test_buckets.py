"""Tests of data in buckets: the same batches as from a disk, by reads of the needed bytes alone."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore

from gpt.data import pipeline, tokens

ROOT = Path(__file__).parent.parent
LENGTH, BATCH = 64, 16
pytest.importorskip("s3fs")
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The content of the bucket: a text, and its shards."""
    folder = tmp_path_factory.mktemp("bucket")
    rng = random.Random(0)
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh \n", k=rng.randint(20, 900)))}) for _ in range(600)]
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    (folder / "text" / "b.txt").write_text("the end " * 400)
    work = tokens.plan(str(folder / "text"), "byte", 8192, str(folder / "shards"), 0.05, 40_000)
    tokens.convert(work, range(len(work.parts)), 1)
    tokens.finish(work)
    return folder


@pytest.fixture
def store(folder):
    with ObjectStore(str(folder), bucket="bucket") as store:
        yield store


# It runs in another process, because clients of buckets do not survive a fork.
BATCHES = """
import sys, numpy as np
from gpt.data import pipeline, text
from gpt.data.text import TextConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.gpt import GPTConfig

path, start, steps, first, stop, out = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
corpus = text.load(TextConfig(path=path), TokenizerConfig(), 64)
source = corpus.training(GPTConfig(block_size=64), 0)
print("loaded", flush=True)
sys.stdin.readline()
found = pipeline.training_batches(source, 16, 0, range(first, stop), start, 0)
np.save(out, np.array([[batch["inputs"], batch["targets"]] for _, batch in zip(range(steps), found)]))
"""


def batches(store, path, out, start, steps, positions, tmp_path):
    """Returns batches that a process reads, and the keys of the store that it read for them."""
    arguments = [path, str(start), str(steps), str(positions.start), str(positions.stop), str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", BATCHES, *arguments],
        cwd=ROOT,
        env=os.environ | store.environment | {"GPT_CACHE_DIR": str(tmp_path / "cache")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "loaded\n":
            break
    store.counters(reset=True)
    process.communicate("\n", timeout=120)
    assert process.returncode == 0
    return np.load(out), store.counters()["keys"]


def test_batches_are_those_of_the_disk_and_each_process_reads_its_rows_alone(store, folder, tmp_path):
    local, _ = batches(store, str(folder / "shards"), tmp_path / "local.npy", 0, 6, range(BATCH), tmp_path)
    for processes, start in ((1, 0), (2, 0), (4, 0), (4, 3)):
        size = BATCH // processes
        parts, counted = [], 0
        for p in range(processes):
            rows = range(p * size, (p + 1) * size)
            found, keys = batches(store, "s3://bucket/shards", tmp_path / "a.npy", start, 3, rows, tmp_path)
            parts.append(found)
            for key, count in keys.items():
                assert key.startswith("shards/train_")
                counted += count["bytes"]
        np.testing.assert_array_equal(np.concatenate(parts, axis=2), local[start : start + 3])
        assert counted == 3 * BATCH * (LENGTH + 1)  # a token of the tokenizer `byte` is a byte


def run(store, *arguments, **options):
    environment = os.environ | store.environment | options.pop("env", {})
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)


FLAGS = ["gpt.main", "--config=configs/char_tiny.py", "--config.model.embed_dim=16", "--config.model.num_layers=1"]
FLAGS += ["--config.train.batch_size=8", "--config.train.sample_tokens=0", "--config.train.log_every=1"]


def test_a_run_goes_on_from_the_bucket_as_from_the_disk(store, folder, tmp_path):
    """Losses are equal to the last digit that is shown, with latency."""
    store.counters(latency=0.02)
    on_disk, in_bucket = (f"--config.data.path={place}/shards" for place in (folder, "s3://bucket"))
    found = [
        run(store, *FLAGS, f"--workdir={tmp_path}/{name}", path, f"--config.train.steps={steps}")
        for name, path, steps in (("a", on_disk, 6), ("b", on_disk, 3), ("b", in_bucket, 6))
    ]
    assert [each.returncode for each in found] == [0, 0, 0], found
    whole, _, rest = found

    def losses(found):
        lines = (line.split() for line in found.stdout.splitlines() if line.startswith("step "))
        return {line[1]: line[3] for line in lines if line[2] == "loss"}

    assert {step: loss for step, loss in losses(whole).items() if step[0] in "456"} == losses(rest)
    assert len(losses(rest)) == 3


def test_text_in_a_bucket_is_tokenised_into_the_bucket(store, folder, tmp_path):
    flags = ["--data=s3://bucket/text", "--out=s3://bucket/again", "--tokenizer=byte", "--validation_fraction=0.05"]
    found = run(store, "gpt.tokenize", *flags, "--workers=2")
    assert found.returncode == 0, found.stderr
    assert "Done: " in found.stdout
    corpora = []
    for path in ("s3://bucket/again", str(folder / "shards")):
        out = tmp_path / "tokens.npy"
        corpora.append(batches(store, path, out, 0, 4, range(BATCH), tmp_path)[0])
    assert corpora[0].shape == corpora[1].shape
    assert json.loads((folder / "again" / "tokens.json").read_text())["train"]
    again = run(store, "gpt.tokenize", *flags)
    assert again.returncode == 0, again.stderr
    verified = run(store, "gpt.tokenize", "--out=s3://bucket/again", "--verify")
    assert "are intact" in verified.stdout
    shutil.rmtree(folder / "again")


def test_patterns_and_raw_text_in_a_bucket(store, folder, tmp_path):
    for path in ("s3://bucket/text/*.txt", "s3://bucket/text/b.txt", "s3://bucket/text"):
        flags = [*FLAGS, f"--workdir={tmp_path}/{len(path)}", f"--config.data.path={path}", "--config.train.steps=1"]
        found = run(store, *flags, env={"GPT_CACHE_DIR": str(tmp_path / "cache")})
        assert found.returncode == 0, found.stderr
        assert ("vocabulary 6" in found.stdout) == (path != "s3://bucket/text")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/missing", "data.path: there are no files at s3://bucket/missing."),
        ("s3://bucket/text/*.bin", "data.path: there are no files at s3://bucket/text/*.bin."),
        ("s3://other/text", "data.path: "),
        ("https://host/text", "data.path: https://host/text is not on a disk or in a bucket"),
    ],
)
def test_missing_objects_are_sentences(store, tmp_path, path, message):
    found = run(store, *FLAGS, f"--workdir={tmp_path}/run", f"--config.data.path={path}")
    assert found.returncode == 1
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_shard_that_disappears_ends_the_run_with_a_sentence(store, folder, tmp_path):
    copy = folder / "copy"
    shutil.copytree(folder / "shards", copy)
    process = subprocess.Popen(
        [sys.executable, "-m", *FLAGS, f"--workdir={tmp_path}/run", "--config.data.path=s3://bucket/copy"],
        cwd=ROOT,
        env=os.environ | store.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            for file in copy.glob("train_*.npy"):
                file.unlink()
            break
    _, errors = process.communicate(timeout=120)
    shutil.rmtree(copy)
    assert process.returncode == 1
    assert "Cannot read s3://bucket/copy/train_" in errors
    assert "Traceback" not in errors


def test_google_storage(store, folder, tmp_path):
    pytest.importorskip("gcsfs")
    local, _ = batches(store, str(folder / "shards"), tmp_path / "local.npy", 0, 2, range(BATCH), tmp_path)
    found, keys = batches(store, "gs://bucket/shards", tmp_path / "a.npy", 0, 2, range(BATCH), tmp_path)
    np.testing.assert_array_equal(found, local)
    assert sum(count["bytes"] for count in keys.values()) == 2 * BATCH * (LENGTH + 1)


def test_rows_are_read_at_the_same_time(monkeypatch):
    """A batch takes about as long as its slowest read, not as all reads together."""
    import threading

    together = threading.Barrier(8, timeout=30)

    class Slow:
        threads = 8

        def __len__(self):
            return 64

        def example(self, epoch, index):
            together.wait()
            return {"inputs": np.array([index])}

    found = pipeline.training_batches(Slow(), 8, 0, range(8))
    assert len(next(found)["inputs"]) == 8
