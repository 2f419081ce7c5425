"""TODO."""

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
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from tensorboard.summary.writer.record_writer import RecordWriter

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
        self._queue(event_pb2.Event(step=step + 1, session_log=session))

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
        if self._enabled:
            self._queue(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
            self._write()

    def _queue(self, event: event_pb2.Event) -> None:
        """Keeps an event, to be written with the next one that has something to show."""
        event.wall_time = time.time()
        self._waiting.append(event.SerializeToString())

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
