"""Real processes that train as one: the same losses, the same stop, and one word about who failed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from gpt import metrics, train
from gpt.checkpoint import Workdir
from gpt.config import from_tree

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
    """`python -m MODULE FLAGS…` as several processes of two devices each.

    Args:
      own_flags: {process: flags for it alone}.
    """

    def __init__(self, count, module, *flags, own_flags=None, devices=2):
        self.port = free_port()
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self.all = []
        for i in range(count):
            several = (f"--coordinator=127.0.0.1:{self.port}", f"--num_processes={count}", f"--process_id={i}")
            command = [
                sys.executable,
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
        """Reads what they print until they end; those that don't are killed, and the test fails."""
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
        """Reads lines of process 0 until one matches."""
        for line in self.all[0].stdout:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} did not come: {self.all[0].stderr.read()}")

    def succeeded(self) -> "Processes":
        self.wait()
        assert set(self.codes) == {0}, self.err
        return self


def losses(workdir) -> dict[int, float]:
    steps, values = metrics.read_scalars(workdir, ["train/loss"])["train/loss"]
    return dict(zip(steps, values, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, play, command):
    """Losses of 16 steps in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    flags = (*MODEL, f"--config.data.path={play}", "--config.train.steps=16", f"--workdir={workdir}")
    result = command("main", *flags)
    assert result.returncode == 0, result.stderr
    return workdir, losses(workdir)


# Restores, in each process, and keeps what its devices hold.
RESTORE = """
    import sys
    import numpy as np
    import jax
    from gpt import cli, cluster, loaded, train
    from gpt.checkpoint import Workdir
    from absl import flags
    out = flags.DEFINE_string("out", None, "Folder.")
    def main():
        cluster.start()
        run = loaded.load(Workdir(flags.FLAGS.workdir), "last")
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
    """{array and place in it: numbers} of all processes."""
    found = {}
    for file in folder.iterdir():
        for name, array in np.load(file).items():
            np.testing.assert_array_equal(found.setdefault(name, array), array)
    return found


def test_a_run_goes_on_with_other_processes_and_meshes(undisturbed, play, tmp_path, monkeypatch):
    """1 → 2 → 4 → 1 processes, dp → fsdp → fsdp_tp → sp: losses as in one process, and parameters to the bit."""
    workdir, flags = tmp_path / "run", (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}")
    (tmp_path / "restore.py").write_text(textwrap.dedent(RESTORE))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    stages = [
        (1, "--config.mesh.rules=dp"),
        (2, "--config.mesh.rules=fsdp"),
        (4, "--config.mesh.rules=fsdp_tp", "--config.mesh.data=2", "--config.mesh.model=2"),
        (1, "--config.mesh.rules=sp", "--config.mesh.sequence=2"),
    ]
    for i, (count, *mesh) in enumerate(stages, 1):
        ended = Processes(count, "gpt.main", *flags, *mesh, f"--config.train.steps={4 * i}").succeeded()
        assert f"Done: {4 * i} steps" in ended.out[0]
        assert (f"of {count} processes" in ended.out[0]) == (count > 1)
        assert not re.search("^(model|step|Done)", "".join(ended.out[1:]), re.M), "only process 0 prints"
        if count == 2:
            # What these two hold after step 8, against what one process reads of the same files.
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


def test_evaluate_and_sample_in_two_processes_say_what_one_says(undisturbed, command):
    workdir, _ = undisturbed
    for module, *flags in (("evaluate", "--json"), ("sample", "--prompt=KING", "--num_tokens=8", "--num_samples=2")):
        alone = command(module, f"--workdir={workdir}", *flags)
        together = Processes(2, f"gpt.{module}", f"--workdir={workdir}", *flags).succeeded()
        said = "".join(line for line in together.out[0].splitlines(True) if not line.startswith("[Gloo]"))
        if module == "sample":
            assert said == alone.stdout
        else:
            one, two = json.loads(alone.stdout), json.loads(said)
            assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
            assert (two["tokens"], two["step"]) == (one["tokens"], one["step"])
        assert "".join(line for line in together.out[1].splitlines() if not line.startswith("[Gloo]")) == ""


def test_each_process_reads_the_rows_of_its_devices(play, tmp_path, monkeypatch):
    """Counted in real processes: no row twice, and in all just the rows of the batches that were trained on."""
    spy = """
        import atexit, json, os, pathlib
        from gpt import cli, main
        from gpt.data import text
        rows, original = [], text.TrainingWindows.row
        def row(self, epoch, index):
            rows.append([epoch, index])
            return original(self, epoch, index)
        text.TrainingWindows.row = row
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
    Processes(2, "spy", *MODEL, *flags, "--config.train.steps=5", "--config.train.batch_size=8").succeeded()
    read = [json.loads(file.read_text()) for file in (tmp_path / "rows").iterdir()]
    assert [len(rows) for rows in read] == [(5 + 1) * 4] * 2  # a batch is fetched while a step runs
    assert len({tuple(row) for rows in read for row in rows}) == (5 + 1) * 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(undisturbed, play, tmp_path, number):
    """And the same command goes on."""
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


@pytest.mark.parametrize("killed", [0, 1])
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
    assert re.search(rf"error: .*process {killed} .* is gone without a word", running.err[1 - killed]), running.err
    again = Processes(2, "gpt.main", *flags, "--config.train.steps=30").succeeded()
    assert re.search("resuming after step [1-9]", again.out[0])


@pytest.mark.parametrize(
    ("own_flags", "message"),
    [
        (("--config.data.path={tmp}/missing.txt",), "data.path: there is no file or folder .*missing.txt"),
        (("--config.optimizer.learning_rate=0.5",), "to train different runs: optimizer.learning_rate 0.004 ≠ 0.5"),
        (("--config.model.num_layers=0",), "model.num_layers=0 has to be greater than 0"),
    ],
    ids=["missing file", "another config", "mistake"],
)
def test_an_error_of_one_process_ends_all_with_its_message(play, tmp_path, own_flags, message):
    own = {1: [flag.format(tmp=tmp_path) for flag in own_flags]}
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}")
    never_came = "num_layers" in own_flags[0]  # so that process 0 waits in vain
    flags += ("--cluster_timeout=20",) if never_came else ()
    running = Processes(2, "gpt.main", *flags, "--config.train.steps=100000", own_flags=own).wait(120)
    assert running.codes == [1, 1], running.err
    assert re.search(f"error: .*{message}", running.err[1]), running.err
    assert "Traceback" not in running.err[0] + running.err[1]
    if not never_came:
        assert re.search(f"process 1 on .*: error: .*{message}", running.err[0]), running.err


def test_a_mistake_that_all_make_is_said_once(play, tmp_path):
    flags = (*MODEL, f"--config.data.path={play}", f"--workdir={tmp_path}", "--config.mesh.data=3")
    running = Processes(2, "gpt.main", *flags).wait(120)
    assert running.codes == [1, 1]
    assert running.err[0].startswith("error: mesh.data=3")
    assert "mesh.data" not in running.err[1]


# Start-up, and the lifelines by themselves: without JAX, which makes it quick.


def run_script(script: str, *, wait=True, **variables):
    """A process that runs lines with `gpt.cluster` at hand."""
    lines = ["import os, signal, sys, time", "from gpt import cluster", textwrap.dedent(script)]
    command = [sys.executable, "-c", "\n".join(lines)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in variables.items()}, **options)
    return finished(process) if wait else process


def finished(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


CONNECT = """
    index, count = int(os.environ["INDEX"]), int(os.environ["COUNT"])
    kind = cluster._Spoke if index else cluster._Hub
    try:
        line = cluster._lifeline = kind(f"127.0.0.1:{os.environ['PORT']}", count, index, float(os.environ["TIMEOUT"]))
    except cluster.UserError as error:
        print(error)
        sys.exit(9)
"""


def connected(script: str, count=3, timeout=60, only=None):
    """The results of that many processes that run a script once they are connected."""
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
    """A peer's error that follows from it would only hide it."""
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
    first, second = connected("time.sleep(100)", count=4, timeout=15, only=[0, 2])
    assert re.search(r"process 0 on \S+ waited 15 s at 127.0.0.1:\d+ for process 1, 3 of 4 to connect", first.stdout)
    assert (first.returncode, second.returncode) == (9, 1)


def test_who_contradicts_is_refused():
    """A process with another number of processes, and a stranger that is none."""
    port = free_port()
    hub = run_script(textwrap.dedent(CONNECT), wait=False, INDEX=0, COUNT=2, PORT=port, TIMEOUT=30)
    wrong = run_script(textwrap.dedent(CONNECT) + "time.sleep(30)", INDEX=1, COUNT=3, PORT=port, TIMEOUT=30)
    assert wrong.returncode == 1
    assert wrong.stderr == ""
    for word in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": 1}\n', b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(word)
    right = run_script(textwrap.dedent(CONNECT) + "cluster.finish()", INDEX=1, COUNT=2, PORT=port, TIMEOUT=30)
    assert right.returncode == 0, right.stderr
    assert finished(hub).returncode == 0


LAUNCHERS = {
    "slurm": {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": 2, "SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}"},
    "open mpi": {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": "{i}", "OMPI_COMM_WORLD_LOCAL_RANK": "{i}"},
    "none": {},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_found_and_a_laptop_is_left_alone(launcher):
    """JAX's own detection, with variables as these set them."""
    script = """
        cluster.flags.FLAGS(["program"])
        cluster.start()
        import jax
        print(jax.process_index(), jax.process_count(), cluster.is_first(), cluster.is_several())
        cluster.finish()
    """
    job = random.randrange(2**12)  # from which the launchers' ports follow
    ids = {"slurm": {"SLURM_JOB_ID": job}, "open mpi": {"OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1"}}
    count = 1 if launcher == "none" else 2
    variables = LAUNCHERS[launcher] | ids.get(launcher, {})
    started = [
        run_script(script, wait=False, **{name: str(value).format(i=i) for name, value in variables.items()})
        for i in range(count)
    ]
    results = [finished(process) for process in started]
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    said = [result.stdout.splitlines()[-1] for result in results]
    assert said == [f"{i} {count} {i == 0} {count > 1}" for i in range(count)]


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


def test_one_process_by_flags_is_one_process(undisturbed, command):
    workdir, _ = undisturbed
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=1", "--process_id=0", "--json")
    assert json.loads(command("evaluate", f"--workdir={workdir}", *flags).stdout)["step"] == 16


def test_processes_have_to_share_the_workdir(tiny, tmp_path, monkeypatch):
    """As process 1 sees it when process 0 wrote to a disk of its own."""
    monkeypatch.setattr("gpt.cluster.is_first", lambda: False)
    monkeypatch.setattr("gpt.cluster.share", lambda key, compute: None)
    with pytest.raises(train.UserError, match=r"run\.json, by process 0, is not there; all hosts need the same disk"):
        train.train(from_tree(json.loads(json.dumps(train.dataclasses.asdict(tiny)))), Workdir(tmp_path))
