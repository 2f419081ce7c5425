"""Output of the commands: control characters are escaped, and an output that fails does not end a run."""

import contextlib
import errno
import json
import os
import select
import subprocess
import sys
import textwrap
import threading
import time

from gpt.runtime import output

HOSTILE = "\0\a\b\r\x1b]0;title\x07\x7f\x85\x9b31m\u202etxt.exe\u2066"
ESCAPED = r"\x00\x07\x08\x0d\x1b]0;title\x07\u007f\u0085\u009b31m\u202etxt.exe\u2066"


def test_control_characters_are_escaped_and_nothing_else():
    kept = "To be,\n\tor not — naïve 世界 👩\u200d👧 \\x1b \ud800"
    assert output.visible(HOSTILE + kept) == ESCAPED + kept
    line = json.dumps({"text": HOSTILE})
    assert json.loads(output.visible(line)) == {"text": HOSTILE}


@contextlib.contextmanager
def pipe(*, size=None):
    """Returns a descriptor to write to, and a function that reads what was written."""
    reader, writer = os.pipe()
    try:
        yield writer, lambda: os.read(reader, 1 << 20).decode() if select.select([reader], [], [], 1)[0] else ""
    finally:
        os.close(writer)
        with contextlib.suppress(OSError):
            os.close(reader)


class Disk:
    """Replaces os.write by a disk that has space for a number of bytes."""

    def __init__(self, monkeypatch, number):
        self.room, self._number, self._write = 1 << 20, number, os.write
        monkeypatch.setattr("os.write", self)

    def __call__(self, number, data):
        if number != self._number:
            return self._write(number, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: self.room]
        self.room -= len(data)
        return self._write(number, data)


def stream(number, *, other=None, **options):
    descriptor = output._Descriptor(number, **options)
    descriptor.other = other
    return output._Stream(descriptor, None), descriptor


def test_a_full_disk_leaves_a_gap_that_is_marked_and_told_on_the_other_stream(monkeypatch):
    with pipe() as (log, read), pipe() as (errors, read_errors):
        out, _ = stream(log, other=output._Descriptor(errors))
        disk = Disk(monkeypatch, log)
        print("step 1", file=out)
        disk.room = 3  # the write ends within a line
        for step in (2, 3, 4):
            print(f"step {step}", file=out)
        disk.room = 1 << 20
        print("step 5", file=out)
        print("step 6", file=out)
        missing = "note: 3 lines are missing here (No space left on device)."
        assert read() == f"step 1\nste\n{missing}\nstep 5\nstep 6\n"
        expected = "note: cannot write to standard output (No space left on device); the run continues without it.\n"
        assert read_errors() == expected  # once


def test_a_reader_that_sleeps_does_not_stop_a_run_and_gets_the_rest_when_it_wakes(monkeypatch):
    """The pipe is full, as for a terminal after Ctrl-S or a connection that hangs."""
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    with pipe() as (log, read):
        out, _ = stream(log)
        began = time.monotonic()
        for _ in range(100):
            print("x" * 2000, file=out)
        assert time.monotonic() - began < 5
        shown = read()
        while shown.count("\n") * 2001 < len(shown) or "missing" not in shown:
            print("awake", file=out)
            shown += read()
        assert "lines are missing here (it accepted nothing for" in shown
        assert shown.endswith("awake\n")


def test_a_descriptor_that_does_not_block_is_waited_for():
    """Another process can make a descriptor non-blocking. A BlockingIOError is not a failure of the output."""
    with pipe() as (log, read):
        os.set_blocking(log, False)
        out, _ = stream(log, raises=True)
        found = []

        def collect():
            while len("".join(found)) < 400_000:
                time.sleep(0.01)
                found.append(read())

        reader = threading.Thread(target=collect)
        reader.start()
        print("x" * 399_999, file=out)
        reader.join(10)
        assert "".join(found) == "x" * 399_999 + "\n"


PRINTS = """
    import os, sys, warnings
    from absl import logging
    from gpt.runtime import cli
    def main():
        assert os.open(os.devnull, os.O_RDONLY) > 2, "libraries would print into this file"
        assert sys.stdin.read() == ""
        print("the \x1b[1mresult", flush=True)
        warnings.warn("a \x1b[1mwarning")
        logging.warning("logged \x1b[1m")
        return 3
    cli.run(main, prints_result=bool(os.environ.get("PRINTS_RESULT")))
"""
# Redirections of the shell, whether the command only prints, its exit code, and what stdout and stderr contain.
LOSSES = (
    ("| true", False, 3, "", "note: cannot write to standard output (Broken pipe); the run continues without it."),
    ("2>&1 | true", False, 3, "", ""),
    ("2>/dev/full", False, 3, "note: cannot write to standard error (No space left on device)", ""),
    ("<&- >&- 2>&-", False, 3, "", ""),
    ("| true", True, 141, "", ""),
    ("--help | true", False, 141, "", ""),
    (">/dev/full", True, 1, "", "error: Cannot write to standard output: No space left on device."),
    (">&-", True, 1, "", "error: Cannot write to standard output: Bad file descriptor."),
)


def test_an_output_that_is_lost_ends_only_a_command_that_has_nothing_else_to_do():
    """The exit code is that of the command, and the other output has a note, no traceback. All cases run at once."""
    running = []
    for redirections, prints_result, *_ in LOSSES:
        line = f'"$0" -c "$1" {redirections}; exit ${{PIPESTATUS[0]}}'
        running.append(
            subprocess.Popen(
                ["bash", "-c", line, sys.executable, textwrap.dedent(PRINTS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PRINTS_RESULT": "1" if prints_result else ""},
            )
        )
    for process, (redirections, _, code, in_out, in_err) in zip(running, LOSSES, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, (redirections, out, err)
        assert in_out in out, (redirections, out)
        assert in_err in err, (redirections, err)
        assert (bool(out), bool(err)) == (bool(in_out), bool(in_err)), (redirections, out, err)
        for text in (out, err):
            assert "Traceback" not in text
            assert "Exception ignored" not in text
            assert "\x1b" not in text
        if redirections == "2>/dev/full":  # stdout gets the lines of stderr
            assert r"a \x1b[1mwarning" in out
            assert r"logged \x1b[1m" in out
