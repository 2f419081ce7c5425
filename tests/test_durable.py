"""Checkpoints survive a power cut, record their run and step, and hold the values of every device.

Damage to files, full disks and kills are in test_faults.py.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cluster import MODEL, Processes

from gpt import sharding, train
from gpt.checkpointing import integrity, loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.runtime import files
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

ROOT = Path(__file__).parent.parent


def change(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.fixture(scope="module")
def small(play) -> Config:
    config = train.Config(data=dataclasses.replace(Config().data, path=str(play)))
    config = change(config, "model", num_layers=1, num_heads=2, embed_dim=16, block_size=16)
    options = {"log_every": 1, "eval_every": 0, "checkpoint_every": 2, "sample_tokens": 0, "keep_checkpoints": 2}
    return change(config, "train", batch_size=8, steps=4, **options)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory) -> Path:
    """A workdir with the checkpoints 2 and 4, which has a validation loss."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert train.train(small, Workdir(path)) == 0
    return path


@pytest.fixture
def workdir(trained, tmp_path) -> Workdir:
    return Workdir(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """Returns the files in a folder by their path, without TensorBoard's events and the lock."""
    files = (file for file in Path(folder).rglob("*") if file.is_file() and not file.name.startswith((".lock", "ev")))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# Power cuts.


class Recorder:
    """Records which files are synced, renamed and deleted, and checks that this order survives a power cut."""

    def __init__(self, monkeypatch, root: Path):
        self.root, self.synced, self.renamed, self.deleted = root, {}, [], []
        for name in ("fsync", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, getattr(self, name)(getattr(os, name)))

    def fsync(self, real):
        def fsync(handle):
            path = os.readlink(f"/proc/self/fd/{handle}")
            real(handle)
            self.synced[path] = time.time_ns()

        return fsync

    def rename(self, real):
        def rename(old, new):
            real(old, new)
            self.renamed.append((str(old), str(new), time.time_ns()))
            if not str(new).endswith("-tmp"):
                self.check_content(Path(old), Path(new))

        return rename

    def unlink(self, real):
        def unlink(path, *, dir_fd=None):
            self.deleted.append(os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd else str(path))
            self.check_parents()
            real(path, dir_fd=dir_fd)

        return unlink

    rmdir = unlink

    def check_content(self, old: Path, new: Path) -> None:
        """Checks that everything that gets a valid name was synced after the last write to it."""
        inside = new.name == "params" or new.name == "optimizer"  # items of a checkpoint with a temporary name
        for path in [] if inside else [new, *new.rglob("*")]:
            before = str(old / path.relative_to(new))
            written = path.stat().st_mtime_ns
            assert self.synced.get(before, 0) >= written - 20_000_000, f"{before} was not synced"

    def check_parents(self) -> None:
        """Checks that the new names are on the disk when something old is deleted."""
        for _, new, when in self.renamed:
            if re.search(r"/checkpoints/\d+$|\.json$", new):
                assert self.synced.get(os.path.dirname(new), 0) > when, f"{new} was not synced by its folder"


def test_all_that_a_resume_needs_is_synced_before_it_counts_and_before_older_is_deleted(small, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch, tmp_path)
    path = tmp_path / "new" / "run"
    config = change(small, "train", steps=8, keep_checkpoints=1)
    assert train.train(config, Workdir(path)) == 0
    monkeypatch.undo()
    published = {Path(new).name for _, new, _ in recorder.renamed if not new.endswith("-tmp")}
    assert {"2", "4", "6", "8", "run.json", "tokenizer.json"} <= published
    assert any("/2.orbax-checkpoint-tmp/" in name for name in recorder.deleted)
    for folder in (tmp_path, tmp_path / "new", path):  # the names of the folders themselves
        assert str(folder) in recorder.synced
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["8"]


@pytest.mark.slow
def test_power_cuts_on_ext4(play, tmp_path):
    """Copies the image of a file system during training: what a power cut at that moment would leave on the disk."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    setup = f"truncate -s 96M {image} && mkfs.ext4 -q {image} && mount -o loop {image} {mounted}"
    if subprocess.run(setup, shell=True, capture_output=True, check=False).returncode:
        pytest.skip("needs root, loop devices and mkfs.ext4")
    flags = [*MODEL[:-1], f"--config.data.path={play}", f"--workdir={mounted}/run", "--config.train.steps=1000000"]
    flags += ["--config.train.checkpoint_every=20", "--config.train.eval_every=0", "--config.train.keep_checkpoints=2"]
    out, found = tmp_path / "out", []
    with out.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "gpt.main", *flags], cwd=ROOT, stdout=stream)
    try:
        while "step 100/" not in out.read_text():
            assert process.poll() is None, out.read_text()
            time.sleep(0.1)
        for i in range(10):
            time.sleep(0.37 * (i + 1))
            shutil.copy(image, tmp_path / f"cut{i}")
            names = os.listdir(mounted / "run" / "checkpoints")
            found.append(max(int(name) for name in names if name.isdecimal()))
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", mounted], check=True)
    for i, newest in enumerate(found):
        subprocess.run(["mount", "-o", "loop", tmp_path / f"cut{i}", mounted], check=True)
        try:
            run = loading.load(Workdir(mounted / "run"), "last")
            assert run.step >= newest - 20, "the newest whole checkpoint was lost"
        finally:
            subprocess.run(["umount", mounted], check=True)


# Devices that hold different values.


def put(config: MeshConfig):
    """Returns arrays of several shapes and dtypes, on the host and sharded over a mesh in several ways."""
    mesh = sharding.make_layout(config).mesh
    numbers = np.random.default_rng(0)
    specs = {"a": jax.P(), "b": jax.P("data"), "c": jax.P(None, "fsdp"), "d": jax.P(("data", "fsdp"), "model")}
    shapes = {"a": (), "b": (8,), "c": (3, 16), "d": (8, 16)}
    tree = {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tree |= {"e": np.arange(5, dtype=np.int32), "f": numbers.normal(size=(4, 8)).astype(jnp.bfloat16)}
    return tree, {
        name: jax.device_put(x, jax.NamedSharding(mesh, specs.get(name, jax.P()))) for name, x in tree.items()
    }


def flip(array: jax.Array, device: int) -> jax.Array:
    """Returns the array with one bit flipped in the copy of one device."""
    parts = [np.array(shard.data) for shard in array.addressable_shards]
    parts[device].reshape(-1).view(np.uint8)[0] ^= 1
    places = [shard.device for shard in array.addressable_shards]
    shards = [jax.device_put(part, place) for part, place in zip(parts, places, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(rules="fsdp_tp", data=2, fsdp=2, model=2)])
def test_digests_do_not_depend_on_the_sharding_and_find_each_replica_that_differs(config):
    tree, on_devices = put(config)
    found = integrity.digests(on_devices)
    assert found == {name: integrity.on_host(array) for name, array in tree.items()}
    assert len(set(found.values())) == len(found)
    part = tree["d"][2:5, 3:7]
    rest = [
        ((0, 0), tree["d"][:2]),
        ((2, 0), tree["d"][2:5, :3]),
        ((2, 7), tree["d"][2:5, 7:]),
        ((5, 0), tree["d"][5:]),
    ]
    pieces = [((2, 3), part), *rest]
    assert found["d"] == sum(integrity.on_host(piece, origin, (8, 16)) for origin, piece in pieces) % 2**32
    for name in tree:
        changed = on_devices | {name: flip(on_devices[name], 5)}
        replicas = len(on_devices[name].addressable_shards) // len(
            {str(s.index) for s in on_devices[name].addressable_shards}
        )
        if replicas == 1:
            assert integrity.digests(changed)[name] != found[name]
            continue
        with pytest.raises(integrity.ReplicasDiffer, match=f"^{name} differs .*cpu:5 ") as error:
            integrity.digests(changed)
        assert ("between" in str(error.value)) == (replicas == 2)


def test_a_run_whose_replicas_differ_stops_and_keeps_the_checkpoint_before(small, tmp_path, monkeypatch):
    save = train.Training._save

    def flip_and_save(self, loss=None):
        if self.step == 4:
            flipped = jax.tree.map(lambda x: x, self.state.params)
            flipped["block_0"]["mlp"]["up"]["kernel"] = flip(flipped["block_0"]["mlp"]["up"]["kernel"], 3)
            self.state = self.state.replace(params=flipped)
        save(self, loss)

    monkeypatch.setattr(train.Training, "_save", flip_and_save)
    sentence = r"Step 4 was not saved.*params/blocks/mlp/up/kernel differs on cpu:3 .*the checkpoint of step 2 is kept"
    with pytest.raises(UserError, match=sentence):
        train.train(small, Workdir(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


DRIFTS = """
    import jax, numpy as np
    from gpt import main, train
    from gpt.runtime import cli
    from test_durable import flip
    save = train.Training._save
    def flip_and_save(self, loss=None):
        if jax.process_index() == 1 and self.step == 4:
            params = jax.tree.map(lambda x: x, self.state.params)
            params["final_norm"]["scale"] = flip(params["final_norm"]["scale"], 0)
            self.state = self.state.replace(params=params)
        save(self, loss)
    train.Training._save = flip_and_save
    if __name__ == "__main__":
        cli.run(main.main)
"""


def test_a_replica_of_another_process_is_compared_too(play, tmp_path, monkeypatch):
    (tmp_path / "drifts.py").write_text(textwrap.dedent(DRIFTS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")]))
    flags = (*MODEL[:-1], f"--config.data.path={play}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=4")
    ended = Processes(2, "drifts", *flags, "--config.train.checkpoint_every=2", devices=1).wait()
    assert ended.codes == [1, 1], ended.err
    assert re.search(r"Step 4 was not saved.*final_norm/scale differs between .*process 0.*process 1", ended.err[0])
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]


def test_what_was_written_is_read_back_before_it_counts(small, tmp_path, monkeypatch, capsys):
    """If wrong values reach the disk, the save fails and the previous checkpoint is not deleted."""
    publish, wrong = files.publish, []

    def publish_wrong(partial, final):
        if final.name == "4":
            file = max((Path(partial) / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            wrong.append(file)
        publish(partial, final)

    monkeypatch.setattr(files, "publish", publish_wrong)
    with pytest.raises(UserError, match=r"Cannot save .*/4: .*the checkpoint of step 2 is kept"):
        train.train(change(small, "train", keep_checkpoints=1), Workdir(tmp_path))
    assert wrong
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4.damaged"]
    monkeypatch.undo()
    assert train.train(small, Workdir(tmp_path)) == 0
    assert "resuming after step 2" in capsys.readouterr().out


# The run and the step of a checkpoint.


def test_a_checkpoint_without_its_digests_is_damaged(small, workdir, capsys):
    shutil.rmtree(workdir.path / "checkpoints" / "4" / "digests")
    with pytest.raises(UserError, match=r"4 is damaged \(digests/metadata is missing\)"):
        loading.load(workdir, "last")
    assert train.train(small, workdir) == 0
    assert "resuming after step 2" in capsys.readouterr().out


def test_a_checkpoint_under_another_step_is_damaged(small, workdir, capsys):
    (workdir.path / "checkpoints" / "4").rename(workdir.path / "checkpoints" / "3")
    assert train.train(small, workdir) == 0
    out = capsys.readouterr().out
    assert "3 is damaged (digests/metadata: it belongs to step 4)" in out
    assert "resuming after step 2" in out


def test_a_checkpoint_of_another_run_is_refused(small, workdir, tmp_path):
    other = Workdir(tmp_path / "other")
    assert train.train(change(small, "train", steps=2), other) == 0
    assert other.read().id != workdir.read().id
    shutil.rmtree(workdir.path / "checkpoints")
    shutil.copytree(other.path / "checkpoints", workdir.path / "checkpoints")
    before = content(workdir.path)
    with pytest.raises(UserError, match=r"none was changed: .*2 is damaged .*belongs to another run"):
        train.train(small, workdir)
    assert content(workdir.path) == before


@pytest.mark.parametrize("name", ["{}.bak", "0{}", "step_{}", "{}.damaged"])
def test_checkpoints_under_other_names_are_not_the_same_as_none(small, workdir, name):
    for step in ("2", "4"):
        (workdir.path / "checkpoints" / step).rename(workdir.path / "checkpoints" / name.format(step))
    before = content(workdir.path)
    with pytest.raises(UserError, match=f"has no checkpoint with a valid name, only {re.escape(name.format('2'))}"):
        train.train(small, workdir)
    assert content(workdir.path) == before


def edit_environment(workdir: Workdir, **values: str) -> None:
    record = json.loads((workdir.path / "run.json").read_text())
    record["environment"].update(values)
    (workdir.path / "run.json").write_text(json.dumps(record))


def test_another_order_of_examples_is_refused(small, workdir):
    """A different version of grain may change the order."""
    edit_environment(workdir, **{"order of examples": "0" * 16, "grain": "0.2.12"})
    with pytest.raises(UserError, match=r"in a different order \(grain 0\.2\.12 → .*--allow_config_change"):
        train.train(small, workdir)
    assert train.train(small, workdir, allow_config_change=True) == 0
    assert workdir.read().environment["grain"] != "0.2.12"


def test_other_devices_and_versions_are_reported(small, workdir, capsys):
    devices = workdir.read().environment["devices"]
    assert re.match(r"8 × \S", devices)
    edit_environment(workdir, devices="1 × abacus", jax="0.1")
    assert train.train(small, workdir) == 0
    out = capsys.readouterr().out
    assert f"changed: devices '1 × abacus' → {devices!r}\n" in out
    assert "changed: jax '0.1' → " in out
    assert "to rounding, not to the bit" in out
    assert train.train(small, workdir) == 0  # recorded, and reported once
    assert "changed:" not in capsys.readouterr().out


# What is recorded, and when.


def test_a_change_that_cannot_work_is_not_advised_and_changes_no_file(small, workdir):
    wider, slower = change(small, "model", num_layers=2), change(small, "optimizer", learning_rate=1e-5)
    before = content(workdir.path)
    with pytest.raises(UserError, match=r"model\.num_layers 1 → 2.*does not fit the config") as error:
        train.train(wider, workdir)
    assert "--allow_config_change" not in str(error.value)
    with pytest.raises(UserError, match="does not fit the config"):
        train.train(wider, workdir, allow_config_change=True)
    with pytest.raises(UserError, match=r"learning_rate.*--allow_config_change"):
        train.train(slower, workdir)
    assert content(workdir.path) == before
    assert train.train(small, workdir) == 0
    assert train.train(slower, workdir, allow_config_change=True) == 0
    assert workdir.read().config.optimizer.learning_rate == 1e-5


def test_the_best_loss_on_other_data_does_not_count(small, workdir, tmp_path, play, capsys):
    """After a change to a harder text, only losses on that text compete, in the run and when it is loaded."""
    assert workdir.checkpoints().best()[0] == 4
    other = tmp_path / "other.txt"
    other.write_text("".join(np.random.default_rng(0).permutation(list(play.read_text()))))
    moved = change(change(small, "data", path=str(other)), "train", steps=6)
    with pytest.raises(UserError, match="fingerprint of the data"):
        train.train(moved, workdir)
    assert workdir.checkpoints().best()[0] == 4
    assert train.train(moved, workdir, allow_config_change=True) == 0
    step, loss = workdir.checkpoints().best()
    assert step == 6
    assert f"best validation loss {loss:.4f}" in capsys.readouterr().out
    assert loading.load(workdir, "best").step == 6


def test_a_start_that_fails_leaves_no_folder(small, tmp_path):
    missing = change(small, "data", path=str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match=r"missing\.txt"):
        train.train(missing, Workdir(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"missing\.txt"):
        train.train(missing, Workdir(tmp_path / "there"))
    assert not list((tmp_path / "there").iterdir())


# Paths, and links out of a workdir.


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "what?", "back\\slash", "x://y", "bell\a", "caf\udce9"])
def test_paths_that_would_be_misread_are_refused_before_anything_is_made(name, tmp_path):
    with pytest.raises(UserError, match="--workdir="):
        Workdir(f"{tmp_path}/{name}/run")


def test_letters_beyond_ascii_need_utf_8(tmp_path, monkeypatch):
    Workdir(tmp_path / "Läuf 100% #1 世界")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    Workdir(tmp_path / "plain")
    with pytest.raises(UserError, match="PYTHONUTF8=1"):
        Workdir(tmp_path / "Läuf")


@pytest.mark.parametrize("name", [".lock", "run.json.partial", "checkpoints", "checkpoints/6", "plugins", "any"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_nothing_in_a_workdir_leads_out_of_it(small, workdir, tmp_path, name, kind):
    victim, path = tmp_path / "victim", workdir.path / name
    victim.mkdir()
    (victim / "precious").write_text("precious")
    if name == "checkpoints":
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        os.symlink(victim if kind == "link" else tmp_path / "nothing", path)
    with pytest.raises(UserError, match=f"{re.escape(name)} is a (link|pipe)"):
        train.train(small, workdir)
    assert content(victim) == {"precious": b"precious"}
    assert not (tmp_path / "nothing").exists()


def test_a_lock_that_is_a_hard_link_is_not_written_to(small, workdir, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (workdir.path / ".lock").unlink()
    os.link(tmp_path / "precious", workdir.path / ".lock")
    with pytest.raises(UserError, match="hard link"):
        train.train(small, workdir)
    assert (tmp_path / "precious").read_text() == "precious"
