"""Exceptions whose message is meant for the person at the keyboard, and checks of what others wrote."""

import json
from typing import Any


class UserError(Exception):
    """Something the user can mend: one sentence that names the flag, file or value.

    The commands print it without a traceback and exit with its code; any other exception
    is a bug and keeps its traceback.
    """

    exit_code = 1


class UsageError(UserError):
    """A UserError about the flags themselves."""

    exit_code = 2


def one_line(error: object) -> str:
    """The text of an exception without line feeds, nor the quotes around that of a KeyError."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).replace("\\'", "'").split())


LARGEST_JSON = 1 << 26  # bytes: a hundred times a real vocabulary, and still parsed in a gigabyte or so


def read_json(path: Any) -> Any:
    """What a JSON file of any author holds.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or would fill the memory or the stack.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path.name} has more than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


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
