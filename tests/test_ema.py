"""The moving average of the parameters: its values, resuming it, its use after the training, and LoRA."""

import signal

import jax
import numpy as np
import pytest
from test_train import StopAfter, change, checkpoint_arrays, scalars

from gpt import train
from gpt.checkpointing import loading
from gpt.checkpointing.stacking import stack_layers
from gpt.checkpointing.workdir import Workdir
from gpt.inference.model import TrainedModel
from gpt.runtime.errors import UserError
from gpt.sharding import path_name

RATE = 0.3


@pytest.fixture
def averaged(tiny):
    """Returns a run of six steps that keeps the checkpoint of every step."""
    options = {"steps": 6, "eval_every": 3, "checkpoint_every": 1, "keep_checkpoints": 6, "sample_tokens": 0}
    config = change(change(tiny, "optimizer", ema=RATE, learning_rate=3e-3), "model", num_heads=2, num_layers=1)
    return change(config, "train", **options)


def parts(workdir: Workdir, step: int) -> tuple[dict, dict]:
    """Returns the parameters after a step and their average, by name."""
    arrays = checkpoint_arrays(workdir, step)
    return tuple(
        {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
        for start in (".params", ".ema")
    )


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ({"zero1": True}, 1),
        pytest.param({"rules": "fsdp_tp", "data": 2, "fsdp": 2, "model": 2}, 2, marks=pytest.mark.slow),
    ],
    ids=["zero1", "sharded"],
)
def test_average_is_the_formula_and_resumes_to_the_bit(averaged, tmp_path, monkeypatch, mesh, micro_batches):
    config = change(change(averaged, "mesh", **mesh), "train", micro_batches=micro_batches)
    workdir, resumed = Workdir(tmp_path / "whole"), Workdir(tmp_path / "resumed")
    assert train.train(config, workdir) == 0
    average = None
    for step in range(1, 7):
        params, found = parts(workdir, step)
        assert params.keys() == found.keys() != set()
        rate = min(RATE, step / (9 + step))
        if average is not None:
            expected = {name: rate * average[name] + (1 - rate) * value for name, value in params.items()}
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
        average = found
    with monkeypatch.context() as patch:
        StopAfter(patch, 2, signal.SIGTERM)
        assert train.train(config, resumed) == 128 + signal.SIGTERM
    assert train.train(config, resumed) == 0
    for before, after in zip(parts(workdir, 6), parts(resumed, 6), strict=True):
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_average_is_the_model_and_the_raw_parameters_can_be_named(averaged, tmp_path, capsys):
    workdir = Workdir(tmp_path)
    assert train.train(averaged, workdir) == 0
    losses, raw = scalars(workdir, "validation/loss"), scalars(workdir, "validation/raw_loss")
    assert losses.keys() == raw.keys() == {3, 6}
    assert f"validation loss {losses[6]:.4f}  without averaging {raw[6]:.4f}" in capsys.readouterr().out
    best = min(losses, key=losses.get)
    assert workdir.checkpoints(run=workdir.read()).best() == (best, pytest.approx(losses[best], rel=1e-6))
    for checkpoint, loss in (("best", losses[best]), ("6", losses[6]), ("last,raw", raw[6])):
        model = TrainedModel(**vars(loading.load(workdir, checkpoint)))
        assert model.evaluate()["loss"] == pytest.approx(loss, rel=1e-6)
    params, average = parts(workdir, 6)
    shapes = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(stack_layers(model.params))
    }
    for checkpoint, values in (("6,raw", params), ("6", average)):  # as gpt.convert reads them
        read = {name: part for name, _, part in loading.Weights(workdir, checkpoint).restore_each(shapes)}
        np.testing.assert_array_equal(read["final_norm/scale"], values["['final_norm']['scale']"])
    with pytest.raises(UserError, match="--checkpoint=best,average: choose best, last or one of 1, 2"):
        loading.load(workdir, "best,average")


def test_adapters_have_an_average_of_their_own(averaged, tmp_path):
    """Adapters are averaged, not merged weights; they are based on the average of a run that has one."""
    base, workdir = Workdir(tmp_path / "base"), Workdir(tmp_path / "adapters")
    assert train.train(averaged, base) == 0
    config = change(change(averaged, "model", lora_rank=2), "train", init_from=str(base.path))
    assert train.train(config, workdir) == 0
    arrays = checkpoint_arrays(workdir, 6)
    assert {name.split("'")[-2] for name in arrays if name.startswith(".ema")} == {"a", "b"}
    model = TrainedModel(**vars(loading.load(workdir, "last")))
    assert model.evaluate()["loss"] == pytest.approx(scalars(workdir, "validation/loss")[6], rel=1e-5)
    assert workdir.read().base.digest == loading.Weights(base, "best").as_base().digest
    assert workdir.read().base.digest != loading.Weights(base, "best,raw").as_base().digest


def test_run_without_an_average_cannot_get_one(averaged, tmp_path):
    workdir = Workdir(tmp_path)
    config = change(averaged, "optimizer", ema=0.0)
    assert train.train(change(config, "train", steps=2), workdir) == 0
    with pytest.raises(
        UserError, match=r"has no moving average \(optimizer\.ema\); start a new run by train\.init_from"
    ):
        train.train(averaged, workdir, allow_config_change=True)
