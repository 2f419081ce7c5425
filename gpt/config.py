"""The whole configuration: dataclasses here, an ml_collections tree towards the user.

Each part is declared next to the code that uses it. `configs/*.py` start from `default_config()`,
which is typed and locked, so a misspelt key or a wrong type is refused.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import re
import traceback
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from gpt.data import KINDS, DataConfig
from gpt.data.text import TextConfig
from gpt.errors import UsageError, UserError, check_choice, check_positive, one_line
from gpt.models import FAMILIES, ModelConfig
from gpt.models.gpt import GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.sharding import MeshConfig
from gpt.tokenizers import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run. Just one of `steps`, `epochs` and `tokens` is set."""

    batch_size: int = 128  # rows in one step, over all devices
    init_from: str = ""  # workdir whose best parameters the run starts from; "": random ones
    micro_batches: int = 1  # the gradient is accumulated over this many parts of the batch
    steps: int = 5000
    epochs: float = 0.0
    tokens: float = 0.0
    log_every: int = 10  # steps between points on TensorBoard and lines in a log
    eval_every: int = 500  # steps between evaluations of the whole validation split; 0: only at the end
    checkpoint_every: int = 1000  # steps; the last step and the best evaluation are saved in any case
    keep_checkpoints: int = 2  # newest ones, besides the best
    sample_prompt: str = ""  # text that the sample at each evaluation continues; "": a line feed
    sample_tokens: int = 256  # its length; 0: no samples
    on_nonfinite: str = "stop"  # where a loss or gradient is not finite; or skip (the update), rollback
    max_skipped: int = 10  # updates or batches that a run may leave out; one more stops it
    spike_factor: float = 0.0  # a loss above this times its running mean counts as not finite; 0: none does

    def __post_init__(self):
        check_positive("train", self, "batch_size", "micro_batches", "log_every", "checkpoint_every")
        check_positive("train", self, "keep_checkpoints", "max_skipped")
        check_choice("train.on_nonfinite", self.on_nonfinite, ("stop", "skip", "rollback"))
        if self.spike_factor and not self.spike_factor > 1:
            raise UserError(f"train.spike_factor={self.spike_factor} has to be greater than 1, or 0 for none.")
        if self.spike_factor and self.on_nonfinite == "skip":
            raise UserError(
                "train.spike_factor needs train.on_nonfinite=stop or rollback: a spike is seen when its update is made."
            )
        for name in ("steps", "epochs", "tokens", "eval_every", "sample_tokens"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must not be negative.")
        lengths = [
            f"train.{name}={getattr(self, name):g}" for name in ("steps", "epochs", "tokens") if getattr(self, name)
        ]
        if len(lengths) != 1:
            found = " and ".join(lengths) or "none is"
            raise UserError(
                f"Set just one of train.steps, train.epochs and train.tokens, and the others to 0; {found} set."
            )

    def total_steps(self, row_length: int, rows_per_epoch: int) -> int:
        """Length of the run in steps, for rows of so many tokens; a last partial step counts as one."""
        if self.steps:
            return self.steps
        rows = self.epochs * rows_per_epoch if self.epochs else self.tokens / row_length
        return math.ceil(rows / self.batch_size)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run is made of; see the classes of its parts."""

    seed: int = 0
    model: ModelConfig = GPTConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative.")
        if self.model.reads != self.data.gives:
            raise UserError(
                f"model.family={self.model.family} reads {self.model.reads}, but data.kind={self.data.kind} gives "
                f"{self.data.gives}."
            )


# What is one of several classes: the field that tells which, and where they are.
CHOICES = {ModelConfig: ("family", FAMILIES), DataConfig: ("kind", KINDS)}


def default_config(model: ModelConfig | None = None, data: DataConfig | None = None) -> ml_collections.ConfigDict:
    """A typed, locked tree of all options for a config file to change; with the defaults of a GPT on text."""
    config = Config(model=model or GPTConfig(), data=data or TextConfig())
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_tree(tree: ml_collections.ConfigDict | dict) -> Config:
    """The validated dataclasses of a tree.

    Raises:
      UserError: an unknown or missing key, a wrong type, or a value that its part refuses.
    """
    return _build(Config, dict(tree.items()), "")


def read_file(place: str) -> ml_collections.ConfigDict:
    """The tree that a config file returns.

    Args:
      place: FILE, or FILE:ARGUMENT for a `get_config` with a parameter.

    Raises:
      UsageError: there is no such file, it is not a config file, or there is a mistake in it.
    """
    name, colon, argument = place.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        is_folder = name and path.is_dir()
        stems = {file.stem: file for folder in ("configs", path.parent) for file in sorted(Path(folder).glob("*.py"))}
        near = difflib.get_close_matches(path.stem, stems, n=1) if not is_folder else []
        what = "is a folder, not a config file" if is_folder else "there is no such config file"
        hint = f"did you mean {stems[near[0]]}{colon}{argument}?" if near else "name one, like configs/char.py."
        raise UsageError(f"--config={place}: {what}; {hint}")
    if path.suffix != ".py":
        raise UsageError(f"--config={place}: a config file is a Python file, like configs/char.py.")
    module = ModuleType("config_file")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UsageError("it defines no function get_config(); see configs/char.py.")
        arguments = [argument] if colon else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            takes = "takes no argument; leave out" if colon else "needs an argument; add"
            raise UsageError(f"its get_config() {takes} {colon or ':'}{argument or 'ARGUMENT'}.") from None
        tree = get_config(*arguments)
        if not isinstance(tree, ml_collections.ConfigDict) or set(tree) != set(default_config()):
            raise UsageError(f"its get_config() has to return what default_config() made, not a {type(tree).__name__}.")
    except UserError as error:
        raise UsageError(f"--config={place}: {error}") from None
    except Exception as error:  # of the user's code, unless it comes from within this package
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(Path(__file__).parent) and frames[-1].name != read_file.__name__:
            raise
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        what = _mistake(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, what = [error.lineno], error.msg
        line = f"line {lines[-1]}: " if lines else ""
        raise UsageError(f"--config={place}: {line}{what if what.endswith('?') else what.rstrip('.') + '.'}") from None
    return tree


def _mistake(error: Exception) -> str:
    """What to say of an exception in a config file. A locked ConfigDict names keys and types in its own words."""
    text = one_line(error).replace("\\n", " ")
    if key := re.match(r"\W*(?:Key )?['\"]+(\w+)['\"]+(?: does not exist| Did you mean|$)", text):
        return str(unknown_key(key[1]))
    if wrong := re.match(
        r"Could not override field '(\w+)'.*?\. (.*) is of original type .* type <class '(.*)'>", text
    ):
        if "ConfigDict" in wrong[3]:
            return f"{wrong[1]} is a group of keys and cannot be set to {wrong[2]}"
        return f"{wrong[1]}={wrong[2]} has to be of type {wrong[3]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
READERS = {
    int: (int, "a whole number, like 1000"),
    float: (float, "a number, like 0.1"),
    bool: (lambda text: BOOLEANS[text.lower()], "true or false"),
    str: (str, "a text"),
}


def override(tree: ml_collections.ConfigDict, key: str, text: str | None) -> None:
    """Sets a key of a tree to the value that a flag gives as text; None is true, for a key that is true or false.

    Raises:
      UsageError: there is no such key, or it has another type.
    """
    *path, name = key.split(".")
    group: Any = tree
    for part in path:
        group = group.get(part) if isinstance(group, ml_collections.ConfigDict) else None
    if not isinstance(group, ml_collections.ConfigDict) or name not in group:
        raise UsageError(str(unknown_key(key)))
    kind, flag = group.get_type(name), f"--config.{key}"
    if kind not in READERS:
        example = next(iter(flatten(group[name].to_dict())))
        given = flag if text is None else f"{flag}={text}"
        raise UsageError(f"{given}: {key} is a group of keys; set one of them, like {flag}.{example}=VALUE.")
    if key in ("model.family", "data.kind") and text != group[name] and text in (*FAMILIES, *KINDS):
        raise UsageError(f"{flag}={text}: other keys depend on it, so start from a config file for {text}.")
    if text is None and kind is not bool:
        raise UsageError(f"{flag} needs a value: {flag}=VALUE.")
    read, wanted = READERS[kind]
    try:
        group[name] = read("true" if text is None else text)
    except (ValueError, KeyError):
        raise UsageError(f"{flag}={text} has to be {wanted}.") from None


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"model.num_layers": 8, …} of a nested dictionary."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} where two configs differ."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    keys = dict.fromkeys([*before, *after])  # families and kinds have their own
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def known_keys() -> list[str]:
    """The config keys that there are, of all families and kinds."""
    keys = list(flatten(dataclasses.asdict(Config())))
    for section, places in (("model", FAMILIES), ("data", KINDS)):
        keys += [f"{section}.{field.name}" for place in places.values() for field in dataclasses.fields(_load(place))]
    return list(dict.fromkeys(keys))


def nearest_keys(key: str) -> list[str]:
    """Known config keys that `key` may have meant, best first."""
    known = known_keys()
    by_leaf = {}
    for name in known:
        by_leaf.setdefault(name.split(".")[-1], []).append(name)
    leaves = difflib.get_close_matches(key.split(".")[-1], by_leaf, n=2)
    groups = {name.split(".")[0] for name in known}
    whole = difflib.get_close_matches(key, [*sorted(groups), *known], n=2, cutoff=0.75)
    return list(dict.fromkeys(whole + [name for leaf in leaves for name in by_leaf[leaf]]))[:3]


def unknown_key(key: str) -> UserError:
    """The error for a key that a config does not have."""
    if key in known_keys():
        return UserError(f"{key} is a key of another model.family or data.kind; start from a config file that has it.")
    near = nearest_keys(key)
    return UserError(f"There is no config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "."))


def _chosen_class(expected, values, key: str):
    """The dataclass for a part of the config."""
    if expected not in CHOICES:
        return expected
    field, classes = CHOICES[expected]
    if field not in values:
        raise UserError(f"The config has no key '{key}.{field}'.")
    if not isinstance(values[field], str):
        raise UserError(f"{key}.{field}={values[field]!r} has to be of type str.")
    check_choice(f"{key}.{field}", values[field], classes)
    return _load(classes[values[field]])


def _load(place: str):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _build(cls, values: dict, prefix: str):
    hints = typing.get_type_hints(cls)
    types = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name in sorted(values.keys() - types.keys()):
        raise unknown_key(prefix + name)
    arguments = {}
    for name, expected in types.items():
        key = prefix + name
        if name not in values:
            raise UserError(f"The config has no key {key!r}.")
        value = values[name]
        if dataclasses.is_dataclass(expected) or expected in CHOICES:
            if not hasattr(value, "items"):
                raise UserError(f"{key} is a group of keys and cannot be set to {value!r}.")
            arguments[name] = _build(_chosen_class(expected, value, key), dict(value.items()), f"{key}.")
        else:
            if expected is float and type(value) is int and abs(value) < 2**1000:
                value = float(value)
            if type(value) is not expected:
                raise UserError(f"{key}={value!r} has to be of type {expected.__name__}.")
            if expected is int and not abs(value) < 2**31:
                raise UserError(f"{key} has to be less than 2³¹, with which devices count.")
            if expected is float and not abs(value) < 3e38:
                raise UserError(f"{key}={value} has to be a finite number that float32 can hold.")
            arguments[name] = value
    return cls(**arguments)
