"""Exceptions whose message is written for the user of a command."""

import difflib
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """An error that the user can correct. Its message names the flag, file or value, and says what to do.

    The commands print the message without a traceback and exit with `exit_code`. Any other exception is a bug and
    keeps its traceback.
    """

    exit_code = 1


class UsageError(UserError):
    """A UserError about the flags of a command."""

    exit_code = 2


def one_line(error: object) -> str:
    """Returns the message of an exception as one line, without the quotation marks that a KeyError adds."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).replace("\\'", "'").split())


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns the end of a sentence about a name that is not known: "; did you mean NAME?", or "." if none is near.

    Args:
      known: the known names, or what to show instead of each of them, by name.
    """
    pairs = known.items() if isinstance(known, Mapping) else zip(known := list(known), known, strict=True)
    names = {str(other).lower(): shown for other, shown in pairs}
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else "."
