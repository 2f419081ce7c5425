"""Converts a folder of Hugging Face's transformers to a workdir, and a workdir to such a folder.

A file of this package for each architecture says which tensors and which keys of config.json are which of ours.
"""

import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import numpy as np

from gpt.checkpointing.loading import Weights
from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.checkpointing.writing import Deferred, write_params
from gpt.config import Config
from gpt.interop import safetensors_folder
from gpt.interop.architecture import Architecture, Tensor
from gpt.interop.config_file import ConfigFile
from gpt.interop.gpt2 import GPT2
from gpt.interop.safetensors_folder import SafetensorsFolder
from gpt.interop.vit import ViT
from gpt.models.transformer import BlockConfig
from gpt.runtime import files
from gpt.runtime.errors import UserError

# Any: each architecture has its own config class.
ARCHITECTURES: tuple[Architecture[Any], ...] = (GPT2(), ViT())


def from_hf(folder: Path, workdir: Workdir, vocab_multiple: int) -> BlockConfig:
    """Converts a folder of transformers to a workdir with a checkpoint of step 0, and returns the model's config.

    Args:
      vocab_multiple: `model.vocab_multiple` of the workdir, for a language model.

    Raises:
      UserError: the folder holds no whole model of a known architecture, or the workdir is not empty.
    """
    if not folder.is_dir():
        raise UserError(f"--from_hf={folder}: there is no such folder.")
    _refuse_to_overwrite("workdir", workdir.path)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; it describes the shape of the model.")
    file = ConfigFile.read(path)
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    model_type = file.values.get("model_type")
    file.check("model_type", model_type in [*known], " and ".join(map(repr, known)))
    architecture = known[str(model_type)]
    config, (_, tokenizer, parts) = architecture.read_config(file, vocab_multiple)
    source = SafetensorsFolder(folder, architecture.prefix, architecture.buffers, architecture.model_class)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: vocab_size is {config.vocab_size} in config.json, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens."
        )
    tensors = architecture.tensors(config)
    expected = {name: tensor.shape for tensor in tensors.values() for names in tensor.names_by_layer for name in names}
    source.check_shapes(expected, architecture.duplicates(config, source), architecture.title)
    run = Run(Config(model=dataclasses.replace(config, vocab_size=0), **parts), tokenizer, fingerprint=None)
    params = {name: _deferred(source, tensor) for name, tensor in tensors.items()}
    workdir.create()
    write_params(workdir.path / "checkpoints" / "0", run, flax.traverse_util.unflatten_dict(params, sep="/"))
    workdir.record(run)
    return config


def _deferred(source: SafetensorsFolder, tensor: Tensor) -> Deferred:
    """Returns a parameter that is read from a folder when it is written to a checkpoint."""

    def make() -> np.ndarray:
        array = np.zeros(tensor.stacked_shape, np.float32)
        for names, layer in zip(tensor.names_by_layer, array.reshape(-1, *tensor.our_shape), strict=True):
            tensor.to_ours([source.read(name) for name in names], layer)
        return array

    return Deferred(tensor.stacked_shape, make)


def to_hf(workdir: Workdir, checkpoint: str, folder: Path) -> tuple[BlockConfig, int]:
    """Converts a checkpoint of a workdir to a folder of transformers, and returns the model's config and the step.

    Args:
      checkpoint: "best", "last" or a step.

    Raises:
      UserError: there is no such checkpoint, transformers has no such model, or the folder is not empty.
    """
    run = workdir.read()
    known = {architecture.config_class: architecture for architecture in ARCHITECTURES}
    if (architecture := known.get(type(run.config.model))) is None:
        titles = " and ".join(architecture.title for architecture in ARCHITECTURES)
        raise UserError(
            f"--workdir={workdir.path} holds a model.family={run.config.model.family}, but only {titles} can be "
            "converted."
        )
    config: Any = run.config.model.without_kernel().resolve(run.tokenizer.vocab_size, "cpu")
    texts = architecture.write(config, run)
    weights = Weights(workdir, checkpoint)
    _refuse_to_overwrite("to_hf", folder)
    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    try:
        partial.mkdir(parents=True)
        _write_weights(partial / safetensors_folder.WEIGHTS, architecture, architecture.tensors(config), weights)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        files.publish(partial, folder)
    except OSError as error:
        raise UserError(f"Cannot write to --to_hf={folder}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config, weights.step


def _write_weights(path: Path, architecture: Architecture, tensors: dict[str, Tensor], weights: Weights) -> None:
    shapes = {
        ("" if name.startswith(architecture.head) else architecture.prefix) + name: tensor.shape
        for tensor in tensors.values()
        for names in tensor.names_by_layer
        for name in names
    }

    def arrays() -> Iterator[np.ndarray]:
        restored = weights.restore_each({name: tensor.stacked_shape for name, tensor in tensors.items()})
        for tensor, array in zip(tensors.values(), restored, strict=True):
            for layer in array.reshape(-1, *tensor.our_shape):
                yield from tensor.to_theirs(layer)

    safetensors_folder.write(path, shapes, arrays())


def _refuse_to_overwrite(flag: str, path: Any) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--{flag}={path} exists and is not an empty folder; choose another.")
