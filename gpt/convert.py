"""Converts a folder of Hugging Face's transformers to a workdir, or a workdir to such a folder.

python -m gpt.convert --from_hf=FOLDER --workdir=runs/gpt2
python -m gpt.convert --workdir=runs/my_run --to_hf=FOLDER

A folder holds config.json, model.safetensors (or several such files and model.safetensors.index.json), and the files of
a tokenizer or, for a ViT, preprocessor_config.json. Arrays are converted in parts: a model need not fit in memory. The
architectures are those of `ARCHITECTURES` in gpt/interop/huggingface.py.
"""

from pathlib import Path

from absl import flags

from gpt.runtime import cli
from gpt.runtime.errors import UsageError

_FROM_HF = flags.DEFINE_string("from_hf", None, "Folder of transformers to convert to a workdir.")
_TO_HF = flags.DEFINE_string("to_hf", None, "New folder to write for transformers.")
_WORKDIR = cli.define_workdir_flag("Folder of the run: a new one with --from_hf, an existing one with --to_hf.")
_CHECKPOINT = cli.define_checkpoint_flag()
_VOCAB_MULTIPLE = flags.DEFINE_integer(
    "vocab_multiple", 128, "model.vocab_multiple of the new workdir, a multiple of mesh.model.", lower_bound=1
)


def main() -> None:
    if (_FROM_HF.value is None) == (_TO_HF.value is None):
        raise UsageError("Give just one of --from_hf and --to_hf.")
    import jax

    from gpt.checkpointing.workdir import Workdir
    from gpt.interop import huggingface

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    workdir = Workdir(_WORKDIR.value)
    folder = Path(_FROM_HF.value or _TO_HF.value or "").expanduser()
    if _FROM_HF.value is not None:
        config = huggingface.from_hf(folder, workdir, _VOCAB_MULTIPLE.value)
        done = f"converted to {workdir.path}"
    else:
        config, step = huggingface.to_hf(workdir, _CHECKPOINT.value, folder)
        done = f"step {step:,} of {workdir.path} converted to {folder}"
    print(f"model  {config.num_parameters():,} parameters: {config.summary()}, vocabulary {config.vocab_size}")
    print(f"Done: {done}.")


if __name__ == "__main__":
    cli.run(main)
