"""`gpt.runs`: a row for each run whatever its folder contains, differences of configs, and deleted checkpoints."""

import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from object_store import ObjectStore
from orbax.checkpoint.path import atomicity

from gpt import train
from gpt.checkpointing import overview, record
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, TrainConfig
from gpt.models.gpt import GPTConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(play) -> Config:
    return Config(
        model=GPTConfig(num_layers=1, num_heads=2, embed_dim=16, block_size=16),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=TrainConfig(
            batch_size=8, steps=8, checkpoint_every=2, eval_every=2, keep_checkpoints=9, log_every=1, sample_tokens=0
        ),
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    """A workdir with the checkpoints 2, 4, 6 and 8, of which 4 has the lowest loss."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert train.train(config, Workdir(path)) == 0
    edit_record(path, 4, validation_loss=0.5)
    return path


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_record(workdir: Path, step: int, **values) -> None:
    path = workdir / "checkpoints" / str(step) / record.RECORD
    path.write_text(dataclasses.replace(record.Record.from_json(json.loads(path.read_text())), **values).to_json())


def states(folder: Path) -> dict[str, str]:
    return {run.name: run.state for run in overview.find(str(folder))}


def steps(workdir: Path) -> set[str]:
    return {folder.name for folder in (workdir / "checkpoints").iterdir()}


def stop_after(report):
    """Returns `Training._report` that sends a signal to this process after step 3."""

    def reporting(training, step, metrics):
        report(training, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    return reporting


def test_each_state_has_a_row(config, trained, runs, monkeypatch, command):
    for name in ("done", "group/nested", "never", "weights", "busy"):
        shutil.copytree(trained, runs / name)
    shutil.rmtree(runs / "never" / "checkpoints")
    edit_json(runs / "weights" / "run.json", data_fingerprint=None)
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text("{")
    (runs / "no run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_report", stop_after(train.Training._report))
        assert train.train(config, Workdir(runs / "ended")) == 128 + signal.SIGTERM
    with Workdir(runs / "busy").lock(), Workdir(runs / "starting").lock():
        shown = command("runs", str(runs))
        in_json = command("runs", str(runs), "--json")
        single = command("runs", str(runs / "group" / "nested"), "--json")
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    found = {run["name"]: run for run in map(json.loads, in_json.stdout.splitlines())}
    assert {name: run["state"] for name, run in found.items()} == {
        "busy": "running",
        "damaged": "damaged",
        "done": "finished",
        "ended": "stopped",
        "group/nested": "finished",
        "never": "never saved",
        "starting": "running",
        "weights": "converted",
    }
    assert f"process {os.getpid()} on " in found["busy"]["reason"]
    lines = shown.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line[0] != " "] == ["name", *found]
    assert lines[2].startswith("damaged ")
    assert lines[3].startswith("    Expecting property name")
    done = found["done"]
    assert (done["step"], done["total_steps"], done["tokens"]) == (8, 8, 8 * 8 * 16)
    assert done["best_validation_loss"] == 0.5
    assert done["last_validation_loss"] != 0.5
    on_disk = {file: file.stat().st_size for file in (runs / "done").rglob("*") if file.is_file()}
    assert done["size_bytes"] == sum(on_disk.values())
    assert done["checkpoint_bytes"] == {
        step: sum(size for file, size in on_disk.items() if runs / "done/checkpoints" / step in file.parents)
        for step in ("2", "4", "6", "8")
    }
    assert done["config"] == "gpt, 1 layers, 2 heads, 16 wide, block 16, text"
    assert json.loads(single.stdout)["name"] == "nested"


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def link(target: str):
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE = {
    "huge": ("run.json", lambda path: sparse(path, 1 << 40), "run.json has more than 64 MiB"),
    "deep": ("run.json", lambda path: path.write_text("[" * 100_000), "run.json is nested too deeply"),
    "list": ("run.json", lambda path: path.write_text("[1]"), "list indices"),
    "lacking": ("run.json", lambda path: path.write_text("{}"), "run.json has no 'total_steps'"),
    "bytes": ("run.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
    "infinite": ("run.json", lambda path: edit_json(path, total_steps=float("inf")), "cannot convert float infinity"),
    "absurd": ("run.json", lambda path: edit_json(path, tokens_per_step=10**300), "negative or above 2⁶³"),
    "pipe": ("run.json", pipe, "run.json is not a file"),
    "device": ("run.json", link("/dev/zero"), "run.json is not a file"),
    "loop": ("run.json", link("run.json"), "Too many levels"),
    "other": ("run.json", link("/etc/passwd"), "Expecting value"),
    "tokenizer": ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
    "lock": (".lock", pipe, None),
    "lock link": (".lock", link("/etc/passwd"), None),
    "record pipe": (
        "checkpoints/6/digests/metadata",
        pipe,
        "checkpoints/6 is damaged (digests/metadata: metadata is not",
    ),
    "record": ("checkpoints/6/digests/metadata", lambda path: path.write_text("{}"), "checkpoints/6 is damaged"),
    "no record": ("checkpoints/6/digests/metadata", Path.unlink, "digests/metadata is missing"),
    "moved": ("checkpoints/6", lambda path: path.rename(path.with_name("7")), "it belongs to step 6"),
    "folder": ("checkpoints", lambda path: shutil.rmtree(path) or path.write_text(""), "Not a directory"),
    "words": (
        "checkpoints/6/digests/metadata",
        lambda path: edit_record(path.parents[3], 8, mean_loss="x"),
        "must be real",
    ),
    "aside": (
        "checkpoints",
        lambda path: [each.rename(f"{each}.damaged") for each in path.iterdir()],
        "no checkpoint has",
    ),
}


def test_nothing_in_a_folder_ends_or_disturbs_the_list(trained, runs, command):
    for name, (place, change, _) in HOSTILE.items():
        shutil.copytree(trained, runs / name)
        if place == ".lock":
            (runs / name / place).touch()
        change(runs / name / place)
    strange = ["\x1b[31mred", "line\nfeed", "\u202eright", os.fsdecode(b"\xff"), "宽" * 40, "long" * 40]
    for name in strange:
        shutil.copytree(trained, runs / name)
    (runs / "gone").symlink_to("nowhere")
    (runs / "circle").symlink_to(".")
    (runs / "linked").symlink_to(trained)
    result = command("runs", str(runs), "--json")
    assert result.returncode == 0, result.stderr
    found = {run["name"]: run for run in map(json.loads, result.stdout.splitlines())}
    assert found.keys() == {*HOSTILE, *strange, "gone", "linked"}
    for name, (_, _, problem) in HOSTILE.items():
        assert (found[name]["state"] == "damaged") == (problem is not None), found[name]
        assert not problem or problem in found[name]["reason"], found[name]
    assert found["gone"]["reason"] == "a link to nothing"
    assert {found[name]["state"] for name in [*strange, "linked"]} <= {"finished"}
    shown = command("runs", str(runs), text=False)
    assert shown.returncode == 0
    lines = shown.stdout.decode().splitlines()
    assert len(lines) == 1 + len(found) + sum(run["state"] == "damaged" for run in found.values())
    assert all(line.isprintable() and overview.cell_len(line) <= 80 for line in lines)
    assert "\\x1b[31mred" in shown.stdout.decode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_have_a_row(trained, runs):
    for name, part in (("a", "."), ("b", "checkpoints"), ("c", "run.json")):
        shutil.copytree(trained, runs / name)
        (runs / name / part).chmod(0)
    try:
        assert states(runs) == dict.fromkeys("abc", "damaged")
    finally:
        for name, part in (("a", "."), ("b", "checkpoints"), ("c", "run.json")):
            (runs / name / part).chmod(0o700)


def test_the_table_fits_any_terminal(trained, runs):
    shutil.copytree(trained, runs / "short")
    shutil.copytree(trained, runs / "a" / ("very" * 30) / "end")
    found = overview.find(str(runs))
    for width in (20, 40, 80, 120, 400):
        lines = list(overview.table(found, width))
        assert max(map(len, lines)) <= width
    assert lines[0].split() == list(overview.COLUMNS)
    assert "very" * 30 in lines[1]
    narrow = list(overview.table(found, 80))
    assert re.match("a/veryvery.*….*very/end +finished ", narrow[1])
    assert narrow[0].split()[:5] == ["name", "state", "step", "best", "last"]


def test_runs_are_sorted_by_any_column(trained, runs, command):
    for name, loss in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        shutil.copytree(trained, runs / name)
        edit_record(runs / name, 4, validation_loss=loss)
    (runs / "d").mkdir()
    (runs / "d" / "run.json").touch()

    def order(column: str) -> str:
        return "".join(run.name for run in overview.sort(overview.find(str(runs)), column))

    assert order("best") == "bcad"
    assert order("-best") == "acbd"
    assert order("-name") == "dcba"
    for column in overview.COLUMNS:
        assert sorted(order(column)) == ["a", "b", "c", "d"]
    refused = command("runs", "--sort=size_bytes", str(runs))
    assert refused.returncode == 2
    assert "--sort=size_bytes: choose one of name, state" in refused.stderr


def test_mistakes_are_one_sentence(trained, command, tmp_path):
    for flags, text in {
        (f"{tmp_path}/none",): "none: No such file or directory; name a folder with runs",
        (f"{tmp_path}", "more"): "Unexpected argument 'more'",
        (f"--diff={trained}",): "--diff needs two runs",
        (f"--diff={trained},none",): "--diff=none: there is no such run",
        ("--prune=none",): "--prune=none: there is no such run",
        (f"--prune={trained}", "--keep=3", "--yes"): "--keep=3: .* has no such checkpoint, only 2, 4, 6, 8",
        (f"--prune={trained}",): "add --yes",
    }.items():
        result = command("runs", *flags, stdin=subprocess.DEVNULL)
        assert result.returncode, flags
        assert result.stderr.count("\n") == 1, result.stderr
        assert re.search(text, result.stderr), result.stderr
    assert steps(trained) == {"2", "4", "6", "8"}


def test_differences_of_two_configs(trained, config, runs, command):
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1), seed=3)
    assert train.train(changed, Workdir(runs / "other")) == 0
    result = command("runs", str(runs), f"--diff=other,{trained}")
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [["seed", "3", "0"], ["train.steps", "1", "8"]]
    assert command("runs", f"--diff={trained},{trained}").stdout == "The configs are equal.\n"


@pytest.fixture
def pruned(trained, runs) -> Path:
    return shutil.copytree(trained, runs / "run")


def test_pruning_keeps_what_is_needed(pruned, runs, command, config):
    record_before = (pruned / "run.json").read_bytes()
    adapters = shutil.copytree(pruned, runs / "adapters")
    edit_json(adapters / "run.json", base={"path": str(pruned), "step": 2, "digest": 0})
    (pruned / "checkpoints" / "3.damaged").mkdir()
    kept = command("runs", str(runs), "--prune=run", "--keep=6,best", "--yes")
    assert kept.returncode == 0, kept.stderr
    assert "Nothing to delete" in kept.stdout
    assert steps(pruned) == {"2", "3.damaged", "4", "6", "8"}
    result = command("runs", str(runs), "--prune=run", "--yes")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"(\d) .*  (keep.*|delete)", result.stdout) == [
        ("2", "keep (base of adapters)"),
        ("4", "keep (best)"),
        ("6", "delete"),
        ("8", "keep (last)"),
    ]
    assert "Deleted 1 checkpoint (" in result.stdout
    assert steps(pruned) == {"2", "3.damaged", "4", "8"}
    assert (pruned / "run.json").read_bytes() == record_before
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    assert train.train(longer, Workdir(pruned)) == 0
    assert steps(pruned) == {"2", "3.damaged", "4", "8", "9"}


@pytest.mark.parametrize(("answer", "is_deleted"), [("n", False), ("", False), ("y", True)])
def test_pruning_asks_on_a_terminal(pruned, command, answer, is_deleted):
    controller, terminal = pty.openpty()
    os.write(controller, f"{answer}\n".encode())
    result = command("runs", f"--prune={pruned}", stdin=terminal)
    os.close(controller), os.close(terminal)
    assert re.search(r"Delete 2 checkpoints \([\d.]+kB\) of .*run\? \[y/N\] ", result.stdout)
    assert result.returncode == (not is_deleted)
    assert steps(pruned) == ({"4", "8"} if is_deleted else {"2", "4", "6", "8"})


def test_pruning_is_refused_while_a_process_trains(pruned, command):
    with Workdir(pruned).lock():
        result = command("runs", f"--prune={pruned}", "--yes")
    assert result.returncode == 1
    assert f"is in use by process {os.getpid()}" in result.stderr
    assert steps(pruned) == {"2", "4", "6", "8"}


@pytest.mark.parametrize("step", ["4", "8"], ids=["best", "last"])
def test_pruning_verifies_what_it_keeps(pruned, command, step):
    """The record is whole, and the arrays are not."""
    for file in (pruned / "checkpoints" / step / "params").rglob("d/*"):  # the data of the arrays
        file.write_bytes(bytes(file.stat().st_size))
    assert states(pruned.parent) == {"run": "finished"}
    result = command("runs", f"--prune={pruned}", "--yes")
    assert result.returncode == 1
    assert re.search(rf"checkpoints/{step} is damaged", result.stderr)
    assert steps(pruned) == {"2", "4", "6", "8"}


def test_a_damaged_run_is_not_pruned(pruned, command):
    (pruned / "checkpoints" / "2" / record.RECORD).unlink()
    result = command("runs", f"--prune={pruned}", "--yes")
    assert result.returncode == 1
    assert "is damaged: checkpoints/2 is damaged" in result.stderr
    assert steps(pruned) == {"2", "4", "6", "8"}


def test_the_list_refuses_no_run(pruned):
    """The list takes each lock for a moment to see whether it is held."""
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            overview.find(str(pruned))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(30):
            with Workdir(pruned).lock():
                pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.process
def test_a_bucket_is_listed_as_a_disk_is(trained, tmp_path):
    pytest.importorskip("s3fs")
    for name in ("a", "deep/b"):
        shutil.copytree(trained, tmp_path / "bucket" / "runs" / name)
    (tmp_path / "bucket" / "runs" / "a" / "checkpoints" / "4" / record.RECORD).write_text("{}")
    with ObjectStore(str(tmp_path / "bucket"), bucket="bucket") as store:
        listed = [sys.executable, "-m", "gpt.runs", "--json", "s3://bucket/runs"]
        result = subprocess.run(listed, cwd=ROOT, env=os.environ | store.environment, capture_output=True, text=True)
        missing = [sys.executable, "-m", "gpt.runs", "s3://other/runs"]
        failed = subprocess.run(missing, cwd=ROOT, env=os.environ | store.environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    a, b = map(json.loads, result.stdout.splitlines())
    (on_disk,) = overview.find(str(trained))
    local = {**dataclasses.asdict(on_disk), "name": "deep/b", "age_seconds": None}
    assert b | {"age_seconds": None} == json.loads(json.dumps(local))
    assert (a["name"], a["state"]) == ("a", "damaged")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: Cannot list s3://other/runs: ")


@pytest.mark.process
def test_pruning_in_a_bucket(trained, tmp_path):
    pytest.importorskip("s3fs")
    run = shutil.copytree(trained, tmp_path / "bucket" / "runs" / "run")
    # Tensorstore, which verifies the arrays, asks Amazon's servers only.
    code = "from gpt.checkpointing import pruning, reading; reading.Checkpoint.verify = print; "
    code += "pruning.prune('run', 's3://bucket/runs', [], True)"
    with ObjectStore(str(tmp_path / "bucket"), bucket="bucket") as store:
        environment = os.environ | store.environment
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "There is no lock in a bucket" in result.stdout
    assert "Deleted 2 checkpoints" in result.stdout
    assert steps(run) == {"4", "8"}
    assert states(run.parent) == {"run": "finished"}


def test_the_list_imports_no_jax(trained):
    code = (
        f"import runpy, sys; sys.argv = ['runs', {str(trained)!r}]; runpy.run_module('gpt.runs', run_name='__main__')"
    )
    check = (
        f"import atexit, sys; atexit.register(lambda: print(sorted(sys.modules.keys() & {{'jax', 'orbax'}}))); {code}"
    )
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n"), result


def test_the_suffix_of_unfinished_saves_is_that_of_orbax():
    assert record.UNFINISHED == atomicity.TMP_DIR_SUFFIX
