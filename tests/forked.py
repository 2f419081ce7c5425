"""Starts the commands of `gpt` in forks of one process that has already imported everything.

An import of JAX and of its libraries costs almost two seconds of a core, which a suite with hundreds of commands would
pay hundreds of times. The process that has imported them serves a Unix socket:

    python tests/forked.py SOCKET                                 the server
    GPT_TEST_SERVER=SOCKET python -IS tests/forked.py -m gpt.NAME FLAGS…    a command, as `python -m gpt.NAME FLAGS…`

The second form passes its environment, folder, standard streams and signals to a fork of the server, and ends as the
fork ends: by the same exit code or signal. The fork ends when the process that asked for it is killed. The fork becomes
a new `python -m` where the environment differs in a variable that Python or a library reads while it starts.
"""

import array
import functools
import gc
import json
import os
import select
import signal
import socket
import sys
import threading

# Variables that are read when a command runs, not when its libraries are imported.
READ_LATE = ("GPT_", "PYTEST_", "XDG_CACHE_HOME", "XLA_FLAGS", "TMPDIR", "COLUMNS")
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def warm_up() -> None:
    """Imports all modules of gpt but the commands, which run as `__main__`, and what the modules import late."""
    import importlib
    import pkgutil
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import gpt

    for module in pkgutil.walk_packages(gpt.__path__, "gpt."):
        is_command = (Path(gpt.__path__[0]) / f"{module.name.removeprefix('gpt.')}.py").exists()
        # Benchmarks need the package lm_eval, which is an extra.
        if (not is_command or module.name == "gpt.train") and module.name != "gpt.inference.benchmarks":
            importlib.import_module(module.name)
    importlib.import_module("grain")


def run(module: str, flags: list[str]) -> None:
    """Runs a module as `python -m` does, and ends this process."""
    import atexit
    import runpy

    sys.argv = [module, *flags]
    sys.path[0] = os.getcwd()
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def become(case: dict, files: list[int]) -> None:
    """Makes this process, a fork of the server, the command that a case describes."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(case["cwd"])
    different = {name for name, _ in os.environ.items() ^ case["env"].items()}
    if not all(name.startswith(READ_LATE) for name in different):
        os.execve(sys.executable, [sys.executable, "-m", case["module"], *case["flags"]], case["env"])
    for name in different - case["env"].keys():
        del os.environ[name]
    os.environ.update(case["env"])
    run(case["module"], case["flags"])


def attend(connection: socket.socket) -> None:
    """Starts the command that a client asks for, forwards its signals, and reports how the command ended."""
    content, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    with connection.makefile("rb") as stream:
        case = json.loads(content if content.endswith(b"\n") else content + stream.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(case, files)
    for file in (*files, 0, 1, 2):
        os.close(file)
    ended = os.pidfd_open(pid)
    while ended not in select.select([connection, ended], [], [])[0]:
        numbers = connection.recv(100)
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(array.array("h", [code]).tobytes())


def serve(path: str) -> None:
    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages
    assert threading.active_count() == 1, "a fork has only one of the threads of its parent"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombies remain
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".partial")
        server.listen(64)
        os.rename(path + ".partial", path)
        while True:
            # The standard input of the server is a pipe from its user, so that the server ends when its user does.
            if 0 in select.select([0, server], [], [])[0]:
                return
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                attend(connection)
                os._exit(0)
            connection.close()


def ask(module: str, flags: list[str]) -> None:
    """Has the server run a command, and ends as the command does."""
    case = {"module": module, "flags": flags, "cwd": os.getcwd(), "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["GPT_TEST_SERVER"])
        for number in FORWARDED:
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        content = json.dumps(case).encode() + b"\n"
        sent = socket.send_fds(connection, [content], [0, 1, 2])
        connection.sendall(content[sent:])
        (code,) = array.array("h", connection.recv(2)) or (-signal.SIGKILL,)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


@functools.cache
def warm() -> list[str]:
    """The first words of a command line that starts a module in a fork of a process that has imported all of `gpt`."""
    import atexit
    import shutil
    import subprocess
    import tempfile
    import time
    from pathlib import Path

    script, path = __file__, Path(tempfile.mkdtemp(prefix="gpt-test-server-")) / "socket"
    server = subprocess.Popen(
        [sys.executable, script, str(path)], stdin=subprocess.PIPE, cwd=Path(script).parent.parent
    )
    atexit.register(lambda: (server.communicate(), shutil.rmtree(path.parent)))
    while not path.exists():
        assert server.poll() is None, "the process that imports everything has ended"
        time.sleep(0.02)
    os.environ["GPT_TEST_SERVER"] = str(path)
    return [sys.executable, "-IS", script]


if __name__ == "__main__":
    if sys.argv[1] == "-m":
        ask(sys.argv[2], sys.argv[3:])
    else:
        serve(sys.argv[1])
