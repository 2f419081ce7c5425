"""Converts a folder of Hugging Face's transformers to a workdir, and a workdir to such a folder.

A file of the folder `architectures` for each says which tensors and which keys of config.json are which of ours.
"""

import dataclasses
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt.checkpointing.loading import Weights
from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.checkpointing.writing import Deferred, write_params
from gpt.config import Config
from gpt.interop import safetensors_folder
from gpt.interop.architecture import Architecture, Decoder, Source, Tensor, declaration
from gpt.interop.gguf_file import GGUFFile
from gpt.interop.rotary_decoder import Gemma, Gemma3, Qwen, RotaryDecoder
from gpt.interop.safetensors_folder import SafetensorsFolder
from gpt.interop.vit import ViT
from gpt.models.base import ModelConfig
from gpt.runtime import files
from gpt.runtime.errors import UserError

# The class of each file in the folder `architectures`. A model is written as the first that computes the same.
KINDS: dict[str, type[Architecture[Any]]] = {"gpt2": Decoder}
KINDS |= dict.fromkeys(("llama", "mistral"), RotaryDecoder) | dict.fromkeys(("qwen2", "qwen3"), Qwen)
KINDS |= {"olmo2": RotaryDecoder, "gemma2": Gemma, "gemma3_text": Gemma3, "gpt_neox": RotaryDecoder, "vit": ViT}
# Any: each architecture has its own config class.
ARCHITECTURES: dict[str, Architecture[Any]] = {
    name: kind(model_type=name, **declaration(name)) for name, kind in KINDS.items()
}


def from_hf(folder: Path, workdir: Workdir, vocab_multiple: int) -> ModelConfig:
    """Converts a folder of transformers or a GGUF file to a workdir with a checkpoint of step 0; returns the config.

    Args:
      vocab_multiple: `model.vocab_multiple` of the workdir, for a language model.

    Raises:
      UserError: there is no such folder or file, it holds no whole model of a known architecture, or the workdir is not
        empty.
    """
    is_gguf = folder.suffix == ".gguf" and folder.is_file()
    if not is_gguf and not folder.is_dir():
        raise UserError(f"--from_hf={folder}: there is no such folder or GGUF file.")
    source = GGUFFile(folder) if is_gguf else SafetensorsFolder(folder)
    refuse_to_overwrite("workdir", workdir.path)
    model_type = source.config.values.get("model_type")
    source.config.check("model_type", model_type in [*ARCHITECTURES], ", ".join(map(repr, ARCHITECTURES)))
    architecture = ARCHITECTURES[str(model_type)]
    config, vocabulary, parts = architecture.read(source, vocab_multiple)
    if vocabulary.vocab_size > config.vocab_size:
        raise UserError(
            f"{source.path}: vocab_size is {config.vocab_size} in config.json, but the tokenizer has "
            f"{vocabulary.vocab_size} tokens."
        )
    tensors = architecture.tensors(config)
    names = {name.removeprefix(architecture.prefix): name for name in source.shapes}
    if len(names) < len(source.shapes):
        raise UserError(f"{source.path}: some tensors are there with and without the prefix {architecture.prefix}.")
    expected = {name: shape for tensor in tensors.values() for name, shape in tensor.their_shapes.items()}
    unknown = names.keys() - architecture.duplicates(config, source, names) - expected.keys()
    for problem, wrong in (
        ("missing", expected.keys() - names.keys()),
        (f"not part of a {architecture.model_class} of this shape", unknown),
    ):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{source.path}: {', '.join(sorted(wrong)[:3])}{more}: {problem}, by config.json.")
    for name, shape in expected.items():
        if (found := source.shapes[names[name]]) != shape:
            sizes, wanted = (" × ".join(map(str, each)) for each in (found, shape))
            raise UserError(f"{source.path}: {name} is {sizes}, but has to be {wanted} by config.json.")
    own_size = 0 if vocabulary.vocab_size == config.vocab_size else config.vocab_size
    run = Run(Config(model=dataclasses.replace(config, vocab_size=own_size), **parts), vocabulary, fingerprint=None)
    params = [_deferred(source, names, name, tensor) for name, tensor in tensors.items()]
    workdir.create()
    write_params(workdir.path / "checkpoints" / "0", run, params)
    workdir.record(run)
    return config


def _deferred(source: Source, names: dict[str, str], our_name: str, tensor: Tensor) -> Deferred:
    """Returns a parameter that is read from a source when it is written to a checkpoint."""

    def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for layer, theirs in enumerate(tensor.names_by_layer):
            array = tensor.to_ours([source.read(names[name]) for name in theirs])
            origin = (0,) * array.ndim
            if tensor.num_layers:
                yield (layer, *origin), array[None]
                continue
            yield origin, array
            for axis, (size, padded) in enumerate(zip(array.shape, tensor.our_shape, strict=True)):
                if size < padded:
                    shape = *array.shape[:axis], padded - size, *array.shape[axis + 1 :]
                    yield (*origin[:axis], size, *origin[axis + 1 :]), np.broadcast_to(np.float32(0), shape)

    return Deferred(our_name, tensor.stacked_shape, parts)


def to_hf(workdir: Workdir, checkpoint: str, folder: Path) -> tuple[ModelConfig, int]:
    """Converts a checkpoint of a workdir to a folder of transformers, and returns the model's config and the step.

    Args:
      checkpoint: "best", "last" or a step, with or without ",raw".

    Raises:
      UserError: there is no such checkpoint, transformers has no such model, or the folder is not empty.
    """
    weights = Weights(workdir, checkpoint)
    config, architecture = exported(weights.run, workdir)
    texts, tensors = architecture.write(config, weights.run), architecture.tensors(config)
    shapes = {
        ("" if name.startswith(architecture.head) else architecture.prefix) + name: shape
        for tensor in tensors.values()
        for name, shape in tensor.their_shapes.items()
    }
    arrays = (
        array
        for name, _, part in weights.restore_each({name: tensor.stacked_shape for name, tensor in tensors.items()})
        for array in tensors[name].to_theirs(part[0] if tensors[name].num_layers else part)
    )
    write_folder("to_hf", folder, texts, safetensors_folder.WEIGHTS, shapes, arrays)
    return config, weights.step


def exported(run: Run, workdir: Workdir) -> tuple[Any, Architecture[Any]]:
    """Returns the resolved config of a run's model, and the architecture as which it is written."""
    known = [each for each in ARCHITECTURES.values() if each.config_class is type(run.config.model)]
    if not known:
        raise UserError(
            f"--workdir={workdir.path} holds a model.family={run.config.model.family}, which cannot be converted."
        )
    config = run.config.model.without_kernel().resolve(run.tokenizer.vocab_size, "cpu")
    return config, min(known, key=lambda architecture: len(architecture.differences(config)))


def write_folder(
    flag: str,
    folder: Path,
    texts: dict[str, str],
    weights: str,
    shapes: dict[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Makes a new folder; an interruption leaves nothing.

    Args:
      flag: the flag that names the folder, for messages.
      texts: the text of each file, by name.
      weights: name of the file with the tensors.
      shapes, arrays: see `safetensors_folder.write`.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    refuse_to_overwrite(flag, folder)
    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    try:
        partial.mkdir(parents=True)
        safetensors_folder.write(partial / weights, shapes, arrays)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        files.publish(partial, folder)
    except OSError as error:
        raise UserError(f"Cannot write to --{flag}={folder}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_to_overwrite(flag: str, path: Any) -> None:
    """Raises UserError if something exists at a path, besides an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--{flag}={path} exists and is not an empty folder; choose another.")
