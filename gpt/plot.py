"""Plots the losses of one or several runs over their steps as a PNG file. Needs the extra `plot`.

python -m gpt.plot --workdir=runs/char --out=loss.png
"""

from absl import flags

from gpt.runtime import cli, plots

_WORKDIR = flags.DEFINE_list("workdir", None, "Folders of runs, separated by commas.", required=True)
_OUT = flags.DEFINE_string("out", "loss.png", "New file for the plot.")


def main() -> int:
    from gpt.checkpointing.workdir import Workdir

    folders = [Workdir(path) for path in _WORKDIR.value]
    for folder in folders:
        folder.read()  # raises UserError if the folder holds no run
    print(f"wrote {plots.draw_losses([folder.path for folder in folders], _OUT.value)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
