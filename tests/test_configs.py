"""Every config file: it can be built, and one of each family and kind trains, resumes, shards, evaluates and plans.

A new config is listed by itself. `SMALL` and `SMALL_DATA` make a family or kind small where the defaults do not do.
"""

import dataclasses
import json
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt import config_files, reporting, sharding, step, train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, TrainConfig, from_tree
from gpt.data import base
from gpt.data.tokenizers import Labels, TokenizerConfig
from gpt.models.gpt import GPTConfig
from gpt.planning import compiling
from gpt.runtime.errors import UserError
from gpt.runtime.fields import option
from gpt.sharding import MeshConfig

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py"))
CONFIGS.remove("finetune")  # it takes the config of a workdir
CONFIGS += [f"pretrain:{size}" for size in runpy.run_path(str(FOLDER / "pretrain.py"))["SIZES"]]

# Values of a small model, or of little data, of the fields that there are.
SMALL = {
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 16,
    "vocab_multiple": 8,
    "image_size": 16,
    "patch_size": 8,
    "lora_rank": 0,
    "residual_dropout": 0.0,  # on other meshes, other masks are drawn
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "prefix_dropout": 0.0,
    "num_latents": 8,
}
SMALL_DATA = {"validation_rows": 20}
SMALL_TEXT = {"block_size": 16, "vocab_size": 256}
TRAIN = {"batch_size": 8, "micro_batches": 1, "steps": 4, "epochs": 0.0, "tokens": 0.0, "log_every": 1}
TRAIN |= {"eval_every": 4, "checkpoint_every": 2, "keep_checkpoints": 9, "sample_tokens": 0}


def of_file(name: str) -> Config:
    """Returns the config of NAME or NAME:ARGUMENT."""
    stem, *argument = name.split(":")
    return from_tree(runpy.run_path(str(FOLDER / f"{stem}.py"))["get_config"](*argument))


def with_fields(part, values):
    known = {field.name for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **{name: value for name, value in values.items() if name in known})


def small(name: str, play: Path) -> Config:
    config, text = of_file(name), {}
    if config.data.kind == "text":
        text = SMALL_TEXT
        config = dataclasses.replace(config, tokenizer=TokenizerConfig("byte"))
    return dataclasses.replace(
        config,
        model=with_fields(config.model, SMALL | text),
        data=with_fields(config.data, SMALL_DATA | ({"path": str(play)} if text else {})),
        train=dataclasses.replace(config.train, **TRAIN),
        mesh=MeshConfig(),
    )


def one_of_each() -> list[str]:
    """A config of each family with each kind of data."""
    found = {}
    for name in CONFIGS:
        config = of_file(name)
        found.setdefault((config.model.family, config.data.kind), name)
    return list(found.values())


def scalars(workdir, tag):
    return [event.value for event in EventAccumulator(str(workdir.path)).Reload().Scalars(tag)]


def arrays(workdir, number):
    run = loading.load(workdir, str(number))
    return jax.tree.map(np.asarray, train.restore(workdir.checkpoints(), number, run.program))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds(name):
    """Its parameters are as many as it says, and a batch of its rows is what its model takes."""
    config = of_file(name)
    vocab_size = config.model.vocab_size or config.data.vocab_size or 80
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8, micro_batches=1))
    layout = sharding.make_layout(MeshConfig("fsdp"))
    program = step.build(config, vocab_size, layout, 10)
    assert program.num_parameters() == program.model.config.num_parameters()
    assert program.model.config.flops_per_token() > 0
    with layout.use():
        batch = compiling.batch(config, program)
        _, measured = jax.eval_shape(program.train_step, program.abstract_state, batch)
        with jax.numpy_dtype_promotion("strict"):  # the optimizer, which is optax's, relies on promotion
            jax.eval_shape(program.eval_step, program.abstract_state.params, batch)
    assert measured["loss"].shape == ()
    assert program.model.config.summary() in next(reporting.describe(program, config, None, 1, [], (1, 1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_back_from_json(name, tmp_path):
    """As `gpt.main --print_config` prints it."""
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(of_file(name)), indent=2))
    assert config_files.read(str(tmp_path / "config.json")) == of_file(name)


@pytest.fixture(scope="module", params=one_of_each())
def trained(request, play, tmp_path_factory):
    """A small config of a family and kind, and the workdir in which it was trained."""
    config, workdir = small(request.param, play), Workdir(tmp_path_factory.mktemp(request.param))
    assert train.train(config, workdir) == 0
    return config, workdir


def test_it_resumes_to_the_bit(trained, tmp_path):
    config, workdir = trained
    expected, losses = arrays(workdir, 4), scalars(workdir, "train/loss")
    again = Workdir(shutil.copytree(workdir.path, tmp_path / "run"))
    shutil.rmtree(again.path / "checkpoints" / "4")
    assert train.train(config, again) == 0
    jax.tree.map(np.testing.assert_array_equal, arrays(again, 4), expected)
    assert scalars(again, "train/loss") == losses


def test_it_is_the_same_on_a_mesh_of_data_fsdp_and_model(trained, tmp_path):
    config, workdir = trained
    mesh = MeshConfig("fsdp_tp", data=2, fsdp=2, model=2)
    train.train(dataclasses.replace(config, mesh=mesh), Workdir(tmp_path))
    for tag in ("train/loss", "validation/loss"):
        np.testing.assert_allclose(scalars(Workdir(tmp_path), tag), scalars(workdir, tag), rtol=1e-4)


def test_it_is_evaluated_from_its_workdir(trained):
    """The report is that of the training, and counts what the source has."""
    _, workdir = trained
    run = loading.load(workdir, "last")
    dataset = run.dataset()
    source = dataset.evaluation("val", run.model_config)
    result = step.evaluate(run.program, run.params, source, run.batch_size)
    report = dataset.report(source, result)
    assert report["loss"] == pytest.approx(scalars(workdir, "validation/loss")[-1], rel=1e-5)
    assert result["examples"] == len(source)
    assert result["targets"] == sum((source.example(0, i)["targets"] >= 0).sum() for i in range(len(source)))
    assert 0 <= result["accuracy"] <= 1
    assert len(result["mistakes"]) == min(step.MAX_MISTAKES, round((1 - result["exact_match"]) * len(source)))
    assert dataset.mistakes(source, result).text.count("mistake") in (0, len(result["mistakes"]))


def test_it_is_planned(trained):
    """Its step, compiled for devices that are given, without its data."""
    config, _ = trained
    program = compiling.build(config, jax.devices()[:2])
    used = compiling.compile_step(config, program).executable.memory_analysis()
    assert used.argument_size_in_bytes > 4 * program.num_parameters()


def test_the_kind_that_the_page_on_data_writes_trains(tmp_path, monkeypatch):
    """The blocks of Python in gpt/data/README.md are a kind of data, as they stand."""
    page = (Path(base.__file__).parent / "README.md").read_text()
    names = {name: getattr(base, name) for name in ("IGNORED", "Dataset", "DataConfig")}
    module = types.ModuleType("parity")
    monkeypatch.setitem(sys.modules, "parity", module)
    vars(module).update(names | {"dataclasses": dataclasses, "np": np, "Labels": Labels, "option": option})
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, vars(module))
    monkeypatch.setitem(base.KINDS, "parity", "parity:ParityConfig")
    model = GPTConfig(num_layers=1, num_heads=2, embed_dim=16, block_size=8)
    config = Config(model=model, data=module.ParityConfig(), train=TrainConfig(**TRAIN))
    assert train.train(config, Workdir(tmp_path)) == 0
    assert loading.load(Workdir(tmp_path), "best").dataset().describe().startswith("100,000 training")
    assert 0 <= scalars(Workdir(tmp_path), "validation/accuracy")[-1] <= 1


def test_the_speedrun_has_its_times():
    names = ("char_speedrun", "char_speedrun:3min", "char_speedrun:15min")
    lengths = [of_file(name).train.steps for name in names]
    assert lengths[0] < min(lengths[1:])
    with pytest.raises(UserError, match="time='4min' is not known; choose one of 30s, 3min, 15min"):
        of_file("char_speedrun:4min")


def test_the_sizes_for_pretraining_are_named():
    with pytest.raises(UserError, match="size='gpt4' is not known; choose one of gpt2-124m, gpt2-1558m, gpt3-7b, gpt3"):
        of_file("pretrain:gpt4")
