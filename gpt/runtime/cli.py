"""What all commands share: parsing of flags, and one error message instead of a traceback for errors of the user."""

import contextlib
import dataclasses
import difflib
import inspect
import logging as std_logging
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from gpt.runtime import backend, cluster, output, progress, signals
from gpt.runtime.errors import UserError, nearest, one_line

MAX_PIPED = 1 << 20  # bytes of a prompt on stdin; a model sees only its end
WIDTH, COLUMN = 80, 34  # columns of --help, and of its names
MUST_NOT_BE_EMPTY = {"config", "workdir", "checkpoint", "out", "html", "topology", "data", "from_hf", "to_hf"}
MUST_NOT_BE_EMPTY |= {"compare"}

Override = tuple[str, str | None]  # KEY and VALUE of a flag --config.KEY=VALUE; None: no value
NearestKeys = Callable[[str], list[str]]
HelpRows = Callable[[str | None, list[Override]], list[tuple[str, str]]]

_nearest_keys: NearestKeys | None = None
_help_rows: HelpRows
_overrides: list[Override] = []
_argument: list[str] | None = None  # of a command that takes one which is not a flag: the default, and what is given

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
            with progress.task(progress.STARTING):
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

    output.install(prints_result)
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
        app.run(checked, flags_parser=lambda argv: _parse(argv, main))
    except output.OutputLost as lost:
        sys.exit(cluster.failed(str(lost), lost.exit_code, own_fault=True))
    except (signals.Stopped, KeyboardInterrupt) as stopped:
        sys.exit(end(getattr(stopped, "number", signal.SIGINT)))


def overrides() -> list[Override]:
    """Returns the flags --config.KEY=VALUE in their order: KEY, and VALUE as text or None if there is no value."""
    return list(_overrides)


def define_workdir_flag(
    text: str = "Folder of the run, or a place in a bucket.", required: bool = True
) -> flags.FlagHolder:
    """Defines --workdir; returns its holder."""
    return flags.DEFINE_string("workdir", None, text, required=required)


def define_config_flag(text: str, nearest_keys: NearestKeys, help_rows: HelpRows) -> flags.FlagHolder:
    """Defines --config and accepts --config.KEY=VALUE; returns the holder of --config.

    Args:
      text: help text of the flag.
      nearest_keys: returns the config keys that a mistyped flag may stand for, the best first.
      help_rows: returns KEY=VALUE and a description for each key of a config file with overrides.
    """
    global _nearest_keys, _help_rows
    _nearest_keys, _help_rows = nearest_keys, help_rows
    return flags.DEFINE_string("config", None, text)


def define_argument(default: str) -> Callable[[], str]:
    """Accepts an argument that is not a flag, before or after the flags; returns a function that returns it."""
    global _argument
    _argument = given = [default]
    flags.FLAGS.set_gnu_getopt(True)
    return lambda: given[-1]


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
    text = "HOST:PORT of process 0, if the launcher is unknown; needs the next two. See launch/README.md."
    coordinator = flags.DEFINE_string("coordinator", None, text)
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


def _parse(argv: list[str], main: Callable[[], int | None]) -> list[str]:
    known = [argument for argument in argv if not re.fullmatch(r"--?(h|help|helpshort|helpfull)", argument)]
    if len(known) < len(argv):
        _show_help(known, main)
        sys.exit(0)
    try:
        argv = flags.FLAGS.read_flags_from_files(argv)
        rest = flags.FLAGS(_take_overrides(argv) if _nearest_keys else argv)
    except flags.UnrecognizedFlagError as error:
        _refuse(f"There is no flag --{error.flagname}; {_hint(error.flagname)}")
    except flags.Error as error:
        _refuse(_reworded(error))
    if _argument is not None:
        _argument.extend(rest[1:2])
        del rest[1:2]
    if len(rest) > 1:
        _refuse(f"Unexpected argument {rest[1]!r}; flags are written --name=value.")
    for name in MUST_NOT_BE_EMPTY.intersection(flags.FLAGS):
        if flags.FLAGS[name].value in ("", []):
            _refuse(f"--{name} is empty; give it a value or leave it out.")
    return rest


def _show_help(argv: list[str], main: Callable[[], int | None]) -> None:
    """Prints what a command does, its flags, and the keys of the config that its flags name."""
    for paragraph in inspect.cleandoc(main.__globals__["__doc__"] or "").split("\n\n"):
        print(paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, WIDTH), end="\n\n")
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(main.__module__), key=lambda flag: flag.name):
        has_default = flag.default or type(flag.default) in (int, float)
        print(_row(f"  --{flag.name}", flag.help + (f" [default {flag.default}]" if has_default else "")))
    if not _nearest_keys:
        return
    with contextlib.suppress(flags.Error):
        flags.FLAGS(_take_overrides(argv), known_only=True)
    place = flags.FLAGS["config"].value
    try:
        rows = _help_rows(place, _overrides)
    except UserError as error:
        _refuse(str(error))
    print(f"\nKeys of {place or 'a config'} (--config.KEY=VALUE); * marks values that are not the default:")
    print(re.sub(r"\n{3,}", "\n\n", "\n".join(_row(*row) for row in rows)))  # some sections may have no row
    if not place:
        print("\nEach model family and kind of data has its own keys: --config=FILE --help.")


def _row(name: str, text: str) -> str:
    """Returns a row of a table with two columns: a flag or key, and its description, wrapped."""
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False, break_long_words=False)
    start = name.ljust(COLUMN) if len(name) < COLUMN else f"{name}\n{' ' * COLUMN}"
    return (start + f"\n{' ' * COLUMN}".join(lines)).rstrip()


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
    choice = re.fullmatch(r"--\w+=(.*): choose one of <(.*)>", text)
    return text.rstrip(".") + (nearest(choice[1], choice[2].split("|")) if choice else ".")


def _hint(name: str) -> str:
    """Returns a suggestion for the name of a flag that does not exist."""
    keys = _nearest_keys(name) if _nearest_keys else []
    near = [f"config.{key}" for key in keys]
    if not any(name in (key, key.split(".")[-1]) for key in keys):  # a flag is nearer than a key that is not exact
        near = difflib.get_close_matches(name, list(flags.FLAGS), n=1, cutoff=0.7) + near
    return f"did you mean --{near[0]}?" if near else "see --help."


def _refuse(problem: str) -> NoReturn:
    """Ends the program because of a mistake in its flags."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
