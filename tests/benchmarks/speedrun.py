"""Seconds to a validation loss from a cold start, and what 2,000 steps of eager PyTorch take on the same machine.

python tests/benchmarks/speedrun.py --data=tinyshakespeare.txt   (needs torch, beside what the project needs)

Each run is `gpt.main` in a process of its own, with empty caches, another seed, and a clock from the start of the
process to the line that has the loss. Between the runs, the PyTorch model of `training.py` takes its turn: nanoGPT's
small setting of 4 layers, 128 wide, 64 × 12 tokens, of which the recipe makes 2,000 steps; its start-up and
evaluations are left out.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import Contestant

ROOT = Path(__file__).parent.parent.parent
RECIPE_STEPS = 2000


def cold_run(config: str, data: str, seed: int) -> tuple[float, float]:
    """Seconds to the last validation loss, and that loss."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpt.main", f"--config={config}", f"--config.data.path={data}"]
        command += [f"--config.seed={seed}", f"--workdir={folder}/run"]
        began, seconds, loss = time.perf_counter(), 0.0, float("nan")
        environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if found := re.search(r"validation loss ([\d.]+)", line):
                    seconds, loss = time.perf_counter() - began, float(found[1])
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text, tinyshakespeare.txt")
    parser.add_argument("--config", default="configs/char_speedrun.py")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    eager = Contestant("eager", "--size=4/4/128").wait_until_ready()
    ours, recipe = [], []
    for seed in range(arguments.runs):
        seconds, loss = cold_run(arguments.config, str(Path(arguments.data).absolute()), seed)
        ours.append(seconds)
        recipe.append(RECIPE_STEPS * eager.seconds(40))
        print(f"seed {seed}: loss {loss:.4f} after {seconds:.1f} s; {RECIPE_STEPS:,} eager steps: {recipe[-1]:.0f} s")
    eager.close()
    ratios = sorted(theirs / own for theirs, own in zip(recipe, ours, strict=True))
    print(
        f"median {statistics.median(ours):.1f} s against {statistics.median(recipe):.0f} s: "
        f"{statistics.median(ratios):.1f} × ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


if __name__ == "__main__":
    main()
