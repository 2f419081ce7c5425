"""Loss against compute, for the plain recipe and for that of the speedrun, in sizes that each have the same compute.

python tests/benchmarks/scaling.py --data=tinyshakespeare.txt --workdir=runs/scaling   (needs the extra `plot`)

Each run is `gpt.main` in the folder of its name, so an interrupted study goes on where it stopped. A size gets
`--tokens_per_parameter` tokens for each of its parameters, the same for both recipes; its compute is what
`flops_per_token` counts for these. The peak learning rate is the recipe's own, times the best of `--rates`. Writes
scaling.png, and prints how much compute the plain recipe needs for each loss of the other, on the line between its
points (logarithm of compute, loss).
"""

import argparse
import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gpt.checkpointing.loading import load
from gpt.checkpointing.workdir import Workdir

ROOT = Path(__file__).parent.parent.parent
RECIPES = {"plain": "configs/char_tiny.py", "speedrun": "configs/char_speedrun.py"}
# Layers and heads; heads are 32 wide. Rows and their length are the same for both recipes as well.
SIZES = {"2/1": (2, 1), "2/2": (2, 2), "3/2": (3, 2), "3/3": (3, 3)}
ROWS, LENGTH = 16, 64


@dataclasses.dataclass(frozen=True)
class Point:
    flops: float
    loss: float


def run(recipe: str, size: str, tokens_per_parameter: float, rate: float, data: str, folder: Path) -> Point:
    """Trains to the end, or reads what is there already."""
    layers, heads = SIZES[size]
    width = 32 * heads
    steps = round(tokens_per_parameter * 12 * layers * width**2 / (ROWS * LENGTH))
    config = runpy.run_path(str(ROOT / RECIPES[recipe]))["get_config"]()
    flags = {
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.embed_dim": width,
        "model.block_size": LENGTH,
        "train.batch_size": ROWS,
        "train.steps": steps,
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        "optimizer.learning_rate": config.optimizer.learning_rate * rate,
        "optimizer.warmup_tokens": 0.05 * steps * ROWS * LENGTH,
        "data.path": data,
    }
    path = folder / f"{recipe}-{size.replace('/', '-')}-{rate:g}"
    command = [sys.executable, "-m", "gpt.main", f"--config={RECIPES[recipe]}", f"--workdir={path.absolute()}"]
    subprocess.run(command + [f"--config.{k}={v}" for k, v in flags.items()], cwd=ROOT, check=True, stdout=2)
    command = [sys.executable, "-m", "gpt.evaluate", f"--workdir={path.absolute()}", "--checkpoint=last", "--json"]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    flops = load(Workdir(path), "last").program.model.config.flops_per_token() * steps * ROWS * LENGTH
    return Point(flops, json.loads(said)["loss"])


def needed(points: list[Point], loss: float) -> float:
    """Compute for a loss, on the lines through the points; nan beyond them."""
    points = sorted(points, key=lambda point: point.loss)
    logs = np.log([point.flops for point in points])
    return float(np.exp(np.interp(loss, [point.loss for point in points], logs, left=np.nan, right=np.nan)))


def draw(found: dict[str, list[Point]], file: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="compute (FLOPs)", ylabel="validation loss (nats per token)", xscale="log")
    for recipe, points in found.items():
        axes.plot([p.flops for p in points], [p.loss for p in points], "o-", label=recipe)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text, tinyshakespeare.txt")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs and of scaling.png")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--tokens_per_parameter", type=float, default=10.0)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1.0, 2.0, 4.0])
    arguments = parser.parse_args()
    data = str(Path(arguments.data).absolute())
    found: dict[str, list[Point]] = {recipe: [] for recipe in RECIPES}
    print("recipe    layers/heads       FLOPs    loss   by learning rate")
    for size in arguments.sizes:
        for recipe in RECIPES:
            tried = {
                rate: run(recipe, size, arguments.tokens_per_parameter, rate, data, arguments.workdir)
                for rate in arguments.rates
            }
            best = min(tried.values(), key=lambda point: point.loss)
            found[recipe].append(best)
            losses = ", ".join(f"{point.loss:.4f} at × {rate:g}" for rate, point in tried.items())
            print(f"{recipe:9} {size:12} {best.flops:11.2e}  {best.loss:.4f}   {losses}", flush=True)
    for point in found["speedrun"]:
        flops = needed(found["plain"], point.loss)
        times = "more than its largest had" if np.isnan(flops) else f"{flops / point.flops:.1f} × the compute"
        print(f"loss {point.loss:.4f}: the plain recipe needs {times}")
    draw(found, arguments.workdir / "scaling.png")
    print(f"wrote {arguments.workdir / 'scaling.png'}")


if __name__ == "__main__":
    main()
