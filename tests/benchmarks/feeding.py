"""Whether input keeps up with devices that take 2 million tokens a second, from a disk and from a bucket.

    python tests/benchmarks/feeding.py [--rate=2e6] [--length=1024] [--rows=512] [--seconds=20]

The device is a stand-in that sleeps as long as a batch would take. The bucket is a server on the loopback interface
that answers after 50 ms. It prints the part of the time that the stand-in waits for a batch, the least and the most
memory of the process, and the requests and bytes that the server counted.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from object_store import ObjectStore

from gpt.data import pipeline, text
from gpt.data.text import TextConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.gpt import GPTConfig

LATENCY = 0.05  # seconds
PREFETCH = 4  # batches, the default of data.prefetch


def write_shards(folder: Path, millions: int) -> None:
    """Writes shards of llm.c with random tokens."""
    rng = np.random.default_rng(0)
    for number in range(millions // 10):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 10_000_000
        body = rng.integers(0, 50257, 10_000_000).astype("<u2")
        name = f"corpus_{'val' if number == 0 else 'train'}_{number:06d}.bin"
        (folder / name).write_bytes(header.tobytes() + body.tobytes())


def memory() -> float:
    """Returns the memory of this process in MB, without what it shares with files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def feed(path: str, options: argparse.Namespace) -> None:
    corpus = text.load(TextConfig(path=path), TokenizerConfig("gpt2"), options.length)
    source = corpus.training(GPTConfig(block_size=options.length), 0)
    batches = pipeline.training_batches(source, options.rows, 0, range(options.rows), 0, PREFETCH)
    duration = options.rows * options.length / options.rate
    for _ in range(PREFETCH):  # as while the training step compiles
        next(batches)
    time.sleep(2)
    waited, began, used, count, marks = 0.0, time.perf_counter(), [], 0, time.process_time()
    while time.perf_counter() < began + options.seconds:
        at = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - at
        time.sleep(duration)
        count += 1
        if count % 10 == 0:
            used.append(memory())
    spent = time.perf_counter() - began
    speed, share, cores = (
        count * options.rows * options.length / spent / 1e6,
        waited / spent,
        (time.process_time() - marks) / spent,
    )
    place = path.partition(":")[0] if "://" in path else "disk"
    print(f"{place:5}{speed:.2f} million tokens/s, waits {share:.2%} of the time, {cores:.2f} cores", end=", ")
    print(f"memory {min(used):.0f} to {max(used):.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=2e6, help="tokens a second")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 100)
        feed(folder, options)
        with ObjectStore(folder, bucket="bucket", latency=LATENCY) as store:
            os.environ.update(store.environment)
            feed("s3://bucket", options)
            counted = store.counters()
            mean = counted["bytes"] / counted["requests"]
            print(f"     {counted['requests']:,} requests of {mean:,.0f} bytes on average", flush=True)
            time.sleep(1)  # the reads that are still in flight end


if __name__ == "__main__":
    main()
