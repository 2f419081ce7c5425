"""Options: the fields of config dataclasses, with their meaning, their values, and whether a resumed run may differ."""

import dataclasses
import importlib
import operator
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from gpt.runtime.errors import UserError, nearest

BOUNDS = {
    "above": ("greater than", ">", operator.gt),
    "least": ("at least", ">=", operator.ge),
    "below": ("less than", "<", operator.lt),
    "most": ("at most", "<=", operator.le),
}


def option(default: Any, text: str, choices: Iterable[object] = (), harmless: bool = False, **bounds: float) -> Any:
    """Returns a field of a subclass of `Options`.

    Args:
      default: default value; dataclasses.MISSING: the subclasses give it. A subclass that gives a field another
        default keeps the rest of this declaration.
      text: what the option means, for `--help`.
      choices: the values that the option takes, or the name of the class attribute that has them; (): any value.
      harmless: whether a resumed run may change the value. Such a value does not affect the results of the run (the
        mesh, the interval between log lines, the implementation of a function), or changing it is the reason to
        resume the run (more steps).
      bounds: the value is a number `above`, `below`, at `least` or at `most` these numbers.
    """
    declared = {"text": text, "choices": choices, "harmless": harmless, "bounds": bounds}
    return dataclasses.field(default=default, metadata=declared)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class of the dataclasses that a config consists of. Raises UserError if a value of `option` is refused."""

    section: ClassVar[str] = ""  # the first part of the keys of the config

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            key = f"{self.section}.{field.name}".removeprefix(".")
            value, bounds = getattr(self, field.name), declared(self, field.name)["bounds"]
            is_number = isinstance(value, int | float)
            if not all(is_number and BOUNDS[name][2](value, bound) for name, bound in bounds.items()):
                wanted = " and ".join(f"{BOUNDS[name][0]} {bound:g}" for name, bound in bounds.items())
                wanted = "must not be negative" if bounds == {"least": 0} else f"has to be {wanted}"
                raise UserError(f"{key}={value!r} {wanted}.")
            if known := choices(self, field.name):
                check_choice(key, value, known)


def declared(options: Options, name: str) -> Mapping[str, Any]:
    """Returns what `option` declared of a field, or of the field of a base class that it replaces."""
    fields = (vars(base).get("__dataclass_fields__", {}).get(name) for base in type(options).__mro__)
    return next((field.metadata for field in fields if field and field.metadata), option(None, "").metadata)


def choices(options: Options, name: str) -> list[object]:
    """Returns the values that a field takes; []: any value."""
    known = declared(options, name)["choices"]
    return list(getattr(options, known) if isinstance(known, str) else known)


def describe(options: Options, field: dataclasses.Field) -> str:
    """Returns what a field means, the values that it takes, and its default if its value is another."""
    known, bounds = choices(options, field.name), declared(options, field.name)["bounds"]
    notes = [", ".join(map(str, known))] if known else []
    notes += [f"{BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items()]
    notes += [f"default {field.default}"] if getattr(options, field.name) != field.default else []
    return declared(options, field.name)["text"] + (f" [{'; '.join(notes)}]" if notes else "")


def harmless_names(cls: Any) -> set[str]:
    """Returns the names of the fields of a dataclass that a resumed run may change."""
    return {field.name for field in dataclasses.fields(cls) if declared(cls(), field.name)["harmless"]}


def named(place: str) -> Any:
    """Returns the object that "MODULE:NAME" names, like "gpt.models.gpt:GPTConfig"; imports the module if needed."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raises UserError unless `value` is one of `choices`. `key` is the config key that the message names."""
    if value not in (known := list(choices)):
        names = ", ".join(map(str, known))
        raise UserError(f"{key}={value!r} is not known; choose one of {names}{nearest(value, known)}")


def check_names(key: str, value: str, choices: Iterable[str], others: str = "") -> None:
    """Raises UserError unless `value` consists of one or more of `choices`, separated by commas."""
    known = list(choices)
    if unknown := [name for name in value.split(",") if name not in known]:
        near = nearest(unknown[0], known)
        raise UserError(f"{key}={value!r} has to be {others}some of {','.join(known)}{near}")
