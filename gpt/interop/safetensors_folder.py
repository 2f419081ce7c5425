"""A folder of safetensors: its tensors are mapped into memory and read where they are used, and one can be written."""

import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt.data.tokenizers import Tokenizer
from gpt.interop import tokenizer_files
from gpt.interop.config_file import ConfigFile
from gpt.runtime.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Tensors in old files that are no parameters: causal masks, and the frequencies of rotary positions.
BUFFERS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|(.*\.)?rotary_emb\.inv_freq")
BLOCK = 1 << 24  # elements to write at a time


class SafetensorsFolder:
    """A model as transformers saves it, see `architecture.Source`. Its properties are read when they are used.

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
        return {name: tuple(tensor["shape"]) for name, (_, tensor, _) in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, float16 or bfloat16; only the parts that are used are read from the disk."""
        file, tensor, start = self._tensors[name]
        offset = start + tensor["data_offsets"][0]
        return np.memmap(self.path / file, DTYPES[tensor["dtype"]], "r", offset, self.shapes[name])

    def tokenizer(self) -> Tokenizer:
        """Returns the folder's tokenizer."""
        return tokenizer_files.read(self.path)

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[str, dict[str, Any], int]]:
        """The file of each tensor, its entry in the file's header, and where the data of the file begins."""
        tensors: dict[str, tuple[str, dict[str, Any], int]] = {}
        for file in self._files():
            header, start = self._header(file)
            for name, tensor in header.items():
                if name == "__metadata__" or BUFFERS.fullmatch(name):
                    continue
                if name in tensors:
                    raise UserError(f"{self.path / file}: {name} is also in {tensors[name][0]}.")
                if (dtype := tensor["dtype"]) not in DTYPES:
                    problem = f"{name} is of type {dtype}; only {', '.join(DTYPES)} can be read"
                    raise UserError(f"{self.path / file}: {problem}.")
                tensors[name] = file, tensor, start
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

    def _header(self, file: str) -> tuple[dict[str, Any], int]:
        """Returns the header of a file, and where the data begins: after the header's length and the header."""
        from safetensors import SafetensorError, safe_open

        try:
            # The library checks that the tensors are within the file and have the sizes that their shapes say.
            with safe_open(self.path / file, framework="numpy"), open(self.path / file, "rb") as data:
                length = int.from_bytes(data.read(8), "little")
                return json.loads(data.read(length)), 8 + length
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file} is damaged or cut off ({error}).") from None


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
