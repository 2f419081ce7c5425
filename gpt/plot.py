"""Plots the losses of one or several runs as a PNG, SVG or PDF file. Needs the extra `plot`.

    python -m gpt.plot --workdir=runs/char --out=loss.png
    python -m gpt.plot --workdir=runs/small,runs/large --x=flops --log=xy --out=loss.svg

Runs that differ only in their seed are one line, their mean, within a band from the lowest to the highest loss.
"""

from absl import flags

from gpt.runtime import cli

_WORKDIR = flags.DEFINE_list("workdir", None, "Folders of runs, separated by commas.", required=True)
_OUT = flags.DEFINE_string("out", "loss.png", "New file for the plot. Its suffix selects the format.")
flags.DEFINE_enum("x", "step", ["step", "tokens", "time", "flops"], "What to plot the losses over.")
flags.DEFINE_enum("log", None, ["x", "y", "xy"], "Axes with a logarithmic scale.")
flags.DEFINE_bool("band", True, "Draw runs that differ only in the seed as their mean, within a band.")
flags.DEFINE_bool("dark", False, "Draw on a dark background.")


def main() -> int:
    from gpt.checkpointing.workdir import Workdir
    from gpt.inference import plots

    folders = [Workdir(path) for path in _WORKDIR.value]
    print(f"wrote {plots.draw_losses(folders, _OUT.value, plots.Options(**cli.values(plots.Options)))}")
    return 0


if __name__ == "__main__":
    cli.run(main)
