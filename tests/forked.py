"""Runs a command of `gpt` several times, each in a fork of one process that has imported everything.

python tests/forked.py NAME < CASES, a JSON list of [flags, environment, packages that are not installed]; prints
[exit code, stdout, stderr] of each.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from gpt import train  # noqa: F401  imported once for all
from gpt.runtime import cli

TIMEOUT = 60  # seconds of a case


def run(name: str, flags: list[str], env: dict[str, str], missing: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            signal.alarm(TIMEOUT)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(env)
            jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))  # was read when JAX was imported
            sys.modules.update(dict.fromkeys(missing))
            sys.argv = [f"gpt/{name}.py", *flags]
            code = 1
            try:
                cli.run(importlib.import_module(f"gpt.{name}").main)
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else bool(exit.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return code, *texts


if __name__ == "__main__":
    name = sys.argv[1]
    importlib.import_module(f"gpt.{name}")
    print(json.dumps([run(name, *case) for case in json.load(sys.stdin)]))
