"""SIGTERM, SIGHUP and Ctrl-C: a command ends at once, a training saves first. The exit code is 128 + the signal number.

SIGHUP stays ignored if it was ignored when the program started (nohup).
"""

import itertools
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

from gpt.runtime import progress

PATIENCE = 2  # seconds in which the main thread has to handle a signal; during a compilation, it cannot
ANSWER = 0.3  # seconds after which a signal that the main thread has not handled is answered
_num_handled = 0  # signals that the main thread has handled
_recording = False  # whether a first signal is recorded instead of raised
_announced = False  # whether the user knows of that signal


class Stopped(BaseException):
    """Raised in the main thread when a signal stops the program.

    Attributes:
      number: number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def end_at_once(give_up: Callable[[int], object]) -> None:
    """Makes signals raise Stopped, or KeyboardInterrupt for Ctrl-C, in the main thread.

    Args:
      give_up: called in another thread, with the signal number, if the main thread does not handle the signal within
        PATIENCE because it is not running Python code.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, writer, give_up), name="signals", daemon=True).start()
    _handle(_stop)


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Sets the handler of all signals that stop a program; returns the previous handlers by signal number."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _stop(number: int, _: FrameType | None) -> None:
    global _num_handled
    _num_handled += 1
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def _watch(reader: socket.socket, writer: socket.socket, give_up: Callable[[int], object]) -> None:
    """Answers signals, because the main thread may be busy, and calls `give_up` for those that it does not handle.

    Args:
      writer: an argument to keep it open.
    """
    for count in itertools.count(1):
        select.select([reader], [], [])
        number = reader.recv(1)[0]
        time.sleep(ANSWER)
        if _num_handled >= count:
            continue
        if _recording and not _announced:
            _announce(number)
        elif not _recording or number == signal.SIGINT:
            progress.say(f"{_name(number)}: leaving in {PATIENCE} s at the latest")
            time.sleep(PATIENCE)
            if _num_handled < count:
                give_up(number)


def _announce(number: int) -> None:
    """Tells the user, once, that the run stops because of a signal."""
    global _announced
    if not _announced:
        _announced = True
        again = "; again to leave without saving" if number == signal.SIGINT else ""
        progress.say(f"{_name(number)}: stopping after this step{again}")


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupted:
    """A context that replaces interruption by a signal number on which all processes agree.

    From `begin` on, a signal is recorded instead of raised; a second Ctrl-C raises KeyboardInterrupt at once.

    Args:
      mesh: mesh of all devices of all processes.
    """

    def __init__(self, mesh: "jax.sharding.Mesh"):
        import jax

        self._signal = 0
        self._agreed: jax.Array | int = 0
        self._previous_handlers: dict[int, Any] = {}
        self._sharded = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._max = jax.jit(jax.numpy.max, in_shardings=self._sharded, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def begin(self) -> None:
        """Records signals from now on instead of raising Stopped."""
        global _recording, _announced
        if not self._previous_handlers:
            self._previous_handlers, _recording, _announced = _handle(self._record), True, False

    def __enter__(self) -> "Interrupted":
        return self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = False
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def poll(self) -> int:
        """Returns the number of a signal that any process has received; 0 if there is none.

        All processes have to call `poll` at the same points of the program, and all get the same number. With several
        processes, the number is that of the previous call, which the devices finish computing with the previous step,
        so that `poll` does not wait for the current step.
        """
        import jax
        import numpy as np

        if jax.process_count() == 1:
            return self._signal
        own_signal = np.full(1, self._signal, np.int32)
        shape = (self._sharded.mesh.size,)
        previous = self._agreed
        self._agreed = self._max(jax.make_array_from_callback(shape, self._sharded, lambda _: own_signal))
        return int(previous)

    def check(self) -> None:
        """Raises Stopped if `poll` returns a signal."""
        if number := self.poll():
            raise Stopped(number)

    def _record(self, number: int, _: FrameType | None) -> None:
        global _num_handled
        _num_handled, self._signal = _num_handled + 1, self._signal or number
        _announce(number)
        signal.signal(signal.SIGINT, _stop)
