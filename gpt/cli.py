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

from gpt import cluster, output, signals
from gpt.config import default_config, known_keys, unknown_key
from gpt.errors import UserError


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


def _parse(argv: list[str]) -> list[str]:
    asked_for_help = any(argument.lstrip("-") in ("help", "helpshort", "helpfull") for argument in argv[1:])
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        # absl prints help while it parses, and counts that as a failure.
        sys.exit(0 if asked_for_help else 2)
    except UserError as error:
        sys.exit(_fail(error, 2))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; see --help."
        sys.exit(_fail(f"There is no flag --{error.flagname}{hint}", 2))
    except flags.Error as error:
        sys.exit(_fail(_one_line(error), 2))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(_fail(_config_error(argv, error), 2))
    if len(rest) > 1:
        sys.exit(_fail(f"Unexpected argument {rest[1]!r}; flags are written --name=value.", 2))
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if type(config).__name__ == "_ErrorConfig":  # ml_collections' word for a file that it cannot load
        path = flags.FLAGS["config"].config_filename
        sys.exit(_fail(f"--config={path}: there is no such config file.", 2))
    return rest


def _config_error(argv: list[str], error: Exception) -> str | UserError:
    """What to say of an error that came while the config file or its overrides were read."""
    known = known_keys()
    for argument in argv:
        override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if override and override[1] not in known and override[1] not in default_config():
            return unknown_key(override[1])
    path = next((argument.split("=", 1)[-1] for argument in argv if re.match(r"--?config=", argument)), "")
    return f"--config={path}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace("\\'", "'").split())


def _fail(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
