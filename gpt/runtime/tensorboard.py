"""Writes and reads TensorBoard's event files, without TensorFlow."""

import itertools
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from tensorboard.data_compat import migrate_value
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.custom_scalar.layout_pb2 import Chart, Layout, MultilineChartContent
from tensorboard.plugins.hparams import api_pb2 as hparams_api
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2 as hparams_data
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from gpt.runtime.loggers import CHARTS, Logger, Session, describe
from gpt.runtime.progress import say

FLUSH_EVERY = 120  # seconds; a flush to a bucket uploads the whole file again
MAX_PENDING = 100_000  # events that are kept while the storage accepts none
_FILE_NUMBERS = itertools.count()  # numbers of the files that this process writes


class TensorBoard(Logger):
    """Writes TensorBoard events.

    A storage that does not accept events (a full disk) does not end the run. The events are kept and written again
    with the next event, to a new file, because the previous file may end within an event.
    """

    def __init__(self, session: Session):
        self._path = session.path
        self._file: GFile | None = None
        self._name, self._flushed_at, self._failed = "", 0.0, False
        self._pending: list[bytes] = []
        self._tags: dict[str, None] = {}  # those written so far, in order
        self._drawn = 0  # how many of them the layout of charts knows
        self.restart(session.step)
        if session.config:
            self.text(session.step, "config", f"```json\n{json.dumps(session.config, indent=1)}\n```")
        if session.hparams:
            metrics = [hparams.Metric(tag) for tag in ("validation/loss", "validation/best_loss", "train/loss")]
            keys = [hparams.HParam(key) for key in session.hparams]
            self._summary(session.step, hparams.hparams_config_pb(keys, metrics).value)
            self._summary(
                session.step,
                hparams.hparams_pb(session.hparams, trial_id=f"{session.path.name} {session.id[:4]}").value,
            )

    def restart(self, step: int) -> None:
        """Makes TensorBoard hide events of steps after `step` that were written before."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._queue(event_pb2.Event(step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._summary(step, text_pb(tag, [markdown.encode(errors="replace")]).value)

    def image(self, step: int, tag: str, png: bytes) -> None:
        width, height = struct.unpack(">II", png[16:24])  # the position that the PNG standard defines
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._summary(step, [summary_pb2.Summary.Value(tag=tag, image=image)])

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
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
        """Writes all pending events to the storage, and after new tags a layout of charts that has them."""
        if len(self._tags) > self._drawn:
            self._drawn = len(self._tags)
            layout, metadata = _charts(self._tags), custom_scalars.create_summary_metadata()
            tensor = make_tensor_proto(layout.SerializeToString())
            value = summary_pb2.Summary.Value(tag=custom_scalars.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)
            self._queue(event_pb2.Event(summary=summary_pb2.Summary(value=[value])))
        self._flushed_at = 0.0
        self._write()

    def close(self, is_complete: bool) -> None:
        """Writes all pending events to the storage, or reports how many could not be written."""
        status = hparams_api.STATUS_SUCCESS if is_complete else hparams_api.STATUS_FAILURE
        end = hparams_data.SessionEndInfo(status=status, end_time_secs=time.time())
        data = hparams_metadata.create_summary_metadata(hparams_data.HParamsPluginData(session_end_info=end))
        value = summary_pb2.Summary.Value(
            tag=hparams_metadata.SESSION_END_INFO_TAG, metadata=data, tensor=hparams_metadata.NULL_TENSOR
        )
        self._queue(event_pb2.Event(summary=summary_pb2.Summary(value=[value])))
        self.flush()
        if self._pending:
            say(f"note: {len(self._pending)} of TensorBoard's events could not be written to {self._path}.")

    def _summary(self, step: int, values: Sequence[summary_pb2.Summary.Value]) -> None:
        described = []
        for value in values:
            if value.tag not in self._tags:
                self._tags[value.tag] = None
                value.metadata.summary_description = describe(value.tag)
                # TensorBoard's fast reader takes descriptions from tensors alone, and other programs read no tensors:
                # the first value of a tag is written in both forms, and the reader keeps one value of a step.
                tensor = migrate_value(value)
                described += [tensor] if tensor is not value else []
        self._queue(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[*described, *values])))
        self._write()

    def _queue(self, event: event_pb2.Event) -> None:
        """Adds an event to those that the next `_write` writes."""
        event.wall_time = time.time()
        self._pending.append(event.SerializeToString())

    def _write(self) -> None:
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
                say(f"{text}; the run continues and tries again.")
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


def _charts(tags: Iterable[str]) -> Layout:
    """Returns the charts of the dashboard "custom scalars" that show some of the tags.

    They have patterns instead of the tags, because TensorBoard merges only equal charts of several runs.
    """
    layout = Layout()
    for category, patterns in CHARTS.items():
        charts = {}
        for title, pattern in patterns.items():
            for match in filter(None, (re.fullmatch(pattern, tag) for tag in tags)):
                shown = f"^{pattern.replace('(.*)', match[1])}$" if not title else f"^{pattern}$"
                charts[title or match[1]] = MultilineChartContent(tag=[shown])
        if charts:
            found = [Chart(title=title, multiline=content) for title, content in charts.items()]
            layout.category.add(title=category, chart=found, closed="layer" in category)
    return layout


def read_scalars(path: Path, tags: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns {tag: (steps, values)} of the event files in a folder, with empty lists for a tag that has no events."""
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    events = {tag: accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else [] for tag in tags}
    return {tag: ([event.step for event in found], [event.value for event in found]) for tag, found in events.items()}
