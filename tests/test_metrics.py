"""TensorBoard's event files, the rates of a run, and the progress line."""

import contextlib
import io
import os
import re
import shutil
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt.runtime import hardware, progress, tensorboard
from gpt.runtime.loggers import Session
from gpt.runtime.progress import Progress, Speed
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


class Clock:
    """A clock that advances only when a test calls `wait`."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_rates_are_steps_over_seconds(clock):
    speed = Speed(tokens_per_step=100, flops_per_step=6e9, peak=1e10)
    for _ in range(4):
        clock.wait(0.5)
        speed.step()
    clock.wait(3.0)
    expected = {"tokens_per_second": 80.0, "steps_per_second": 0.8, "input_wait": 0.0, "mfu": 0.48}
    assert speed.rates() == pytest.approx(expected)
    assert speed.rates() == pytest.approx(expected)  # `rates` does not change the measurement


def test_no_mfu_where_the_peak_is_not_known(clock):
    speed = Speed(100, 6e9, None)
    clock.wait(1.0)
    assert "mfu" not in speed.rates()


def test_pauses_are_left_out(clock):
    speed = Speed(100, 1.0, None)
    clock.wait(1.0)
    for _ in range(2):
        with speed.pause():
            clock.wait(50.0)
    clock.wait(1.0)
    speed.step()
    assert speed.rates()["tokens_per_second"] == pytest.approx(50.0)


def test_pause_that_fails_is_left_out_too(clock):
    speed = Speed(100, 1.0, None)
    clock.wait(2.0)
    with contextlib.suppress(KeyboardInterrupt), speed.pause():
        clock.wait(50.0)
        raise KeyboardInterrupt
    speed.step()
    assert speed.rates()["tokens_per_second"] == pytest.approx(50.0)


def test_restart_forgets_everything(clock):
    speed = Speed(100, 1.0, None)
    with speed.waiting(lambda: True):
        clock.wait(7.0)
    speed.step()
    with speed.pause():
        clock.wait(7.0)
    speed.restart()
    clock.wait(2.0)
    speed.step()
    assert speed.rates() == pytest.approx({"tokens_per_second": 50.0, "steps_per_second": 0.5, "input_wait": 0.0})


def test_waiting_counts_where_the_device_ran_dry(clock):
    """Fetching a batch costs time only if the device is idle at the end of it."""
    speed = Speed(100, 1.0, None)
    for seconds, idle_after in ((2.0, False), (1.0, True), (3.0, False)):
        idle = [not idle_after]
        with speed.waiting(idle.pop):
            clock.wait(seconds)
            idle[:] = [idle_after]  # at the end of the wait, not at its start
    clock.wait(2.0)
    speed.step()
    rates = speed.rates()
    assert rates["input_wait"] == pytest.approx(1 / 8)
    assert rates["steps_per_second"] == pytest.approx(1 / 8)


def test_rates_of_no_time_at_all_are_finite(clock):
    assert all(np.isfinite(value) for value in Speed(100, 1.0, 1.0).rates().values())


# The progress line.

RATES = {"tokens_per_second": 12_345.0, "steps_per_second": 2.0, "input_wait": 0.0}


class Terminal(io.StringIO):
    """Simulates a terminal: `\\r` moves to the start of the line, `ESC [K` erases the rest of the line."""

    def isatty(self):
        return True

    def screen(self) -> list[str]:
        lines = []
        for line in self.getvalue().split("\n"):
            shown, column = "", 0
            for piece in filter(None, re.split(r"(\r|\033\[K)", line)):
                if piece == "\r":
                    column = 0
                elif piece == "\033[K":
                    shown = shown[:column]
                else:
                    shown = shown[:column] + piece + shown[column + len(piece) :]
                    column += len(piece)
            lines.append(shown)
        return lines


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda **_: os.terminal_size((80, 24)))
    return Terminal()


def test_milestones_alone_are_printed_where_there_is_no_terminal(clock):
    out = io.StringIO()
    progress = Progress(2000, out=out)
    progress.say("hello")
    for step in range(1, 21):
        clock.wait(1.0)
        progress.update(step, 2.0 / step, RATES, milestone=step % 10 == 0)
    progress.evaluated(20, {"loss": 1.5}, best=True)
    progress.update(30, 0.5, RATES | {"mfu": 0.4567, "input_wait": 0.25}, milestone=True)
    progress.evaluated(30, {"loss": 1.75}, best=False)
    assert out.getvalue().splitlines() == [
        "hello",
        "step 10/2,000  loss 0.2000  12.3k tok/s  eta 16m35s",
        "step 20/2,000  loss 0.1000  12.3k tok/s  eta 16m30s",
        "step 20/2,000  validation loss 1.5000  (best)",
        "step 30/2,000  loss 0.5000  val 1.5000  12.3k tok/s  mfu 45.7%  waiting for input 25%  eta 16m25s",
        "step 30/2,000  validation loss 1.7500",
    ]
    assert out.getvalue().endswith("\n")


def test_line_renews_itself_on_a_terminal(terminal, clock):
    progress = Progress(100, out=terminal)
    progress.say("hello")
    for step in range(1, 6):
        clock.wait(1.0)
        progress.update(step, 1.0, RATES, milestone=False)
    assert [line.split("  ")[0] for line in terminal.screen()] == ["hello", "step 5/100"]
    progress.evaluated(5, {"loss": 1.5}, best=False)
    clock.wait(1.0)
    progress.update(6, 1.0, RATES, milestone=True)
    assert [line.split("  ")[0] for line in terminal.screen()] == ["hello", "step 5/100", "step 6/100"]
    progress.say("saved")
    assert terminal.screen() == ["hello", "step 5/100  validation loss 1.5000", "saved", ""]


def test_fast_steps_do_not_flood_a_terminal(terminal, clock):
    """About ten of a hundred steps in a second are drawn, and every milestone."""
    progress = Progress(1000, out=terminal)
    for step in range(1, 101):
        clock.wait(0.01)
        progress.update(step, 1.0, RATES, milestone=step == 100)
    drawn = re.findall(r"step (\d+)/", terminal.getvalue())
    assert 9 <= len(drawn) <= 12
    assert drawn[-1] == "100"


def test_line_is_cut_to_the_terminal(terminal, clock, monkeypatch):
    """A line that wraps cannot be erased."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda **_: os.terminal_size((20, 24)))
    progress = Progress(100, out=terminal)
    clock.wait(1.0)
    progress.update(1, 1.0, RATES, milestone=False)
    assert terminal.screen() == ["step 1/100  loss 1.0"[:19]]
    progress.say("a generated text, which may be longer than the line")
    assert terminal.screen()[0] == "a generated text, which may be longer than the line"


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_disabled_prints_nothing(make, clock):
    out = make()
    progress = Progress(100, enabled=False, out=out)
    clock.wait(1.0)
    progress.update(1, 1.0, RATES, milestone=True)
    progress.evaluated(1, {"loss": 1.0}, best=True)
    progress.say("hello")
    assert out.getvalue() == ""


def test_standard_output_is_the_default(capsys):
    Progress(1).say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_remaining_time_is_given_before_any_is_known(clock):
    """Rates are 0 after a restart, by which nothing may be divided."""
    out = io.StringIO()
    Progress(10, out=out).update(1, 1.0, dict.fromkeys(RATES, 0.0), milestone=True)
    assert "0 tok/s" in out.getvalue()
    assert re.search(r"eta \d+d", out.getvalue())


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (12_345, "12.3k"), (2.5e6, "2.5M"), (3.21e9, "3.2G")],
)
def test_tokens_a_second_are_short(clock, number, shown):
    out = io.StringIO()
    Progress(10, out=out).update(1, 1.0, RATES | {"tokens_per_second": number}, milestone=True)
    assert f"  {shown} tok/s  " in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),  # not 60s
        (61, "1m01s"),
        (187, "3m07s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (7559, "2h05m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (4 * 86_400 + 3 * 3600 + 1800, "4d03h"),
        (1e7, "115d17h"),
    ],
)
def test_duration(seconds, shown):
    assert progress.duration(seconds) == shown


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
