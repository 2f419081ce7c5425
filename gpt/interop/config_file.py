"""JSON files in a folder of transformers: reading them, and checking the values of their keys."""

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any, Self

from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json


def tables(name: str) -> dict[str, Any]:
    """Returns the content of a TOML file of this package."""
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


HARMLESS = re.compile("|".join(itertools.chain(*tables("harmless.toml").values())))


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The content of a JSON file, with the file's path for error messages.

    Attributes:
      values: the value of each key, defaults included where a reader has added them.
      read_keys: keys that `get` has read.
    """

    path: Path
    values: dict[str, Any]
    read_keys: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns the content of a file. Raises UserError if the file is not valid JSON or holds no JSON object."""
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}.") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no JSON object.")
        return cls(path, values)

    def with_defaults(self, defaults: dict[str, Any]) -> Self:
        """Returns the same file with default values for the keys that the file leaves out."""
        return dataclasses.replace(self, values=defaults | self.values)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or the default, and notes that the key has been read."""
        self.read_keys.add(key)
        return self.values.get(key, default)

    def check(self, key: str, is_supported: bool, supported: str) -> None:
        """Raises UserError with the supported values unless the value of a key is one of them."""
        if not is_supported:
            raise UserError(f"{self.path}: {key} is {self.values.get(key)!r}, but only {supported} can be converted.")

    def number(self, key: str, kind: type[int] | type[float]) -> int | float:
        """Returns the value of a key as a number. Raises UserError if the value is not a number or is too large."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise UserError(f"{self.path}: {key} is {value!r}, which is not {KINDS[kind]}.")
        if not abs(value) < 2**31:
            raise UserError(f"{self.path}: {key} is not less than 2³¹.")
        return kind(value)

    def check_all_read(self) -> None:
        """Raises UserError if a key has a value, was not read, and may change what the model computes."""
        for key in sorted(self.values.keys() - self.read_keys):
            if self.values[key] is not None and not HARMLESS.fullmatch(key):
                raise UserError(
                    f"{self.path}: {key} is {self.values[key]!r}, which is not known; remove the key if you are sure "
                    "that the model computes the same without."
                )


KINDS = {int: "a whole number", float: "a number"}
