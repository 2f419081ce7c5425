"""What the loggers show of a run: TensorBoard, Weights & Biases without a network, and MLflow without a server."""

import dataclasses
import importlib.util
import json
import signal
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gpt import sharding, statistics, train
from gpt.checkpointing.workdir import Workdir
from gpt.runtime import loggers
from gpt.runtime.errors import UserError
from gpt.runtime.loggers import Logger, Loggers, Session
from gpt.runtime.tensorboard import TensorBoard, read_scalars

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\2\0\1H\xaf\xa4q"
PNG += b"\0\0\0\0IEND\xaeB`\x82"


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def needs(library):
    return pytest.mark.skipif(not importlib.util.find_spec(library), reason=f"{library} is not installed")


def read_wandb(path) -> list:
    """Returns the records of a file in LevelDB's log format, after the 7 bytes of Weights & Biases' header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, position, content = path.read_bytes(), [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no record begins in the last bytes of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(content))
            content = b""
    return records


def history(records) -> dict[int, dict]:
    """Returns {step: {tag: value}} of the records of Weights & Biases."""
    found: dict[int, dict] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            found.setdefault(int(values.pop("_step")), {}).update(values)
    return found


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Takes API keys and settings of the user away."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    (tmp_path / "home").mkdir()


@needs("wandb")
def test_wandb_offline_is_read_back_from_an_interrupted_and_resumed_run(tiny, tmp_path, offline, monkeypatch, capfd):
    workdir, config = Workdir(tmp_path / "run"), change(tiny, "train", loggers="tensorboard,wandb")
    original = train.Training._report

    def stop(training, step, metrics):
        original(training, step, metrics)
        if step == 12 and not list(workdir.path.glob("checkpoints/20")):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_report", stop)
        assert train.train(config, workdir) == 128 + signal.SIGTERM
    assert train.train(config, workdir) == 0
    out, err = capfd.readouterr()
    assert out.count("note: Weights & Biases is offline (there is no API key: `wandb login`)") == 2
    assert "wandb:" not in out + err  # the library prints nothing
    first, second = sorted(
        (read_wandb(path) for path in workdir.path.glob("wandb/offline-run-*/*.wandb")), key=lambda r: min(history(r))
    )
    for records in (first, second):
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
        assert run.run_id == workdir.read().id
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["train"] == dataclasses.asdict(config.train)
    assert max(history(first)) == 13
    assert list(history(second)) == list(range(14, 21))
    merged = history(first) | history(second)
    for tag in ("train/loss", "validation/loss", "weights/gradient_norm/block_1/mlp/up/kernel"):
        shown = {step: values[tag] for step, values in merged.items() if tag in values}
        assert shown == pytest.approx(dict(zip(*read_scalars(workdir.path, [tag])[tag], strict=True)), rel=1e-6), tag
    assert merged[20]["weights/histogram/final_norm/scale/_type"] == "histogram"
    assert merged[20]["sample/_type"] == "html-file"
    exits = [record.exit.exit_code for part in (first, second) for record in part if record.HasField("exit")]
    assert exits == [1, 0]


@needs("mlflow")
def test_mlflow_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for start, lr in ((0, 0.5), (2, 0.25)):
        session = Session(tmp_path / "run", start, "abc", {"train": {"steps": 4}}, {"learning_rate": lr})
        logger = Loggers("mlflow", session)
        logger.begin()
        for step in (start + 1, start + 2):
            logger.scalars(step, {"train/loss": 1.0 / step, "sources/a|b/tokens": 7.0})
        logger.text(start, "sample", "To be")
        logger.image(start, "validation/samples", PNG)
        logger.histogram(start, "weights/histogram/x", np.ones(2), np.arange(3.0))
        logger.flush()
        logger.close(start == 2)
    import mlflow

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("gpt-spmd").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"learning_rate": "0.5"}  # the value of a parameter is final
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert run.data.metrics["sources/a_b/tokens"] == 7
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config", "sample", "images"}


def test_mlflow_without_an_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=name))
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        Loggers("mlflow", Session(tmp_path)).begin()


@pytest.mark.parametrize("spec", [None, types.SimpleNamespace(origin=None)])  # the latter is that of any folder `wandb`
def test_a_library_that_is_not_installed(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r'needs wandb: pip install "gpt-spmd\[wandb\]"'):
        loggers.require("wandb")


@pytest.mark.parametrize("names", ["tensorbord", "tensorboard, wandb", ","])
def test_an_unknown_logger(tiny, names):
    with pytest.raises(UserError, match=r"train.loggers=.* has to be empty or some of tensorboard,wandb,mlflow"):
        change(tiny, "train", loggers=names)


@pytest.mark.parametrize(("names", "enabled"), [("", True), ("tensorboard", False)])
def test_nothing_is_written_without_loggers_and_by_other_processes(tmp_path, names, enabled):
    none = Loggers(names, Session(tmp_path, config={"seed": 0}), enabled)
    none.begin()
    none.scalars(1, {"loss": 1.0})
    none.close(True)
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_fails_gives_one_note_and_ends_nothing(tmp_path, monkeypatch, capsys):
    class Broken(Logger):
        calls = 0

        def __init__(self, session):
            pass

        def scalars(self, step, values):
            Broken.calls += 1
            raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(loggers.LOGGERS, "mlflow", "test_loggers:Broken")
    monkeypatch.setattr(loggers, "named", lambda place: Broken if "Broken" in place else TensorBoard)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    both = Loggers("mlflow,tensorboard", Session(tmp_path))
    both.begin()
    for step in range(1, 7):
        clock[0] = 100.0 * step
        both.scalars(step, {"loss": 1.0})
    both.close(True)
    note = (
        "note: cannot write to mlflow (ConnectionError: no network); the run continues and tries again every 5 minutes."
    )
    assert capsys.readouterr().out.splitlines() == [note]
    assert Broken.calls == 2
    assert read_scalars(tmp_path, ["loss"])["loss"][0] == [1, 2, 3, 4, 5, 6]


def test_what_tensorboard_tells_about_a_run(tiny, tmp_path):
    """Descriptions of tags, charts of several tags, and hyperparameters with the outcome."""
    workdir = Workdir(tmp_path)
    assert train.train(change(tiny, "optimizer", ema=0.9), workdir) == 0
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    for tag in ("train/loss", "validation/logits", "sample", "weights/update_norm/block_0/mlp/up/kernel"):
        assert events.SummaryMetadata(tag).summary_description == loggers.describe(tag) != ""
    assert all(loggers.describe(tag) for tag in events.Tags()["scalars"] + events.Tags()["histograms"])
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {c.title: {chart.title: chart.multiline.tag[:] for chart in c.chart} for c in layout.category}
    assert charts["Loss"]["loss"] == ["^(train|validation)/(raw_)?loss$"]
    assert charts["Gradient norms of each layer"]["mlp/up/kernel"] == [
        r"^weights/gradient_norm/block_\d+/mlp/up/kernel$"
    ]
    assert "accuracy" not in charts["Loss"]  # a text has none
    start, end = (
        HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/session_{name}_info").plugin_data.content)
        for name in ("start", "end")
    )
    values = start.session_start_info.hparams
    assert values["optimizer.ema"].number_value == 0.9
    assert values["train.batch_size"].number_value == 16
    assert "train.log_every" not in values
    assert end.session_end_info.status == 1


def test_no_curve_is_flat_zero(tiny, tmp_path):
    assert train.train(tiny, Workdir(tmp_path)) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in events.Tags()["scalars"]:
        assert any(event.value for event in events.Scalars(tag)), tag
    scalars = read_scalars(tmp_path, ["train/loss", "train/bits_per_byte", "used_memory/process", "progress/skipped"])
    (_, losses), (_, bits), (_, memory), (skipped, _) = scalars.values()
    assert bits == pytest.approx([loss / np.log(2) for loss in losses])  # the tokens are characters of one byte
    assert all(0.05 < value < 50 for value in memory)
    assert skipped == []


def test_learning_rate_of_kernels_where_it_differs(tiny, tmp_path):
    assert train.train(change(tiny, "model", base_width=8), Workdir(tmp_path)) == 0
    rates = read_scalars(tmp_path, ["train/learning_rate", "train/learning_rate_of_kernels"])
    (_, usual), (_, of_kernels) = rates.values()
    assert of_kernels == pytest.approx([rate / 4 for rate in usual])


@pytest.mark.parametrize("scanned", [False, True])
def test_norms_and_histograms_of_sharded_parameters_are_those_of_each_layer(scanned):
    layout = sharding.make_layout(sharding.MeshConfig(rules="fsdp"))
    values = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    kernel = jax.device_put(values, layout.mesh and jax.NamedSharding(layout.mesh, jax.P(None, "fsdp")))
    if scanned:
        params, axes = {"blocks": {"kernel": kernel}}, {"blocks": {"kernel": jax.P("layers", "embed", "mlp")}}
    else:
        params = {f"block_{i}": {"kernel": kernel[i]} for i in range(3)}
        axes = {f"block_{i}": {"kernel": jax.P("embed", "mlp")} for i in range(3)}
    params["norm"], axes["norm"] = jnp.ones(8, jnp.bfloat16), jax.P("embed")
    assert statistics.names(params, axes) == ["block_0/kernel", "block_1/kernel", "block_2/kernel", "norm"]
    norms = statistics.norms(jax.tree.map(lambda x: x.astype(jnp.float32), params), axes)
    np.testing.assert_allclose(norms, [*np.sqrt((values**2).sum((1, 2))), 8**0.5], rtol=1e-6)
    *kernels, ones = statistics.histograms(params, axes, layout)
    for (counts, edges), expected in zip(kernels, values, strict=True):
        np.testing.assert_allclose(edges[[0, -1]], [expected.min(), expected.max()])
        assert counts.sum() == expected.size
        np.testing.assert_allclose(counts, np.histogram(expected, statistics.BINS)[0], atol=1)
    assert ones[0].sum() == 8
    assert set(ones[1]) == {1.0}
