"""The training loop: exact resume, gradient accumulation, evaluation, checkpoints, signals."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt import losses, sharding, step, train
from gpt.checkpointing import checkpoints, loading
from gpt.checkpointing.workdir import Workdir
from gpt.data import pipeline, text
from gpt.data.base import IGNORED
from gpt.inference import generation
from gpt.models.gpt import GPTConfig, finish_logits
from gpt.runtime import progress, signals
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def checkpoint_arrays(workdir, step):
    """Returns the arrays of a checkpoint on the host, by name."""
    run = loading.load(workdir, str(step))
    checkpoints = workdir.checkpoints()
    state = train.restore(checkpoints, step, run.program)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def scalars(workdir, tag):
    events = EventAccumulator(str(workdir.path)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a function that returns the workdir of an uninterrupted run of a config, which it trains once."""
    made = {}

    def run(config):
        if config not in made:
            workdir = Workdir(tmp_path_factory.mktemp("whole"))
            assert train.train(config, workdir) == 0
            made[config] = workdir
        return made[config]

    return run


class StopAfter:
    """Sends a signal to this process after a step was reported."""

    def __init__(self, monkeypatch, step, number):
        original = progress.Steps.update

        def update(progress, done, *args, **kwargs):
            original(progress, done, *args, **kwargs)
            if done == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(progress.Steps, "update", update)


@pytest.mark.parametrize(
    ("stop_at", "number"), [(7, signal.SIGTERM), (8, signal.SIGHUP), (13, signal.SIGTERM), (7, signal.SIGINT)]
)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    tiny, whole, tmp_path, monkeypatch, capsys, stop_at, number
):
    """Compares parameters, optimizer state and every loss, with dropout."""
    workdir = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        StopAfter(patch, stop_at, number)
        assert train.train(tiny, workdir) == 128 + number
    last_line = capsys.readouterr().out.splitlines()[-1]
    # No step is started after the signal; the one after `stop_at` was running already.
    assert last_line.startswith(f"Stopped by {number.name}, saved after step {stop_at + 1} of 20;")
    assert train.train(tiny, workdir) == 0
    assert "resuming after step" in capsys.readouterr().out
    expected, found = checkpoint_arrays(whole(tiny), 20), checkpoint_arrays(workdir, 20)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate", "validation/loss"):
        assert scalars(workdir, tag) == scalars(whole(tiny), tag)


@pytest.mark.parametrize("moment", ["before", "within", "in the sample"])
def test_a_signal_is_not_kept_waiting_by_an_evaluation(tiny, tmp_path, monkeypatch, capsys, moment):
    """A scheduler grants 30 s, and an evaluation may take minutes. A step is saved with its loss if that is known."""
    calls = []

    def interrupt(check):
        calls.append(moment)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        check()

    evaluate, continuations, report = train.evaluate, generation.continuations, train.Training._report

    def evaluation(program, params, source, batch_size, check):
        assert moment != "before"
        return evaluate(
            program, params, source, batch_size, (lambda: interrupt(check)) if moment == "within" else check
        )

    def samples(*args, check, **kwargs):
        assert moment == "in the sample"
        return continuations(*args, check=lambda: interrupt(check), **kwargs)

    def report_and_interrupt(training, step, measured):
        report(training, step, measured)
        if moment == "before" and step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluation)
        patch.setattr(generation, "continuations", samples)
        patch.setattr(train.Training, "_report", report_and_interrupt)
        assert train.train(tiny, Workdir(tmp_path)) == 128 + signal.SIGTERM
    assert len(calls) == (0 if moment == "before" else 3)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("Stopped by SIGTERM, saved after step 10 of 20;")
    assert ("validation loss" in out) == (moment == "in the sample")
    best = Workdir(tmp_path).checkpoints().best()
    assert (best and best[0]) == (10 if moment == "in the sample" else None)
    assert train.train(tiny, Workdir(tmp_path)) == 0
    assert "resuming after step 10" in capsys.readouterr().out


def test_a_step_is_saved_before_its_evaluation_which_a_resume_makes_up_for(tiny, whole, tmp_path, monkeypatch, capsys):
    """A scheduler kills the process in the middle of the last evaluation."""
    workdir, events, save, evaluate = Workdir(tmp_path), [], checkpoints.Checkpoints.save, train.evaluate

    def saving(checkpoints, step, *args):
        events.append(("save", step))
        save(checkpoints, step, *args)

    def evaluating(*args):
        events.append(("evaluate", events[-1][1]))
        if events[-1][1] == 20:
            raise signals.Stopped(signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", saving)
        patch.setattr(train, "evaluate", evaluating)
        train.train(tiny, workdir)
    assert events == [("save", 5), ("save", 10), ("evaluate", 10), ("save", 15), ("save", 20), ("evaluate", 20)]
    assert workdir.checkpoints()[20].record.validation_loss is None
    capsys.readouterr()
    assert train.train(tiny, workdir) == 0
    assert "step 20/20  validation loss" in capsys.readouterr().out
    for number in (10, 20):
        loss = whole(tiny).checkpoints()[number].record.validation_loss
        assert workdir.checkpoints()[number].record.validation_loss == loss is not None
    assert train.train(tiny, workdir) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_a_second_signal_does_not_disturb_the_save(tiny, tmp_path, monkeypatch, capsys):
    """A scheduler sends a second SIGTERM, and systemd then sends SIGHUP."""
    close = checkpoints.Checkpoints.close

    def disturbed(checkpoints):
        for number in (signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        close(checkpoints)

    StopAfter(monkeypatch, 7, signal.SIGTERM)
    monkeypatch.setattr(checkpoints.Checkpoints, "close", disturbed)
    assert train.train(tiny, Workdir(tmp_path)) == 128 + signal.SIGTERM
    assert Workdir(tmp_path).checkpoints().last() == 8


def test_resuming_on_another_mesh_gives_the_same_losses(tiny, whole, tmp_path, monkeypatch):
    """Restored parameters are equal to the bit, losses to rounding."""
    workdir = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        StopAfter(patch, 9, signal.SIGTERM)
        train.train(tiny, workdir)
    last = workdir.checkpoints().last()
    before = checkpoint_arrays(workdir, last)
    other = change(tiny, "mesh", rules="fsdp_tp", data=2, fsdp=2, model=2)
    program = step.build(other, workdir.read().tokenizer.vocab_size, sharding.make_layout(other.mesh), 20)
    checkpoints = workdir.checkpoints()
    after = train.restore(checkpoints, last, program)
    for (path, x), (name, y) in zip(jax.tree_util.tree_leaves_with_path(after), before.items(), strict=True):
        assert jax.tree_util.keystr(path) == name
        np.testing.assert_array_equal(np.asarray(x), y)
    assert train.train(other, workdir) == 0
    expected, found = scalars(whole(tiny), "train/loss"), scalars(workdir, "train/loss")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_resuming_on_meshes_that_do_not_divide_the_width(tiny, tmp_path):
    """Parameters that are sharded over other axes than the rules name are restored on another such mesh to the bit."""
    config = change(change(tiny, "model", num_heads=6, embed_dim=36), "mesh", rules="fsdp")
    workdir = Workdir(tmp_path)
    train.train(change(config, "train", steps=5), workdir)
    other = change(config, "mesh", rules="sp", fsdp=4, sequence=2)
    program = step.build(other, workdir.read().tokenizer.vocab_size, sharding.make_layout(other.mesh), 5)
    after = train.restore(workdir.checkpoints(), 5, program)
    for x, y in zip(jax.tree.leaves(after), checkpoint_arrays(workdir, 5).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize("scan_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_may_change_to_scanned_layers_and_back(tiny, tmp_path, scan_first):
    """Both layouts give the same losses without dropout, whose masks differ."""
    config = change(tiny, "model", embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0, num_layers=3)
    workdirs = [Workdir(tmp_path / name) for name in ("same", "changed")]
    for workdir in workdirs:
        train.train(change(change(config, "train", steps=5), "model", scan_layers=scan_first), workdir)
    before = checkpoint_arrays(workdirs[0], 5)
    train.train(change(config, "model", scan_layers=scan_first), workdirs[0])
    train.train(change(config, "model", scan_layers=not scan_first), workdirs[1])
    expected, found = (list(scalars(workdir, "train/loss").values()) for workdir in workdirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The checkpoint from before the change is restored in the new layout with the same values.
    after = checkpoint_arrays(workdirs[1], 5)
    unrolled, scanned = (after, before) if scan_first else (before, after)
    for layer in range(3):
        for where in (".params", ".opt_state[1].mu", ".opt_state[1].nu"):
            kernel = "['mlp']['up']['kernel']"
            stacked = scanned[f"{where}['blocks']{kernel}"]
            np.testing.assert_array_equal(stacked[layer], unrolled[f"{where}['block_{layer}']{kernel}"])


def test_finished_run_has_nothing_to_do_and_resumes_with_more_steps(tiny, tmp_path, capsys):
    workdir = Workdir(tmp_path)
    train.train(change(tiny, "train", steps=5), workdir)
    assert train.train(change(tiny, "train", steps=5), workdir) == 0
    assert "Nothing to do: 5 of 5 steps are done" in capsys.readouterr().out
    assert train.train(change(tiny, "train", steps=8, log_every=2), workdir) == 0
    out = capsys.readouterr().out
    assert "changed: train.steps 5 → 8" in out
    assert "resuming after step 5" in out
    assert workdir.checkpoints().last() == 8


def test_another_config_is_refused_with_the_differences(tiny, tmp_path, play):
    workdir = Workdir(tmp_path / "run")
    train.train(change(tiny, "train", steps=2), workdir)
    record = (workdir.path / "run.json").read_text()
    other = change(change(tiny, "train", steps=4), "optimizer", learning_rate=1e-4)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate 0\.0006 → 0\.0001.*--allow_config_change") as error:
        train.train(other, workdir)
    assert "train.steps" not in str(error.value)  # harmless
    assert (workdir.path / "run.json").read_text() == record
    assert train.train(other, workdir, allow_config_change=True) == 0

    longer_play = tmp_path / "longer.txt"
    longer_play.write_text(play.read_text() + "ROMEO")
    with pytest.raises(UserError, match="fingerprint of the data"):
        train.train(change(other, "data", path=str(longer_play)), workdir)


def test_a_run_that_never_saved_can_start_anew(tiny, tmp_path):
    broken = change(change(tiny, "optimizer", learning_rate=1e30, clip_norm=0.0), "train", checkpoint_every=20)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        train.train(change(broken, "train", eval_every=0), Workdir(tmp_path))
    assert train.train(change(tiny, "train", steps=2), Workdir(tmp_path)) == 0
    assert Workdir(tmp_path).read().config.optimizer.learning_rate == 6e-4


def test_best_and_newest_checkpoints_are_kept(tiny, tmp_path, monkeypatch):
    """The validation loss is lowest at step 4, and only that checkpoint and the newest are kept."""
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: real(*args) | {"loss": next(losses)})
    workdir = Workdir(tmp_path)
    train.train(change(tiny, "train", steps=10, eval_every=2, checkpoint_every=3, keep_checkpoints=1), workdir)
    checkpoints = workdir.checkpoints()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 10]
    assert checkpoints.best() == (4, 2.0)
    assert checkpoints.find("best") == 4
    assert checkpoints.find("last") == 10
    assert checkpoints.find("10") == 10
    with pytest.raises(UserError, match="best, last or one of 4, 10"):
        checkpoints.find("5")


def test_nan_loss_stops_and_names_the_step(tiny, tmp_path):
    """The learning rate is absurd; the previous checkpoint does not change."""
    workdir = Workdir(tmp_path)
    train.train(change(tiny, "train", steps=5), workdir)
    before = checkpoint_arrays(workdir, 5)
    broken = change(change(tiny, "optimizer", learning_rate=1e30, clip_norm=0.0), "train", checkpoint_every=1)
    with pytest.raises(UserError, match=r"^Step (6|7|8) gave loss .*checkpoint of step \d+ is kept"):
        train.train(broken, workdir, allow_config_change=True)
    last = workdir.checkpoints().last()
    assert all(np.isfinite(array).all() for array in checkpoint_arrays(workdir, last).values())
    after = checkpoint_arrays(workdir, 5)
    assert all((before[name] == after[name]).all() for name in before)


def gradients(config, layout):
    """Returns metrics and parameters after one step of plain gradient descent, which show the gradient."""
    corpus = text.load(config.data, config.tokenizer, config.model.block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.optimizer, "make_optimizer", lambda *_: optax.sgd(lambda _: 1.0))
        program = step.build(config, corpus.tokenizer.vocab_size, layout, 1)
        source = text.TrainingWindows(corpus.train, config.model.block_size, 0)
        rows = range(16)
        batch = next(pipeline.to_devices(pipeline.training_batches(source, 16, 0, rows), layout, 16))
        # Targets that do not count, unevenly: a mean of means would be wrong.
        targets = np.array(batch["targets"])
        targets[:5, 3:] = IGNORED
        batch["targets"] = jax.device_put(targets, batch["targets"].sharding)
        with layout.use():
            state, measured = program.train_step(program.init(), batch)
    return measured, state.params


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradient_equals_that_of_the_big_batch(tiny, parts):
    config = change(tiny, "model", embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    layout = sharding.make_layout(MeshConfig(), jax.devices()[:2])
    expected, expected_params = gradients(config, layout)
    measured, params = gradients(change(config, "train", micro_batches=parts), layout)
    for name in expected:
        np.testing.assert_allclose(measured[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_z_loss_changes_the_gradient_and_not_the_reported_loss(tiny, monkeypatch):
    config = change(tiny, "model", embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    layout = sharding.make_layout(MeshConfig(), jax.devices()[:2])
    plain, plain_params = gradients(config, layout)
    for parts in (1, 4):
        measured, params = gradients(change(config, "train", z_loss=0.3, micro_batches=parts), layout)
        assert float(measured["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)

    def with_penalty(model, chunks, z_loss, x_BxTxD, head_VxD, targets):
        logits = finish_logits(model, x_BxTxD @ head_VxD.T)
        penalty = 0.3 * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(step.token_losses(logits, targets) + jnp.where(targets != IGNORED, penalty, 0))

    monkeypatch.setattr(step, "fused_loss", with_penalty)
    _, expected = gradients(config, layout)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    effects = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, plain_params)
    assert max(jax.tree.leaves(effects)) > 1e-3


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig("sp", 2, 1, 2, 2), MeshConfig("fsdp_tp", 1, 4, 1, 2)], ids=lambda mesh: mesh.rules
)
def test_the_fused_loss_and_its_gradients_are_those_of_the_logits(mesh, chunks):
    model = GPTConfig(block_size=16, vocab_multiple=16, logit_softcap=3.0).resolve(27, "cpu", 2)
    rng = np.random.default_rng(0)
    x, head = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16, 24), (32, 24)))
    targets = rng.integers(-1, 27, (8, 16)).astype(np.int32)

    def from_logits(x, head):
        logits = finish_logits(model, x @ head.T)
        squares = jnp.where(targets != IGNORED, jax.nn.logsumexp(logits, axis=-1) ** 2, 0).sum()
        return step.token_losses(logits, targets).sum() + 0.1 * (squares - jax.lax.stop_gradient(squares))

    expected = jax.value_and_grad(from_logits, (0, 1))(x, head)
    with sharding.make_layout(mesh).use():
        fused = functools.partial(losses.fused_loss, model, chunks, 0.1)
        found = jax.jit(jax.value_and_grad(lambda x, head: 2 * fused(x, head, targets), (0, 1)))(x, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-5), found, expected)


def test_evaluation_with_a_stride_gives_each_target_its_context(tiny):
    """Compares the losses with the logits of each target's own context."""
    corpus = text.load(tiny.data, tiny.tokenizer, 16)
    tokens, stride = np.asarray(corpus.validation[:60], np.int32), 5
    program = step.build(tiny, corpus.tokenizer.vocab_size, sharding.make_layout(MeshConfig()), 1)
    with program.layout.use():
        params = jax.tree.map(lambda x: x * 8, program.init().params)
    contexts, lengths = np.zeros((59, 16), np.int32), []
    for target in range(1, 60):
        start = max(0, -(-(target - 16) // stride) * stride)  # start of the first window that contains the target
        lengths.append(target - start)
        contexts[target - 1, : target - start] = tokens[start:target]
    logits = program.model.apply({"params": jax.tree.map(np.asarray, params)}, contexts)
    logits = logits[np.arange(59), np.array(lengths) - 1]
    losses = jax.nn.logsumexp(logits, axis=-1) - logits[np.arange(59), tokens[1:]]
    result = step.evaluate(program, params, text.EvaluationWindows(tokens, 16, stride=stride), 16)
    assert result["targets"] == 59
    assert result["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_evaluation_is_the_exact_mean_over_tokens(tiny):
    """Compares the loss with a loop over single windows, for batch sizes that do not divide the split."""
    corpus = text.load(tiny.data, tiny.tokenizer, 16)
    validation = corpus.validation[:1003]
    program = step.build(tiny, corpus.tokenizer.vocab_size, sharding.make_layout(MeshConfig()), 1)
    with program.layout.use():
        params = program.init().params
    params = jax.tree.map(lambda x: x * 8, params)  # far from uniform
    total = 0.0
    local = jax.tree.map(np.asarray, params)
    for start in range(0, 1002, 16):
        window = np.asarray(validation[start : start + 17], np.int32)
        logits = np.asarray(program.model.apply({"params": local}, jnp.asarray(window[None, :-1])), np.float64)[0]
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        total += (log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum()
    source = text.EvaluationWindows(validation, 16)
    for batch_size in (8, 24, 40, 80):
        result = step.evaluate(program, params, source, batch_size)
        assert result["targets"] == 1002
        assert result["loss"] == pytest.approx(total / 1002, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 7}, 7), ({"epochs": 1.5}, 6), ({"tokens": 2048.0}, 8), ({"tokens": 2049.0}, 9)]
)
def test_length_in_steps_epochs_or_tokens(tiny, length, steps):
    config = change(tiny, "train", **({"steps": 0} | length))
    assert config.train.total_steps(length=16, examples_per_epoch=64) == steps


def test_what_tensorboard_shows(tiny, whole):
    workdir = whole(tiny)
    events = EventAccumulator(str(workdir.path)).Reload()
    for tag in ("loss", "gradient_norm", "parameter_norm", "learning_rate"):
        assert list(scalars(workdir, f"train/{tag}")) == list(range(1, 21))
    tokens = scalars(workdir, "progress/tokens")
    assert tokens[20] == 20 * 16 * 16
    assert all(value > 0 for value in scalars(workdir, "progress/tokens_per_second").values())
    assert {"config", "sample"} <= set(events.Tags()["tensors"])
    shown = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert json.loads(shown.removeprefix("```json\n").removesuffix("\n```")) == dataclasses.asdict(tiny)
    histogram = events.Histograms("validation/logits")[0].histogram_value
    assert histogram.num == 16 * workdir.read().tokenizer.vocab_size
    assert math.isfinite(histogram.min)


@pytest.fixture
def profiled(tmp_path, play, command):
    """Trains eight steps with `--profile` in a new process, because JAX's profiler crashes if libtpu is loaded."""

    def run() -> subprocess.CompletedProcess:
        # Without JAX_PLATFORMS libtpu would make JAX look for a TPU, which gpt.main prevents.
        env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        flags = ("--config.model.num_layers=1", "--config.model.embed_dim=16", "--config.train.sample_tokens=0")
        config = ("--config=configs/char_tiny.py", f"--config.data.path={play}", "--config.train.steps=8", *flags)
        return command("main", *config, f"--workdir={tmp_path}/run", "--profile", env=env)

    return run


def test_profile_leaves_a_trace(tmp_path, profiled):
    result = profiled()
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.glob("run/plugins/profile/*/*.xplane.pb"))


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, profiled):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/plugins").touch()
    result = profiled()
    assert result.returncode == 0
    assert f"note: cannot write the trace to {tmp_path}/run: " in result.stdout


def test_loss_falls_and_the_model_learns_a_pattern(tiny, tmp_path):
    """The previous character determines the next one, so the loss has to approach 0."""
    pattern = tmp_path / "pattern.txt"
    pattern.write_text("abcdefgh" * 1000)
    config = change(change(tiny, "data", path=str(pattern)), "train", steps=150, log_every=50, eval_every=0)
    config = change(config, "optimizer", learning_rate=5e-3)
    workdir = Workdir(tmp_path / "run")
    train.train(config, workdir)
    assert scalars(workdir, "validation/loss")[150] < 0.05


def test_unknown_sample_prompt_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match=r"train\.sample_prompt: unknown characters 'ж'"):
        train.train(change(tiny, "train", sample_prompt="ж"), Workdir(tmp_path))


def test_slow_input_is_reported(tiny, tmp_path, monkeypatch, capsys):
    """The log shows the share of waiting every `log_every` steps, and TensorBoard shows it too."""
    real = text.TrainingWindows.example

    def slow(*args):
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(text.TrainingWindows, "example", slow)
    monkeypatch.setattr(sharding, "make_layout", lambda mesh, make=sharding.make_layout: make(mesh, jax.devices()[:1]))
    config = change(tiny, "model", num_layers=1, embed_dim=16)
    train.train(change(config, "train", steps=12, log_every=4, eval_every=0), Workdir(tmp_path))
    shares = [re.search(r"waiting for input (\d+)%", line) for line in capsys.readouterr().out.splitlines()]
    assert [int(share[1]) > 50 for share in shares if share][-1:] == [True]
    assert scalars(Workdir(tmp_path), "progress/input_wait")[12] > 0.5


@pytest.mark.parametrize("prefetch", [0, 4])
def test_input_that_fails_ends_the_run_with_its_error(tiny, tmp_path, monkeypatch, prefetch):
    """The thread that reads ahead raises the error, and no earlier checkpoint is lost."""
    real, count = text.TrainingWindows.example, itertools.count()

    def failing(*args):
        if next(count) == 12 * 16:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(text.TrainingWindows, "example", failing)
    config = change(change(tiny, "data", prefetch=prefetch), "train", eval_every=0)
    with pytest.raises(OSError, match="Input/output error"):
        train.train(config, Workdir(tmp_path))
    assert Workdir(tmp_path).checkpoints().last() in (5, 10)
