"""Converts models and adapters of Hugging Face's transformers and PEFT, and GGUF files, to workdirs and back.

    python -m gpt.convert --from_hf=FOLDER --workdir=runs/gpt2
    python -m gpt.convert --from_hf=FILE.gguf --workdir=runs/smollm2
    python -m gpt.convert --workdir=runs/my_run --to_hf=FOLDER
    python -m gpt.convert --workdir=runs/my_adapters --to_peft=FOLDER
    python -m gpt.convert --from_peft=FOLDER --base=runs/smollm2 --workdir=runs/adapters

A folder holds config.json, model.safetensors (or several such files and model.safetensors.index.json), and the files of
a tokenizer or, for a ViT, preprocessor_config.json. Arrays are converted in parts: a model need not fit in memory. The
architectures are those of `ARCHITECTURES` in gpt/interop/huggingface.py.
"""

from pathlib import Path

from absl import flags

from gpt.runtime import cli, progress
from gpt.runtime.errors import UsageError

_FROM_HF = flags.DEFINE_string("from_hf", None, "Folder of transformers, or GGUF file, to convert to a workdir.")
_TO_HF = flags.DEFINE_string("to_hf", None, "New folder to write for transformers.")
_FROM_PEFT = flags.DEFINE_string("from_peft", None, "Folder of PEFT with LoRA adapters to convert to a workdir.")
_BASE = flags.DEFINE_string("base", None, "With --from_peft: workdir of the model that the adapters are for.")
_TO_PEFT = flags.DEFINE_string("to_peft", None, "New folder to write with the LoRA adapters of a run, for PEFT.")
_WORKDIR = cli.define_workdir_flag("Folder of the run: a new one with --from_…, an existing one with --to_….")
_CHECKPOINT = cli.define_checkpoint_flag()
_VOCAB_MULTIPLE = flags.DEFINE_integer("vocab_multiple", 128, "model.vocab_multiple of the new workdir.", lower_bound=1)


def main() -> None:
    given = [flag for flag in (_FROM_HF, _TO_HF, _FROM_PEFT, _TO_PEFT) if flag.value is not None]
    if len(given) != 1 or (_FROM_PEFT.value is None) != (_BASE.value is None):
        raise UsageError("Give just one of --from_hf, --to_hf, --from_peft (with --base) and --to_peft.")
    import jax

    from gpt.checkpointing.workdir import Workdir
    from gpt.interop import huggingface, peft

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    workdir, folder = Workdir(_WORKDIR.value), Path(str(given[0].value)).expanduser()
    done = f"converted to {workdir.path}"
    with progress.task("converting"):
        if given[0] is _FROM_HF:
            config = huggingface.from_hf(folder, workdir, _VOCAB_MULTIPLE.value)
        elif given[0] is _FROM_PEFT:
            config = peft.from_peft(folder, Workdir(str(_BASE.value)), workdir)
        else:
            convert = huggingface.to_hf if given[0] is _TO_HF else peft.to_peft
            config, step = convert(workdir, _CHECKPOINT.value, folder)
            done = f"step {step:,} of {workdir.path} converted to {folder}"
    progress.say(f"model  {config.num_parameters():,} parameters: {config.summary()}, vocabulary {config.vocab_size}")
    progress.say(f"Done: {done}.")


if __name__ == "__main__":
    cli.run(main)
