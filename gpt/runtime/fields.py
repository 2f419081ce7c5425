"""Fields of config dataclasses: which fields a resumed run may change, and checks of their values."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from gpt.runtime.errors import UserError


def harmless(default: Any, **options: Any) -> Any:
    """Returns a dataclass field whose value a resumed run may change.

    Such a value does not affect the results of the run (the mesh, the interval between log lines, the implementation
    of a function), or changing it is the reason to resume the run (more steps).

    Args:
      default: default value of the field.
      options: other arguments of `dataclasses.field`.
    """
    return dataclasses.field(default=default, metadata={"harmless": True}, **options)


def harmless_names(cls: Any) -> set[str]:
    """Returns the names of the fields of a dataclass that `harmless` defined."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("harmless")}


def named(place: str) -> Any:
    """Returns the object that "MODULE:NAME" names, like "gpt.models.gpt:GPTConfig"; imports the module if needed."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raises UserError unless `value` is one of `choices`. `key` is the config key that the message names."""
    if value not in (known := list(choices)):
        raise UserError(f"{key}={value!r} is not known; choose one of {', '.join(map(str, known))}.")


def check_names(key: str, value: str, choices: Iterable[str], others: str = "") -> None:
    """Raises UserError unless `value` consists of one or more of `choices`, separated by commas."""
    if not set(value.split(",")) <= set(known := list(choices)):
        raise UserError(f"{key}={value!r} has to be {others}some of {','.join(known)}.")


def check_positive(section: str, config: object, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is a number greater than 0."""
    _check(section, config, names, lambda value: value > 0, "has to be greater than 0")


def check_not_negative(section: str, config: object, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is a number of at least 0."""
    _check(section, config, names, lambda value: value >= 0, "must not be negative")


def check_fraction(section: str, config: object, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is a number in [0, 1)."""
    _check(section, config, names, lambda value: 0 <= value < 1, "has to be at least 0 and less than 1")


def check_part(section: str, config: object, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is a number in (0, 1)."""
    _check(section, config, names, lambda value: 0 < value < 1, "has to lie between 0 and 1")


def _check(section: str, config: object, names: Iterable[str], is_valid: Callable[[float], bool], what: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and is_valid(value)):
            raise UserError(f"{section}.{name}={value!r} {what}.")
