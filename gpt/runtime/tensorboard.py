"""Writes and reads TensorBoard's event files, without TensorFlow."""

import itertools
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

FLUSH_EVERY = 120  # seconds; a flush to a bucket uploads the whole file again
MAX_PENDING = 100_000  # events that are kept while the storage accepts none
_FILE_NUMBERS = itertools.count()  # numbers of the files that this process writes


class TensorBoard:
    """Writes TensorBoard events.

    A storage that does not accept events (a full disk) does not end the run. The events are kept and written again
    with the next event, to a new file, because the previous file may end within an event.

    Args:
      path: folder of the event file.
      start_step: number of finished steps. TensorBoard hides events of later steps, which an earlier process wrote
        after the checkpoint that this process resumed from.
      enabled: False to write nothing, on all processes except the first.
      say: called with a line for the user if events cannot be written.
    """

    def __init__(self, path: Path, start_step: int = 0, enabled: bool = True, say: Callable[[str], object] = print):
        self._path, self._enabled, self._say = path, enabled, say
        self._file: GFile | None = None
        self._name, self._flushed_at, self._failed = "", 0.0, False
        self._pending: list[bytes] = []
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Makes TensorBoard hide events of steps after `step` that were written before."""
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._queue(event_pb2.Event(step=step + 1, session_log=session))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one scalar for each tag in `values`."""
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a text in Markdown, for TensorBoard's text plugin."""
        self._summary(step, text_pb(tag, [markdown.encode(errors="replace")]).value)

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Writes an image. `png` is the content of a PNG file."""
        width, height = struct.unpack(">II", png[16:24])  # the position that the PNG standard defines
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, image=image)])

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Writes a histogram.

        Args:
          counts: [N] numbers of values in each bin.
          edges: [N + 1] bounds of the bins, in increasing order.
        """
        counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
        centers = (edges[1:] + edges[:-1]) / 2
        histogram = summary_pb2.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * centers).sum(),
            sum_squares=(counts * centers**2).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, histo=histogram)])

    def flush(self) -> None:
        """Writes all pending events to the storage."""
        self._flushed_at = 0.0
        self._write()

    def close(self) -> None:
        """Writes all pending events to the storage, or reports how many could not be written."""
        self.flush()
        if self._pending:
            self._say(f"note: {len(self._pending)} of TensorBoard's events could not be written to {self._path}.")

    def _summary(self, step: int, values: Sequence[summary_pb2.Summary.Value]) -> None:
        if self._enabled:
            self._queue(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
            self._write()

    def _queue(self, event: event_pb2.Event) -> None:
        """Adds an event to those that the next `_write` writes."""
        event.wall_time = time.time()
        self._pending.append(event.SerializeToString())

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
            while self._pending:
                RecordWriter(self._file).write(self._pending[0])
                del self._pending[0]
            if time.time() > self._flushed_at + FLUSH_EVERY:
                self._file.flush()
                self._flushed_at = time.time()
            self._failed = False
        except Exception as error:  # each client of a bucket raises its own types of exceptions
            self._file, self._pending = None, self._pending[-MAX_PENDING:]
            if not self._failed:
                text = f"note: cannot write TensorBoard's events to {self._path} ({error})"
                self._say(f"{text}; the run continues and tries again.")
            self._failed = True

    def _new_name(self) -> str:
        """Returns a file name that sorts after those in the folder, because TensorBoard reads files in that order.

        The clock alone does not give such a name: it may be behind the clock that named the existing files.
        """
        newest = max((file.name for file in epath.Path(self._path).iterdir() if "tfevents" in file.name), default="")
        match = re.match(r"events\.out\.tfevents\.(\d+)", newest)
        seconds = max(int(time.time()), int(match[1]) + 1 if match else 0)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILE_NUMBERS)}"
        return name if name > newest else f"{newest}.{next(_FILE_NUMBERS)}"


def read_scalars(path: Path, tags: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns {tag: (steps, values)} of the event files in a folder, with empty lists for a tag that has no events."""
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    events = {tag: accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else [] for tag in tags}
    return {tag: ([event.step for event in found], [event.value for event in found]) for tag, found in events.items()}
