"""Converts text of any size to token shards, which gpt.main reads with --config.data.path=FOLDER.

    python -m gpt.tokenize --data=corpus --out=shards --tokenizer=gpt2
    python -m gpt.tokenize --data='s3://bucket/*.jsonl.zst' --out=s3://bucket/shards --tokenizer=llama

The same command goes on after an interruption, with the same shards at the end. Several processes or hosts share the
work with --num_processes and --process_id, or as an array of Slurm.
"""

import os

from absl import flags

from gpt.data import shards, tokens
from gpt.data.tokenizers import TokenizerConfig
from gpt.runtime import cli, pool, progress
from gpt.runtime.errors import UsageError


def _slurm(name: str, default: int) -> int:
    """Returns a number of the array of Slurm that this process belongs to."""
    return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))


_DATA = flags.DEFINE_string("data", None, "Text, JSONL and Parquet, as in data.path of gpt.main.")
_OUT = flags.DEFINE_string("out", None, "Folder for the shards, on a disk or in a bucket.", required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "gpt2", "char, byte, bpe or gpt2, as in tokenizer.name; or a folder with a tokenizer.json."
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", TokenizerConfig.vocab_size, "For bpe: number of tokens to train.")
_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.001, "Fraction of the documents that is for validation.", lower_bound=0, upper_bound=0.999
)
_SHARD_MB = flags.DEFINE_integer("shard_mb", 64, "Megabytes of text in a shard.", lower_bound=1, upper_bound=4096)
_WORKERS = flags.DEFINE_integer("workers", pool.cores(), "Processes on this machine.", lower_bound=1)
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where to work: here, or on a Ray cluster.")
_COUNT = flags.DEFINE_integer(
    "num_processes", _slurm("COUNT", 1), "Number of commands that share the work. Default: of an array of Slurm, or 1."
)
_INDEX = flags.DEFINE_integer(
    "process_id",
    (_slurm("ID", 0) - _slurm("MIN", 0)) // _slurm("STEP", 1),
    "Number of this command, from 0.",
)
_VERIFY = flags.DEFINE_bool("verify", False, "Compare the shards in --out with their digests instead.")


def main() -> int:
    if _VERIFY.value:
        progress.say(shards.verify(_OUT.value.rstrip("/")))
        return 0
    if not _DATA.value:
        raise UsageError("--data is missing; see --help.")
    if not 0 <= _INDEX.value < _COUNT.value:
        raise UsageError(f"--process_id={_INDEX.value} has to be less than --num_processes={_COUNT.value}.")
    size = _SHARD_MB.value * 1_000_000
    options = _TOKENIZER.value, _VOCAB_SIZE.value, _OUT.value, _FRACTION.value, size
    work = tokens.plan(_DATA.value, *options)
    numbers = range(_INDEX.value, len(work.parts), _COUNT.value)
    progress.say(f"{len(numbers):,} parts of {sum(work.parts[i].size for i in numbers) / 1e6:,.1f} MB to {work.folder}")
    tokens.convert(work, numbers, _WORKERS.value, is_on_ray=_ENGINE.value == "ray")
    progress.say(tokens.finish(work))
    return 0


if __name__ == "__main__":
    cli.run(main)
