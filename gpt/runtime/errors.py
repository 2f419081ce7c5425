"""Exceptions whose message is meant for the person at the keyboard, and checks of what others wrote."""


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
