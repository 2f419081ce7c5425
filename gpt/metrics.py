"""What a person sees of a run: the progress line, TensorBoard, tokens/s and MFU."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from tensorboard.summary.writer.record_writer import RecordWriter

from gpt import output

FLUSH_EVERY = 120  # seconds; matters for buckets only, where the whole file is written again
MOST_WAITING = 100_000  # events that are kept for a storage that takes none
_FILES = itertools.count()  # numbers the files of this process


class TensorBoard:
    """Writes TensorBoard events, without TensorFlow.

    What the storage refuses to take (a full disk) is kept and tried again with the next event, in another file, for the
    first one may end within an event. That is no reason to end a run.

    Args:
      path: the folder of the events file.
      start_step: steps done so far; events of later steps, from a run that went further than its
        last checkpoint, are dropped from view.
      enabled: False makes every call do nothing (on all processes but one).
      say: prints a line: of events that cannot be written.
    """

    def __init__(self, path: Path, start_step: int = 0, enabled: bool = True, say: Callable[[str], object] = print):
        self._path, self._enabled, self._say = path, enabled, say
        self._file, self._name, self._flushed, self._failed = None, "", 0.0, False
        self._waiting: list[bytes] = []
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Drops events of later steps than `step` from view."""
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=step + 1, session_log=session))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])

    def text(self, step: int, tag: str, markdown: str) -> None:
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[markdown.encode(errors="replace")],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]),
        )
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Writes a picture; its size stands where every PNG file has it."""
        width, height = struct.unpack(">II", png[16:24])
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, image=image)])

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Writes a histogram of `counts` between `edges`, of which there is one more."""
        counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
        middles = (edges[1:] + edges[:-1]) / 2
        histogram = summary_pb2.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, histo=histogram)])

    def flush(self) -> None:
        """Hands all events to the storage."""
        self._flushed = 0.0
        self._write()

    def close(self) -> None:
        """Hands all events to the storage, or says how many it did not take."""
        self.flush()
        if self._waiting:
            self._say(f"note: {len(self._waiting)} of TensorBoard's events could not be written to {self._path}.")

    def _summary(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

    def _add(self, event: event_pb2.Event) -> None:
        if not self._enabled:
            return
        event.wall_time = time.time()
        self._waiting.append(event.SerializeToString())
        self._write()

    def _write(self) -> None:
        if not self._enabled:
            return
        try:
            if not self._file:
                self._name = self._name or self._new_name()
                file = GFile(os.path.join(self._path, self._name), "wb")
                version = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
                RecordWriter(file).write(version.SerializeToString())
                self._file, self._name = file, ""
            while self._waiting:
                RecordWriter(self._file).write(self._waiting[0])
                self._waiting.pop(0)
            if time.time() > self._flushed + FLUSH_EVERY:
                self._file.flush()
                self._flushed = time.time()
            self._failed = False
        except Exception as error:  # of a disk, or of the client of some bucket
            self._file, self._waiting = None, self._waiting[-MOST_WAITING:]
            if not self._failed:
                self._say(f"note: cannot write TensorBoard's events to {self._path} ({error}); they are tried again.")
            self._failed = True

    def _new_name(self) -> str:
        """A name that sorts after those of the files there, for that is how TensorBoard orders them.

        The clock may be behind the one that they were named by.
        """
        newest = max((file.name for file in epath.Path(self._path).iterdir() if "tfevents" in file.name), default="")
        seconds = re.match(r"events\.out\.tfevents\.(\d+)", newest)
        seconds = max(int(time.time()), int(seconds[1]) + 1 if seconds else 0)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILES)}"
        return name if name > newest else f"{newest}.{next(_FILES)}"


def read_scalars(path: Path, tags: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """{tag: (steps, values)} of the events in a folder; empty lists for what was not written."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    written = {tag: events.Scalars(tag) if tag in events.Tags()["scalars"] else [] for tag in tags}
    return {tag: ([event.step for event in found], [event.value for event in found]) for tag, found in written.items()}


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
