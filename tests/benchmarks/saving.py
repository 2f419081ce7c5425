"""What checkpoints cost a run, and how long a start takes.

python tests/benchmarks/saving.py [--config=configs/char.py] [--every=3] [--steps=9]

Trains a few steps with a checkpoint every third, or more rarely, and measures by the wall clock: a step just before a
save, the time that the loop stands still for a save (device to host, and the wait for the save before), and what all
steps after it take longer while it goes on in the background.
From these follows the share of the time at the config's own train.checkpoint_every.
Then it starts the same command with an empty and with a filled compilation cache (JAX_COMPILATION_CACHE_DIR).
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))


def measure_saves(file: str, every: int, steps: int) -> dict[str, float]:
    """Seconds of a step, and of the parts of a save."""
    import importlib.util

    from gpt import config, train
    from gpt.checkpointing.checkpoints import Checkpoints
    from gpt.checkpointing.workdir import Workdir
    from gpt.runtime import backend, progress

    spec = importlib.util.spec_from_file_location("chosen", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config()
    interval = tree.train.checkpoint_every
    tree.train.update({"checkpoint_every": every, "eval_every": 0, "sample_tokens": 0, "log_every": 1})
    reported, stood, waited = {}, [], []
    update, save, wait = progress.Steps.update, Checkpoints.save, Checkpoints.wait

    def timed_update(self, step, *args, **kwargs):
        update(self, step, *args, **kwargs)
        reported[step] = time.perf_counter()
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    def timed_wait(self):
        if self._saving is not None:
            since = time.perf_counter()
            wait(self)
            waited.append(time.perf_counter() - since)

    def timed_save(self, step, *args):
        timed_wait(self)
        since = time.perf_counter()
        save(self, step, *args)
        stood.append(time.perf_counter() - since)

    progress.Steps.update, Checkpoints.save, Checkpoints.wait = timed_update, timed_save, timed_wait
    with tempfile.TemporaryDirectory() as folder:
        settings = config.from_tree(tree)
        backend.set_xla_options()  # as gpt.main does
        backend.divide_cpu(settings.work(settings.train.batch_size // settings.train.micro_batches))
        workdir = Workdir(folder)
        train.train(settings, workdir)
        newest = Path(folder, "checkpoints", str(workdir.checkpoints().last()))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    # Where a save stood between two reports, the later step is not measured; the one after ran beside the save.
    times = [[] for _ in range(every)]
    for step in range(every + 1, steps + 1):
        times[step % every].append(reported[step] - reported[step - 1])
    alone, _, *beside = [statistics.median(seconds) for seconds in times]
    return {
        "step": alone,
        "slower": sum(max(seconds - alone, 0) for seconds in beside),
        "first": stood[0],
        "stands": statistics.median(stood[1:]),
        "waits": max(waited),
        "size": size,
        "interval": interval,
    }


def measure_start(file: str, cache: str) -> float:
    """Seconds from the command to the report of its first step."""
    flags = ["--config.train.log_every=1", "--config.train.sample_tokens=0"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpt.main", f"--config={file}", f"--workdir={folder}", *flags]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        try:
            next(line for line in process.stdout if re.match("step 1/", line))
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs" / "char.py"))
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        starts = {name: measure_start(arguments.config, cache) for name in ("empty", "filled")}
    found = measure_saves(arguments.config, arguments.every, arguments.steps)
    whole = found["interval"] * found["step"]
    rows = [
        ("a step", found["step"]),
        ("all steps beside a save take longer", found["slower"]),
        ("the loop stands still for a save", found["stands"]),
        ("  for the first, which compiles", found["first"]),
        (f"  and waits for the one before, {arguments.every} steps ago", found["waits"]),
    ]
    print(f"\n{Path(arguments.config).name}, a checkpoint of {found['size'] / 1e6:,.0f} MB")
    for name, seconds in rows:
        print(f"{name:46}{seconds:9.3f} s")
    for name, seconds in (
        ("standing still", found["stands"]),
        ("standing still and waiting as above", found["stands"] + found["waits"]),
        ("these and the slower steps", found["stands"] + found["waits"] + found["slower"]),
    ):
        print(f"share of {found['interval']:,} steps: {name:36}{seconds / whole:8.3%}")
    for name, seconds in starts.items():
        print(f"{f'start to first step, {name} cache':46}{seconds:9.1f} s")


if __name__ == "__main__":
    main()
