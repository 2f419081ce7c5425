"""Exceptions whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the flag, file or value.

    The commands print it without a traceback and exit with its code; any other exception
    is a bug and keeps its traceback.
    """

    exit_code = 1


class UsageError(UserError):
    """A UserError about the flags themselves."""

    exit_code = 2


def check_choice(key: str, value: str, choices) -> None:
    """Raises UserError unless `value` is one of `choices`; `key` is the config key."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")


def check_positive(section: str, config, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` is greater than zero."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise UserError(f"{section}.{name}={value} has to be greater than 0.")


def check_fraction(section: str, config, *names: str) -> None:
    """Raises UserError unless each named attribute of `config` lies in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"{section}.{name}={value} has to be at least 0 and less than 1.")
