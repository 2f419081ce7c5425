"""Draws the losses of one or several runs over their steps, as a PNG. Needs the extra `plot`.

python -m gpt.plot --workdir=runs/char --out=loss.png
"""

from pathlib import Path

from absl import flags

from gpt import cli
from gpt.errors import UserError

_WORKDIR = flags.DEFINE_list("workdir", None, "Folders of runs, joined by commas.", required=True)
_OUT = flags.DEFINE_string("out", "loss.png", "The picture to write; it must not exist.")


def main() -> int:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('Plots need matplotlib: pip install "gpt-spmd[plot]".') from None
    from gpt import metrics
    from gpt.checkpoint import Workdir

    out = Path(_OUT.value)
    if out.exists():
        raise UserError(f"--out={out} exists already; name another file.")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for color, path in enumerate(_WORKDIR.value):
        workdir = Workdir(path)
        workdir.read()
        scalars = metrics.read_scalars(workdir.path, ("train/loss", "validation/loss"))
        axes.plot(*scalars["train/loss"], color=f"C{color}", alpha=0.35, label=f"{workdir.path.name}, training")
        axes.plot(*scalars["validation/loss"], "o-", color=f"C{color}", label=f"{workdir.path.name}, validation")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    form = out.suffix[1:].lower() or "png"
    if form not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out={out}: there is no picture format {form!r}; choose one like .png, .svg or .pdf.")
    try:
        with out.open("xb") as file:
            figure.savefig(file, format=form)
    except OSError as error:
        raise UserError(f"Cannot write --out={out}: {error.strerror}.") from None
    print(f"wrote {out.absolute()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
