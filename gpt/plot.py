"""Draws the losses of one or several runs over their steps, as a PNG. Needs the extra `plot`.

python -m gpt.plot --workdir=runs/char --out=loss.png
"""

from pathlib import Path

from absl import flags

from gpt import cli
from gpt.errors import UserError

_WORKDIR = flags.DEFINE_list("workdir", None, "Folders of runs, joined by commas.", required=True)
_OUT = flags.DEFINE_string("out", "loss.png", "The picture to write.")


def main() -> int:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('Plots need matplotlib: pip install "gpt-spmd[plot]".') from None
    from gpt import metrics
    from gpt.checkpoint import Workdir

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
    try:
        figure.savefig(_OUT.value)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write --out={_OUT.value}: {error}.") from None
    print(f"wrote {Path(_OUT.value).absolute()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
