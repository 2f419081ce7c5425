"""Prints how good a checkpoint is, over a whole split of its data or of other data: for a text loss, perplexity and
bits per byte, for others loss, accuracy and exact match, with examples of mistakes.

python -m gpt.evaluate --workdir=runs/char
python -m gpt.evaluate --workdir=runs/char --data=my.txt --split=all --stride=32
"""

import json

from absl import flags

import gpt
from gpt.runtime import cli, cluster

_WORKDIR = cli.define_workdir_flag()
_SPLIT = flags.DEFINE_enum("split", "val", ["val", "train", "all"], "Part of the data.")
_DATA = flags.DEFINE_string("data", None, "Other data in place of the run's, as in data.path, and split as it is.")
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens from one window to the next; the fewer, the more context each prediction has. Default: model.block_size.",
    lower_bound=1,
)
_CHECKPOINT = cli.define_checkpoint_flag()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Examples at a time. Default: as in training.", lower_bound=1, upper_bound=2**20
)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
_JOB = cli.define_cluster_flags()


def main() -> int:
    model = gpt.load_model(_WORKDIR.value, _CHECKPOINT.value, batch_size=_BATCH_SIZE.value, job=_JOB())
    report, mistakes = model.evaluate_with_mistakes(_SPLIT.value, _DATA.value, _STRIDE.value)
    if not cluster.is_first():
        return 0
    if _JSON.value:
        print(json.dumps({"workdir": str(model.workdir.path), "split": _SPLIT.value, "step": model.step} | report))
        return 0
    (what, count), *measures = report.items()
    of = f" of {_DATA.value}" if _DATA.value else ""
    print(f"{model.workdir.path}, step {model.step:,}, {_SPLIT.value} split{of}, {count:,} {what}")
    for name, value in measures:
        print(f"{name.replace('_', ' '):20}{value:.4f}")
    if mistakes.text:
        print(mistakes.text)
    return 0


if __name__ == "__main__":
    cli.run(main, prints_result=True)
