"""The time that `gpt.runs` takes for many workdirs, start included.

python tests/benchmarks/runs.py [--workdirs=1000] [--checkpoints=3]

The workdirs are copies of one short run of configs/char_tiny.py with a smaller model.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdirs", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "runs" / "0"
        flags = {"model.num_layers": 2, "model.embed_dim": 32, "model.block_size": 16, "train.sample_tokens": 0}
        flags |= {"train.steps": arguments.checkpoints, "train.checkpoint_every": 1, "train.keep_checkpoints": 99}
        command = [sys.executable, "-m", "gpt.main", "--config=configs/char_tiny.py", f"--workdir={first}"]
        command += [f"--config.{key}={value}" for key, value in flags.items()]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for number in range(1, arguments.workdirs):
            shutil.copytree(first, first.with_name(str(number)))
        files = sum(len(names) for _, _, names in os.walk(first.parent))
        for _ in range(5):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [sys.executable, "-m", "gpt.runs", str(first.parent)]
            lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.count(b"\n")
            after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"{lines - 1:,} runs, {files:,} files: {seconds:.2f} s, {busy:.2f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
