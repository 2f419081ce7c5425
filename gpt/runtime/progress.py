"""What a person sees of a run: the progress line, TensorBoard, tokens/s and MFU."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from gpt.runtime import output


class Speed:
    """Rates over the steps since `restart`, time that was not training left out.

    Args:
      tokens_per_step: over all devices.
      flops_per_step: model FLOPs over all devices.
      peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None):
        self._tokens_per_step, self._flops_per_step, self._peak = tokens_per_step, flops_per_step, peak
        self.restart()

    def restart(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count: compilation, evaluation, sampling, saving."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self, device_is_idle: Callable[[], bool]) -> Iterator[None]:
        """A context in which input is fetched: its time counts as waiting if the device ran dry meanwhile."""
        began = time.perf_counter()
        yield
        if device_is_idle():
            self._waited += time.perf_counter() - began

    def step(self) -> None:
        """One more step is done."""
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """tokens_per_second, steps_per_second, input_wait (fraction of the time), and mfu where known."""
        seconds, steps = max(time.perf_counter() - self._since, 1e-9), self._steps
        rates = {
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "steps_per_second": steps / seconds,
            "input_wait": self._waited / seconds,
        }
        if self._peak:
            rates["mfu"] = steps * self._flops_per_step / seconds / self._peak
        return rates


class Progress:
    """The progress of a run: one line that renews itself on a terminal, plain lines elsewhere.

    Args:
      total_steps: length of the run.
      enabled: False prints nothing (on all processes but one).
    """

    def __init__(self, total_steps: int = 0, enabled: bool = True, out: TextIO | None = None):
        self.total_steps, self._enabled, self._out = total_steps, enabled, out or sys.stdout
        self._terminal = self._out.isatty()
        self._drawn, self._drawn_at, self._validation_loss = False, 0.0, None

    def update(self, step: int, loss: float, rates: dict[str, float], milestone: bool) -> None:
        """Shows the state after a step: of every one on a terminal, of milestones elsewhere."""
        now = time.perf_counter()
        if not milestone and (not self._terminal or now - self._drawn_at < 0.1):
            return
        self._drawn_at = now
        parts = [f"step {step:,}/{self.total_steps:,}", f"loss {loss:.4f}"]
        if self._validation_loss is not None:
            parts.append(f"val {self._validation_loss:.4f}")
        parts.append(f"{_short(rates['tokens_per_second'])} tok/s")
        if "mfu" in rates:
            parts.append(f"mfu {rates['mfu']:.1%}")
        if rates["input_wait"] > 0.01:
            parts.append(f"waiting for input {rates['input_wait']:.0%}")
        parts.append(f"eta {duration((self.total_steps - step) / max(rates['steps_per_second'], 1e-9))}")
        self._line("  ".join(parts), keep=not self._terminal)

    def evaluated(self, step: int, measures: dict[str, float], best: bool) -> None:
        """Shows the result of an evaluation: its loss, and accuracy and exact match where there are such measures."""
        self._validation_loss = measures["loss"]
        parts = [f"step {step:,}/{self.total_steps:,}", f"validation loss {measures['loss']:.4f}"]
        parts += [f"{n.replace('_', ' ')} {measures[n]:.2%}" for n in ("accuracy", "exact_match") if n in measures]
        self._line("  ".join([*parts, *(["(best)"] if best else [])]))

    def status(self, text: str) -> None:
        """Shows a line that the next one replaces, on a terminal only."""
        if self._terminal:
            self._line(text, keep=False)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._line(text)

    def _line(self, text: str, keep: bool = True) -> None:
        if not self._enabled:
            return
        text = output.visible(text)
        erase = output.Control("\r\033[K" if self._drawn else "")
        if not keep:  # cut, for a line that wraps cannot be erased
            text = text[: shutil.get_terminal_size().columns - 1]
        self._drawn = not keep
        self._out.write(erase)
        print(text, end="\n" if keep else "", flush=True, file=self._out)


def duration(seconds: float) -> str:
    """ "3m07s", "2h05m", "4d03h"."""
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // small:02d}{small_unit}"
    return f"{seconds}s"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
