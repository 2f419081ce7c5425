"""Steps with a loss, gradient or parameters that are not finite, and spikes of the loss."""

import dataclasses
import math
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cluster import MODEL, Processes
from test_train import StopAfter, change, checkpoint_arrays, scalars

from gpt import reporting, sharding, step, train
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.data import pipeline, text
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError

POISON = -2  # a target that no text has, which marks the batches to be poisoned
REAL_LOSS, REAL_BATCHES, MAKE_LAYOUT = step.fused_loss, pipeline.training_batches, sharding.make_layout


@pytest.fixture
def small(play) -> Config:
    """Returns a run of 14 steps of a model of one layer, with dropout."""
    return Config(
        model=GPTConfig(num_layers=1, num_heads=2, embed_dim=16, block_size=16, vocab_multiple=8),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=dataclasses.replace(
            Config().train,
            batch_size=16,
            steps=14,
            log_every=1,
            eval_every=0,
            checkpoint_every=5,
            sample_tokens=0,
            keep_checkpoints=9,
        ),
    )


def damaged(kind):
    """Returns `step.fused_loss` with a loss or gradient that is not finite for batches with a `POISON` target."""

    def fused_loss(config, chunks, z_loss, x_BxTxD, head_VxD, targets_BxT):
        loss = REAL_LOSS(config, chunks, z_loss, x_BxTxD, head_VxD, targets_BxT)
        bad = (targets_BxT == POISON).any()
        if kind == "gradient":  # the loss is finite, but the derivative of a root at 0 is not
            return loss + jnp.sqrt(jnp.where(bad, 0 * x_BxTxD[0, 0, 0], 1))
        return loss * jnp.where(bad, 5.0 if kind == "spike" else float(kind), 1.0)

    return fused_loss


def poison(patch, config, numbers, kind="nan"):
    """Makes these batches of the run give a loss or gradient that is not finite, each time they come."""
    corpus = text.load(config.data, config.tokenizer, config.model.block_size)
    source = text.TrainingWindows(corpus.train, config.model.block_size, config.seed)
    clean = REAL_BATCHES(source, config.train.batch_size, config.seed, range(config.train.batch_size))
    every = [next(clean)["inputs"].tobytes() for _ in range(max(numbers) + 1)]
    marked = {every[number] for number in numbers}

    def training_batches(source, batch_size, seed, rows, *args):
        whole = REAL_BATCHES(source, batch_size, seed, range(batch_size), *args)
        for batch in whole:
            if batch["inputs"].tobytes() in marked:
                batch["targets"][3, 5] = POISON
            yield {name: array[np.asarray(rows)] for name, array in batch.items()}

    patch.setattr(pipeline, "training_batches", training_batches)
    patch.setattr(step, "fused_loss", damaged(kind))


def leave_out_by_hand(patch, numbers, kind="nan"):
    """Removes batches from the stream without the code under test; the program is that of `poison`."""

    def training_batches(source, batch_size, seed, rows, start, prefetch, skipped):
        assert start == 0
        assert skipped == ()
        return (batch for i, batch in enumerate(REAL_BATCHES(source, batch_size, seed, rows)) if i not in numbers)

    patch.setattr(pipeline, "training_batches", training_batches)
    patch.setattr(step, "fused_loss", damaged(kind))


def same_arrays(a, b, step):
    expected, found = checkpoint_arrays(a, step), checkpoint_arrays(b, step)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def shown_texts(workdir, tag):
    events = EventAccumulator(str(workdir.path)).Reload()
    if tag not in events.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


@pytest.fixture
def devices(monkeypatch):
    """Limits meshes to a number of devices, because fewer devices compile faster."""

    def limit(count):
        monkeypatch.setattr(sharding, "make_layout", lambda config: MAKE_LAYOUT(config, jax.devices()[:count]))

    limit(1)
    return limit


@pytest.fixture(autouse=True)
def _one_device(devices):
    pass


VARIANTS = {
    "nan": ("nan", {}, {}),
    "inf": ("inf", {}, {}),
    "gradient": ("gradient", {"micro_batches": 2}, {}),
    "zero1": ("nan", {}, {"zero1": True}),
    "sharded": ("nan", {}, {"rules": "fsdp_tp", "data": 2, "fsdp": 2, "model": 2}),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=SLOW if name in ("inf", "gradient", "sharded") else ()) for name in VARIANTS]
)
def test_a_skipped_update_is_one_left_out_by_hand(small, tmp_path, monkeypatch, capsys, devices, variant):
    kind, train_options, mesh_options = VARIANTS[variant]
    devices(8 if mesh_options else 1)
    config = change(change(small, "train", on_nonfinite="skip", **train_options), "mesh", **mesh_options)
    config = change(config, "optimizer", ema=0.9)  # an update that is left out does not count for the average either
    workdir = Workdir(tmp_path / "run")
    with monkeypatch.context() as patch:
        poison(patch, config, {6, 8}, kind)
        assert train.train(config, workdir) == 0
    out = capsys.readouterr().out
    assert re.search(r"Step 7 gave loss .*: its update is left out \(1 of at most 10\)\.", out)
    assert re.search(r"Step 9 gave loss .*: its update is left out \(2 of at most 10\)\.", out)
    assert scalars(workdir, "progress/skipped") == {i: 1.0 + (i >= 9) for i in range(7, 15)}
    assert shown_texts(workdir, "skipped").keys() == {7, 9}

    # By hand: the update of these steps is discarded.
    corpus = text.load(config.data, config.tokenizer, config.model.block_size)
    layout = sharding.make_layout(config.mesh)
    monkeypatch.setattr(step, "fused_loss", damaged(kind))
    program = step.build(config, corpus.tokenizer.vocab_size, layout, config.train.steps)
    source = text.TrainingWindows(corpus.train, config.model.block_size, config.seed)
    rows = range(config.train.batch_size)
    batches = pipeline.to_devices(pipeline.training_batches(source, 16, config.seed, rows), layout, 16)
    with layout.use():
        state = program.init()
        for i in range(14):
            batch = next(batches)
            if i in (6, 8):
                state = state.replace(step=state.step + 1)
            else:
                state, _ = program.train_step(state, batch)
    expected = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    found = checkpoint_arrays(workdir, 14)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    # The shown learning rate is the one that was used, which depends on the number of updates.
    rates = scalars(workdir, "train/learning_rate")
    assert rates[8] == rates[7]


@pytest.mark.parametrize(
    "variant",
    [
        "nan",
        pytest.param("gradient", marks=SLOW),
        pytest.param("zero1", marks=SLOW),
        pytest.param("sharded", marks=SLOW),
    ],
)
def test_a_run_rolled_back_is_one_that_never_saw_those_batches(small, tmp_path, monkeypatch, capsys, devices, variant):
    kind, train_options, mesh_options = VARIANTS[variant]
    devices(8 if mesh_options else 1)
    config = change(change(small, "train", on_nonfinite="rollback", **train_options), "mesh", **mesh_options)
    run, by_hand = Workdir(tmp_path / "run"), Workdir(tmp_path / "by_hand")
    compilations, compiling = [], reporting.Report.compiling
    with monkeypatch.context() as patch:
        patch.setattr(reporting.Report, "compiling", lambda report: compilations.append(1) or compiling(report))
        poison(patch, config, {2, 6, 7, 11}, kind)  # before the first checkpoint, two in a row, after another
        assert train.train(config, run) == 0
    out = capsys.readouterr().out
    assert re.search(r"Step 3 gave loss .*: back to step 0 and on without batch 2 \(1 of at most 10\)\.", out)
    assert re.search(r"Step 6 gave loss .*: back to step 5 and on without batch 6 \(2 of at most 10\)\.", out)
    assert re.search(r"Step 6 gave loss .*: back to step 5 and on without batch 7 \(3 of at most 10\)\.", out)
    assert re.search(r"Step 9 gave loss .*: back to step 5 and on without batch 11 \(4 of at most 10\)\.", out)
    assert len(compilations) == 1
    with monkeypatch.context() as patch:
        leave_out_by_hand(patch, {2, 6, 7, 11}, kind)
        assert train.train(config, by_hand) == 0
    same_arrays(by_hand, run, 14)
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate", "validation/loss"):
        assert scalars(run, tag) == scalars(by_hand, tag)
    assert all(map(math.isfinite, scalars(run, "train/loss").values()))
    assert scalars(run, "progress/skipped")[14] == 4
    assert set(shown_texts(run, "skipped")) == {3, 6, 9}
    assert run.read().skipped == (2, 6, 7, 11)


@pytest.mark.parametrize("stop_at", [pytest.param(3, marks=SLOW), 6, pytest.param(8, marks=SLOW)])
def test_rolled_back_stopped_and_resumed_is_the_same(small, tmp_path, monkeypatch, stop_at):
    """Stops before, between and after the batches that are left out."""
    config = change(small, "train", on_nonfinite="rollback")
    run, by_hand = Workdir(tmp_path / "run"), Workdir(tmp_path / "by_hand")
    with monkeypatch.context() as patch:
        poison(patch, config, {6, 11})
        with monkeypatch.context() as stopping:
            StopAfter(stopping, stop_at, signal.SIGTERM)
            assert train.train(config, run) == 128 + signal.SIGTERM
        assert train.train(config, run) == 0
    with monkeypatch.context() as patch:
        leave_out_by_hand(patch, {6, 11})
        assert train.train(config, by_hand) == 0
    same_arrays(by_hand, run, 14)
    assert scalars(run, "train/loss") == scalars(by_hand, "train/loss")


def test_killed_right_after_it_was_recorded(small, tmp_path, monkeypatch):
    """The process is killed between the record of a batch and the first step without it."""

    class Killed(BaseException):
        pass

    config = change(small, "train", on_nonfinite="rollback")
    run, by_hand = Workdir(tmp_path / "run"), Workdir(tmp_path / "by_hand")
    with monkeypatch.context() as patch:
        poison(patch, config, {6, 11})
        real = Workdir.record

        def record(workdir, run):
            real(workdir, run)
            if run.skipped:
                raise Killed

        with monkeypatch.context() as killing:
            killing.setattr(Workdir, "record", record)
            with pytest.raises(Killed):
                train.train(config, run)
        assert run.read().skipped == (6,)
        assert train.train(config, run) == 0
    with monkeypatch.context() as patch:
        leave_out_by_hand(patch, {6, 11})
        assert train.train(config, by_hand) == 0
    same_arrays(by_hand, run, 14)


def test_parameters_of_a_checkpoint_that_are_poisoned(small, tmp_path):
    """Leaving out batches does not help, and ends at `train.max_skipped`."""
    workdir = Workdir(tmp_path)
    train.train(change(small, "train", steps=4), workdir)
    layout = sharding.make_layout(small.mesh)
    program = step.build(small, workdir.read().tokenizer.vocab_size, layout, 14)
    checkpoints = workdir.checkpoints(keep=9)
    state = train.restore(checkpoints, 4, program)
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
    checkpoints.save(5, state.replace(params=params).items)
    checkpoints.close()
    for choice in ("skip", "rollback"):
        config = change(small, "train", on_nonfinite=choice, max_skipped=3)
        with pytest.raises(
            UserError,
            match=r"^Step \d+ gave loss nan.*; train\.max_skipped=3 were left out already; the checkpoint of ",
        ):
            train.train(config, workdir)
        assert workdir.checkpoints().last() == 5
    assert len(workdir.read().skipped) == 3


def test_an_update_that_makes_the_parameters_infinite_is_detected_at_once(small, tmp_path):
    """Loss and gradient of that step are finite, and the step must not be saved."""
    config = change(change(small, "optimizer", learning_rate=1e30, clip_norm=0.0), "train", checkpoint_every=1)
    with pytest.raises(UserError, match=r"^Step 1 gave loss \d.*parameter norm inf; there is no checkpoint yet"):
        train.train(config, Workdir(tmp_path))


def test_too_many_steps_stop_the_run(small, tmp_path, monkeypatch):
    for choice in ("skip", "rollback"):
        workdir = Workdir(tmp_path / choice)
        config = change(small, "train", on_nonfinite=choice, max_skipped=2)
        with monkeypatch.context() as patch:
            poison(patch, config, {6, 7, 8, 9})
            with pytest.raises(
                UserError, match=r"train\.max_skipped=2 were left out already.*a larger train\.max_skip"
            ):
                train.train(config, workdir)
            # The run resumes with a larger limit, which is a harmless change.
            assert train.train(change(config, "train", max_skipped=4), workdir) == 0
            assert scalars(workdir, "progress/skipped")[14] == 4


def test_a_spike_of_the_loss_is_rolled_back_or_stops(small, tmp_path, monkeypatch, capsys):
    """The checkpoint has the running mean, so a resumed run decides as an uninterrupted one."""
    config = change(small, "train", on_nonfinite="rollback", spike_factor=2.0)
    run, by_hand, stopped = (Workdir(tmp_path / name) for name in ("run", "by_hand", "stopped"))
    with monkeypatch.context() as patch:
        poison(patch, config, {5, 11}, "spike")
        with monkeypatch.context() as stopping:
            StopAfter(stopping, 3, signal.SIGTERM)  # batch 5 comes soon after the resume
            train.train(config, run)
        assert train.train(config, run) == 0
        out = capsys.readouterr().out
        assert re.search(
            r"Step 6 gave loss [\d.]+, more than train\.spike_factor=2\.0 × [\d.]+: back to step \d+ ", out
        )
        with pytest.raises(
            UserError, match=r"^Step 6 gave loss [\d.]+, more than .*; the checkpoint of step 5 is kept"
        ):
            train.train(change(config, "train", on_nonfinite="stop"), stopped)
    with monkeypatch.context() as patch:
        leave_out_by_hand(patch, {5, 11}, "spike")
        assert train.train(config, by_hand) == 0
    same_arrays(by_hand, run, 14)
    assert scalars(run, "train/loss") == scalars(by_hand, "train/loss")
    ends = [workdir.checkpoints()[14].record.mean_loss for workdir in (run, by_hand)]
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["skip", "rollback"])
def test_several_processes_decide_alike(play, tmp_path, choice):
    """Compares two processes of two devices with one of four devices, on the same mesh with zero1."""
    found = []
    for count in (2, 1):
        flags = (
            *MODEL,
            f"--config.data.path={play}",
            f"--workdir={tmp_path}/{count}",
            f"--config.train.on_nonfinite={choice}",
            "--config.train.batch_size=8",
            "--config.train.steps=8",
            "--config.train.checkpoint_every=2",
            "--config.mesh.zero1",
        )
        processes = Processes(count, "tests.poisoned", *flags, devices=4 // count).wait()
        assert processes.codes == [0] * count, processes.err
        reports = re.findall(r"Step (\d+) gave .*?: (.*)\.", processes.out[0])
        workdir = Workdir(tmp_path / str(count))
        found.append((reports, workdir.read().skipped, scalars(workdir, "train/loss")))
        assert all("gave" not in out for out in processes.out[1:])
    assert found[0][:2] == found[1][:2]
    assert len(found[0][0]) == 2
    assert found[0][1] == ((3, 6) if choice == "rollback" else ())
    np.testing.assert_allclose(list(found[0][2].values()), list(found[1][2].values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, r"train\.on_nonfinite='ignore' is not known; choose one of stop, skip, rollback"),
        ({"max_skipped": 0}, r"train\.max_skipped=0"),
        ({"spike_factor": 0.5}, r"train\.spike_factor=0\.5 has to be greater than 1"),
        ({"spike_factor": float("nan")}, r"train\.spike_factor=nan"),
        ({"spike_factor": 2.0, "on_nonfinite": "skip"}, r"train\.spike_factor needs train\.on_nonfinite=stop or"),
    ],
)
def test_invalid_settings_are_refused(small, options, message):
    with pytest.raises(UserError, match=message):
        change(small, "train", **options)
