"""LoRA adapters in folders of Hugging Face's PEFT: adapter_model.safetensors and adapter_config.json.

PEFT adapts each linear layer of transformers apart, and ours share one matrix `a` where one layer of ours is several of
theirs. An adapter of PEFT with different matrices for these becomes one of a larger rank, with zeros in `b`.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpt.checkpointing.loading import Weights
from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.checkpointing.writing import Deferred, write_params
from gpt.interop import huggingface
from gpt.interop.architecture import Architecture, Tensor
from gpt.interop.config_file import ConfigFile
from gpt.interop.safetensors_folder import SafetensorsFolder
from gpt.models.base import ModelConfig
from gpt.runtime.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Keys that change what the adapters compute, with the only values that ours can have.
FIXED: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None}
FIXED |= {"rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "layer_replication": None}
FIXED |= {"alora_invocation_tokens": None, "trainable_token_indices": None, "target_parameters": None}


Pair = tuple[np.ndarray, np.ndarray]


def to_peft(workdir: Workdir, checkpoint: str, folder: Path) -> tuple[ModelConfig, int]:
    """Writes the adapters of a checkpoint to a folder that `peft` loads, and returns the model's config and the step.

    Raises:
      UserError: the workdir has no adapters, transformers has no such model, or the folder is not empty.
    """
    weights = Weights(workdir, checkpoint)
    config, architecture = huggingface.exported(weights.run, workdir)
    adapters = weights.adapters()
    if not adapters:
        raise UserError(f"--workdir={workdir.path} has no adapters; export its weights with --to_hf.")
    tensors = architecture.tensors(config)
    arrays: dict[str, np.ndarray] = {}
    for kernel, adapter in adapters.items():
        tensor, rank = tensors[kernel], config.lora_rank
        matrix_b = _of_b(tensor, rank)
        for layer, names in enumerate(tensor.names_by_layer):
            a, b = adapter["a"][layer].reshape(-1, rank).T, matrix_b.to_theirs(adapter["b"][layer])
            for name, part in zip(names, b, strict=True):
                module = _module(architecture, name)
                arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": part}
    modules = {name.rsplit(".", 3)[-3] for name in arrays}
    content = FIXED | {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "target_modules": sorted(modules)}
    content |= {"task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.0, "use_rslora": False}
    content |= {"fan_in_fan_out": not tensors["blocks/attention/out/kernel"].axes}
    shapes = {name: array.shape for name, array in arrays.items()}
    texts = {CONFIG: json.dumps(content, indent=2) + "\n"}
    huggingface.write_folder("to_peft", folder, texts, WEIGHTS, shapes, arrays.values())
    return config, weights.step


def from_peft(folder: Path, base: Workdir, workdir: Workdir) -> ModelConfig:
    """Makes a workdir of adapters from a folder of PEFT and the workdir of their base; returns the model's config.

    Raises:
      UserError: the folder does not hold LoRA adapters of the base's linear layers, or the workdir is not empty.
    """
    huggingface.refuse_to_overwrite("workdir", workdir.path)
    file = ConfigFile.read(folder / CONFIG)
    for key, value in FIXED.items():
        given = file.values.get(key)
        file.check(key, given == value or not (given or value), repr(value))
    rank, alpha = int(file.number("r", int)), file.number("lora_alpha", float)
    scale = alpha / max(rank, 1) ** (0.5 if file.values.get("use_rslora") else 1)
    weights = Weights(base, "best")
    shape, architecture = huggingface.exported(weights.run, base)
    source, found = SafetensorsFolder(folder, WEIGHTS), {}
    unknown = set(source.shapes)
    tensors = architecture.tensors(shape)
    for kernel in [name for name, tensor in tensors.items() if tensor.num_layers and name.endswith("kernel")]:
        modules = [[_module(architecture, name) for name in layer] for layer in tensors[kernel].names_by_layer]
        pairs = [[_pair(source, module, rank, unknown) for module in layer] for layer in modules]
        if any(pair for layer in pairs for pair in layer):
            found[kernel] = pairs
    if unknown or not found:
        wrong = f"{min(unknown)} is not for a layer of this model" if unknown else "there are no adapters"
        raise UserError(f"{folder / WEIGHTS}: {wrong}.")
    starts = {kernel: 0 if all(map(_is_shared, pairs)) else rank for kernel, pairs in found.items()}
    total = max(rank + starts[kernel] * (len(pairs[0]) - 1) for kernel, pairs in found.items())
    targets = {kernel.split("/")[-2] for kernel in found}
    options = {"lora_rank": total, "lora_alpha": scale * total, "lora_targets": ",".join(sorted(targets))}
    adapted: Any = dataclasses.replace(weights.run.config.model, **options)
    config = dataclasses.replace(weights.run.config, model=adapted)
    run = Run(config, weights.run.tokenizer, None, base=weights.as_base())
    params = []
    for kernel, pairs in found.items():
        matrices = zip(*(_joined(tensors[kernel], layer, total, starts[kernel]) for layer in pairs), strict=True)
        for name, arrays in zip("ab", matrices, strict=True):
            params.append(_deferred(kernel.removesuffix("kernel") + name, np.stack(arrays)))
    workdir.create()
    write_params(workdir.path / "checkpoints" / "0", run, params)
    workdir.record(run)
    return adapted


def _module(architecture: Architecture[Any], name: str) -> str:
    return PREFIX + architecture.prefix + name.removesuffix(".weight")


def _deferred(name: str, array: np.ndarray) -> Deferred:
    return Deferred(name, array.shape, lambda: [((0,) * array.ndim, array)])


def _is_shared(pairs: list[Pair | None]) -> bool:
    """Returns whether all matrices `a` are equal."""
    return len({pair[0].tobytes() for pair in pairs if pair}) < 2


def _joined(tensor: Tensor, pairs: list[Pair | None], total: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns our matrices `a` and `b` of one layer, of rank `total`.

    Args:
      start: number of rows by which the matrices of a part begin after those of the part before; 0: they share them.
    """
    of_b = _of_b(tensor, total)
    a = np.zeros((total, math.prod(tensor.our_shape) // math.prod(of_b.our_shape[1:])), np.float32)
    parts = [np.zeros(shape, np.float32) for shape in of_b.shapes]
    for i, (pair, b) in enumerate(zip(pairs, parts, strict=True)):
        if pair:
            rows = slice(i * start, i * start + len(pair[0]))
            a[rows], b[:, rows] = pair
    inputs = len(tensor.our_shape) - len(of_b.our_shape) + 1
    return a.T.reshape(*tensor.our_shape[:inputs], total), of_b.to_ours(parts)


def _of_b(tensor: Tensor, rank: int) -> Tensor:
    """Returns the tensors of the matrices `b` of a kernel: PEFT's are [outputs, rank]."""
    first, last = (tensor.axes[0], tensor.axes[-1]) if tensor.axes else (0, -1)
    # The first axes of ours are the inputs: one, or the heads and their size.
    inputs = 1 if tensor.our_shape[0] == tensor.shapes[0][first] else 2
    shapes = tuple((shape[last], rank) for shape in tensor.shapes)
    return dataclasses.replace(tensor, shapes=shapes, our_shape=(rank, *tensor.our_shape[inputs:]), axes=(1, 0))


def _pair(source: SafetensorsFolder, module: str, rank: int, unknown: set[str]) -> Pair | None:
    """Returns PEFT's matrices of a module, whose names leave `unknown`; None if the module has no adapter."""
    names = [f"{module}.lora_{matrix}.weight" for matrix in "AB"]
    if not unknown.issuperset(names):
        return None
    unknown.difference_update(names)
    if (source.shapes[names[0]][0], source.shapes[names[1]][-1]) != (rank, rank):
        raise UserError(f"{source.path / WEIGHTS}: {module} does not have the rank r={rank} of {CONFIG}.")
    return np.asarray(source.read(names[0]), np.float32), np.asarray(source.read(names[1]), np.float32)
