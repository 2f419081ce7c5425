"""Prints the loss, perplexity and bits per byte of a checkpoint, over a whole split of its corpus or of another text.

python -m gpt.evaluate --workdir=runs/char
python -m gpt.evaluate --workdir=runs/char --data=my.txt --split=all --stride=32
"""

import dataclasses
import json
import math

from absl import flags

from gpt import cli, cluster
from gpt.checkpoint import Workdir
from gpt.errors import UsageError, UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "val", ["val", "train", "all"], "Part of the corpus.")
_DATA = flags.DEFINE_string("data", None, "Another text in place of the run's, as in data.path, and split as it is.")
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens from one window to the next; the fewer, the more context each prediction has. Default: model.block_size.",
    lower_bound=1,
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows at a time. Default: that of the training.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
flags.adopt_module_key_flags(cluster)


def main() -> int:
    from gpt import backend, loaded, program  # after the flags: mistakes in them need not wait for it
    from gpt.data import text

    backend.start()
    workdir = Workdir(_WORKDIR.value)
    backend.divide_cpu(workdir.read().config, rows=0)
    run = loaded.load(workdir, _CHECKPOINT.value, _BATCH_SIZE.value)
    block_size = run.model_config.block_size
    if _STRIDE.value and _STRIDE.value > block_size:
        raise UsageError(f"--stride={_STRIDE.value} is more than model.block_size={block_size}: it would leave gaps.")
    data = dataclasses.replace(run.run.config.data, path=_DATA.value, validation_path="") if _DATA.value else None
    corpus = run.corpus(data)
    tokens = corpus.split(_SPLIT.value)
    if len(tokens) < 2:
        raise UserError(f"The {_SPLIT.value} split has {len(tokens)} tokens: too few to predict any; try --split=all.")
    windows = text.EvaluationWindows(tokens, block_size, corpus.border, _STRIDE.value)
    result = program.evaluate(run.program, run.params, windows, run.batch_size)
    loss, nats = result["loss"], result["loss"] * result["tokens"]
    size = sum(run.tokenizer.byte_lengths[tokens[i : i + 2**20]].sum() for i in range(1, len(tokens), 2**20))
    report = {
        "workdir": str(run.workdir.path),
        "split": _SPLIT.value,
        "step": run.step,
        "tokens": result["tokens"],
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": nats / math.log(2) / int(size),
    }
    if not cluster.is_first():
        return 0
    if _JSON.value:
        print(json.dumps(report))
    else:
        of = f" of {_DATA.value}" if _DATA.value else ""
        print(f"{run.workdir.path}, step {run.step:,}, {_SPLIT.value} split{of}, {result['tokens']:,} tokens")
        for name in ("loss", "perplexity", "bits_per_byte"):
            print(f"{name.replace('_', ' '):14}{report[name]:.4f}")
    return 0


if __name__ == "__main__":
    cli.run(main)
