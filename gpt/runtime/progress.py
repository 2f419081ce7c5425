"""What a command shows while it runs: lines that stay, and one line about what it does now, with rates and times."""

import contextlib
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gpt.runtime import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

TICK = 0.25  # seconds from one drawing of the line on a terminal to the next
LOG_AFTER, LOG_EVERY = 10, 30  # seconds after which a log gets a line about a task, and from that to the next line
STARTING = "starting"  # the text of the task that ends when another one begins
MEAN_OVER = 20  # steps over which the duration of a step is averaged, about


class Task:
    """Work that takes time. `task` shows it until it ends.

    Attributes:
      text: what the program does.
      total: amount of the work, in any unit; 0: not known.
      done: amount that is done.
      note: more about the work, like its speed.
    """

    head = ""  # what the line shows of the task while a task inside it runs

    def __init__(self, text: str, total: float = 0):
        self.text, self.total, self.done, self.note = text, total, 0.0, ""
        self.began = time.perf_counter()
        self.log_at = self.began + LOG_AFTER  # time of the next line in a log

    def parts(self) -> list[str]:
        """Returns the parts of the line that shows the task. A narrow terminal shows the first ones only."""
        seconds, share = time.perf_counter() - self.began, min(1, self.done / self.total) if self.total else 0
        parts = [self.text, f"{share:.0%}" if self.total else "", duration(seconds), self.note]
        return [
            *filter(None, parts),
            *([f"{duration(seconds * (1 / share - 1))} left"] if share and seconds > 1 else []),
        ]


@contextlib.contextmanager
def task(work: Task | str, total: float = 0) -> Iterator[Task]:
    """Shows a task while the context lasts: on a terminal in a line that is redrawn, in a log in lines with the time.

    Tasks nest: the line shows the innermost one.

    Args:
      work: the task, or the text of one.
      total: see `Task`.
    """
    shown = Task(work, total) if isinstance(work, str) else work
    _display.begin(shown)
    try:
        yield shown
    finally:
        _display.end(shown)


def say(text: str) -> None:
    """Prints lines that stay, on the first process."""
    if output.is_first:
        output.show(text, output.messages())


def log(text: str) -> None:
    """Prints a line with the time of day to a log. A terminal gets nothing, because its line shows the same."""
    if not output.console(output.messages()):
        say(f"{text}  {time.strftime('%H:%M:%S')}")


class _Display:
    """Draws the innermost task in a thread, because the main thread may be busy, within a compilation for instance."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # a fork has neither the thread nor, maybe, the lock

    def reset(self) -> None:
        self._tasks: list[Task] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._drawn_on: Console | None = None  # the terminal on which the line is visible

    def begin(self, shown: Task) -> None:
        self._tasks = [*(each for each in self._tasks if each.text != STARTING), shown]
        output.writing = self.hidden
        if not self._thread:
            self._thread = threading.Thread(target=self._run, name="display", daemon=True)
            self._thread.start()

    def end(self, shown: Task) -> None:
        self._tasks = [each for each in self._tasks if each is not shown]
        with self.hidden():
            pass

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Removes the line from the terminal while the context lasts."""
        with self._lock:
            if self._drawn_on:
                from rich.control import Control, ControlType

                self._drawn_on.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
                self._drawn_on = None
            yield

    def _run(self) -> None:
        while True:
            time.sleep(TICK)
            # A command that only prints ends when the main thread finds that its output is lost.
            with self._lock, contextlib.suppress(output.OutputLost):
                if (tasks := self._tasks) and output.is_first:
                    self._show(tasks)

    def _show(self, tasks: list[Task]) -> None:
        """Draws the innermost task on a terminal, and prints it to a log if that is due."""
        shown, now = tasks[-1], time.perf_counter()
        parts = [*filter(None, (outer.head for outer in tasks[:-1])), *shown.parts()]
        if now > shown.log_at:
            shown.log_at = now + LOG_EVERY
            log("  ".join(parts))
        streams = output.messages(), sys.stdout, sys.stderr
        terminal = next(filter(None, map(output.console, streams)), None)
        if terminal and not output.has_open_line():
            with self.hidden():
                terminal.print(_fitted(parts, output.width(terminal)), end="", soft_wrap=True)
                self._drawn_on = terminal


def _fitted(parts: list[str], width: int) -> "Text":
    """Returns a line of the first parts that a terminal is wide enough for."""
    from rich.cells import cell_len
    from rich.text import Text

    while len(parts) > 1 and cell_len("  ".join(parts)) >= width:
        parts = parts[:-1]
    line = Text(output.visible("  ".join(parts)).replace("\n", " "), style="cyan")
    line.truncate(width - 1, overflow="ellipsis")  # a line that wraps cannot be erased
    return line


_display = _Display()


class Speed:
    """Measures rates over the steps since the last `restart`, excluding time that was not training.

    Args:
      tokens_per_step: tokens of a step on all devices.
      flops_per_step: model FLOPs of a step on all devices.
      peak: peak FLOP/s of all devices together; None if the peak is not known.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None):
        self._tokens_per_step, self._flops_per_step, self._peak = tokens_per_step, flops_per_step, peak
        self._step_seconds = 0.0  # running mean of the duration of a step
        self._pauses: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        """Starts a new measurement."""
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()
        self._last = self._start

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Excludes the time inside the context from the rates: compilation, evaluation, sampling, checkpoints.

        Args:
          kind: a name, under which `left` estimates how long such a pause takes.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._start, self._last = self._start + seconds, self._last + seconds
            self._pauses.setdefault(kind, []).append(seconds)

    @contextlib.contextmanager
    def waiting(self, device_is_idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time inside the context as waiting for input if the device is idle at the end of the context."""
        start = time.perf_counter()
        yield
        if device_is_idle():
            self._waited += time.perf_counter() - start

    def step(self) -> None:
        """Counts a finished step."""
        self._steps, now = self._steps + 1, time.perf_counter()
        weight = 1 if self._step_seconds == 0 else 1 / MEAN_OVER
        self._step_seconds += weight * (now - self._last - self._step_seconds)
        self._last = now

    def left(self, steps: int, pauses: dict[str, tuple[int, float]]) -> float:
        """Returns how many seconds steps and pauses will take.

        Args:
          pauses: {kind: (number of pauses, tokens that the model processes in each)}. A pause that was not measured yet
            takes a third of the time of as many tokens in training, in which the backward pass is two thirds.
        """
        seconds = steps * self._step_seconds
        for kind, (number, tokens) in pauses.items():
            measured = self._pauses.get(kind)
            guess = tokens / self._tokens_per_step * self._step_seconds / 3
            seconds += number * (statistics.median(measured) if measured else guess)
        return seconds

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


class Steps(Task):
    """The steps of a training run, shown with their loss and rates.

    Args:
      total_steps: number of steps of the run.
    """

    def __init__(self, total_steps: int):
        super().__init__("")
        self.total_steps, self._parts, self._validation_loss = total_steps, [""], ""
        self.log_at = math.inf  # a log gets the milestones

    def parts(self) -> list[str]:
        seconds = time.perf_counter() - self.began
        return [*self._parts, *([f"for {duration(seconds)}"] if seconds > 2 else [])]

    def update(
        self, step: int, loss: float, mean_loss: float | None, rates: dict[str, float], left: float, milestone: bool
    ) -> None:
        """Shows the state after a step; a log, after milestones only.

        Args:
          mean_loss: running mean of the losses.
          left: seconds until the end of the run.
        """
        self.head, self.began = f"step {step:,}/{self.total_steps:,}", time.perf_counter()
        mean = f" (mean {mean_loss:.4f})" if mean_loss is not None else ""
        parts = [self.head, f"loss {loss:.4f}{mean}", f"eta {duration(left)}"]
        parts += [self._validation_loss, f"{short(rates['tokens_per_second'])} tok/s"]
        parts += [f"mfu {rates['mfu']:.1%}" if "mfu" in rates else ""]
        parts += [f"waiting for input {rates['input_wait']:.0%}" if rates["input_wait"] > 0.01 else ""]
        self._parts = [*filter(None, parts)]
        if milestone:
            log("  ".join(self._parts))

    def evaluated(self, step: int, measures: dict[str, float], best: bool) -> None:
        """Prints the result of an evaluation: the loss, and accuracy and exact match if `measures` has them."""
        self._validation_loss = f"val {measures['loss']:.4f}"
        parts = [f"step {step:,}/{self.total_steps:,}", f"validation loss {measures['loss']:.4f}"]
        parts += [f"{n.partition('/')[2]} {value:.4f}" for n, value in measures.items() if n.startswith("loss/")]
        parts += [f"without averaging {measures['raw_loss']:.4f}"] if "raw_loss" in measures else []
        parts += [f"{n.replace('_', ' ')} {measures[n]:.2%}" for n in ("accuracy", "exact_match") if n in measures]
        say("  ".join([*parts, *(["(best)"] if best else [])]))


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


def short(number: float) -> str:
    """Returns a number in three digits or more, such as "950", "12.3k" or "4.5G"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 100 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"
