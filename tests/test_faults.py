"""Injected faults, with real processes and real files: no saved state is lost, and every fault is reported.

Failing starts are in test_commands.py, errors of one of several processes in test_cluster.py, and signals that a run
handles in test_train.py.
"""

import contextlib
import math
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_cluster import Processes

from gpt import train
from gpt.checkpointing import loading
from gpt.checkpointing.checkpoints import Damaged
from gpt.checkpointing.workdir import Workdir
from gpt.runtime import progress, tensorboard
from gpt.runtime.errors import UserError

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent
STEPS, EVERY = 120, 20
FLAGS = (
    "--config=configs/char_tiny.py",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.embed_dim=32",
    "--config.model.block_size=16",
    "--config.model.residual_dropout=0.1",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.eval_every=50",
    "--config.train.sample_tokens=0",
    f"--config.train.checkpoint_every={EVERY}",
    "--config.train.keep_checkpoints=3",
)


def start(workdir, play, *, steps=STEPS, module="gpt.main", wrapper=(), out=None) -> subprocess.Popen:
    """Starts `python -m gpt.main` in a new process, with its output in a file beside the workdir."""
    command = [*wrapper, sys.executable, "-m", module, *FLAGS, f"--config.train.steps={steps}"]
    command += [f"--config.data.path={play}", f"--workdir={workdir}"]
    with open(out or f"{workdir}.out", "w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)


def printed(workdir) -> str:
    return Path(f"{workdir}.out").read_text()


def whole_steps(workdir: Path) -> list[int]:
    """Returns the steps whose checkpoint is complete, because orbax renames its folder last."""
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdecimal())


def unfinished(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def arrays(workdir: Path, step: int, program) -> dict[str, np.ndarray]:
    state = train.restore(Workdir(workdir).checkpoints(), step, program)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def points(workdir: Path) -> dict[str, tuple[list[int], list[float]]]:
    return tensorboard.read_scalars(workdir, ("train/loss", "train/gradient_norm", "validation/loss"))


class Undisturbed:
    """An uninterrupted run, to copy and to compare with."""

    def __init__(self, path: Path, play: Path, steps: int = STEPS):
        began = time.monotonic()
        assert start(path, play, steps=steps).wait(240) == 0, printed(path)
        self.path, self.steps, self.seconds = path, steps, time.monotonic() - began
        self.config = Workdir(path).read().config
        self.program = loading.load(Workdir(path), "last").program
        self.arrays, self.points = arrays(path, steps, self.program), points(path)
        assert self.points["train/loss"][0] == list(range(1, steps + 1))

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.path, to)

    def same_arrays(self, workdir: Path) -> None:
        """Checks that parameters and optimizer state are equal to the bit."""
        found = arrays(workdir, self.steps, self.program)
        assert found.keys() == self.arrays.keys()
        for name, array in self.arrays.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)

    def equals(self, workdir: Path) -> None:
        """Checks that arrays and the points of TensorBoard are equal."""
        self.same_arrays(workdir)
        assert points(workdir) == self.points


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, play) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", play)


# Kills.


def kill(workdir: Path, play: Path, when: str, moment: float, steps: int) -> str:
    """Starts the run and kills it; returns its output.

    Args:
      when: "start": `moment` seconds after its start; "step": `moment` seconds after its first step was shown; "save":
        during the save after `moment` complete ones.
    """
    began, before = time.time(), whole_steps(workdir)
    process = start(workdir, play, steps=steps)
    while process.poll() is None:
        if when == "save":
            saving = any(started(folder) > began for folder in unfinished(workdir))
            now = saving and len(set(whole_steps(workdir)) - set(before)) >= moment
        else:
            if when == "step" and not re.search("^step ", printed(workdir), re.M):
                began = time.time()
            now = time.time() - began > moment
        if now:
            process.kill()
            break
        time.sleep(0.001)
    process.wait()
    return printed(workdir)


def started(folder: Path) -> float:
    """Returns when a save started; 0 if it has just ended."""
    try:
        return folder.stat().st_ctime
    except FileNotFoundError:
        return 0


def survive(expected: Undisturbed, workdir: Path, play: Path, moments: list[tuple[str, float]]) -> dict[str, int]:
    """Kills the run at each of the moments, checks how each start resumes, and compares the final state.

    Returns:
      Numbers of kills in a save, at start-up, and at other times.
    """
    killed = {"in a save": 0, "at start-up": 0, "between": 0}
    for when, moment in [*moments, ("start", math.inf)]:
        before, began = whole_steps(workdir), time.time()
        out = kill(workdir, play, when, moment, expected.steps)
        after = whole_steps(workdir)
        kind = "between" if re.search("^step ", out, re.M) else "at start-up"
        if any(started(folder) > began for folder in unfinished(workdir)):
            kind = "in a save"
        killed[kind] += 1
        print(f"{when} {moment:.3f}: whole before {before}, after {after}, killed {kind}")
        assert (after or [0])[-1] >= (before or [0])[-1], "the newest checkpoint is missing"
        if re.search("^(resuming after|step) ", out, re.M):
            resumed = re.search(r"resuming after step ([\d,]+)", out)
            assert (int(resumed[1].replace(",", "")) if resumed else 0) == (before or [0])[-1], out
        assert "Traceback" not in out, out
        assert "is damaged" not in out, out
    assert f"Done: {expected.steps:,} steps" in out
    expected.equals(workdir)
    killed[kind] -= 1  # the last one was not killed
    return killed


def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(undisturbed, play, tmp_path):
    """Kills in a save, at start-up, and in a save again, in a folder with a space and non-ASCII characters."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = [("save", 2), ("start", random.Random(seed).uniform(0.2, 2)), ("save", 1)]
    killed = survive(undisturbed, tmp_path / "ein Läuf 世界", play, moments)
    assert killed["at start-up"] >= 1
    assert sum(killed.values()) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_25_times_ends_as_if_it_had_not_been(play, tmp_path):
    """Kills at random times, in saves, and at start-up. GPT_FAULTS_SEED repeats a failed test."""
    seed = int(os.environ.get("GPT_FAULTS_SEED") or random.randrange(2**32))
    draw = random.Random(seed)
    expected = Undisturbed(tmp_path / "undisturbed", play, steps=1000)
    print(f"GPT_FAULTS_SEED={seed}; undisturbed {expected.seconds:.1f} s")
    kinds = ["save"] * 9 + ["start-up"] * 6 + ["any"] * 10
    draw.shuffle(kinds)
    moments = {
        "save": lambda: ("save", draw.randrange(3)),
        "start-up": lambda: ("start", draw.uniform(0, 5)),
        "any": lambda: ("step", draw.uniform(0, 0.05) * expected.seconds),
    }
    killed = survive(expected, tmp_path / "run", play, [moments[kind]() for kind in kinds])
    print(killed)
    assert sum(killed.values()) == 25
    assert min(killed.values()) > 0


# Damage.


def numbers(checkpoint: Path) -> list[Path]:
    """Returns the files with values of the parameters, some of which tensorstore may have written and never reads.

    Tensorstore has checksums for the small arrays and for the indices in them only.
    """
    return [file for file in sorted(checkpoint.glob("params/ocdbt.process_0/d/*")) if file.is_file()]


def truncate(checkpoint: Path) -> None:
    for file in numbers(checkpoint):
        os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def flip_in_the_middle(checkpoint: Path) -> None:
    for file in numbers(checkpoint):
        flip(file, file.stat().st_size // 2)


def remove_metadata(checkpoint: Path) -> None:
    (checkpoint / "optimizer" / "_METADATA").unlink()


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def change_the_loss(checkpoint: Path) -> None:
    file = checkpoint / "digests" / "metadata"
    file.write_text(re.sub(r"\d", "1", file.read_text()))


DAMAGES = [truncate, flip_in_the_middle, remove_metadata, empty, change_the_loss]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_takes_its_place(undisturbed, tmp_path, capsys, damage):
    workdir = undisturbed.copy(tmp_path / "run")
    newest = workdir / "checkpoints" / str(STEPS)
    damage(newest)
    left = sorted(file.relative_to(newest) for file in newest.rglob("*"))
    assert train.train(undisturbed.config, Workdir(workdir)) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "is damaged" in line)
    assert re.match(rf"{newest} is damaged \(.+\)\. It was renamed to {STEPS}\.damaged\.$", line), line
    assert f"resuming after step {STEPS - EVERY}" in lines
    aside = newest.with_name(f"{STEPS}.damaged")
    assert sorted(file.relative_to(aside) for file in aside.rglob("*")) == left
    undisturbed.equals(workdir)
    if damage is empty:  # a second time: another name, and the first folder is kept
        damage(newest)
        assert train.train(undisturbed.config, Workdir(workdir)) == 0
        assert newest.with_name(f"{STEPS}.damaged-2").is_dir()
        assert aside.is_dir()


def test_where_all_are_damaged_the_run_stops(undisturbed, tmp_path):
    """Every start is refused, because nothing is renamed."""
    workdir = undisturbed.copy(tmp_path / "run")
    checkpoints = sorted((workdir / "checkpoints").iterdir())
    for checkpoint, damage in zip(checkpoints, DAMAGES, strict=False):
        damage(checkpoint)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^All checkpoints in .* are damaged, and none was changed: .*damaged"):
            train.train(undisturbed.config, Workdir(workdir))
        assert sorted((workdir / "checkpoints").iterdir()) == checkpoints


@pytest.mark.parametrize("damage", [flip_in_the_middle, empty])
def test_damage_is_reported_by_every_reader(undisturbed, play, tmp_path, command, damage):
    """evaluate, sample and init_from print one error and rename nothing. Other checkpoints can be read."""
    workdir = undisturbed.copy(tmp_path / "run")
    damage(workdir / "checkpoints" / str(STEPS))
    names = sorted(file.name for file in (workdir / "checkpoints").iterdir())
    sentence = rf"{workdir}/checkpoints/{STEPS} is damaged \(.+\)\.\n$"
    flags = ("evaluate", "--checkpoint=last") if damage is empty else ("sample", "--prompt=KING", "--num_tokens=3")
    result = command(*flags, f"--workdir={workdir}", f"--checkpoint={STEPS}")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert re.match("error: " + sentence, result.stderr), result.stderr
    other = train.dataclasses.replace(undisturbed.config.train, init_from=str(workdir))
    with pytest.raises(UserError, match="is damaged"):
        train.train(train.dataclasses.replace(undisturbed.config, train=other), Workdir(tmp_path / "other"))
    assert loading.load(Workdir(workdir), str(STEPS - EVERY)).step == STEPS - EVERY
    assert sorted(file.name for file in (workdir / "checkpoints").iterdir()) == names


def test_a_flipped_bit_in_any_file_is_noticed_or_of_no_effect(undisturbed, tmp_path):
    """Orbax and tensorstore detect some flips; the digests of the arrays detect those that change a value."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    workdir = undisturbed.copy(tmp_path / "run")
    noticed = {"elsewhere": 0, "by the digests": 0, "no effect": 0}
    files = [file for file in sorted((workdir / "checkpoints" / str(STEPS)).rglob("*")) if file.is_file()]
    many = [file for file in numbers(workdir / "checkpoints" / str(STEPS)) if file.stat().st_size > 4096]
    for file in files:
        before = file.read_bytes()
        for _ in range(6 if file in many else 1):
            flip(file, draw.randrange(len(before)))
            try:
                undisturbed.same_arrays(workdir)
                noticed["no effect"] += 1
            except Damaged as error:
                noticed["by the digests" if "the values differ from those saved" in str(error) else "elsewhere"] += 1
            file.write_bytes(before)
    print(noticed)
    assert min(noticed.values()) > 0


# Storage.


def mount(*mounts: str) -> tuple[str, ...]:
    """Returns the prefix of a command that runs it with these mounts, without root; skips if that is not permitted."""
    script = " && ".join(["mount --make-rprivate /", *mounts])
    permitted = shutil.which("unshare") and subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], capture_output=True, check=False
    )
    if not permitted or permitted.returncode:
        pytest.skip("needs `unshare -rm` and mounts within it")
    return ("unshare", "-rm", "bash", "-c", f'{script} && exec "$@"', "bash")


FILLS_THE_DISK = """
    import os, pathlib
    from gpt import main
    from gpt.checkpointing import checkpoints
    from gpt.runtime import cli
    fill, full, free = pathlib.Path(os.environ["FILL"]), int(os.environ["FULL"]), int(os.environ["FREE"])
    save = checkpoints.Checkpoints.save
    def fills_the_disk(self, step, *args):
        self.wait()
        if step == full:
            with fill.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(512)):
                        pass
                except OSError:
                    pass
        if step == free:
            fill.unlink()
        save(self, step, *args)
    checkpoints.Checkpoints.save = fills_the_disk
    if __name__ == "__main__":
        cli.run(main.main)
"""


@pytest.mark.parametrize("free", [STEPS, 0], ids=["for a while", "to the end"])
def test_a_full_disk(undisturbed, play, tmp_path, monkeypatch, capsys, free):
    """Training continues, older checkpoints are kept, the next save tries again; a failed last save gives exit code 1.

    The points of TensorBoard are buffered, and written when there is space.
    """
    disk, workdir = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    wrapper = mount(f"mount -t tmpfs -o size=4m tmpfs {disk}")
    (tmp_path / "fills.py").write_text(textwrap.dedent(FILLS_THE_DISK))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name, value in (("FILL", disk / "fill"), ("FULL", STEPS - EVERY), ("FREE", free)):
        monkeypatch.setenv(name, str(value))
    # The disk ends with the process that mounted it, so what it holds is copied from there.
    script = f"""
        cp -r {undisturbed.path} {workdir} && rm -r {workdir}/checkpoints/{STEPS} {workdir}/checkpoints/{STEPS - EVERY}
        "$@"; code=$?
        rm -f {disk}/fill; cp -r {workdir} {tmp_path}/after; exit $code
    """
    process = start(workdir, play, module="fills", out=tmp_path / "out", wrapper=(*wrapper, "bash", "-c", script, "-"))
    code, out = process.wait(240), (tmp_path / "out").read_text()
    kept = f"No space left on device; the checkpoint of step {STEPS - 2 * EVERY} is kept."
    sentence = f"Cannot save {workdir}/checkpoints/{{}}: {kept}"
    assert f"\n{sentence.format(STEPS - EVERY)} Training continues and tries again at the next save.\n" in out, out
    assert "Traceback" not in out, out
    assert whole_steps(tmp_path / "after")[-1] == (STEPS if free else STEPS - 2 * EVERY)
    if free:
        assert code == 0, out
        assert f"\nDone: {STEPS} steps" in out
    else:
        assert code == 1, out
        assert out.endswith(f"\nerror: {sentence.format(STEPS)} The same command resumes from there.\n"), out
        assert train.train(undisturbed.config, Workdir(tmp_path / "after")) == 0
        assert f"resuming after step {STEPS - 2 * EVERY}" in capsys.readouterr().out
    undisturbed.equals(tmp_path / "after")


def test_a_workdir_that_cannot_be_written_to(undisturbed, play, tmp_path):
    """A disk that is mounted read-only is refused before anything is compiled, and nothing is changed."""
    workdir = undisturbed.copy(tmp_path / "run")
    before = sorted(workdir.rglob("*"))
    wrapper = mount(f"mount --bind {workdir} {workdir}", f"mount -o remount,bind,ro {workdir}")
    assert start(workdir, play, wrapper=wrapper).wait(120) == 1
    assert printed(workdir) == f"error: Cannot write to --workdir={workdir}: Read-only file system.\n"
    assert sorted(workdir.rglob("*")) == before


def test_a_workdir_that_is_removed_under_the_run(undisturbed, tmp_path, monkeypatch, capsys):
    """The run continues, because the folder may come back (on a network disk), and reports each failed save."""
    workdir = tmp_path / "run"
    update = progress.Steps.update

    def update_and_remove(progress, step, *args, **kwargs):
        update(progress, step, *args, **kwargs)
        if step == EVERY + 5:
            shutil.rmtree(workdir.rename(tmp_path / "gone"), ignore_errors=True)  # a save may be running

    monkeypatch.setattr(progress.Steps, "update", update_and_remove)
    settings = train.dataclasses.replace(undisturbed.config.train, steps=3 * EVERY, eval_every=0)
    with pytest.raises(UserError, match=rf"^Cannot save {workdir}/checkpoints/{3 * EVERY}: "):
        train.train(train.dataclasses.replace(undisturbed.config, train=settings), Workdir(workdir))
    assert f"Cannot save {workdir}/checkpoints/{2 * EVERY}: the workdir was removed;" in capsys.readouterr().out
    assert not whole_steps(workdir)


HOLD = """
    import sys, time
    from gpt.checkpointing.workdir import Workdir
    with Workdir(sys.argv[1]).lock():
        print("locked", flush=True)
        time.sleep(1000)
"""


def test_two_runs_do_not_share_a_workdir(undisturbed, play, tmp_path):
    """The second run is refused with the process ID of the first; a killed process releases the lock."""
    workdir = undisturbed.copy(tmp_path / "run")
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(workdir)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        assert start(workdir, play).wait(120) == 1
        by = f"process {holder.pid} on {socket.gethostname()}"
        assert printed(workdir).startswith(f"error: --workdir={workdir} is in use by {by}; "), printed(workdir)
        assert printed(workdir).count("\n") == 1
        loading.load(Workdir(workdir), "last")  # reading is allowed
    finally:
        holder.kill()
        holder.wait()
    with Workdir(workdir).lock(), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        train.train(undisturbed.config, Workdir(workdir))
    with Workdir(workdir).lock():
        pass


# Many processes and long runs.


@pytest.mark.slow
def test_several_processes_agree_on_the_checkpoint_that_is_whole(play, tmp_path):
    """If one process cannot read a file, all processes restore the previous checkpoint."""
    flags = (*FLAGS, f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}", "--config.mesh.rules=fsdp")
    expected = Processes(2, "gpt.main", *flags, f"--config.train.steps={STEPS}").succeeded()
    assert "is damaged" not in expected.out[0]
    losses = points(tmp_path / "run")
    for damage, process in ((flip_in_the_middle, 0), (truncate, 1)):
        newest = tmp_path / "run" / "checkpoints" / str(STEPS)
        folder = newest / "params" / f"ocdbt.process_{process}" / "d"
        file = max(folder.iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size // 2) if damage is truncate else flip(file, file.stat().st_size // 2)
        again = Processes(2, "gpt.main", *flags, f"--config.train.steps={STEPS}").succeeded()
        assert re.search(rf"{newest} is damaged .* It was renamed to {STEPS}\.damaged", again.out[0]), again.out[0]
        assert f"resuming after step {STEPS - EVERY}" in again.out[0]
        assert points(tmp_path / "run") == losses


def measured(process: int) -> tuple[float, int, int]:
    """Returns resident megabytes, open files and threads of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    resident, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads"))
    return resident / 1024, len(os.listdir(f"/proc/{process}/fd")), threads


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_grows_in_a_long_run(play, tmp_path, monkeypatch, count):
    """Memory, open files, threads and TensorBoard's bytes per point stay constant in a long run.

    20,000 steps, or 10,000 of two processes, with a checkpoint and an evaluation every 1,000 steps.
    """
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # glibc's arenas grow for hours without a leak
    steps, log_every = 20_000 // count, 10
    flags = (*FLAGS, f"--config.data.path={play}", f"--workdir={tmp_path}", f"--config.train.steps={steps}")
    flags += (f"--config.train.log_every={log_every}", "--config.train.eval_every=1000")
    flags += ("--config.train.checkpoint_every=1000",)
    running = Processes(count, "gpt.main", *flags, devices=1)
    reader = threading.Thread(target=running.wait, args=(1500,))
    found: dict[int, list] = {process.pid: [] for process in running.all}
    reader.start()
    while reader.is_alive():
        for process in running.all:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, TypeError):  # it has ended
                found[process.pid].append(measured(process.pid))
        time.sleep(0.5)
    reader.join()
    assert set(running.codes) == {0}, running.err
    for rows in found.values():
        quarters = [rows[i * len(rows) // 4 : (i + 1) * len(rows) // 4] for i in range(4)]
        resident, files, threads_ = zip(
            *(map(statistics.median, zip(*rows, strict=True)) for rows in quarters), strict=True
        )
        print(f"{len(rows)} times: MB {resident}, files {files}, threads {threads_}, peak {max(rows)[0]:.0f} MB")
        assert resident[3] - resident[2] < 5  # in the second quarter the allocators still settle
        assert files[3] <= files[1] + 1
        assert threads_[3] <= threads_[1] + 1
    (events,) = tmp_path.glob("events.out.*")
    logged, evaluated = steps // log_every, steps // 1000
    each = events.stat().st_size / logged
    print(f"TensorBoard: {events.stat().st_size:,} bytes, {each:.0f} a logged step with {evaluated} evaluations")
    assert each < 400
