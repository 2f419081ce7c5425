"""SIGTERM, SIGHUP and Ctrl-C: a command ends at once, a training saves first, and the exit code is 128 + the number.

SIGHUP stays ignored where it was ignored at the start (nohup).
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PATIENCE = 2  # seconds that the main thread may take to answer: within a compilation, it does not
_answered = 0.0  # when it did last


class Stopped(BaseException):
    """The signal `number` ends the program, or what it does at the moment."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def end_at_once(give_up: Callable[[int], object]) -> None:
    """From now on signals raise Stopped, or KeyboardInterrupt, in the main thread.

    Args:
      give_up: called with the number, in another thread, where the main one is not in Python and does not answer.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, give_up), name="signals", daemon=True).start()
    _handle(_stop)


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[int, object]:
    """Sets the handler of all of these signals; returns those before."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.pop()
    return {number: signal.signal(number, handler) for number in numbers}


def _stop(number: int, _) -> None:
    global _answered
    _answered = time.monotonic()
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def _watch(reader: int, give_up: Callable[[int], object]) -> None:
    while True:
        select.select([reader], [], [])
        came = time.monotonic()
        time.sleep(PATIENCE)
        number = os.read(reader, 512)[0]
        if _answered < came - 0.5:  # the main thread may have been faster than this one
            give_up(number)


class Interrupted:
    """From `begin` on, turns a signal into a number that all processes agree on; a second Ctrl-C is immediate."""

    def __init__(self, mesh: Mesh):
        self._signal, self._asked, self._before = 0, 0, {}
        self._everywhere = NamedSharding(mesh, P(mesh.axis_names))
        self._max = jax.jit(jnp.max, in_shardings=self._everywhere, out_shardings=NamedSharding(mesh, P()))

    def begin(self) -> None:
        """From now on a signal is noted only."""
        if not self._before:
            self._wakeup, self._before = signal.set_wakeup_fd(-1), _handle(self._note)

    def __enter__(self) -> "Interrupted":
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> int:
        """The signal that this or any other process has had, or 0.

        All processes call it at the same places, and get the same. Several get what they had had at the call before,
        which the devices are done with when they are done with the step before.
        """
        if jax.process_count() == 1:
            return self._signal
        mine = np.full(1, self._signal, np.int32)
        shape = (self._everywhere.mesh.size,)
        before = self._asked
        self._asked = self._max(jax.make_array_from_callback(shape, self._everywhere, lambda _: mine))
        return int(before)

    def check(self) -> None:
        """Raises Stopped where `poll` gives a signal."""
        if number := self.poll():
            raise Stopped(number)

    def _note(self, number: int, _) -> None:
        self._signal = self._signal or number
        signal.signal(signal.SIGINT, signal.default_int_handler)
