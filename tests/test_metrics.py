"""TensorBoard's event files, and the peaks of devices."""

import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt.runtime import hardware, tensorboard
from gpt.runtime.loggers import Session
from gpt.runtime.tensorboard import TensorBoard

# TensorBoard.


def events(path) -> EventAccumulator:
    """Returns the events that TensorBoard itself reads from a folder."""
    guidance = {"scalars": 0, "tensors": 0, "histograms": 0}
    return EventAccumulator(str(path), size_guidance=guidance, purge_orphaned_data=True).Reload()


@pytest.fixture
def new_file(monkeypatch):
    """Returns a function that starts a new second. Event files are read in the order of the seconds in their names."""
    clock = types.SimpleNamespace(now=1.7e9)

    def start():
        clock.now += 1

    monkeypatch.setattr("time.time", lambda: clock.now)
    return start


def test_scalars_are_read_back(tmp_path):
    board = TensorBoard(Session(tmp_path))
    for step in (1, 2, 30):
        board.scalars(step, {"train/loss": step / 2, "train/rate": np.float32(0.25)})
    board.scalars(30, {"validation/loss": float("nan")})
    board.close(True)
    found = events(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["train/loss", "train/rate", "validation/loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (30, 15.0)]
    assert [event.value for event in found.Scalars("train/rate")] == [0.25] * 3
    assert np.isnan(found.Scalars("validation/loss")[0].value)
    assert tensorboard.read_scalars(tmp_path, ("train/loss", "absent")) == {
        "train/loss": ([1, 2, 30], [0.5, 1.0, 15.0]),
        "absent": ([], []),
    }


def test_events_are_there_after_a_flush(tmp_path):
    """A run that is killed keeps its curves up to the last evaluation."""
    board = TensorBoard(Session(tmp_path))
    board.scalars(1, {"loss": 2.0})
    board.flush()
    assert [event.value for event in events(tmp_path).Scalars("loss")] == [2.0]
    board.close(True)


@pytest.mark.parametrize("written", ["*To be*, or not\n\tto be", "naïve 😀 \0", "", "broken \udce9 character"])
def test_text_is_read_back(tmp_path, written):
    """A text is a tensor for TensorBoard's text plugin, and a model may generate any character."""
    board = TensorBoard(Session(tmp_path))
    board.text(7, "sample", written)
    board.close(True)
    found = events(tmp_path)
    (event,) = found.Tensors("sample")
    (content,) = event.tensor_proto.string_val
    assert (event.step, content.decode()) == (7, written.replace("\udce9", "?"))
    assert found.SummaryMetadata("sample").plugin_data.plugin_name == "text"


def test_histogram_is_read_back(tmp_path):
    values = np.array([-1.0, -0.9, 0.1, 0.2, 0.3, 3.0])
    counts, edges = np.histogram(values, bins=4)
    board = TensorBoard(Session(tmp_path))
    board.histogram(3, "logits", counts.astype(np.float32), edges)
    board.close(True)
    (event,) = events(tmp_path).Histograms("logits")
    found = event.histogram_value
    assert event.step == 3
    assert found.bucket_limit == [0.0, 1.0, 2.0, 3.0]
    assert found.bucket == [2, 3, 0, 1]
    assert (found.min, found.max, found.num) == (-1, 3, 6)
    # The sums are those of the centers of the buckets, because the values are not known.
    assert found.sum == pytest.approx(2 * -0.5 + 3 * 0.5 + 1 * 2.5)
    assert found.sum_squares == pytest.approx(2 * 0.25 + 3 * 0.25 + 1 * 6.25)


def test_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path, new_file):
    """A run reached step 6, was killed, and resumes after the checkpoint of step 4. (TensorBoard keeps all texts.)"""
    for start, value in ((0, 1.0), (4, 2.0)):
        new_file()
        board = TensorBoard(Session(tmp_path, start))
        for step in range(start + 1, 7):
            board.scalars(step, {"loss": value})
            board.histogram(step, "logits", [1], [0, value])
        board.close(True)
    found = events(tmp_path)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == expected
    assert [(event.step, event.histogram_value.max) for event in found.Histograms("logits")] == expected


def test_run_that_begins_anew_replaces_all_steps(tmp_path, new_file):
    for value in (1.0, 2.0):
        new_file()
        board = TensorBoard(Session(tmp_path))
        for step in (1, 2, 3):
            board.scalars(step, {"loss": value})
        board.close(True)
    found = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert found == [(1, 2.0), (2, 2.0), (3, 2.0)]


@pytest.mark.parametrize("before", ["", "events.out.tfevents.9999999999.host.1.0", "tfevents-by-another-tool"])
def test_a_clock_that_went_back_loses_no_steps(tmp_path, monkeypatch, before):
    """A clock can go back after a suspend of WSL, or on another host. TensorBoard reads files in the order of names."""
    if before:
        (tmp_path / before).touch()
    for i, now in enumerate((1.7e9, 1.6e9, 1.5e9, 1.5e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        board = TensorBoard(Session(tmp_path, 10 * i))
        for step in range(10 * i + 1, 10 * i + 15):  # four steps more than the checkpoint has
            board.scalars(step, {"loss": float(i)})
        board.close(True)
    found = events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(n, min((n - 1) // 10, 3)) for n in range(1, 45)]


# Rates.


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),  # JAX's name of the v5e
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),  # JAX's name of the v5p
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct NVIDIA H100", None),  # only the prefix counts
    ],
)
def test_peak_of_a_device(kind, peak):
    chip = hardware.of_device(types.SimpleNamespace(device_kind=kind))
    assert (chip and chip.flops) == peak
