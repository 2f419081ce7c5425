"""Config files and overrides by flags: each mistake in them is one sentence that says where it is."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from absl import flags

from gpt import config, config_files, reporting
from gpt.checkpointing.run import Run
from gpt.config import Config, OptimizerConfig, TrainConfig
from gpt.data.base import KINDS
from gpt.data.images import ImagesConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.base import FAMILIES
from gpt.models.vit import ViTConfig
from gpt.runtime import cli, fields
from gpt.runtime.errors import UsageError
from gpt.sharding import MeshConfig

HEAD = "from gpt.config import default_config\ndef get_config():\n    config = default_config()\n"

# The text of a config file, or what follows HEAD, and what is said of it.
FILES = {
    "syntax": (HEAD + "    config.seed = = 3\n", "line 4: invalid syntax"),
    "indentation": (HEAD + "  return config\n", "line 4: unindent does not match"),
    "null bytes": ("a\0b", "null bytes"),
    "unknown key": (
        HEAD + "\n    config.model.num_layer = 3\n",
        r"line 5: There is no config key 'num_layer'; did you mean model\.num_layers\?$",
    ),
    "unknown key by name": (
        HEAD + "    config['model']['num_layer'] = 3\n",
        r"line 4: .*did you mean model\.num_layers",
    ),
    "unknown key read": (HEAD + "    config.seed = config.train.step\n", r"line 4: .*did you mean train\.steps"),
    "unknown group": (HEAD + "    config.modle.num_layers = 3\n", "line 4: .* 'modle'; did you mean model or"),
    "wrong type": (HEAD + "    config.train.steps = 'ten'\n", "line 4: steps=ten has to be of type int"),
    "group as a value": (HEAD + "    config.model = 3\n", "line 4: model is a group of keys and cannot be set to 3"),
    "wrong argument": (
        "from gpt.models.gpt import GPTConfig\ndef get_config():\n    return GPTConfig(num_layerz=3)\n",
        "line 3: TypeError: .*num_layerz",
    ),
    "wrong type of an argument": (
        "from gpt.models.gpt import GPTConfig\ndef get_config():\n    return GPTConfig(num_heads='x')\n",
        r"model\.num_heads='x' has to be greater than 0",
    ),
    "error in a module of the user": (
        "import broken\n",
        r"broken\.py, line 2: NameError",
    ),
    "syntax of a module of the user": (
        "import halved\n",
        r"halved\.py, line 1: '\(' was",
    ),
    "missing module of the package": ("from gpt.modles import gpt\n", r"line 1: ModuleNotFoundError: .*'gpt\.modles'"),
    "exit": (HEAD + "    exit(3)\n", "line 4: SystemExit: 3"),
    "missing module": ("import torchx\n", "line 1: ModuleNotFoundError: No module named 'torchx'"),
    "missing name": (
        "from gpt.config import defaultconfig\n",
        "line 1: ImportError: cannot import name 'defaultconfig'",
    ),
    "error": (HEAD + "    1 / 0\n", "line 4: ZeroDivisionError: division by zero"),
    "error without a text": (HEAD + "    assert config is None\n", "line 4: AssertionError"),
    "error in a library": (HEAD + "    open('/nowhere')\n", r"line 4: FileNotFoundError: .*'/nowhere'"),
    "a key of its own": (HEAD + "    {}['size']\n", "line 4: KeyError: size"),
    "endless": ("def get_config():\n    return get_config()\n", "line 2: RecursionError"),
    "no function": ("x = 3\n", r"it defines no function get_config\(\)"),
    "no callable": ("get_config = 3\n", r"it defines no function get_config\(\)"),
    "no return": (HEAD, r"has to return what default_config\(\) returns, not a NoneType"),
    "a part": (HEAD + "    return config.model\n", r"has to return what default_config\(\) returns"),
    "needs an argument": ("def get_config(size):\n    pass\n", r"its get_config\(\) needs an argument; add :ARGUMENT"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_config_file_is_a_sentence(tmp_path, monkeypatch, name):
    text, sentence = FILES[name]
    path = tmp_path / "mine.py"
    path.write_text(text)
    (tmp_path / "broken.py").write_text("x = 1\nbroken\n")
    (tmp_path / "halved.py").write_text("x = (")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=sentence) as raised:
        config_files.read_file(str(path))
    assert str(raised.value).startswith(f"--config={path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_an_error_of_the_package_keeps_its_traceback(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from gpt.config import flatten\ndef get_config():\n    return flatten(3)\n")
    with pytest.raises(AttributeError):
        config_files.read_file(str(path))


# What --config names, in a folder with configs/char.py, notes.md and other/mine.py.
PLACES = {
    "configs/char.py:gpt-mini": r"its get_config\(\) takes no argument; leave out :gpt-mini\.",
    "x" * 5000 + ".py": "there is no such config file; name one",
    "notes.md": "a config file is a Python file, like .*, or a JSON file",
    "other": "is a folder, not a config file; name one, like",
    "": "there is no such config file; name one, like",
    "configs/cahr.py": r"there is no such config file; did you mean configs/char\.py\?$",
    "configs/cahr.py:gpt-mini": r"did you mean configs/char\.py:gpt-mini\?$",
    "char": r"did you mean configs/char\.py\?$",
    "char.py": r"did you mean configs/char\.py\?$",
    "other/mine": r"did you mean other/mine\.py\?$",
    "https://x.y/mine.py": "there is no such config file",
}


# The text of a JSON file, as a function of the JSON of the defaults, and what is said of it.
JSON_FILES = {
    "cut": (lambda text: text[:700], r"mine\.json is not JSON in line \d\d: "),
    "empty": (lambda text: "", "is not JSON in line 1"),
    "list": (lambda text: "[1]", r"holds no config; gpt\.main --print_config prints one"),
    "nested": (lambda text: "[" * 100_000, "is nested too deeply"),
    "missing key": (lambda text: text.replace('"seed": 0,', ""), "has no key 'seed'"),
    "misspelt key": (lambda text: text.replace("num_layers", "num_layer"), r"did you mean model\.num_layers"),
    "wrong type": (lambda text: text.replace('"seed": 0', '"seed": "0"'), "seed='0' has to be of type int"),
    "not a number": (lambda text: text.replace('"z_loss": 0.0', '"z_loss": NaN'), "has to be a finite number"),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_mistake_in_a_json_file_is_a_sentence(tmp_path, name):
    change, sentence = JSON_FILES[name]
    path = tmp_path / "mine.json"
    path.write_text(change(json.dumps(dataclasses.asdict(Config()), indent=2)))
    with pytest.raises(UsageError, match=sentence):
        config_files.read(str(path))


def test_a_json_file_and_the_record_of_a_run_are_configs(tmp_path):
    """Flags change their values too. The run of a recorded config is resumed."""
    values = dataclasses.asdict(Config(seed=3))
    path, record = tmp_path / "mine.json", tmp_path / "run.json"
    path.write_text(json.dumps(values))
    record.write_text(json.dumps({"id": "x", "config": values}))
    assert config_files.read(str(path)) == config_files.read(str(record)) == Config(seed=3)
    assert config_files.read(str(path), [("train.steps", "7")]).train.steps == 7
    assert config_files.default_workdir(str(path)) == Path("runs/mine")
    assert config_files.default_workdir(str(record)) == tmp_path
    with pytest.raises(UsageError, match="a JSON file takes no argument; leave out :x"):
        config_files.read(f"{path}:x")


def config_classes() -> list[type]:
    places = [*FAMILIES.values(), *KINDS.values()]
    return [Config, TokenizerConfig, OptimizerConfig, TrainConfig, MeshConfig, *map(fields.named, places)]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_key_is_described(cls):
    """`--help` shows the text; choices and bounds are those that a value is checked with."""
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.default):
            assert fields.declared(cls(), field.name)["text"], field.name


def test_help_shows_the_values_of_a_config(tmp_path):
    """Only the keys that its family has, and * where a value is not the default."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(Config(model=ViTConfig(num_layers=4), data=ImagesConfig()))))
    rows = dict(config_files.help_rows(str(path), [("seed", "3")]))
    assert rows["* model.num_layers=4"] == "number of blocks [> 0; default 12]"
    assert rows["  model.positions=learned"] == "position encoding [learned, sincos]"
    assert "* seed=3" in rows
    assert not any("window=" in row or "block_size=" in row for row in rows)
    rows = config_files.help_rows(None, [("optimizer", None)])
    assert {row.split(".")[0] for row, _ in rows if row} == {"  optimizer"}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_config_file_is_a_sentence(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/char.py", "other/mine.py", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEAD + "    return config\n")
    with pytest.raises(UsageError, match=PLACES[place]) as raised:
        config_files.read_file(place)
    assert str(raised.value).startswith(f"--config={place}: ")
    assert config_files.read_file("configs/char.py").seed == 0


OVERRIDES = {
    ("train.steps", "1e3"): r"--config\.train\.steps=1e3 has to be a whole number, like 1000\.",
    ("train.steps", "abc"): r"--config\.train\.steps=abc has to be a whole number",
    ("train.steps", "9" * 5000): "has to be a whole number",
    ("train.steps", ""): r"--config\.train\.steps= has to be a whole number",
    ("train.steps", "(1, 2)"): "has to be a whole number",
    ("train.steps", None): r"--config\.train\.steps needs a value: --config\.train\.steps=VALUE\.",
    ("optimizer.learning_rate", "fast"): r"--config\.optimizer\.learning_rate=fast has to be a number",
    ("optimizer.learning_rate", "0,001"): "has to be a number, like 0.1",
    ("model.gated_mlp", "maybe"): r"--config\.model\.gated_mlp=maybe has to be true or false",
    ("train", "3"): r"--config\.train=3: train is a group of keys; set one of them, like --config\.train\.\w+=VALUE",
    ("train", None): r"--config\.train: train is a group of keys",
    ("train", "{}"): "train is a group of keys",
    ("train.steps.x", "3"): r"no config key 'train\.steps\.x'",
    ("trian.steps", "3"): r"no config key 'trian\.steps'; did you mean train\.steps\?",
    ("steps", "3"): r"did you mean train\.steps\?",
    ("batch", "3"): r"did you mean train\.batch_size\?",
    ("", "3"): "no config key ''",
    ("data.size", "3"): r"data\.size is a key of another model\.family or data\.kind",
    ("model.family", "vit"): r"--config\.model\.family=vit: .* start from a config file for vit",
    ("data.kind", "images"): "start from a config file for images",
}


@pytest.mark.parametrize(("key", "text"), OVERRIDES)
def test_a_mistake_in_an_override_is_a_sentence(key, text):
    with pytest.raises(UsageError, match=OVERRIDES[key, text]):
        config_files.override(config.default_config(), key, text)


def test_overrides_of_every_type():
    tree = config.default_config()
    changes = {"train.steps": "1_000", "optimizer.learning_rate": "1e-3", "model.norm": "rmsnorm", "data.path": ""}
    changes |= {"model.zero_init": "False", "model.tie_embeddings": "0", "model.scan_layers": None, "seed": "7"}
    for key, text in changes.items():
        config_files.override(tree, key, text)
    found = config.flatten(tree.to_dict())
    expected = [1000, 1e-3, "rmsnorm", "", False, False, True, 7]
    assert [found[key] for key in changes] == expected


def test_forms_of_overrides_on_a_command_line(monkeypatch):
    """In any order with --config, by =, by a blank, as --no, and as nothing for true."""
    monkeypatch.setattr(cli, "_overrides", [])
    arguments = [
        "x",
        "--config.seed=1",
        "--config",
        "a.py",
        "-config.seed",
        "-2",
        "--config.mesh.zero1",
        "--other=3",
    ]
    arguments += ["--noconfig.mesh.zero1", "--config.data.path=a=b", "--config.train.steps"]
    assert cli._take_overrides(arguments) == ["x", "--config", "a.py", "--other=3"]
    expected = [
        ("seed", "1"),
        ("seed", "-2"),
        ("mesh.zero1", None),
        ("mesh.zero1", "false"),
        ("data.path", "a=b"),
    ]
    assert cli._overrides == [*expected, ("train.steps", None)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("flag --workdir=None: Flag --workdir must have a value other than None.", "--workdir is missing; see --help."),
        ("flag --json=x: ('Non-boolean argument to boolean flag', 'x')", "--json=x has to be true or false."),
        ("flag --seed=x: invalid literal for int() with base 10: 'x'", "--seed=x has to be a whole number."),
        ("flag --top_p=x: could not convert string to float: 'x'", "--top_p=x has to be a number."),
        ("flag --seed=-1: -1 is not a non-negative integer", "--seed=-1 has to be a non-negative integer."),
        ("flag --split=x: value should be one of <val|all>", "--split=x: choose one of <val|all>."),
        (
            "flag --split=vall: value should be one of <val|all>",
            "--split=vall: choose one of <val|all>; did you mean val?",
        ),
    ],
)
def test_errors_of_flags_name_the_flag(text, sentence):
    assert cli._reworded(flags.Error(text)) == sentence


def changed(old: Config, new: Config, step: int = 1000) -> list[str]:
    """What is said of a resume after some steps, with 640 rows in an epoch."""
    before, now = (Run(each, tokenizer=None, fingerprint="") for each in (old, new))
    return list(reporting.describe_changes(config.differences(old, new), before, now, 640, step))


def with_train(old: Config, **changes) -> Config:
    train_config = TrainConfig(**{"steps": 0, "batch_size": 16, **changes})
    return Config(model=old.model, optimizer=old.optimizer, train=train_config)


COSINE = Config(optimizer=OptimizerConfig(learning_rate=4e-3), train=TrainConfig(steps=1000, batch_size=16))


def test_a_longer_run_says_what_becomes_of_the_learning_rate():
    """By steps, epochs or tokens; half of a cosine of 4e-3 to 4e-4 is 2.2e-3."""
    becomes = ": the learning rate at step 1,000 becomes 0.0022 instead of 0.0004"
    assert changed(COSINE, with_train(COSINE, steps=2000)) == ["changed: train.steps 1000 → 2000" + becomes]
    in_epochs = changed(COSINE, with_train(COSINE, epochs=50.0))
    assert in_epochs == ["changed: train.steps 1000 → 0", "changed: train.epochs 0.0 → 50.0" + becomes]
    tokens = 2000.0 * 16 * COSINE.model.length
    assert changed(COSINE, with_train(COSINE, tokens=tokens))[-1].endswith(becomes)
    optimizer = OptimizerConfig(learning_rate=4e-3, decay_tokens=tokens)
    assert changed(COSINE, Config(optimizer=optimizer, train=COSINE.train))[-1].endswith(becomes)
    optimizer = OptimizerConfig(learning_rate=4e-2)
    (line,) = changed(COSINE, Config(optimizer=optimizer, train=COSINE.train))
    assert line.endswith("becomes 0.004 instead of 0.0004")


def test_nothing_is_said_of_a_learning_rate_that_stays():
    until = OptimizerConfig(decay_tokens=500.0 * 16 * COSINE.model.length)
    fixed = Config(optimizer=until, train=COSINE.train)
    for old in (fixed, Config(optimizer=OptimizerConfig(final_fraction=1.0), train=COSINE.train)):
        assert changed(old, with_train(old, steps=2000)) == ["changed: train.steps 1000 → 2000"]
    assert changed(COSINE, with_train(COSINE, steps=1000, log_every=5)) == ["changed: train.log_every 10 → 5"]
    assert not math.isnan(reporting.learning_rate(COSINE, 640, 0))
