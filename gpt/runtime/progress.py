"""What a user sees of a running training: the progress line with its rates (tokens/s, model FLOPs utilization)."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from gpt.runtime import output

LOG_EVERY = 30  # seconds between two lines about the progress of a long operation in a log


class Speed:
    """Measures rates over the steps since the last `restart`, excluding time that was not training.

    Args:
      tokens_per_step: tokens of a step on all devices.
      flops_per_step: model FLOPs of a step on all devices.
      peak: peak FLOP/s of all devices together; None if the peak is not known.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None):
        self._tokens_per_step, self._flops_per_step, self._peak = tokens_per_step, flops_per_step, peak
        self.restart()

    def restart(self) -> None:
        """Starts a new measurement."""
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside the context from the rates: compilation, evaluation, sampling, checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self, device_is_idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time inside the context as waiting for input if the device is idle at the end of the context."""
        start = time.perf_counter()
        yield
        if device_is_idle():
            self._waited += time.perf_counter() - start

    def step(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Returns tokens_per_second, steps_per_second, input_wait (fraction of the time) and, with a known peak, mfu.

        `mfu` is the model FLOPs utilization: model FLOP/s divided by the peak (PaLM, arXiv 2204.02311, appendix B).
        """
        seconds, steps = max(time.perf_counter() - self._start, 1e-9), self._steps
        rates = {
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "steps_per_second": steps / seconds,
            "input_wait": self._waited / seconds,
        }
        if self._peak:
            rates["mfu"] = steps * self._flops_per_step / seconds / self._peak
        return rates


class Progress:
    """Shows the progress of a run: one line that is redrawn on a terminal, separate lines in a file or a pipe.

    Args:
      total_steps: number of steps of the run.
      enabled: False to print nothing, on all processes except the first.
      out: text stream; None for standard output.
    """

    def __init__(self, total_steps: int = 0, enabled: bool = True, out: TextIO | None = None):
        self.total_steps, self._enabled, self._out = total_steps, enabled, out or sys.stdout
        self._is_terminal = self._out.isatty()
        self._line_is_open = False  # whether the cursor is at the end of a line that the next output replaces
        self._drawn_at, self._logged_at = 0.0, time.perf_counter()
        self._validation_loss: float | None = None

    def update(self, step: int, loss: float, rates: dict[str, float], milestone: bool) -> None:
        """Shows the state after a step. A terminal shows every step, other outputs show milestones only."""
        now = time.perf_counter()
        if not milestone and (not self._is_terminal or now - self._drawn_at < 0.1):
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
        self._write("  ".join(parts), keep=not self._is_terminal)

    def evaluated(self, step: int, measures: dict[str, float], best: bool) -> None:
        """Shows the result of an evaluation: the loss, and accuracy and exact match if `measures` has them."""
        self._validation_loss = measures["loss"]
        parts = [f"step {step:,}/{self.total_steps:,}", f"validation loss {measures['loss']:.4f}"]
        parts += [f"{n.partition('/')[2]} {value:.4f}" for n, value in measures.items() if n.startswith("loss/")]
        parts += [f"without averaging {measures['raw_loss']:.4f}"] if "raw_loss" in measures else []
        parts += [f"{n.replace('_', ' ')} {measures[n]:.2%}" for n in ("accuracy", "exact_match") if n in measures]
        self._write("  ".join([*parts, *(["(best)"] if best else [])]))

    def status(self, text: str) -> None:
        """Shows a line that the next line replaces on a terminal; elsewhere, at most a line in `LOG_EVERY` seconds."""
        if self._is_terminal:
            self._write(text, keep=False)
        elif time.perf_counter() > self._logged_at + LOG_EVERY:
            self._logged_at = time.perf_counter()
            self._write(f"{time.strftime('%H:%M:%S')} {text}")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._write(text)

    def _write(self, text: str, keep: bool = True) -> None:
        if not self._enabled:
            return
        text = output.visible(text)
        erase = output.Control("\r\033[K" if self._line_is_open else "")
        if not keep:  # the line is cut because a line that wraps cannot be erased
            text = text[: shutil.get_terminal_size().columns - 1]
        self._line_is_open = not keep
        self._out.write(erase)
        print(text, end="\n" if keep else "", flush=True, file=self._out)


def columns(lines: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Yields the lines of a table. The first `left` columns and the last are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(line[:-1])]
        yield "  ".join([*cells, line[-1]]).rstrip()


def duration(seconds: float) -> str:
    """Returns a duration as text in its two largest units: "45s", "3m07s", "2h05m" or "4d03h"."""
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
