"""What the commands share: flags in, one clear sentence out when something is wrong."""

import difflib
import inspect
import logging as std_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from gpt.runtime import backend, cluster, output, signals
from gpt.runtime.errors import UserError, one_line

flags.disclaim_key_flags()  # the flags that functions here define are those of the command that calls them

MAX_PIPED = 1 << 20  # bytes of a prompt on stdin; a model sees the end of it only


def run(main: Callable[[], int | None], prints_result: bool = False) -> None:
    """Parses the flags, runs `main` and exits with its code or that of a UserError.

    Mistakes in the flags exit with 2. Any other exception is a bug and keeps its traceback. Where several
    processes run one program, an error of one ends all.

    Args:
      prints_result: the command has nothing else to do than to print, so it ends where standard output fails.
    """

    def checked(_) -> int | None:
        if not prints_result:
            output.go_on_without()
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
        text = f"error: stopped by {signal.Signals(number).name}."
        return cluster.failed(text, 128 + number, own_fault=True)

    output.install()
    signals.end_at_once(give_up=lambda number: os._exit(end(number)))
    # Libraries report their routine at level INFO; warnings are for the user too.
    logging.set_verbosity(logging.WARNING)
    # Errors that they log and raise as well are for us to tell, in a sentence or with their traceback; and where one
    # array of a checkpoint fails, the tasks of the others have nobody left to complain to.
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
    """Returns the flags --config.KEY=VALUE in their order: KEY, and VALUE as text (None if there is none)."""
    return list(_overrides)


def define_workdir_flag(text: str = "Folder of the run.", required: bool = True) -> flags.FlagHolder:
    """Defines --workdir."""
    return flags.DEFINE_string("workdir", None, text, required=required)


def define_config_flag(text: str, keys: Callable[[], list[str]]) -> flags.FlagHolder:
    """Defines --config, with which --config.KEY=VALUE is accepted too; `keys` returns the keys that exist."""
    global _config_keys
    _config_keys = keys
    return flags.DEFINE_string("config", None, text)


def define_checkpoint_flag() -> flags.FlagHolder:
    """Defines --checkpoint."""
    return flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")


def define_cluster_flags() -> Callable[[], cluster.Job]:
    """Defines the flags that tell a process which job it is part of; returns a function that reads them."""
    coordinator = flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, a free port. Not needed where the launcher is known: launch/README.md.",
    )
    count = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    index = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    timeout = flags.DEFINE_float(
        "cluster_timeout", 300, "Seconds to wait for the other processes to start.", lower_bound=1
    )
    return lambda: cluster.Job(coordinator.value, count.value, index.value, timeout.value)


MUST_NAME = {"config", "workdir", "checkpoint", "out", "html", "topology", "data", "from_hf", "to_hf"}
_config_keys: Callable[[], list[str]] | None = None
_overrides: list[tuple[str, str | None]] = []  # of the config, in their order: a key, and its value as text


def read_stdin() -> str:
    """The prompt that a pipe or a file holds, without the line feed at its end; empty where there is none.

    Raises:
      UserError: it is too long, or not UTF-8.
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
    asked_for_help = any(argument.lstrip("-") in ("help", "helpshort", "helpfull") for argument in argv[1:])
    try:
        argv = flags.FLAGS.read_flags_from_files(argv)
        rest = flags.FLAGS(_take_overrides(argv) if _config_keys else argv)
    except SystemExit:
        # absl prints help while it parses, and counts that as a failure.
        sys.exit(0 if asked_for_help else 2)
    except flags.UnrecognizedFlagError as error:
        sys.exit(_fail(f"There is no flag --{error.flagname}; {_hint(error.flagname)}", 2))
    except flags.Error as error:
        sys.exit(_fail(_reworded(error), 2))
    if len(rest) > 1:
        sys.exit(_fail(f"Unexpected argument {rest[1]!r}; flags are written --name=value.", 2))
    for name in MUST_NAME.intersection(flags.FLAGS):
        if flags.FLAGS[name].value in ("", []):
            sys.exit(_fail(f"--{name} is empty; give it a value or leave it out.", 2))
    return rest


def _take_overrides(argv: list[str]) -> list[str]:
    """Moves --config.KEY=VALUE, --config.KEY VALUE, --config.KEY and --noconfig.KEY to `_overrides`."""
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
    """The text of an error of absl as a sentence that names the flag."""
    text = one_line(error)
    for pattern, words in REWORDED.items():
        text = re.sub(pattern, words, text)
    return text.rstrip(".") + "."


def _hint(name: str) -> str:
    """What may have been meant by a flag that does not exist."""
    keys = _config_keys() if _config_keys else []
    near = [f"config.{key}" for key in keys if name in (key, key.split(".")[-1])]
    near = near or difflib.get_close_matches(name, list(flags.FLAGS), n=1, cutoff=0.7)
    return f"did you mean --{near[0]}?" if near else "see --help."


def _fail(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
