"""Several processes that train together: equal losses, a common stop, and a message about the process that failed."""

import concurrent.futures
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import warm

from gpt import train
from gpt.checkpointing.workdir import Workdir
from gpt.config import from_tree
from gpt.runtime import cluster, lifeline, tensorboard, versions
from gpt.runtime.errors import UsageError, UserError

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent

MODEL = (
    "--config=configs/char_tiny.py",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=16",
    "--config.model.block_size=16",
    "--config.model.positions=learned",
    "--config.model.residual_dropout=0.1",
    "--config.model.vocab_multiple=8",
    "--config.train.log_every=1",
    "--config.train.sample_tokens=0",
    "--config.train.checkpoint_every=1000",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """Runs `python -m MODULE FLAGS…` as several processes of two devices each.

    Args:
      own_flags: {process: additional flags of this process}.
    """

    def __init__(self, count, module, *flags, own_flags=None, devices=2):
        self.port = free_port()
        start = warm()
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self.all = []
        for i in range(count):
            several = (f"--coordinator=127.0.0.1:{self.port}", f"--num_processes={count}", f"--process_id={i}")
            command = [
                *start,
                "-m",
                module,
                *flags,
                *(own_flags or {}).get(i, ()),
                *(several if count > 1 else ()),
            ]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
            self.all.append(subprocess.Popen(command, cwd=ROOT, env=env, **options))
        self.out = self.err = self.codes = None

    def wait(self, seconds=240) -> "Processes":
        """Reads the output of all processes until they end. Kills them and fails if they do not end in time."""
        deadline = time.monotonic() + seconds
        try:
            both = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        self.out, self.err = zip(*both, strict=True)
        self.codes = [process.returncode for process in self.all]
        return self

    def wait_for(self, pattern: str) -> str:
        """Returns the first line of process 0 that matches a pattern."""
        for line in self.all[0].stdout:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} did not come: {self.all[0].stderr.read()}")

    def succeeded(self) -> "Processes":
        self.wait()
        assert set(self.codes) == {0}, self.err
        return self


def losses(workdir) -> dict[int, float]:
    steps, values = tensorboard.read_scalars(workdir, ["train/loss"])["train/loss"]
    return dict(zip(steps, values, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, play, command):
    """Returns the workdir and the losses of 16 steps in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    flags = (*MODEL, f"--config.data.path={play}", "--config.train.steps=16", f"--workdir={workdir}")
    result = command("main", *flags)
    assert result.returncode == 0, result.stderr
    return workdir, losses(workdir)


# Restores a checkpoint in each process, and saves the shards of its devices.
RESTORE = """
    import sys
    import numpy as np
    import jax
    from gpt import train
    from gpt.checkpointing import loading
    from gpt.checkpointing.workdir import Workdir
    from gpt.runtime import cli, cluster
    from absl import flags
    out = flags.DEFINE_string("out", None, "Folder.")
    job = cli.define_cluster_flags()
    def main():
        cluster.start(job())
        run = loading.load(Workdir(flags.FLAGS.workdir), "last")
        state = train.restore(run.workdir.checkpoints(), run.step, run.program)
        held = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
            for shard in leaf.addressable_shards:
                held[f"{jax.tree_util.keystr(path)} {shard.index}"] = shard.data
        np.savez(f"{out.value}/{jax.process_index()}.npz", **held)
    if __name__ == "__main__":
        flags.DEFINE_string("workdir", None, "Folder.")
        cli.run(main)
"""


def shards_of(folder) -> dict[str, np.ndarray]:
    """Returns {array and index of a shard: values} of all processes."""
    found = {}
    for file in folder.iterdir():
        for name, array in np.load(file).items():
            np.testing.assert_array_equal(found.setdefault(name, array), array)
    return found


# The numbers of processes and the meshes of consecutive parts of a run.
STAGES = {
    "2 → 1": [(2, "--config.mesh.rules=fsdp"), (1, "--config.mesh.rules=sp", "--config.mesh.sequence=2")],
    "1 → 2 → 4 → 1": [
        (1, "--config.mesh.rules=dp"),
        (2, "--config.mesh.rules=fsdp"),
        (4, "--config.mesh.rules=fsdp_tp", "--config.mesh.data=2", "--config.mesh.model=2"),
        (1, "--config.mesh.rules=sp", "--config.mesh.sequence=2"),
    ],
}


@pytest.mark.parametrize("stages", ["2 → 1", pytest.param("1 → 2 → 4 → 1", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_processes_and_meshes(undisturbed, play, tmp_path, monkeypatch, stages):
    """The losses equal those of one process to rounding, and the restored parameters are equal to the bit."""
    workdir, flags = tmp_path / "run", (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}")
    (tmp_path / "restore.py").write_text(textwrap.dedent(RESTORE))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for i, (count, *mesh) in enumerate(STAGES[stages], 1):
        steps = 16 * i // len(STAGES[stages])
        ended = Processes(count, "gpt.main", *flags, *mesh, f"--config.train.steps={steps}").succeeded()
        assert f"Done: {steps} steps" in ended.out[0]
        assert (f"of {count} processes" in ended.out[0]) == (count > 1)
        assert not re.search("^(model|step|Done)", "".join(ended.out[1:]), re.M), "only process 0 prints"
        if count == 2:
            # The shards of these two processes equal what one process restores from the same files.
            (tmp_path / "several").mkdir()
            restore = ("restore", f"--workdir={workdir}", f"--out={tmp_path / 'several'}")
            Processes(2, *restore).succeeded()
            (tmp_path / "one").mkdir()
            Processes(1, *restore[:2], f"--out={tmp_path / 'one'}", devices=4).succeeded()
            one, several = shards_of(tmp_path / "one"), shards_of(tmp_path / "several")
            assert one.keys() == several.keys()
            assert len(one) > 20
            for name in one:
                np.testing.assert_array_equal(several[name], one[name], err_msg=name)
    found, (_, expected) = losses(workdir), undisturbed
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-5)


# Threads of Gloo print these parts of a line one by one, so that lines may be mixed.
GLOO = r"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks\. Expected number of connected peer ranks is : \d+\n?"


def test_evaluate_and_sample_in_two_processes_say_what_one_says(undisturbed, command):
    workdir, _ = undisturbed
    for module, *flags in (("evaluate", "--json"), ("sample", "--prompt=KING", "--num_tokens=8", "--num_samples=2")):
        alone = command(module, f"--workdir={workdir}", *flags)
        together = Processes(2, f"gpt.{module}", f"--workdir={workdir}", *flags).succeeded()
        printed = re.sub(GLOO, "", together.out[0])
        if module == "sample":
            assert printed == alone.stdout
        else:
            one, two = json.loads(alone.stdout), json.loads(printed)
            assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
            assert (two["tokens"], two["step"]) == (one["tokens"], one["step"])
        assert re.sub(GLOO, "", together.out[1]).strip() == ""


def test_each_process_reads_the_rows_of_its_devices(play, tmp_path, monkeypatch):
    """No example is read twice, and together the processes read exactly the examples of the batches."""
    spy = """
        import atexit, json, os, pathlib
        from gpt import main
        from gpt.data import text
        from gpt.runtime import cli
        rows, original = [], text.TrainingWindows.example
        def example(self, epoch, index):
            rows.append([epoch, index])
            return original(self, epoch, index)
        text.TrainingWindows.example = example
        if __name__ == "__main__":
            out = pathlib.Path(os.environ["SPY"], str(os.getpid()))
            atexit.register(lambda: out.write_text(json.dumps(rows, default=int)))
            cli.run(main.main)
    """
    (tmp_path / "spy.py").write_text(textwrap.dedent(spy))
    (tmp_path / "rows").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("SPY", str(tmp_path / "rows"))
    flags = (f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}", "--config.data.prefetch=0")
    flags += ("--config.train.loggers=",)  # the first process would measure the bytes of tokens in a sample
    Processes(2, "spy", *MODEL, *flags, "--config.train.steps=5", "--config.train.batch_size=8").succeeded()
    read = [json.loads(file.read_text()) for file in (tmp_path / "rows").iterdir()]
    assert [len(rows) for rows in read] == [(5 + 1) * 4] * 2  # a batch is fetched while a step runs
    assert len({tuple(row) for rows in read for row in rows}) == (5 + 1) * 8


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(undisturbed, play, tmp_path, number):
    """The same command resumes the run."""
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path}", "--config.train.eval_every=0")
    running = Processes(2, "gpt.main", *flags, "--config.train.steps=100000")
    running.wait_for("^step 3/")
    running.all[1].send_signal(number)
    running.wait()
    assert running.codes == [128 + number] * 2, running.err
    step = int(re.search(rf"Stopped by {number.name}, saved after step ([\d,]+)", running.out[0])[1].replace(",", ""))
    if number == signal.SIGTERM:
        again = Processes(2, "gpt.main", *flags, f"--config.train.steps={step + 2}").succeeded()
        assert f"resuming after step {step:,}" in again.out[0]
        assert list(losses(tmp_path)) == list(range(1, step + 3))


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_with_a_word(play, tmp_path, killed):
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path}", "--config.train.eval_every=0")
    running = Processes(2, "gpt.main", *flags, "--config.train.steps=100000", "--config.train.checkpoint_every=5")
    running.wait_for("^step 12/")
    running.all[killed].kill()
    began = time.monotonic()
    running.wait(60)
    assert time.monotonic() - began < 30
    assert running.codes[killed] == -signal.SIGKILL
    assert running.codes[1 - killed] not in (0, 143)
    assert re.search(rf"error: .*process {killed} .* ended without a message", running.err[1 - killed]), running.err
    again = Processes(2, "gpt.main", *flags, "--config.train.steps=30").succeeded()
    assert re.search("resuming after step [1-9]", again.out[0])


@pytest.mark.parametrize(
    ("own_flags", "message"),
    [
        (("--config.data.path={tmp}/missing.txt",), "data.path: there is no file or folder .*missing.txt"),
        (
            ("--config.optimizer.learning_rate=0.5",),
            "Process 0 has a different run: optimizer.learning_rate 0.004 ≠",
        ),
        (("--config.model.num_layers=0",), "model.num_layers=0 has to be greater than 0"),
    ],
    ids=["missing file", "another config", "mistake"],
)
def test_an_error_of_one_process_ends_all_with_its_message(play, tmp_path, own_flags, message):
    own = {1: [flag.format(tmp=tmp_path) for flag in own_flags]}
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}")
    fails_before_joining = "num_layers" in own_flags[0]
    flags += ("--cluster_timeout=3",) if fails_before_joining else ()
    running = Processes(2, "gpt.main", *flags, "--config.train.steps=100000", own_flags=own).wait(120)
    assert running.codes == [1, 1], running.err
    assert re.search(f"error: .*{message}", running.err[1]), running.err
    assert "Traceback" not in running.err[0] + running.err[1]
    if not fails_before_joining:
        assert re.search(f"process 1 on .*: error: .*{message}", running.err[0]), running.err


def test_a_mistake_that_all_make_is_said_once(play, tmp_path):
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path}", "--config.mesh.data=3")
    running = Processes(2, "gpt.main", *flags).wait(120)
    assert running.codes == [1, 1]
    assert running.err[0].startswith("error: mesh.data=3")
    assert "mesh.data" not in running.err[1]


# Start-up and lifelines alone. These processes are fast because they do not import JAX.


def run_script(script: str, *, wait=True, **variables):
    """Runs lines of Python in a process that has imported `cluster` and `lifeline`."""
    lines = ["import json, os, signal, sys, time", "from gpt.runtime import cluster, lifeline", textwrap.dedent(script)]
    command = [sys.executable, "-c", "\n".join(lines)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in variables.items()}, **options)
    return finished(process) if wait else process


def finished(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


CONNECT = """
    index, count = int(os.environ["INDEX"]), int(os.environ["COUNT"])
    kind = cluster.Spoke if index else cluster.Hub
    try:
        address, facts = f"127.0.0.1:{os.environ['PORT']}", json.loads(os.environ.get("FACTS", "{}"))
        line = cluster._lifeline = kind(address, count, index, float(os.environ["TIMEOUT"]), facts)
    except cluster.UserError as error:
        print(error)
        sys.exit(9)
"""


def connected(script: str, count=3, timeout=60, only=None):
    """Returns the results of processes that run a script after they have joined a job."""
    port = free_port()
    lines = textwrap.dedent(CONNECT) + textwrap.dedent(script)
    started = [
        run_script(lines, wait=False, INDEX=i, COUNT=count, PORT=port, TIMEOUT=timeout)
        for i in (range(count) if only is None else only)
    ]
    return [finished(process) for process in started]


def test_what_process_0_shares_reaches_all():
    script = """
        print(cluster.share("a", lambda: {"process": index}), cluster.share("b", lambda: [index] * 3))
        def work():
            time.sleep(0 if index else 1)
            return time.time()
        print(cluster.first_before_others("work", work))
        cluster.finish()
    """
    results = connected(script)
    assert [result.returncode for result in results] == [0, 0, 0]
    assert {result.stdout.splitlines()[0] for result in results} == {"{'process': 0} [0, 0, 0]"}
    first, *others = (float(result.stdout.splitlines()[1]) for result in results)
    assert all(first <= other for other in others)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_the_others_at_once(failing):
    script = f"""
        time.sleep(1)
        if index == {failing}:
            sys.exit(cluster.failed("error: out of luck", 7, own_fault=True))
        time.sleep(100)
    """
    began = time.monotonic()
    results = connected(script)
    assert time.monotonic() - began < 20
    assert [result.returncode for result in results] == [7, 7, 7]
    assert "error: out of luck" in results[failing].stderr
    assert "error: out of luck" in results[0].stderr
    assert all(results[i].stderr == "" for i in (1, 2) if i != failing)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_death_ends_the_others_at_once(killed):
    script = f"""
        time.sleep(1)
        if index == {killed}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    """
    began = time.monotonic()
    results = connected(script)
    assert time.monotonic() - began < 20
    assert [result.returncode for result in results] == [-9 if i == killed else 1 for i in range(3)]
    assert all(f"process {killed} " in results[i].stderr for i in ((1, 2) if killed == 0 else (0,)))


def test_what_a_death_causes_elsewhere_is_not_the_word():
    """The error of another process that follows from the death would hide the cause."""
    script = """
        if index == 2:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1:
            sys.exit(cluster.failed("Traceback: connection reset by peer", 1, own_fault=False))
        time.sleep(100)
    """
    results = connected(script)
    assert "Traceback" not in "".join(result.stderr for result in results)
    assert "process 2 " in results[0].stderr


def test_who_is_missing_is_said():
    (late,) = connected("", count=2, timeout=2, only=[1])
    assert late.returncode == 9
    assert re.search(r"process 1 on \S+ waited 2 s for process 0 at 127.0.0.1:\d+: Connection refused", late.stdout)
    first, second = connected("time.sleep(100)", count=4, timeout=6, only=[0, 2])
    assert re.search(r"process 0 on \S+ waited 6 s at 127.0.0.1:\d+ for process 1, 3 of 4 to connect", first.stdout)
    assert (first.returncode, second.returncode) == (9, 1)


def test_who_contradicts_is_refused():
    """A process with another number of processes gets a message. Process 0 continues to wait for the right one."""
    port = free_port()
    hub = run_script(textwrap.dedent(CONNECT), wait=False, INDEX=0, COUNT=2, PORT=port, TIMEOUT=30)
    wrong = run_script(textwrap.dedent(CONNECT) + "time.sleep(30)", INDEX=1, COUNT=3, PORT=port, TIMEOUT=30)
    assert wrong.returncode == 9
    assert re.search(r"process 1 on \S+ was started as one of 3 processes, process 0 on \S+ as one of 2", wrong.stdout)
    right = run_script(textwrap.dedent(CONNECT) + "cluster.finish()", INDEX=1, COUNT=2, PORT=port, TIMEOUT=30)
    assert right.returncode == 0, right.stderr
    assert finished(hub).returncode == 0


def test_other_code_or_settings_end_all_at_the_start():
    """The message names the process and the differences."""
    port = free_port()
    common = {"COUNT": 3, "PORT": port, "TIMEOUT": 60, "wait": False}
    started = [
        run_script(textwrap.dedent(CONNECT) + "time.sleep(60)", INDEX=i, FACTS=json.dumps(facts), **common)
        for i, facts in enumerate(({"jax": "1", "a": "b"}, {"jax": "1", "a": "b"}, {"jax": "2", "c": "d", "e": "f"}))
    ]
    results = [finished(process) for process in started]
    assert [result.returncode for result in results] == [9, 1, 1]
    assert re.match(
        r"process 2 on \S+ differs from process 0 on \S+ in jax \(1 ≠ 2\), a \(b ≠ unset\), c \(unset ≠ d\) "
        r"and 1 more\. .* same code",
        results[0].stdout,
    )


def test_a_changed_copy_of_the_code_ends_all_at_the_start(tmp_path):
    shutil.copytree(ROOT / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "gpt" / "optimizer.py").open("a") as file:
        file.write("# changed\n")
    port = free_port()
    start = """
        from absl import app
        from gpt.runtime import cli, cluster
        job = cli.define_cluster_flags()
        def main(_):
            cluster.start(job())
            print("joined")
        app.run(main)
    """
    (tmp_path / "start.py").write_text(textwrap.dedent(start))
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--cluster_timeout=60")
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / "start.py", *flags, f"--process_id={i}"],
            env=os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, code in enumerate((ROOT, tmp_path))
    ]
    first, second = [finished(process) for process in started]
    assert (first.returncode, second.returncode) == (1, 1)
    assert re.search(
        r"process 1 on \S+ differs from process 0 on \S+ in gpt's code \(\w{12} ≠ \w{12}\)\. Their", first.stderr
    )
    assert "joined" not in first.stdout + second.stdout


def test_facts_tell_what_changes_results(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b --xla_dump_to=/tmp/0 --xla_a=2")
    facts = versions.facts()
    assert {"Python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} < facts.keys()
    assert json.loads(json.dumps(facts)) == facts
    monkeypatch.setenv("XLA_FLAGS", "--xla_b --xla_a=2 --xla_dump_to=/tmp/1")
    assert versions.differences(facts, versions.facts()) == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=3")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with jax.default_matmul_precision("float32"), jax.enable_x64(True):
        different = {name for name, value in versions.facts().items() if facts.get(name) != value}
        missing = facts.keys() - versions.facts().keys()
    assert different == {"XLA_FLAGS --xla_a", "NVIDIA_TF32_OVERRIDE", "jax_default_matmul_precision", "jax_enable_x64"}
    assert missing == {"XLA_FLAGS --xla_b"}


# Behavior of other programs on a connection. Both ends are threads of this process.


class Os:
    """Replaces `os` in `lifeline`. Its `_exit` records the code and blocks the thread.

    It stays in place after the test, because the test's threads continue to run and may call `_exit` later.
    """

    def __init__(self):
        self.codes, self._of_others = [], set(threading.enumerate()) - {threading.current_thread()}

    def __getattr__(self, name):
        return getattr(os, name)

    def _exit(self, code):
        if isinstance(threading.current_thread(), threading.Timer):
            return  # repeats the exit of another thread
        if threading.current_thread() not in self._of_others:
            self.codes.append(code)
        threading.Event().wait()


@pytest.fixture
def exits() -> list[int]:
    """Returns the codes with which `lifeline` would have ended this process."""
    lifeline.os = Os()
    return lifeline.os.codes


@pytest.fixture
def hub(exits):
    """Returns the address of a process 0 that waits for process 1, and a function that waits until process 1 joined."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lifeline.Hub, f"127.0.0.1:{port}", 2, 0, 30, {})
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        yield ("127.0.0.1", port), lambda: waiting.result(10)


def join(address, *, pieces=1, **changes) -> tuple[socket.socket, dict]:
    """Returns a connection on which process 1 introduced itself, and the answer of process 0."""
    connection = socket.create_connection(address, timeout=10)
    file = connection.makefile("r")
    nonce = json.loads(file.readline())["nonce"]
    hello = {"process": 1, "count": 2, "name": "process 1", "facts": {}, "nonce": "mine"}
    hello |= {"proof": lifeline._proof("process", nonce, "mine")} | changes
    data = json.dumps(hello).encode() + b"\n"
    for i in range(pieces):
        connection.sendall(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
        time.sleep(0.005 if pieces > 1 else 0)
    line = file.readline()
    return connection, json.loads(line) if line else {}


NESTED = b"[" * 60_000
FOREIGN = [
    b"",
    b"\n" * 1000,
    b"GET / HTTP/1.1\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"[]\n",
    b"7\n",
    b"null\n",
    b"NaN\n",
    b'{"process": 1}\n',
    b'{"process": 1, "name": "process 1", "count": 2}\n',
    b'{"process": 1, "count": NaN, "name": "a", "facts": {}, "nonce": "a", "proof": "a"}\n',
    b'{"process": true, "count": 2, "name": "a", "facts": {}, "nonce": "a", "proof": "a"}\n',
    b'{"process": 1, "count": 2, "name": "a", "facts": {}, "nonce": "a", "proof": "\\ud800\xc3\xa9"}\n',
    b'{"process": 1, "count": 2, "name": "a", "facts": {}, "nonce": "\\ud800", "proof": "a"}\n',
    b'{"process": 1, "count": 2, "name": "a", "facts": {}, "nonce": [], "proof": null}\n',
    b'{"error": "end", "code": 0}\n',
    b'{"end": 0}\n',
    b'{"process": ' + b"9" * 5000 + b"}\n",
    b'{"process": 1, "count": 2, "name": "\xff"}\n',
    b"{" * 1000 + b"\n",
    NESTED + b"\n",
    b'{"a":' * 12_000 + b"\n",
    bytes(range(256)) * 400,
    b"a" * 1_000_000,  # an endless line
]


def test_no_other_program_disturbs_process_0(hub, exits, capfd):
    """Fixed and random bytes, resets, and more idle connections than the limit; after these, process 1 joins."""
    address, joined = hub
    numbers, before = random.Random(0), lifelines()
    valid = json.dumps({"process": 1, "count": 2, "name": "a", "facts": {}, "nonce": "a", "proof": "a"}).encode()
    changed = []
    for _ in range(200):
        data = bytearray(valid)
        for _ in range(numbers.randrange(1, 6)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        changed.append(bytes(data[: numbers.randrange(1, len(data) + 1)]) + b"\n" * numbers.randrange(2))
    idle = [socket.create_connection(address) for _ in range(300)]
    for data in (*FOREIGN, *changed):
        with socket.create_connection(address) as connection, contextlib.suppress(OSError):
            connection.settimeout(0.2)
            connection.sendall(data)
            if numbers.random() < 0.3:  # closes with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    refused, answer = join(address, proof="a" * 64)
    assert answer == {"proof": ""}
    spoke, answer = join(address, pieces=40)
    assert answer["refusal"] == ""
    process_0 = joined()
    again, answer = join(address)
    assert "process 1 has the same number as process 1" in answer["refusal"]
    for data in FOREIGN:
        with socket.create_connection(address) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
    process_0.share("key", lambda: "value")
    assert spoke.makefile("r").readline() == '{"key": "key", "value": "value"}\n'
    assert exits == []
    spoke.close()
    wait_until(lambda: exits)
    assert exits[0] == 1
    assert "error: process 1 ended without a message" in capfd.readouterr().err
    for connection in (*idle, refused, again):
        connection.close()
    wait_until(lambda: lifelines() <= before + 1)


def lifelines() -> int:
    return sum(thread.name == "lifeline" for thread in threading.enumerate())


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_secret_keeps_a_process_out(hub, monkeypatch, capfd):
    address, joined = hub
    options = {"INDEX": 1, "COUNT": 2, "PORT": address[1], "TIMEOUT": 1}
    late = run_script(textwrap.dedent(CONNECT), GPT_CLUSTER_SECRET="wrong", **options)
    assert late.returncode == 9
    assert f"127.0.0.1:{address[1]}: the program there has another GPT_CLUSTER_SECRET. Check" in late.stdout
    spoke, _ = join(address)
    assert joined()._refused == " A program on 127.0.0.1 tried to join with another GPT_CLUSTER_SECRET."
    spoke.close()

    # The notice and the error of process 0 name the refused program.
    monkeypatch.setenv("GPT_CLUSTER_SECRET", " right\n")
    monkeypatch.setattr(lifeline, "NOTICE_AFTER", 1)
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (time.sleep(0.3), join(("127.0.0.1", port), proof="0" * 64)))
        with pytest.raises(UserError, match=r"waited 2 s .* with another GPT_CLUSTER_SECRET"):
            lifeline.Hub(f"127.0.0.1:{port}", 2, 0, 2, {})
    notice = r"^waiting at .* for process 1 of 2 … A program on 127.0.0.1 tried to join with another GPT_CLUSTER_SECRET"
    assert re.search(notice, capfd.readouterr().err, re.M)
    right = lifeline._proof("process", "a")
    monkeypatch.setenv("GPT_CLUSTER_SECRET", "right")
    assert lifeline._proof("process", "a") == right


def test_a_connection_has_to_prove_itself_in_time(hub, exits, monkeypatch):
    """One connection is silent, the other sends single bytes."""
    monkeypatch.setattr(lifeline, "HANDSHAKE", 0.3)
    address, joined = hub
    for data in (b"", b" "):
        with socket.create_connection(address, timeout=5) as connection, contextlib.suppress(ConnectionError):
            began = time.monotonic()
            connection.settimeout(0.05)
            while time.monotonic() - began < 5:
                connection.sendall(data)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1000):
                        break
        assert time.monotonic() - began < 2
    spoke, _ = join(address)
    joined()
    time.sleep(0.5)
    assert exits == [], "after the handshake, a connection may be silent for any time"
    spoke.close()
    wait_until(lambda: exits)  # else the message about it would be in the output of the next test


@pytest.mark.parametrize(
    "line",
    [
        b'{"error": "text", "code": 0}',
        b'{"error": "text", "code": 256}',
        b'{"error": "text", "code": -1}',
        b'{"error": "text", "code": NaN}',
        b'{"error": "text", "code": true}',
        b'{"error": "text", "code": "7"}',
        b'{"error": 7, "code": 7}',
        b'{"error": "text"}',
        b'{"end": 0}',
        b"{}",
        b"[]",
        b"no JSON \xff",
        NESTED,
    ],
)
def test_what_process_0_cannot_read_of_a_process_ends_all_with_a_word(hub, exits, capfd, line):
    address, joined = hub
    spoke, _ = join(address)
    joined()
    spoke.sendall(line + b"\n")
    message = json.loads(spoke.makefile("r").readline())
    wait_until(lambda: exits)
    error = capfd.readouterr().err
    assert exits[0] == 1
    assert error == "text\n" or re.match(r"error: process 0 on \S+ cannot read a message of another process: ", error)
    assert message.keys() == {"end"}
    spoke.close()


def test_an_endless_line_of_a_process_ends_all(hub, exits, capfd, monkeypatch):
    monkeypatch.setattr(lifeline, "MAX_MESSAGE", 1 << 20)
    address, joined = hub
    spoke, _ = join(address)
    joined()
    with contextlib.suppress(OSError):
        spoke.sendall(b"a" * (1 << 22))
    wait_until(lambda: exits)
    assert "it is too long" in capfd.readouterr().err
    spoke.close()


def test_a_thread_that_dies_ends_the_process(hub, exits, capfd, monkeypatch):
    """Without the thread, the death of a process would not be noticed."""

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(lifeline.Hub, "_receive", broken)
    address, joined = hub
    spoke, _ = join(address)
    joined()
    spoke.sendall(b'{"done": true}\n')
    wait_until(lambda: exits)
    assert exits[0] == 1
    assert "KeyError: 'a bug'" in capfd.readouterr().err
    assert json.loads(spoke.makefile("r").readline()) == {"end": 1}
    spoke.close()


class Daemon:
    """A program that gives the same answer on every connection to its port, and keeps the connections open."""

    def __init__(self, answer: Callable[[socket.socket], None] | bytes):
        self._answer, self._server = answer, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        connections = []
        with contextlib.suppress(OSError):
            while True:
                connections.append(self._server.accept()[0])
                threading.Thread(target=self._serve, args=connections[-1:], daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, ValueError):
            self._answer(connection) if callable(self._answer) else connection.sendall(self._answer)

    def close(self):
        self._server.close()


def drip(connection):
    while True:
        connection.sendall(b" ")
        time.sleep(0.01)


def flood(connection):
    while True:
        connection.sendall(b"a" * 65536)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\xff" * 100 + b"\n",
        b"[]\n",
        b'{"nonce": 7}\n',
        b'{"nonce": "\\ud800"}\n',
        b'{"nonce": "a"}\n',
        b'{"nonce": "a"}\n{"proof": ""}\n',
        b'{"nonce": "a"}\n{"end": 0}\n',
        b'{"nonce": "a"}\n{"proof": "\\ud800"}\n',
        b'{"nonce": "a"}\n{"proof": "a", "refusal": "go away"}\n',
        NESTED + b"\n",
        drip,
        flood,
        reset,
    ],
)
def test_another_program_at_the_coordinator_is_told_from_process_0(answer):
    daemon = Daemon(answer)
    began = time.monotonic()
    with pytest.raises(UserError) as raised:
        lifeline.Spoke(daemon.address, 2, 1, 1, {})
    assert time.monotonic() - began < 4
    assert re.fullmatch(
        rf"process 1 on \S+ waited 1 s for process 0 at {daemon.address}: (the program there (does not answer as "
        r"process 0 does|has another GPT_CLUSTER_SECRET)|Connection reset by peer)\. "
        r"Check --coordinator and what process 0 prints\.",
        str(raised.value),
    )
    daemon.close()


@pytest.mark.parametrize(
    "line", [b'{"end": 0}', b'{"end": NaN}', b'{"end": true}', b'{"end": 512}', b"{}", b"[]", NESTED]
)
def test_a_strange_end_is_no_success(exits, capfd, line):
    def answer(connection):
        connection.sendall(b'{"nonce": "a"}\n')
        hello = json.loads(connection.makefile("r").readline())
        proof = lifeline._proof("process 0", hello["nonce"], "a")
        connection.sendall(json.dumps({"proof": proof, "refusal": ""}).encode() + b"\n" + line + b"\n")

    daemon = Daemon(answer)
    lifeline.Spoke(daemon.address, 2, 1, 5, {})
    wait_until(lambda: exits)
    assert exits[0] == 1
    daemon.close()


def test_nothing_listens_beyond_the_coordinators_address():
    """Neither process 0 nor JAX's coordination service listens at other addresses of the host."""
    script = """
        cluster.start(cluster.Job(os.environ["AT"], 2, int(os.environ["INDEX"])))
        files = [f"/proc/self/fd/{file}" for file in os.listdir("/proc/self/fd")]
        own = {os.readlink(file) for file in files if os.path.lexists(file)}
        for table in ("tcp", "tcp6"):
            for line in list(open(f"/proc/net/{table}"))[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in own:
                    print("listens", local.split(":")[0])
        cluster.finish()
    """
    at = f"127.0.0.1:{free_port()}"
    started = [run_script(script, wait=False, INDEX=i, AT=at) for i in range(2)]
    first, second = [finished(process) for process in started]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert sorted(re.findall(r"listens (\w+)", first.stdout)) == ["0000000000000000FFFF00000100007F", "0100007F"]
    assert second.stdout == ""


@pytest.mark.parametrize(("coordinator", "address"), [("[::1]", "[::1]"), ("localhost", "127.0.0.1")])
def test_other_forms_of_the_coordinators_address(coordinator, address, exits):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        at = f"{coordinator}:{free_port()}"
        hub = pool.submit(lifeline.Hub, at, 2, 0, 30, {})
        spoke = lifeline.Spoke(at, 2, 1, 30, {})
        reached, listens_at = hub.result(10).service()
    assert reached == listens_at
    assert reached.startswith(f"{address}:")
    hub.result().finish()
    spoke.finish()


def test_too_many_open_files_are_waited_for():
    calls = []

    class Server:
        def accept(self):
            calls.append(1)
            if len(calls) < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            sys.exit()

    with pytest.raises(SystemExit):
        lifeline.Hub._accept(None, Server())


@pytest.mark.parametrize("trouble", ["os.close(1); os.close(2)", "os.dup2(full, 1); os.dup2(full, 2)"])
def test_an_end_waits_for_no_output(trouble):
    """Neither a closed output nor a pipe that nobody reads delays the exit."""
    script = """
        lifeline.PRINTING = 1
        _, full = os.pipe()
        os.set_blocking(full, False)
        try:
            while True:
                os.write(full, bytes(4096))
        except BlockingIOError:
            os.set_blocking(full, True)
    """
    assert run_script(f"{textwrap.dedent(script)}\n{trouble}\nlifeline.exit_now('text', 7)").returncode == 7


def test_an_address_of_another_host_is_refused_at_once():
    with pytest.raises(
        UserError, match=r"process 0 on \S+ cannot listen at 192\.0\.2\.77:29999: Cannot assign .* --coordinator"
    ):
        lifeline.Hub("192.0.2.77:29999", 2, 0, 5, {})
    with pytest.raises(UserError, match="cannot listen at " + "a" * 70):
        lifeline.Hub(f"{'a' * 70}:29999", 2, 0, 5, {})


def test_without_a_secret_process_0_warns_where_others_can_connect(monkeypatch, capfd):
    """Others can connect if the coordinator's name means a loopback address on its own host only."""
    monkeypatch.delenv("GPT_CLUSTER_SECRET", raising=False)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", free_port()))]
    monkeypatch.setattr(lifeline.socket, "getaddrinfo", lambda *_, **__: found)
    for secret, warnings in (("", 1), ("secret", 0)):
        monkeypatch.setenv("GPT_CLUSTER_SECRET", secret)
        with pytest.raises(UserError, match="waited 0 s"):
            lifeline.Hub(f"this-host:{free_port()}", 2, 0, 0, {})
        assert capfd.readouterr().err.count("warning: GPT_CLUSTER_SECRET is not set") == warnings


LAUNCHERS = {
    "slurm": {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": 2, "SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}"},
    "open mpi": {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": "{i}", "OMPI_COMM_WORLD_LOCAL_RANK": "{i}"},
    "none": {},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_found_and_a_laptop_is_left_alone(launcher):
    """JAX detects the job from the variables that these launchers set."""
    script = """
        cluster.start(cluster.Job())
        import jax
        print(jax.process_index(), jax.process_count(), cluster.is_first(), cluster.is_several())
        cluster.finish()
    """
    job = random.randrange(2**12)  # JAX computes the port from it
    ids = {"slurm": {"SLURM_JOB_ID": job}, "open mpi": {"OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1"}}
    count = 1 if launcher == "none" else 2
    variables = LAUNCHERS[launcher] | ids.get(launcher, {})
    started = [
        run_script(script, wait=False, **{name: str(value).format(i=i) for name, value in variables.items()})
        for i in range(count)
    ]
    results = [finished(process) for process in started]
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    printed = [result.stdout.splitlines()[-1] for result in results]
    assert printed == [f"{i} {count} {i == 0} {count > 1}" for i in range(count)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_processes=2",), "--num_processes needs --coordinator and --process_id"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "--process_id=2 has to be less than"),
        (
            ("--coordinator=here", "--num_processes=2", "--process_id=1"),
            "--coordinator=here has to be of the form HOST",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(command, flags, message):
    result = command("evaluate", "--workdir=nowhere", *flags)
    assert result.returncode == 2
    assert re.match(f"error: {message}", result.stderr), result.stderr


@pytest.mark.parametrize("address", ["a", "a:", ":1", "a:0", "a:x", "a:65536", "a:99999999", "a:١", "a:-1", "a:1 "])
def test_addresses_that_are_none(address):
    with pytest.raises(UsageError, match=f"--coordinator={address} has to be of the form HOST:PORT"):
        cluster.start(cluster.Job(address, 2, 0))


def test_a_launcher_with_odd_variables_is_told(monkeypatch):
    for name, value in LAUNCHERS["slurm"].items():
        monkeypatch.setenv(name, str(value))  # SLURM_PROCID={i} is no number
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(UserError, match=r"Cannot detect the processes of this job .*\{i\}.* Set --coordinator"):
        cluster.start(cluster.Job())


@pytest.mark.parametrize(
    ("chips", "has_plugin", "has_gpu", "platforms"),
    [(0, False, True, "cpu"), (0, True, False, "cpu"), (0, True, True, "cuda,cpu"), (4, True, True, None)],
)
def test_jax_does_not_look_for_absent_accelerators(monkeypatch, chips, has_plugin, has_gpu, platforms):
    """JAX would log errors about them if the compilers of `gpt.plan` are installed."""
    installed = {"libtpu": True, "jax_cuda13_plugin": has_plugin}
    monkeypatch.setattr(cluster.importlib.util, "find_spec", installed.get)
    monkeypatch.setattr("jax._src.hardware_utils.num_available_tpu_chips_and_device_id", lambda: (chips, None))
    monkeypatch.setattr("jax._src.hardware_utils.has_visible_nvidia_gpu", lambda: has_gpu)
    jax.config.update("jax_platforms", None)
    try:
        cluster.start(cluster.Job())
        assert jax.config.values["jax_platforms"] == platforms
    finally:
        jax.config.update("jax_platforms", "cpu")


def test_one_process_by_flags_is_one_process(undisturbed, command):
    workdir, _ = undisturbed
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=1", "--process_id=0", "--json")
    assert json.loads(command("evaluate", f"--workdir={workdir}", *flags).stdout)["step"] == 16


def test_processes_have_to_share_the_workdir(tiny, tmp_path, monkeypatch):
    """Process 1 raises this error if process 0 wrote to its own disk."""
    monkeypatch.setattr("gpt.runtime.cluster.is_first", lambda: False)
    monkeypatch.setattr("gpt.runtime.cluster.share", lambda key, compute: None)
    with pytest.raises(train.UserError, match=r"the run\.json of process 0 is missing; all hosts need one disk"):
        train.train(from_tree(json.loads(json.dumps(train.dataclasses.asdict(tiny)))), Workdir(tmp_path))
