"""Lists the runs in a folder and the folders below it, compares the configs of two, or deletes checkpoints of one.

    python -m gpt.runs [DIR] [--sort=COLUMN] [--json]
    python -m gpt.runs --diff=runs/a,runs/b
    python -m gpt.runs --prune=runs/a --keep=1000

DIR is a folder (default: runs), a place in a bucket, or one workdir. Losses are in nats per token: "best" is the lowest
validation loss among the checkpoints, "last" that of the newest evaluated one, "train" the mean of the last steps.
"""

import json
import shutil

from absl import flags

from gpt.runtime import cli
from gpt.runtime.errors import UsageError

_DIR = cli.define_argument("runs")
_SORT = flags.DEFINE_string("sort", "name", "Column to sort by, like best or age; -COLUMN: in reverse order.")
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each run.")
_DIFF = flags.DEFINE_list("diff", None, "Two runs, separated by a comma: print the config keys in which they differ.")
_PRUNE = flags.DEFINE_string("prune", None, "Run whose checkpoints to delete, except the best and the last.")
_KEEP = flags.DEFINE_list("keep", [], "With --prune: further steps to keep, separated by commas.")
_YES = flags.DEFINE_bool("yes", False, "With --prune: delete without asking.")


def main() -> int:
    from gpt.checkpointing import overview

    if _DIFF.value is not None and len(_DIFF.value) != 2:
        raise UsageError("--diff needs two runs, separated by a comma: --diff=runs/a,runs/b.")
    if _PRUNE.value is not None:
        from gpt.checkpointing import pruning

        return pruning.prune(_PRUNE.value, _DIR(), _KEEP.value, _YES.value)
    if _DIFF.value:
        print(*overview.compare(_DIFF.value[0], _DIFF.value[1], _DIR()), sep="\n")
        return 0
    runs = overview.sort(overview.find(_DIR()), _SORT.value)
    if _JSON.value:
        print(*(json.dumps(vars(run)) for run in runs), sep="\n")
    else:
        print(*overview.table(runs, shutil.get_terminal_size().columns), sep="\n")
    return 0


if __name__ == "__main__":
    cli.run(main, prints_result=True)
