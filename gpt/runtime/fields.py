"""Fields of config dataclasses: what a change of one means for a run, and checks of their values."""

import dataclasses
import importlib
from typing import Any

from gpt.runtime.errors import UserError


def harmless(default: Any, **options: Any) -> Any:
    """Returns a dataclass field whose value a resumed run may change.

    A change of such a value leaves the course of the run the same (another mesh, another interval between log lines,
    another way to compute the same function), or is the reason to resume it (more steps).
    """
    return dataclasses.field(default=default, metadata={"harmless": True}, **options)


def harmless_names(cls: Any) -> set[str]:
    """Returns the names of the fields of a dataclass that `harmless` made."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("harmless")}


def named(place: str) -> Any:
    """Returns the class of a place like "gpt.models.gpt:GPTConfig", whose module is imported only now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def check_choice(key: str, value: str, choices) -> None:
    """Raises UserError unless `value` is one of `choices`; `key` is the config key."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")


def check_positive(section: str, config, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is greater than zero."""
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{section}.{name}={value!r} has to be greater than 0.")


def check_fraction(section: str, config, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` lies in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(f"{section}.{name}={value!r} has to be at least 0 and less than 1.")
