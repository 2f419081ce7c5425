"""Evaluates a checkpoint on a whole split of its data, on other data, or on tasks of the lm-evaluation-harness.

Prints loss, perplexity and bits per byte for text; loss, accuracy, exact match and examples of mistakes for other data.

    python -m gpt.evaluate --workdir=runs/char
    python -m gpt.evaluate --workdir=runs/char --data=my.txt --split=all --stride=32
    python -m gpt.evaluate --workdir=runs/gpt2 --tasks=lambada_openai,hellaswag
"""

import json

from absl import flags

import gpt
from gpt.runtime import cli, cluster

_WORKDIR = cli.define_workdir_flag()
_SPLIT = flags.DEFINE_enum("split", "val", ["val", "train", "all"], "Part of the data to evaluate on.")
_DATA = flags.DEFINE_string(
    "data", None, "Other data to evaluate on, as in data.path; it is split like the data of the run."
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens by which the window moves; a smaller stride gives predictions more context. Default: model.block_size.",
    lower_bound=1,
)
_CHECKPOINT = cli.define_checkpoint_flag()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Examples in a batch. Default: as in training.", lower_bound=1, upper_bound=2**20
)
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness to evaluate on instead of the data.")
_TASKS_PATH = flags.DEFINE_string(
    "tasks_path", None, "Folder with YAML files of further tasks; the Python functions that they name are called."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Examples of each task. Default: all.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON.")
_JOB = cli.define_cluster_flags()


def main() -> int:
    model = gpt.load_model(_WORKDIR.value, _CHECKPOINT.value, batch_size=_BATCH_SIZE.value, job=_JOB())
    place = {"workdir": str(model.workdir.path), "step": model.step}
    if _TASKS.value:
        results, tables = model.benchmark(_TASKS.value, _TASKS_PATH.value, _LIMIT.value)
        if cluster.is_first():
            print(json.dumps(place | results) if _JSON.value else tables)
        return 0
    report, mistakes = model.evaluate_with_mistakes(_SPLIT.value, _DATA.value, _STRIDE.value)
    if not cluster.is_first():
        return 0
    if _JSON.value:
        print(json.dumps(place | {"split": _SPLIT.value} | report))
        return 0
    (unit, count), *measures = report.items()
    data = f" of {_DATA.value}" if _DATA.value else ""
    print(f"{model.workdir.path}, step {model.step:,}, {_SPLIT.value} split{data}, {count:,} {unit}")
    for name, value in measures:
        print(f"{name.replace('_', ' '):20}{value:.4f}")
    if mistakes.text:
        print(mistakes.text)
    return 0


if __name__ == "__main__":
    cli.run(main, prints_result=True)
