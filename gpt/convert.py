"""Weights in the layout of Hugging Face's transformers to a workdir, and a workdir to such a folder: GPT-2, and ViT.

python -m gpt.convert --from_hf=FOLDER --workdir=runs/gpt2
python -m gpt.convert --workdir=runs/my_run --to_hf=FOLDER

A folder holds config.json, model.safetensors (or several such files and model.safetensors.index.json) and the files
of a tokenizer, or of a ViT preprocessor_config.json. All is read and written array by array, so a model need not fit
in memory.
"""

from absl import flags

from gpt.runtime import cli
from gpt.runtime.errors import UsageError

_FROM_HF = flags.DEFINE_string("from_hf", None, "Folder with a GPT-2 or ViT of transformers, to become a workdir.")
_TO_HF = flags.DEFINE_string("to_hf", None, "Folder to be made, which transformers loads.")
_WORKDIR = cli.define_workdir_flag("Folder of the run: to be made, or to be read.")
_CHECKPOINT = cli.define_checkpoint_flag()
_VOCAB_MULTIPLE = flags.DEFINE_integer(
    "vocab_multiple", 128, "model.vocab_multiple of a new workdir: mesh.model has to divide it.", lower_bound=1
)


def main() -> None:
    if (_FROM_HF.value is None) == (_TO_HF.value is None):
        raise UsageError("Give just one of --from_hf and --to_hf.")
    from gpt.interop import huggingface

    if _FROM_HF.value is not None:
        print(huggingface.import_folder(_FROM_HF.value, _WORKDIR.value, _VOCAB_MULTIPLE.value))
    else:
        print(huggingface.export_folder(_WORKDIR.value, _CHECKPOINT.value, _TO_HF.value))


if __name__ == "__main__":
    cli.run(main)
