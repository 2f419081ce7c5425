"""Prints how good a checkpoint is, over a whole split of its data or of other data: for a text loss, perplexity and
bits per byte, for others loss, accuracy and exact match, with examples of mistakes.

python -m gpt.evaluate --workdir=runs/char
python -m gpt.evaluate --workdir=runs/char --data=my.txt --split=all --stride=32
"""

import json

from absl import flags

from gpt import cli, cluster

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "val", ["val", "train", "all"], "Part of the data.")
_DATA = flags.DEFINE_string("data", None, "Other data in place of the run's, as in data.path, and split as it is.")
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens from one window to the next; the fewer, the more context each prediction has. Default: model.block_size.",
    lower_bound=1,
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Rows at a time. Default: that of the training.", lower_bound=1, upper_bound=2**20
)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
flags.adopt_module_key_flags(cluster)


def main() -> int:
    from gpt import backend, loaded, program  # after the flags: mistakes in them need not wait for it
    from gpt.checkpoint import Workdir

    backend.start()
    workdir = Workdir(_WORKDIR.value)
    backend.divide_cpu(workdir.read().config, rows=0)
    run = loaded.load(workdir, _CHECKPOINT.value, _BATCH_SIZE.value)
    dataset = run.dataset(_DATA.value)
    source = dataset.evaluation(_SPLIT.value, run.model_config, _STRIDE.value)
    result = program.evaluate(run.program, run.params, source, run.batch_size)
    report = dataset.report(source, result)
    if not cluster.is_first():
        return 0
    if _JSON.value:
        print(json.dumps({"workdir": str(run.workdir.path), "split": _SPLIT.value, "step": run.step} | report))
        return 0
    (what, count), *measures = report.items()
    of = f" of {_DATA.value}" if _DATA.value else ""
    print(f"{run.workdir.path}, step {run.step:,}, {_SPLIT.value} split{of}, {count:,} {what}")
    for name, value in measures:
        print(f"{name.replace('_', ' '):20}{value:.4f}")
    if examples := dataset.examples(source, result).text:
        print(examples)
    return 0


if __name__ == "__main__":
    cli.run(main, prints_result=True)
