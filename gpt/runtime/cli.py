"""What all commands share: parsing of flags, and one error message instead of a traceback for errors of the user."""

import dataclasses
import difflib
import inspect
import logging as std_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from gpt.runtime import backend, cluster, output, signals
from gpt.runtime.errors import UserError, one_line

MAX_PIPED = 1 << 20  # bytes of a prompt on stdin; a model sees only its end
MUST_NOT_BE_EMPTY = {"config", "workdir", "checkpoint", "out", "html", "topology", "data", "from_hf", "to_hf"}
MUST_NOT_BE_EMPTY |= {"compare"}

_config_keys: Callable[[], list[str]] | None = None
_overrides: list[tuple[str, str | None]] = []

# `--help` shows the flags that the functions below define as flags of the command that calls them.
flags.disclaim_key_flags()


def run(main: Callable[[], int | None], prints_result: bool = False) -> None:
    """Parses the flags, runs `main`, and exits with its return value, or with the exit code of a UserError.

    Errors in flags exit with code 2. Any other exception is a bug and keeps its traceback. If several processes run
    the program, an error of one process ends all of them.

    Args:
      main: the command. Returns its exit code; None for 0.
      prints_result: whether the only purpose of the command is to print, so that it ends if standard output fails.
    """

    def checked(_: list[str]) -> int | None:
        if not prints_result:
            output.continue_without_output()
        try:
            backend.check_xla_flags()
            code = main()
            sys.stdout.flush()
            cluster.finish()
            return code
        except UserError as error:
            return cluster.failed(f"error: {error}", error.exit_code, own_fault=True)
        except Exception:
            return cluster.failed(traceback.format_exc(), 1, own_fault=False)

    def end(number: int) -> int:
        return cluster.failed(f"error: stopped by {signal.Signals(number).name}.", 128 + number, own_fault=True)

    output.install()
    signals.end_at_once(give_up=lambda number: os._exit(end(number)))
    # Libraries log routine messages at level INFO; warnings are for the user too.
    logging.set_verbosity(logging.WARNING)
    # The command itself reports exceptions, so the same exceptions in the log of a library are hidden. If one array of
    # a checkpoint fails, nobody awaits the tasks of the other arrays, and Python's warnings about them are hidden too.
    for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
        logger.addFilter(lambda record: not record.exc_info)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda raised: (
        str(raised.exc_value) == "Event loop is closed" or inspect.iscoroutine(raised.object) or hook(raised)
    )
    try:
        app.run(checked, flags_parser=_parse)
    except output.OutputLost as lost:
        sys.exit(cluster.failed(str(lost), lost.exit_code, own_fault=True))
    except (signals.Stopped, KeyboardInterrupt) as stopped:
        sys.exit(end(getattr(stopped, "number", signal.SIGINT)))


def overrides() -> list[tuple[str, str | None]]:
    """Returns the flags --config.KEY=VALUE in their order: KEY, and VALUE as text or None if there is no value."""
    return list(_overrides)


def define_workdir_flag(
    text: str = "Folder of the run, or a place in a bucket.", required: bool = True
) -> flags.FlagHolder:
    """Defines --workdir; returns its holder."""
    return flags.DEFINE_string("workdir", None, text, required=required)


def define_config_flag(text: str, keys: Callable[[], list[str]]) -> flags.FlagHolder:
    """Defines --config and accepts --config.KEY=VALUE; returns the holder of --config.

    Args:
      text: help text of the flag.
      keys: returns all config keys, to suggest one for a mistyped flag.
    """
    global _config_keys
    _config_keys = keys
    return flags.DEFINE_string("config", None, text)


def define_checkpoint_flag() -> flags.FlagHolder:
    """Defines --checkpoint; returns its holder."""
    text = 'Checkpoint to load: "best" (lowest validation loss), "last", or a step. "best,raw": no moving average.'
    return flags.DEFINE_string("checkpoint", "best", text)


def values(cls: Any) -> dict[str, Any]:
    """Returns the values of the flags that have the names of fields of a dataclass, by name."""
    names = [field.name for field in dataclasses.fields(cls) if field.name in flags.FLAGS]
    return {name: flags.FLAGS[name].value for name in names}


def define_cluster_flags() -> Callable[[], cluster.Job]:
    """Defines the flags that describe the job that a process belongs to; returns a function that reads them."""
    coordinator = flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, if the launcher is unknown; needs the next two. See launch/README.md.",
    )
    count = flags.DEFINE_integer("num_processes", None, "Number of processes of the job.", lower_bound=1)
    index = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    timeout = flags.DEFINE_float("cluster_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
    return lambda: cluster.Job(coordinator.value, count.value, index.value, timeout.value)


def read_stdin() -> str:
    """Returns the text on stdin, without the line feed at its end; "" if stdin is closed or empty.

    Raises:
      UserError: the text cannot be read, is longer than MAX_PIPED, or is not UTF-8.
    """
    try:
        content = (sys.stdin.buffer.read(MAX_PIPED + 1) or b"") if sys.stdin is not None else b""
    except OSError as error:
        raise UserError(f"Cannot read the prompt from stdin: {error.strerror}.") from None
    if len(content) > MAX_PIPED:
        raise UserError(f"The prompt on stdin has more than {MAX_PIPED:,} bytes; pass only the last part of it.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt on stdin is not UTF-8 (byte {error.start:,}); convert it to UTF-8.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _parse(argv: list[str]) -> list[str]:
    argv = ["--help" if argument == "-h" else argument for argument in argv]
    wants_help = any(argument.lstrip("-") in ("help", "helpshort", "helpfull") for argument in argv[1:])
    try:
        argv = flags.FLAGS.read_flags_from_files(argv)
        rest = flags.FLAGS(_take_overrides(argv) if _config_keys else argv)
    except SystemExit:
        # absl prints the help text while it parses, and exits with an error code.
        sys.exit(0 if wants_help else 2)
    except flags.UnrecognizedFlagError as error:
        _refuse(f"There is no flag --{error.flagname}; {_hint(error.flagname)}")
    except flags.Error as error:
        _refuse(_reworded(error))
    if len(rest) > 1:
        _refuse(f"Unexpected argument {rest[1]!r}; flags are written --name=value.")
    for name in MUST_NOT_BE_EMPTY.intersection(flags.FLAGS):
        if flags.FLAGS[name].value in ("", []):
            _refuse(f"--{name} is empty; give it a value or leave it out.")
    return rest


def _take_overrides(argv: list[str]) -> list[str]:
    """Moves --config.KEY=VALUE, --config.KEY VALUE, --config.KEY, --noconfig.KEY to `_overrides`; returns the rest."""
    rest, remaining = [], list(argv)
    _overrides.clear()
    while remaining:
        argument = remaining.pop(0)
        override = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.S)
        if not override:
            rest.append(argument)
            continue
        no, key, text = override.groups()
        if text is None and no:
            text = "false"
        elif text is None and remaining and not remaining[0].startswith("--"):
            text = remaining.pop(0)
        _overrides.append((key, text))
    return rest


REWORDED = {
    r"flag (--\w+)=None: Flag .* must have a value other than None": r"\1 is missing; see --help",
    r"flag (.*): \('Non-boolean argument to boolean flag', .*\)": r"\1 has to be true or false",
    r"flag (.*): invalid literal for int\(\) .*": r"\1 has to be a whole number",
    r"flag (.*): could not convert string to float: .*": r"\1 has to be a number",
    r"flag (.*): .* is not (an? .*)": r"\1 has to be \2",
    r"flag (.*): value should be one of (.*)": r"\1: choose one of \2",
    r"ERROR:: Unable to open flagfile: .*: '(.*)'": r"--flagfile=\1 cannot be read",
}


def _reworded(error: flags.Error) -> str:
    """Returns the message of an absl error as a sentence that names the flag."""
    text = one_line(error)
    for pattern, replacement in REWORDED.items():
        text = re.sub(pattern, replacement, text)
    return text.rstrip(".") + "."


def _hint(name: str) -> str:
    """Returns a suggestion for the name of a flag that does not exist."""
    keys = _config_keys() if _config_keys else []
    near = [f"config.{key}" for key in keys if name in (key, key.split(".")[-1])]
    near = near or difflib.get_close_matches(name, list(flags.FLAGS), n=1, cutoff=0.7)
    return f"did you mean --{near[0]}?" if near else "see --help."


def _refuse(problem: str) -> NoReturn:
    """Ends the program because of a mistake in its flags."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
