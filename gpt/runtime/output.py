"""Standard output and standard error of the commands: terminal-safe, and no reason to end a training run.

Control characters are escaped, because samples, texts and file names may contain any. An output that fails (a full
disk, a closed terminal, a reader that exited) ends only a command whose purpose is to print.
"""

import contextlib
import errno
import io
import os
import re
import select
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 10  # seconds that a run waits for an output that accepts nothing, like a terminal after Ctrl-S
SILENCE = f"it accepted nothing for {PATIENCE} s"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# How text is coloured on a terminal.
STYLES = {
    r"^error:": "bold red",
    r"^note\b": "yellow",
    r"^Done:|\(best\)$|^FITS": "green",
    r"^DOES NOT FIT": "red",
    r"^(model|lora|data|mesh|memory|run|eval) (?= )": "bold",
}

# A context in which text is written: `gpt.runtime.progress` removes its line from the terminal meanwhile.
writing: Callable[[], AbstractContextManager] = contextlib.nullcontext
is_first = True  # whether this process prints for all processes of the job
prints_result = False  # whether standard output is for the result of the command


class OutputLost(BaseException):
    """Raised when standard output fails in a command whose purpose is to print.

    Attributes:
      exit_code: 141 if the reader exited (`| head`), like a process that SIGPIPE ended; 1 otherwise.
    """

    def __init__(self, error: OSError):
        reader_exited = error.errno == errno.EPIPE
        super().__init__("" if reader_exited else f"error: Cannot write to standard output: {error.strerror}.")
        self.exit_code = 141 if reader_exited else 1


def visible(text: str) -> str:
    """Returns the text with its control characters escaped, including those that reorder text.

    Line feeds and tabs stay. Characters above U+001F are escaped as in JSON, because `json.dumps` does not escape all
    of these, and JSON has to stay valid.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < " " else f"\\u{ord(match[0]):04x}", text)


def show(text: str, file: TextIO) -> None:
    """Prints lines, on a terminal with the colours of STYLES."""
    if terminal := console(file):
        from rich.text import Text

        styled = Text(visible(text))
        for pattern, style in STYLES.items():
            styled.highlight_regex(re.compile(pattern, re.M), style)
        with writing():
            terminal.print(styled, soft_wrap=True)
    else:
        print(text if isinstance(file, _Stream) else visible(text), file=file, flush=True)


def messages() -> TextIO:
    """Returns the stream for what is not the result of the command."""
    return sys.stderr if prints_result else sys.stdout


def console(file: TextIO) -> "Console | None":
    """Returns the console of a stream that `install` made, if it is a terminal that can move its cursor."""
    if not isinstance(file, _Stream) or not file.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return None
    if file.console is None:
        from rich.console import Console

        unescaped = io.TextIOWrapper(file.buffer, file.encoding, errors="replace", write_through=True)
        file.console = Console(file=unescaped, highlight=False, markup=False, emoji=False)
    return file.console


def width(terminal: "Console") -> int:
    """Returns the number of columns of a terminal."""
    try:
        return os.get_terminal_size(terminal.file.fileno()).columns or terminal.width
    except OSError:
        return terminal.width


def has_open_line() -> bool:
    """Returns whether the last text on standard output or standard error does not end with a line feed."""
    return any(isinstance(stream, _Stream) and stream.is_open for stream in (sys.stdout, sys.stderr))


def install(is_result: bool = False) -> None:
    """Replaces sys.stdout and sys.stderr. From now on, OutputLost is raised if standard output fails.

    Args:
      is_result: whether standard output is for the result of the command; messages then go to standard error.
    """
    global prints_result
    prints_result = is_result
    for number in range(3):  # a closed descriptor would become that of the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # writing to it fails, as it does for a closed descriptor
    sys.stdin = sys.stdin or os.fdopen(0)
    original = sys.stdout
    sys.stdout, sys.stderr = _Stream(_Descriptor(1, raises=True), original), _Stream(_Descriptor(2), original)
    from absl import logging

    logging.get_absl_handler().python_handler.setStream(sys.stderr)


def continue_without_output() -> None:
    """Makes the program continue if standard output or standard error fails. Requires `install`."""
    out, err = (cast(_Descriptor, stream.buffer) for stream in (sys.stdout, sys.stderr))
    out.raises, out.other, err.other = False, err, out


class _Stream(io.TextIOWrapper):
    def __init__(self, descriptor: "_Descriptor", original: TextIO | None):
        # A terminal that cannot show a character must not end the program either.
        encoding = original.encoding if original else "utf-8"
        super().__init__(descriptor, encoding, errors="replace", line_buffering=True)
        self.console: Console | None = None
        self.is_open = False  # whether the last text did not end with a line feed

    def write(self, text: str) -> int:
        with writing():
            super().write(visible(text))
            self.is_open = not text.endswith("\n") if text else self.is_open  # print() writes its empty end as well
        return len(text)


class _Descriptor(io.FileIO):
    """The file descriptor of a stream.

    Text that cannot be written is dropped. If `other` is set, a note about this goes to that descriptor, and a note
    marks the gap when the output accepts text again.

    Args:
      number: number of the file descriptor: 2 for standard error.
      raises: whether to raise OutputLost instead.
    """

    def __init__(self, number: int, raises: bool = False):
        super().__init__(number, "w", closefd=False)
        self.name = "standard error" if number == 2 else "standard output"
        self.raises = raises
        self.other: _Descriptor | None = None
        self._number = number
        self._thread: threading.Thread | None = None  # writes, and may be blocked
        self._error: OSError | None = None  # of the last write
        self._failing = ""  # reason why the output fails, from the first failure to the next success
        self._lost_lines = 0

    def write(self, data: Any) -> int:  # of type `collections.abc.Buffer`, which Python 3.11 does not have
        data = bytes(data)
        if self.raises:
            self._write_all(data)
            if self._error:
                raise OutputLost(self._error)
        elif reason := self._try(data):
            self._lost_lines += data.count(b"\n")
            is_first_failure, self._failing = not self._failing, reason
            if self.other and is_first_failure:
                note = f"note: cannot write to {self.name} ({reason}); the run continues without it.\n"
                self.other.write(note.encode())
            if self.other and self._number == 2:
                self.other.write(data)
        else:
            self._failing, self._lost_lines = "", 0
        return len(data)

    def _try(self, data: bytes) -> str:
        """Writes in a thread, because a write can block; returns the reason for a failure, or ""."""
        if self._thread:
            self._thread.join(0 if self._failing else PATIENCE)
            if self._thread.is_alive():
                return self._failing or SILENCE
        if self._failing:
            data = f"\nnote: {self._lost_lines} lines are missing here ({self._failing}).\n".encode() + data
        self._thread = threading.Thread(target=self._write_all, args=(data,), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads
            self._thread = None
            self._write_all(data)
        else:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                return SILENCE
        return self._error.strerror or "" if self._error else ""

    def _write_all(self, data: bytes) -> None:
        self._error = None
        try:
            while data:
                try:
                    data = data[os.write(self._number, data) :]
                except BlockingIOError:  # another process that shares the file made it non-blocking
                    select.select([], [self._number], [])
        except OSError as error:
            self._error = error
