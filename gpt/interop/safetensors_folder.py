"""Reads and writes the tensors of a folder of transformers one at a time, so that a model need not fit in memory."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpt.interop.config_file import ConfigFile
from gpt.runtime.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a folder. Opening it reads the headers of its files; `read` reads one tensor.

    Args:
      path: the folder.
      prefix: what is removed from the beginning of names.
      buffers: names, without the prefix, of tensors to leave out.
      model_class: the model's class in transformers, for a message.

    Attributes:
      shapes: shape of each tensor, by its name without the prefix.

    Raises:
      UserError: the folder has no safetensors, or a file is missing or damaged.
    """

    def __init__(self, path: Path, prefix: str, buffers: re.Pattern | None, model_class: str):
        self.path, self._model_class = path, model_class
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, str]] = {}  # file and full name of each tensor
        for file in self._files():
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dictionary
                    short = name.removeprefix(prefix)
                    if buffers and buffers.fullmatch(short):
                        continue
                    if short in self._places:
                        raise UserError(f"{path / file}: {name} is also in {self._places[short][0]}.")
                    tensor = tensors.get_slice(name)
                    if (dtype := tensor.get_dtype()) not in ("F32", "F16", "BF16"):
                        problem = f"{name} is of type {dtype}; only F32, F16 and BF16 can be read"
                        raise UserError(f"{path / file}: {problem}.")
                    self.shapes[short] = tuple(tensor.get_shape())
                    self._places[short] = file, name

    def _files(self) -> list[str]:
        if (self.path / WEIGHTS).is_file():
            return [WEIGHTS]
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
                f'the file, convert it to {WEIGHTS}: python -c "from transformers import {self._model_class} as M; '
                f"M.from_pretrained('{self.path}').save_pretrained('NEW_FOLDER')\"."
            )
        raise UserError(f"{self.path} has no {WEIGHTS}.")

    def check_shapes(self, expected: dict[str, tuple[int, ...]], ignored: set[str], title: str) -> None:
        """Raises UserError unless the folder has the expected tensors and, beside ignored ones, no others."""
        names = self.shapes.keys() - ignored
        for problem, wrong in (
            ("missing", sorted(expected.keys() - names)),
            (f"not part of a {title} of this shape", sorted(names - expected.keys())),
        ):
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise UserError(f"{self.path}: {', '.join(wrong[:3])}{more}: {problem}, by config.json.")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                found, wanted = (" × ".join(map(str, sizes)) for sizes in (self.shapes[name], shape))
                raise UserError(f"{self.path}: {name} is {found}, but has to be {wanted} by config.json.")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as float32."""
        file, full_name = self._places[name]
        # The file is opened for each tensor, because pages read through its memory map stay in memory until it closes.
        with self._open(file) as tensors:
            return tensors.get_tensor(full_name).astype("float32", copy=False)

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / file, framework="numpy")
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
            file.write(array.astype("<f4").tobytes())
