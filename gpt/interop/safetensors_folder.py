"""A folder of safetensors: its tensors are read where they are used, and one can be written."""

import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.tokenizers import Tokenizer
from gpt.interop import tokenizer_files
from gpt.interop.config_file import ConfigFile
from gpt.runtime.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES = ("F32", "F16", "BF16")
# Tensors in old files that are no parameters: causal masks, and the frequencies of rotary positions.
BUFFERS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|(.*\.)?rotary_emb\.inv_freq")
BLOCK = 1 << 24  # elements to write at a time


class SafetensorsFolder:
    """A model as transformers saves it. Its properties are read when they are used.

    Args:
      path: the folder.
      weights: name of the file of weights if there is just one.

    Raises:
      UserError: the folder has no safetensors or no config.json, or a file is missing or damaged.
    """

    def __init__(self, path: Path, weights: str = WEIGHTS):
        self.path, self._weights = path, weights

    @functools.cached_property
    def config(self) -> ConfigFile:
        """The content of config.json."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path / CONFIG} is missing; it describes the shape of the model.")
        return ConfigFile.read(self.path / CONFIG)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by its name."""
        return {name: tuple(opened.get_slice(name).get_shape()) for name, (_, opened) in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, float16 or bfloat16."""
        return self._tensors[name][1].get_tensor(name)

    def tokenizer(self) -> Tokenizer:
        """Returns the folder's tokenizer."""
        return tokenizer_files.read(self.path)

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[str, Any]]:
        """The file of each tensor: its name, and the library's reader."""
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, tuple[str, Any]] = {}
        for file in self._files():
            try:
                # pread: the pages of mapped files would count as memory of the process beside the arrays.
                opened = safe_open(self.path / file, framework="numpy", backend="pread")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / file} is damaged or cut off ({error}).") from None
            for name in opened.keys():  # noqa: SIM118  it is no dictionary
                if BUFFERS.fullmatch(name):
                    continue
                if name in tensors:
                    raise UserError(f"{self.path / file}: {name} is also in {tensors[name][0]}.")
                if (dtype := opened.get_slice(name).get_dtype()) not in DTYPES:
                    problem = f"{name} is of type {dtype}; only {', '.join(DTYPES)} can be read"
                    raise UserError(f"{self.path / file}: {problem}.")
                tensors[name] = file, opened
        return tensors

    def _files(self) -> list[str]:
        if (self.path / self._weights).is_file():
            return [self._weights]
        if (self.path / INDEX).is_file():
            names = ConfigFile.read(self.path / INDEX).values.get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{self.path / INDEX} has no weight_map that names files.")
            files, existing = sorted(set(names.values())), {path.name for path in self.path.iterdir() if path.is_file()}
            for file in files:
                if Path(file).name != file or file not in existing:
                    raise UserError(f"{self.path / INDEX} names {file}, which is not in the folder.")
            return files
        if pickles := sorted(file.name for file in self.path.glob("*.bin")):
            raise UserError(
                f"{self.path / pickles[0]} is a pickle, which is not read because it can run any code. If you trust "
                f"the file, load it with transformers' from_pretrained, and save it with save_pretrained as {WEIGHTS}."
            )
        raise UserError(f"{self.path} has no {self._weights}.")


def write(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file of float32 tensors in the order of `shapes`. The library's own writer wants all of them in memory.

    The format is eight bytes with the length of the header, the header in JSON, and the arrays one after the other
    (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the arrays
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            rows = max(1, BLOCK * len(array) // array.size)
            for start in range(0, len(array), rows):
                file.write(np.ascontiguousarray(array[start : start + rows], "<f4").data)
