"""Standard output and standard error of the commands: safe to show, and no reason to end a run.

Control characters are shown escaped, for samples, corpora and names of files may hold any. And an output that fails
(a full disk, a closed terminal, a reader that has gone) ends only a command whose result is what it prints.
"""

import errno
import io
import os
import re
import select
import sys
import threading

from absl import logging

PATIENCE = 10  # seconds that a run waits for an output that takes nothing: a terminal after Ctrl-S, a hung connection
SILENCE = f"it took nothing for {PATIENCE} s"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Control(str):
    """Text that may control the terminal."""


class OutputLost(BaseException):
    """Standard output takes nothing, and the command has nothing else to do than to print.

    Attributes:
      exit_code: where the reader has gone (`| head`), the code of a process that SIGPIPE ended.
    """

    def __init__(self, error: OSError):
        gone = error.errno == errno.EPIPE
        super().__init__("" if gone else f"error: Cannot write to standard output: {error.strerror}.")
        self.exit_code = 141 if gone else 1


def visible(text: str) -> str:
    """The text with its control characters escaped, those that reorder text among them; line feeds and tabs stay.

    Above U+001F in the way of JSON, for `json.dumps` leaves some of these as they are.
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < " " else f"\\u{ord(found[0]):04x}", text)


def install() -> None:
    """Replaces sys.stdout and sys.stderr. OutputLost is raised where standard output fails."""
    for number in range(3):  # a closed one would become the number of the next file to be opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # writing to it fails, as it would if it were closed
    sys.stdin = sys.stdin or os.fdopen(0)
    before = sys.stdout
    sys.stdout, sys.stderr = _Stream(_Descriptor(1, raises=True), before), _Stream(_Descriptor(2), before)
    logging.get_absl_handler().python_handler.setStream(sys.stderr)


def go_on_without() -> None:
    """From now on, an output that fails ends nothing."""
    out, err = sys.stdout.buffer, sys.stderr.buffer
    out.raises, out.other, err.other = False, err, out


class _Stream(io.TextIOWrapper):
    def __init__(self, descriptor: "_Descriptor", before: io.TextIOBase | None):
        # A terminal that cannot show a character is no reason to end either.
        super().__init__(descriptor, before.encoding if before else "utf-8", errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        super().write(text if isinstance(text, Control) else visible(text))
        return len(text)


class _Descriptor(io.RawIOBase):
    """The open file behind a stream.

    Text that cannot be written is left out. If `other` is set, it is told so, and a note marks the gap once there is
    room again. With `raises`, OutputLost is raised instead.
    """

    def __init__(self, number: int, raises: bool = False):
        self._number, self.raises, self.other = number, raises, None
        self._writing: threading.Thread | None = None
        self._failure, self._failing, self._lost = None, "", 0  # of the last write; why since when; lines since then

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: bytes) -> int:
        data = bytes(data)
        if self.raises:
            self._put(data)
            if self._failure:
                raise OutputLost(self._failure)
        elif failure := self._try(data):
            self._lost += data.count(b"\n")
            first, self._failing = not self._failing, failure
            if self.other and first:
                name = "standard error" if self._number == 2 else "standard output"
                self.other.write(f"note: cannot write to {name} ({failure}); the run goes on without it.\n".encode())
            if self.other and self._number == 2:
                self.other.write(data)
        else:
            self._failing, self._lost = "", 0
        return len(data)

    def _try(self, data: bytes) -> str:
        """Writes in a thread, for nobody knows how long that takes; returns why it failed, or ""."""
        if self._writing:
            self._writing.join(0 if self._failing else PATIENCE)
            if self._writing.is_alive():
                return self._failing or SILENCE
        if self._failing:
            data = f"\nnote: {self._lost} lines are missing here ({self._failing}).\n".encode() + data
        self._writing = threading.Thread(target=self._put, args=(data,), daemon=True)
        try:
            self._writing.start()
        except RuntimeError:  # the interpreter ends, or there are too many threads
            self._writing = self._put(data)
        else:
            self._writing.join(PATIENCE)
            if self._writing.is_alive():
                return SILENCE
        return self._failure.strerror if self._failure else ""

    def _put(self, data: bytes) -> None:
        self._failure = None
        try:
            while data:
                try:
                    data = data[os.write(self._number, data) :]
                except BlockingIOError:  # whoever shares the file has made it so
                    select.select([], [self._number], [])
        except OSError as error:
            self._failure = error
