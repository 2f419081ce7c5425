"""What a command shows while it runs: rates, lines in a log, and the line on a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable

import numpy as np
import pytest

from gpt.runtime import progress
from gpt.runtime.progress import Speed, Steps

RATES = {"tokens_per_second": 12_345.0, "steps_per_second": 2.0, "input_wait": 0.0}
SILENCE = 2.0  # seconds after which a person wonders whether the program still runs
ERASE = "\r\x1b[2K"


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
        with speed.pause("evaluation"):
            clock.wait(50.0)
    clock.wait(1.0)
    speed.step()
    assert speed.rates()["tokens_per_second"] == pytest.approx(50.0)


def test_pause_that_fails_is_left_out_too(clock):
    speed = Speed(100, 1.0, None)
    clock.wait(2.0)
    with contextlib.suppress(KeyboardInterrupt), speed.pause("evaluation"):
        clock.wait(50.0)
        raise KeyboardInterrupt
    speed.step()
    assert speed.rates()["tokens_per_second"] == pytest.approx(50.0)


def test_restart_forgets_everything(clock):
    speed = Speed(100, 1.0, None)
    with speed.waiting(lambda: True):
        clock.wait(7.0)
    speed.step()
    with speed.pause("evaluation"):
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


def test_time_left_includes_evaluations_and_saves(clock):
    speed = Speed(100, 1.0, None)
    assert speed.left(1000, {"evaluation": (3, 600.0)}) == 0  # nothing is known yet
    for _ in range(10):
        clock.wait(0.5)
        speed.step()
    # An evaluation of 600 tokens has not been measured: the time of 6 steps, without their backward passes.
    pauses = {"evaluation": (3, 600.0), "save": (2, 0.0)}
    assert speed.left(100, pauses) == pytest.approx(100 * 0.5 + 3 * 6 * 0.5 / 3)
    with speed.pause("evaluation"):
        clock.wait(40.0)
    with speed.pause("save"):
        clock.wait(7.0)
    assert speed.left(100, pauses) == pytest.approx(100 * 0.5 + 3 * 40 + 2 * 7)
    speed.restart()  # at each point on TensorBoard
    assert speed.left(100, pauses) == pytest.approx(100 * 0.5 + 3 * 40 + 2 * 7)


def test_time_left_follows_the_speed_without_jumps(clock):
    speed = Speed(100, 1.0, None)
    for seconds in [1.0] * 100 + [10.0] + [1.0] * 20:  # one slow step
        clock.wait(seconds)
        speed.step()
    assert 100 < speed.left(100, {}) < 130


# Lines in a log.


@pytest.fixture
def log(monkeypatch, capsys):
    """Returns a function that returns the lines that were printed."""
    monkeypatch.setattr(time, "strftime", lambda _: "12:34:56")
    return lambda: capsys.readouterr().out.splitlines()


def test_a_log_gets_milestones_with_the_time(clock, log):
    steps = Steps(2000)
    progress.say("hello")
    for step in range(1, 21):
        clock.wait(1.0)
        steps.update(step, 2.0 / step, 1.0, RATES, 995.0 - step, milestone=step % 10 == 0)
    steps.evaluated(20, {"loss": 1.5}, best=True)
    steps.update(30, 0.5, 0.75, RATES | {"mfu": 0.4567, "input_wait": 0.25}, 61, milestone=True)
    steps.evaluated(30, {"loss": 1.75, "accuracy": 0.5, "loss/a": 1.25, "raw_loss": 2.0}, best=False)
    assert log() == [
        "hello",
        "step 10/2,000  loss 0.2000 (mean 1.0000)  eta 16m25s  12.3k tok/s  12:34:56",
        "step 20/2,000  loss 0.1000 (mean 1.0000)  eta 16m15s  12.3k tok/s  12:34:56",
        "step 20/2,000  validation loss 1.5000  (best)",
        "step 30/2,000  loss 0.5000 (mean 0.7500)  eta 1m01s  val 1.5000  12.3k tok/s  mfu 45.7%  "
        "waiting for input 25%  12:34:56",
        "step 30/2,000  validation loss 1.7500  a 1.2500  without averaging 2.0000  accuracy 50.00%",
    ]


def test_a_log_gets_a_line_about_a_long_task_now_and_then(monkeypatch, log):
    monkeypatch.setattr(progress, "LOG_AFTER", 0.3)
    monkeypatch.setattr(progress, "LOG_EVERY", 0.6)
    with progress.task("reading", 8) as shown:
        for _ in range(8):
            time.sleep(0.25)
            shown.done += 1
    with progress.task("something short"):
        pass
    lines = log()
    assert 2 <= len(lines) <= 4
    assert all(re.fullmatch(r"reading  \d+%  \ds(  \ds left)?  12:34:56", line) for line in lines)


def test_only_the_first_process_prints(monkeypatch, clock, log):
    monkeypatch.setattr(progress.output, "is_first", False)
    steps = Steps(100)
    steps.update(1, 1.0, 1.0, RATES, 1.0, milestone=True)
    steps.evaluated(1, {"loss": 1.0}, best=True)
    progress.say("hello")
    assert log() == []


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (2.5e6, "2.5M"), (3.21e9, "3.21G")],
)
def test_tokens_a_second_are_short(number, shown):
    assert progress.short(number) == shown


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


# The line on a terminal.


class Session:
    """A program on a pseudo-terminal, with all that it wrote, and when.

    Args:
      at: {pattern: signal to send when the pattern was written}, one after the other.
    """

    def __init__(self, columns: int, *command: str, at: dict[str, int] | None = None, **environment: str):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "TERM")}
        options = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        process = subprocess.Popen(command, env=clean | {"TERM": "xterm-256color"} | environment, **options)
        os.close(slave)
        self.columns, self.text, self.times = columns, "", []
        waiting, seen = list((at or {}).items()), 0
        deadline = time.monotonic() + 300
        with contextlib.suppress(OSError):  # the terminal ends with the program
            while time.monotonic() < deadline and select.select([master], [], [], 60)[0]:
                self.text += os.read(master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
                self.times.append(time.monotonic())
                if waiting and (found := re.search(waiting[0][0], self.text[seen:], re.S)):
                    seen += found.end()
                    time.sleep(0.2)  # so that the program is within what it announced
                    process.send_signal(waiting.pop(0)[1])
        if time.monotonic() > deadline:
            process.kill()
        os.close(master)
        self.exit_code = process.wait(60)
        assert not waiting, f"{waiting[0][0]!r} did not appear in {self.text!r}"

    @property
    def drawn(self) -> list[str]:
        """The texts of the live line, one after the other, without colours."""
        return [plain(text) for text in re.findall(r"\x1b\[36m(.*?)\x1b\[0m", self.text, re.S)]

    @property
    def lines(self) -> list[str]:
        """The lines that stay on the terminal."""
        return [plain(line.rpartition(ERASE)[2]) for line in self.text.split("\n")]

    @property
    def longest_silence(self) -> float:
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def check(self) -> None:
        """Fails if the live line wraps, breaks, or is not erased, or if nothing was written for too long."""
        for text in self.drawn:
            assert "\n" not in text
            assert len(text) < self.columns, text
        assert self.text.count(ERASE) >= len(self.drawn)  # each is erased before anything else is written
        assert not re.search(r"\x1b\[36m[^\x1b]*\x1b\[0m(?!\r\x1b\[2K)", self.text)
        assert "\x1b" not in "".join(self.lines)
        assert self.longest_silence < SILENCE


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def undisturbed(start: Callable[[], Session]) -> Session:
    """Returns a session, started again if it was silent because other programs took the processors."""
    for _ in range(2):
        if (session := start()).longest_silence < SILENCE:
            return session
    return start()


def python(script: str) -> tuple[str, ...]:
    before = "import time\nfrom gpt.runtime import output, progress\noutput.install()\n"
    return sys.executable, "-c", before + textwrap.dedent(script)


def test_a_task_is_one_line_that_disappears():
    session = Session(
        40,
        *python(
            """
            with progress.task("reading", 10) as shown:
                for i in range(10):
                    time.sleep(0.15)
                    shown.done += 1
                    if i == 5:
                        progress.say("note: half")
                        print("part of a ", end="", flush=True)
                        time.sleep(0.6)  # the line must not follow on an open one
                        print("line")
                with progress.task("writing a very long name of a file \\x1b[31m" + "世界" * 30):
                    time.sleep(0.6)
            print("end")
            """
        ),
    )
    assert session.lines == ["note: half", "part of a line", "end", ""]
    assert session.drawn[0].startswith("reading")
    assert any(re.fullmatch(r"reading  \d\d%  \ds.*", text) for text in session.drawn)
    assert any(text.startswith("writing") and text.endswith("…") for text in session.drawn)
    assert not any("\x1b" in text for text in session.drawn)
    assert session.exit_code == 0
    session.columns = 2 * session.columns  # characters of two columns
    session.check()


def test_the_line_of_a_task_shows_the_step_around_it_and_the_first_parts_in_a_narrow_terminal():
    script = python(
        """
        steps = progress.Steps(100)
        rates = {"tokens_per_second": 12345.0, "input_wait": 0.5, "mfu": 0.25}
        with progress.task(steps):
            steps.update(7, 1.5, 2.5, rates, 61.0, milestone=True)
            time.sleep(0.6)
            with progress.task("evaluating", 4) as shown:
                shown.done = 1
                time.sleep(0.6)
        """
    )
    wide, narrow = Session(140, *script), Session(60, *script)
    line = "step 7/100  loss 1.5000 (mean 2.5000)  eta 1m01s"
    assert f"{line}  12.3k tok/s  mfu 25.0%  waiting for input 50%" in wide.drawn
    assert line in narrow.drawn
    for session in (wide, narrow):
        assert any(text.startswith("step 7/100  evaluating  25%") for text in session.drawn)
        assert session.lines == [""]  # a terminal gets no line for a milestone
        session.check()


@pytest.mark.parametrize(
    ("variable", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_where_they_are_wanted(variable, has_colour):
    script = """
        with progress.task("reading"):
            time.sleep(0.6)
            progress.say("Done: 3 steps")
            progress.say("error: no \\x1b[31mred\\x1b[0m")
        """
    session = Session(80, *python(script), **variable)
    assert ("\x1b[32mDone:\x1b[0m 3 steps" in session.text) == has_colour
    assert ("\x1b[1;31merror:" in session.text) == has_colour
    assert r"no \x1b[31mred\x1b[0m" in session.text  # of what is printed, nothing controls the terminal
    assert (ERASE in session.text) == (variable != {"TERM": "dumb"})


def test_an_output_that_is_no_terminal_gets_no_control_characters(tmp_path):
    script = 'with progress.task("reading"):\n    time.sleep(0.6)\nprogress.say("Done: 3 steps")'
    assert subprocess.run(python(script), capture_output=True, check=True).stdout == b"Done: 3 steps\n"


TINY = (
    *("--config=configs/char_tiny.py", "--config.model.num_layers=1", "--config.model.embed_dim=32"),
    *("--config.train.batch_size=8", "--config.train.eval_every=60", "--config.train.sample_tokens=64"),
)


@pytest.fixture(scope="module")
def sessions(play, tmp_path_factory):
    """Trainings with evaluations on terminals of several widths, and the workdirs."""
    found = {}
    for columns in (60, 80, 140):
        workdirs = []

        def start(columns=columns, workdirs=workdirs):
            workdirs.append(tmp_path_factory.mktemp("runs") / str(columns))
            flags = (*TINY, f"--config.data.path={play}", "--config.train.steps=120", f"--workdir={workdirs[-1]}")
            return Session(columns, sys.executable, "-m", "gpt.main", *flags)

        found[columns] = undisturbed(start), workdirs[-1]
    return found


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_training_on_a_terminal(sessions, columns):
    session, _ = sessions[columns]
    session.check()
    assert session.exit_code == 0
    for text in (r"starting|building", r"step \d+/120  loss", "step (60|120)/120  (evaluating|sampling|saving)"):
        assert any(re.match(text, drawn) for drawn in session.drawn), text
    kept = [line for line in session.lines if line.startswith("step")]
    assert [line.split("  ")[0] for line in kept] == ["step 60/120", "step 120/120"]
    assert all("validation loss" in line for line in kept)
    table = [line for line in session.lines if not line.startswith("  │")]
    assert max(map(len, table)) <= 80 + len(str(sessions[columns][1]))
    assert session.lines[-2].startswith("Done: 120 steps")


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_an_evaluation_on_a_terminal(sessions, columns):
    flags = (f"--workdir={sessions[columns][1]}", "--split=all")
    session = undisturbed(lambda: Session(columns, sys.executable, "-m", "gpt.evaluate", *flags))
    session.check()
    assert session.exit_code == 0
    assert any(re.match(r"evaluating  \d+%  \ds", text) for text in session.drawn)
    assert re.match(r"bits per character +\d|loss +\d", session.lines[1])


@pytest.mark.parametrize("columns", [60, 140])
def test_a_plan_on_a_terminal(columns, tmp_path):
    pytest.importorskip("libtpu")
    flags = ("--config=configs/char_tiny.py", "--config.model.vocab_size=80", "--topology=v5e:2x2")
    command = (sys.executable, "-m", "gpt.plan", *flags)
    caches = iter("abc")
    session = undisturbed(lambda: Session(columns, *command, XDG_CACHE_HOME=str(tmp_path / next(caches))))
    session.check()
    assert session.exit_code == 0
    assert any(text.startswith("compiling for v5e:2x2") for text in session.drawn)
    assert any(line.startswith("FITS") for line in session.lines)


def test_ctrl_c_is_answered_in_words_and_the_second_one_leaves(play, tmp_path):
    flags = (*TINY, f"--config.data.path={play}", "--config.train.steps=1000000", "--config.train.eval_every=0")
    command = (sys.executable, "-m", "gpt.main", *flags)
    once = Session(80, *command, f"--workdir={tmp_path}/once", at={r"step \d+/": signal.SIGINT})
    assert "Ctrl-C: stopping after this step; again to leave without saving" in once.lines
    assert re.match(r"Stopped by SIGINT, saved after step", once.lines[-2])
    assert once.exit_code == 128 + signal.SIGINT
    at = {r"step \d+/": signal.SIGTERM}
    terminated = Session(80, *command, f"--workdir={tmp_path}/terminated", at=at)
    assert "SIGTERM: stopping after this step" in terminated.lines
    assert terminated.exit_code == 128 + signal.SIGTERM


SLOW = """
    import hashlib
    import jax
    from gpt.runtime import cli, progress, signals
    def main():
        with signals.Interrupted(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])) as interrupted:
            if {begins}:
                interrupted.begin()
            progress.say("busy")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a compilation, runs no Python code for minutes
    cli.run(main)
"""


@pytest.mark.parametrize("begins", [False, True])
def test_signals_are_answered_while_the_main_thread_is_busy(begins):
    script = textwrap.dedent(SLOW.replace("{begins}", str(begins)))
    at = {"busy": signal.SIGINT} | ({"without saving": signal.SIGINT} if begins else {})
    began = time.monotonic()
    session = Session(80, sys.executable, "-c", script, at=at)
    answer = "Ctrl-C: stopping after this step; again to leave without saving" if begins else "Ctrl-C: leaving in 2 s"
    assert any(line.startswith(answer) for line in session.lines)
    assert "error: stopped by SIGINT." in session.lines
    assert session.exit_code == 128 + signal.SIGINT
    assert time.monotonic() - began < 60


def test_a_fork_prints_and_shows_its_own_tasks():
    session = Session(
        80,
        *python(
            """
            import os
            with progress.task("the parent"):
                time.sleep(0.6)
                if os.fork() == 0:
                    print("the child prints")
                    with progress.task("the child"):
                        time.sleep(0.6)
                    os._exit(0)
                os.wait()
            """
        ),
    )
    assert "the child prints" in session.text
    assert any(text.startswith("the child") for text in session.drawn)
