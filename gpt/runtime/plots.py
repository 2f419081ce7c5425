"""Plots the losses of runs with matplotlib, from their TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

from gpt.runtime.errors import UserError
from gpt.runtime.files import new_file


def draw_losses(folders: Sequence[Path], out: str) -> str:
    """Plots training and validation loss (nats per token) over steps; returns the absolute path of the image file.

    Args:
      folders: workdirs of the runs, with TensorBoard events.
      out: path of the image file, which must not exist. Its suffix selects the format.

    Raises:
      UserError: matplotlib is not installed, or the file exists, has an unknown format, or cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('Plots need matplotlib: pip install "gpt-spmd[plot]".') from None
    from gpt.runtime.tensorboard import read_scalars

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    image_format = Path(out).suffix[1:].lower() or "png"
    with new_file("out", out) as file:
        if image_format not in figure.canvas.get_supported_filetypes():
            raise UserError(f"--out={out}: there is no picture format {image_format!r}; choose .png, .svg or .pdf.")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        for color, folder in enumerate(folders):
            scalars = read_scalars(folder, ("train/loss", "validation/loss"))
            axes.plot(*scalars["train/loss"], color=f"C{color}", alpha=0.35, label=f"{folder.name}, training")
            axes.plot(*scalars["validation/loss"], "o-", color=f"C{color}", label=f"{folder.name}, validation")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format=image_format)
        return file.name
