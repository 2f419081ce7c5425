"""Plots the losses of runs with matplotlib, from their TensorBoard events."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.runtime.errors import UserError
from gpt.runtime.files import new_file
from gpt.runtime.tensorboard import read_scalars

LABELS = {"step": "step", "tokens": "tokens", "flops": "model FLOPs"}
TIMES = {"hours": 3600, "minutes": 60, "seconds": 1}
LONGEST_NAME = 48  # characters of a name in the legend

Curve = tuple[np.ndarray, np.ndarray]  # [N] places on the x axis, [runs, N] losses


@dataclasses.dataclass(frozen=True)
class Options:
    """How to plot losses.

    Attributes:
      x: what the losses are plotted over: "step", "tokens", "time" (of the steps alone) or "flops".
      log: the axes with a logarithmic scale: "x", "y" or "xy".
      band: draw runs that differ only in the seed as their mean, within a band from the lowest to the highest loss.
      dark: draw on a dark background.
    """

    x: str = "step"
    log: str | None = None
    band: bool = True
    dark: bool = False


def draw_losses(folders: Sequence[Workdir], out: str, options: Options) -> str:
    """Plots training and validation losses of runs; returns the absolute path of the image file.

    Args:
      out: path of the image file, which must not exist. Its suffix selects the format.

    Raises:
      UserError: matplotlib is not installed, a folder holds no run or no losses, the runs predict different things, or
        the file exists, has an unknown format, or cannot be written.
    """
    runs = [folder.read() for folder in folders]
    try:
        from matplotlib import style, ticker
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('Plots need matplotlib: pip install "gpt-spmd[plot]".') from None

    image_format = Path(out).suffix[1:].lower() or "png"
    with new_file("out", out) as file, style.context("dark_background" if options.dark else []):
        if image_format not in (formats := Figure().canvas.get_supported_filetypes()):
            known = ", ".join(name for name in ("png", "svg", "pdf") if name in formats)
            raise UserError(f"--out={out}: there is no picture format {image_format!r}; choose one of {known}.")
        units = {run.tokenizer.unit: folder.path for run, folder in zip(runs, folders, strict=True)}
        if len(units) > 1:
            listed = " and ".join(f"per {unit} ({path})" for unit, path in units.items())
            raise UserError(f"--workdir: losses {listed} are not comparable; plot these runs separately.")
        drawn = read_losses(folders, runs, options)
        label, size = LABELS.get(options.x), 1
        if not label:
            longest = max(x[-1] for curves in drawn.values() for x, _ in curves.values())
            name, size = next(each for each in TIMES.items() if longest > 2 * each[1] or each[1] == 1)
            label = f"{name} of training steps"
        figure = Figure(figsize=(7, 4 + 0.25 * len(drawn)), dpi=120, layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylabel=f"loss (nats per {next(iter(units))})")
        half = LONGEST_NAME // 2
        for color, (name, curves) in enumerate(drawn.items()):
            name = name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
            for part, (x, losses) in curves.items():
                marks = {"marker": "o", "markersize": 4} if part == "validation" else {"alpha": 0.45}
                axes.plot(x / size, losses.mean(0), color=f"C{color}", label=f"{name}, {part}", **marks)
                if len(losses) > 1:
                    axes.fill_between(x / size, losses.min(0), losses.max(0), color=f"C{color}", alpha=0.2, linewidth=0)
        if options.x in ("step", "tokens"):
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if "x" in (options.log or ""):
            axes.set_xscale("log")
        if "y" in (options.log or ""):
            axes.set_yscale("log")
            lowest, highest = axes.get_ylim()
            if highest < 10 * lowest:  # powers of ten would be too few labels
                axes.yaxis.set(major_locator=ticker.MaxNLocator(8), minor_locator=ticker.NullLocator())
                axes.yaxis.set_major_formatter("{x:g}")
        columns = 1 if max(map(len, drawn)) > half else 2
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format=image_format)
        return file.name


def read_losses(folders: Sequence[Workdir], runs: Sequence[Run], options: Options) -> dict[str, dict[str, Curve]]:
    """Returns {name: {"training" or "validation": losses}} of each run, or of each group of runs that is one line.

    The losses of a group are those at the places of its first run, as far as all of its runs have come.

    Raises:
      UserError: a run has no losses.
    """
    names = [folder.path.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.path) for folder in folders]
    members: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        key = repr(dataclasses.replace(run.config, seed=0)), run.fingerprint
        members.setdefault(key if options.band else (i,), []).append(i)
    groups: dict[str, dict[str, Curve]] = {}
    for group in members.values():
        losses = [_losses(folders[i], runs[i], options.x) for i in group]
        others = f" and others, mean of {len(group)} seeds" if len(group) > 1 else ""
        curves = groups[names[group[0]] + others] = {}
        for part in losses[0]:
            if all(part in each for each in losses):
                x = losses[0][part][0]
                x = x[x <= min(each[part][0][-1] for each in losses)]
                curves[part] = x, np.stack([np.interp(x, *each[part]) for each in losses])
    return groups


def _losses(folder: Workdir, run: Run, x: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the places on the x axis and the losses of a run, both [N], of "training" and "validation"."""
    tags = {"training": "train/loss", "validation": "validation/loss"}
    rate = "progress/steps_per_second"
    scalars = read_scalars(folder.path, (*tags.values(), rate))
    found = {part: tuple(map(np.asarray, scalars[tag])) for part, tag in tags.items() if scalars[tag][0]}
    steps, rates = scalars[rate]
    if not found or not steps:
        raise UserError(f"--workdir={folder.path} has no losses on TensorBoard yet; train the model, or leave it out.")
    model, tokens = run.config.model, run.config.train.batch_size * run.config.model.length
    scale = {"step": 1.0, "tokens": float(tokens)}
    if x == "flops":
        resolved = dataclasses.replace(model, vocab_size=model.vocab_size or run.tokenizer.vocab_size)
        scale["flops"] = tokens * resolved.flops_per_token()
    elif x == "time":  # by the rates of the steps, because wall times count the pauses before a run is resumed
        steps = [0, *steps, max(steps[-1], *(at[-1] for at, _ in found.values()))]
        seconds = np.cumsum(np.diff(steps) / [*rates, rates[-1]])
        return {part: (np.interp(at, steps, [0, *seconds]), values) for part, (at, values) in found.items()}
    return {part: (at * scale[x], values) for part, (at, values) in found.items()}
