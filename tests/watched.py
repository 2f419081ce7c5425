"""Runs commands of `gpt` in forks of one process, and writes down what each does to the world outside it.

python tests/watched.py LOG FOLDER < CASES, a JSON list of [command, flags]; prints [exit code, stdout, stderr] of each.
LOG gets a line of JSON for each audit event; FOLDER a folder for each case, whose making marks the start of the case in
the log, and in that of a tracer.
"""

import json
import os
import signal
import sys
import tempfile

import forked

TIMEOUT = 60  # seconds of a case

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The arguments of an event that are paths, and which of them is a folder's descriptor.
PATHS = {
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.mkdir": ((0,), 2),
    "os.rename": ((0, 1), 2),
    "os.link": ((1,), 3),
    "os.symlink": ((1,), 2),
    "os.truncate": ((0,), None),
    "os.chmod": ((0,), 2),
    "os.utime": ((0,), 3),
}
OTHERS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.")
HARMLESS = ("socket.__new__", "socket.gethostname")


def place(path, folder=None) -> str:
    """The absolute path of a name, whatever the links in the folders above it lead to."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))


def watch(log: int) -> None:
    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not (flags or 0) & WRITES:
                return
            found = [os.path.realpath(os.fsdecode(path))]
        elif event in PATHS:
            indices, folder = PATHS[event]
            found = [place(args[i], args[folder] if folder and folder < len(args) else None) for i in indices]
        elif event.startswith(OTHERS) and event not in HARMLESS:
            found = [repr(args)]
        else:
            return
        os.write(log, (json.dumps([event, *found]) + "\n").encode())

    sys.addaudithook(hook)


def run(command: str, flags: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        pid = os.fork()
        if pid == 0:
            signal.alarm(TIMEOUT)
            case = {"module": f"gpt.{command}", "flags": flags, "cwd": os.getcwd(), "env": dict(os.environ)}
            forked.become(case, [file.fileno() for file in (nothing, out, err)])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return code, *texts


if __name__ == "__main__":
    log, folder = sys.argv[1:]
    cases = json.load(sys.stdin)
    forked.warm_up()
    watch(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    results = []
    for number, (command, flags) in enumerate(cases):
        os.mkdir(os.path.join(folder, f"case-{number}"))
        results.append(run(command, flags))
    print(json.dumps(results))
