"""Speed and memory of `gpt.tokenize`, beside the ways in which others tokenise the same documents.

    python tests/benchmarks/tokenizing.py [MEGABYTES] [--kill]

It writes a synthetic corpus of JSONL, whose documents are words of Shakespeare's plays by their frequency, and converts
it with GPT-2's BPE, slice by slice in turns:

- `gpt.tokenize`, as a command, with a process for each core,
- `encode_batch`: the library `tokenizers` on all cores, for all documents of a slice in one call, into one array,
- `prepare.py`: nanoGPT's way, which is `tiktoken` in a pool of processes, and then one process that writes the tokens.
  It needs `pip install tiktoken`.

With --kill, the whole corpus is converted twice in addition, once undisturbed and once with two kills, and the bytes
are compared.
"""

import argparse
import collections
import importlib.util
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt.data import bpe, tokens
from gpt.runtime import pool
from gpt.runtime.cache import Cache

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = 10_000  # in a file
SLICE = 4  # files


def write_corpus(folder: Path, megabytes: float) -> None:
    """Writes files of `DOCUMENTS` documents, of 1.8 KB each on average."""
    folder.mkdir(parents=True)
    text = tokens.shakespeare(Cache()).read_text()
    words = np.array([word for word, _ in collections.Counter(re.findall(r"\S+", text)).most_common(30_000)])
    weights = 1 / np.arange(1, len(words) + 1)
    rng, size, number = np.random.default_rng(0), 0, 0
    while size < megabytes * 1e6:
        lengths = np.maximum(5, rng.lognormal(5.4, 0.9, DOCUMENTS).astype(int))
        chosen = words[rng.choice(len(words), lengths.sum(), p=weights / weights.sum())]
        documents = (" ".join(part) for part in np.split(chosen, np.cumsum(lengths)[:-1]))
        path = folder / f"{number:04d}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        size, number = size + path.stat().st_size, number + 1


def start(data: object, out: Path) -> subprocess.Popen:
    flags = [f"--data={data}", f"--out={out}", "--shard_mb=16", f"--workers={pool.cores()}"]
    return subprocess.Popen([sys.executable, "-m", "gpt.tokenize", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)


def with_command(paths: list[Path], out: Path) -> int:
    assert start(",".join(map(str, paths)), out / "shards").wait() == 0
    index = json.loads((out / "shards" / "tokens.json").read_text())
    return sum(shard["tokens"] for split in index.values() for shard in split)


def read(paths: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in path.open()]


def with_encode_batch(paths: list[Path], out: Path) -> int:
    texts = read(paths)
    found = bpe.gpt2()._model.encode_batch(texts, add_special_tokens=False)
    ids = np.concatenate([np.array([*each.ids, 50256], np.uint16) for each in found])
    np.save(out / "tokens.npy", ids)
    return len(ids)


def with_prepare(paths: list[Path], out: Path) -> int:
    texts = read(paths)
    with multiprocessing.get_context("spawn").Pool(pool.cores(), _load_tiktoken) as workers:
        found = workers.map(_encode, texts, chunksize=256)
    array = np.memmap(out / "train.bin", np.uint16, "w+", shape=(sum(map(len, found)),))
    at = 0
    for ids in found:
        array[at : at + len(ids)] = ids
        at += len(ids)
    array.flush()
    return at


def _load_tiktoken() -> None:
    import tiktoken

    global _encoding
    tokenizer = bpe.gpt2()
    ranks = {value: i for i, value in enumerate(tokenizer._bytes) if i != tokenizer.separator}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    _encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": tokenizer.separator}
    )


def _encode(text: str) -> list[int]:
    return [*_encoding.encode_ordinary(text), _encoding.eot_token]


def compare(folder: Path) -> None:
    """Times the ways in turns over at most 6 slices."""
    ways = {"gpt.tokenize": with_command, "encode_batch": with_encode_batch}
    ways |= {"prepare.py": with_prepare} if importlib.util.find_spec("tiktoken") else {}
    files, seconds, size = sorted((folder / "corpus").iterdir()), dict.fromkeys(ways, 0.0), 0
    for i, first in enumerate(range(0, min(len(files), 6 * SLICE), SLICE)):
        paths, counts = files[first : first + SLICE], {}
        size += sum(path.stat().st_size for path in paths)
        for name in [*ways][i % len(ways) :] + [*ways][: i % len(ways)]:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                began = time.perf_counter()
                counts[name] = ways[name](paths, Path(out))
                seconds[name] += time.perf_counter() - began
        assert len(set(counts.values())) == 1, counts
    print(f"{size / 1e6:.0f} MB in slices of {SLICE * DOCUMENTS:,} documents, {pool.cores()} cores")
    for name, spent in seconds.items():
        ratio = spent / seconds["gpt.tokenize"]
        print(f"{name:14}{size / 1e6 / spent:6.2f} MB/s   {ratio:.2f} × the time of gpt.tokenize")


def kill_and_compare(folder: Path) -> None:
    """Converts everything once undisturbed and once with two kills."""
    data, began, peak = folder / "corpus", time.perf_counter(), 0
    size = sum(path.stat().st_size for path in data.iterdir()) / 1e6
    process = start(data, folder / "undisturbed")
    while process.poll() is None:
        time.sleep(1)
        peak = max(peak, _memory(process.pid))
    spent = time.perf_counter() - began
    print(f"undisturbed: {size:.0f} MB in {spent:.0f} s, {size / spent:.2f} MB/s, at most {peak / 1e6:.0f} MB in use")
    for part in (0.3, 0.4):
        process = start(data, folder / "killed")
        time.sleep(part * spent)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = len(list((folder / "killed" / "parts").glob("*.json")))
        print(f"killed after {part:.0%} of that time, {finished} parts finished")
    assert start(data, folder / "killed").wait() == 0
    same = subprocess.run(["diff", "-rq", "-x", "*.partial", folder / "undisturbed", folder / "killed"], check=False)
    print("the bytes are the same" if same.returncode == 0 else "THE BYTES DIFFER")


def _memory(pid: int) -> int:
    """Returns the memory in bytes of a process and its children, without what they share with files."""
    total = 0
    for number in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        try:
            status = Path(f"/proc/{number}/status").read_text()
            total += 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])
        except (OSError, TypeError):  # it has ended
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=float, nargs="?", default=50)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the corpus and the shards here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        if not (folder / "corpus").exists():
            write_corpus(folder / "corpus", options.megabytes)
        compare(folder)
        if options.kill:
            kill_and_compare(folder)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
