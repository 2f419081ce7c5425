"""The config of a run: dataclasses, to an ml_collections tree for config files to change, and back.

Each part is declared beside the code that uses it. `configs/*.py` start from `default_config()`, which is typed and
locked, so that a misspelt key or a wrong type is refused. `gpt.config_files` reads these files.
"""

import dataclasses
import difflib
import math
import typing
from typing import Any, ClassVar

import ml_collections

from gpt.data.base import KINDS, DataConfig
from gpt.data.text import TextConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.base import FAMILIES, ModelConfig
from gpt.models.gpt import GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.runtime.backend import Work
from gpt.runtime.errors import UserError
from gpt.runtime.fields import Options, check_choice, harmless_names, named, option
from gpt.runtime.loggers import check_loggers
from gpt.sharding import MeshConfig

SMALL_SPLIT = 1 << 19  # tokens of a validation split that is evaluated whole even if that takes long
ON_NONFINITE = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """Length of a run, and its intervals. Exactly one of `steps`, `epochs` and `tokens` is set."""

    section: ClassVar[str] = "train"

    batch_size: int = option(128, "examples of a step, over all devices", above=0)
    init_from: str = option("", "workdir whose best parameters the run starts from; empty: random parameters")
    micro_batches: int = option(1, "parts of the batch over which the gradient is accumulated", above=0)
    loss_chunks: int = option(1, "parts of a sequence whose logits share memory, one by one", harmless=True, above=0)
    z_loss: float = option(0.0, "weight in the gradient of the squared log of the softmax's denominator", least=0)
    steps: int = option(5000, "length of the run in steps", harmless=True, least=0)
    epochs: float = option(0.0, "length of the run in passes over the data", harmless=True, least=0)
    tokens: float = option(0.0, "length of the run in tokens", harmless=True, least=0)
    log_every: int = option(10, "steps between points on TensorBoard and lines in a log", harmless=True, above=0)
    loggers: str = option("tensorboard", "some of tensorboard,wandb,mlflow; empty: none", harmless=True)
    eval_every: int = option(500, "steps between evaluations; 0: only at the end", harmless=True, least=0)
    # 0: at most SMALL_SPLIT, or as many as take 2 % of the time
    eval_tokens: int = option(0, "tokens of an evaluation, always the same; 0: chosen by time", harmless=True, least=0)
    checkpoint_every: int = option(1000, "steps between checkpoints, besides last and best", harmless=True, above=0)
    keep_checkpoints: int = option(2, "newest checkpoints that are kept, besides the best", harmless=True, above=0)
    sample_prompt: str = option("", "text that samples at evaluations continue; empty: a line feed", harmless=True)
    sample_tokens: int = option(256, "tokens of a sample at an evaluation; 0: no samples", harmless=True, least=0)
    on_nonfinite: str = option("stop", "what to do if a loss is not finite", choices=ON_NONFINITE, harmless=True)
    max_skipped: int = option(10, "updates or batches that a run may leave out", harmless=True, above=0)
    spike_factor: float = option(0.0, "ratio to its mean at which a loss counts as not finite; 0: none", harmless=True)

    def __post_init__(self):
        super().__post_init__()
        check_loggers(self.loggers)
        if self.spike_factor and not self.spike_factor > 1:
            raise UserError(f"train.spike_factor={self.spike_factor} has to be greater than 1, or 0 for none.")
        if self.spike_factor and self.on_nonfinite == "skip":
            raise UserError(
                "train.spike_factor needs train.on_nonfinite=stop or rollback: a spike is known after its update only."
            )
        lengths = [
            f"train.{name}={getattr(self, name):g}" for name in ("steps", "epochs", "tokens") if getattr(self, name)
        ]
        if len(lengths) != 1:
            given = " and ".join(lengths) or "none is"
            raise UserError(
                f"Set just one of train.steps, train.epochs and train.tokens, and the others to 0; {given} set."
            )

    def total_steps(self, length: int, examples_per_epoch: int) -> int:
        """Returns the length of the run in steps, with examples of `length` tokens; a partial step counts as one."""
        if self.steps:
            return self.steps
        examples = self.epochs * examples_per_epoch if self.epochs else self.tokens / length
        return math.ceil(examples / self.batch_size)

    def evaluated(self, examples: int, length: int, total_steps: int) -> int:
        """Returns how many of the validation examples are evaluated.

        Args:
          length: tokens of an example. Training costs 3 times as much for a token as an evaluation.
        """
        if not self.eval_tokens and examples * length <= SMALL_SPLIT:
            return examples
        between = self.batch_size * length * min(self.eval_every or total_steps, total_steps)
        return max(1, (self.eval_tokens or max(SMALL_SPLIT // 4, int(0.02 * 3 * between))) // length)


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """All settings of a run; the classes of its parts describe them."""

    seed: int = option(0, "seed of the initial parameters, the order of the data and dropout", least=0)
    model: ModelConfig = GPTConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.model.reads != self.data.gives:
            raise UserError(
                f"model.family={self.model.family} reads {self.model.reads}, but data.kind={self.data.kind} gives "
                f"{self.data.gives}."
            )
        if self.model.reads != "tokens" and (self.train.z_loss or self.train.loss_chunks > 1):
            raise UserError("train.z_loss and train.loss_chunks are for models of tokens; leave them out.")

    def work(self, rows: int) -> Work:
        """Returns what decides how many devices a CPU is divided into.

        Args:
          rows: examples that a step divides over the devices; 0: not known, any number of devices will do.
        """

        def divides(count: int) -> bool:
            try:
                shape = self.mesh.shape(count)
            except UserError:
                return False
            return rows % (shape["data"] * shape["fsdp"]) == 0

        vocab_size = self.model.vocab_size or self.tokenizer.vocab_size
        parameters = dataclasses.replace(self.model, vocab_size=vocab_size).num_parameters()
        return Work(parameters, rows * self.model.length, divides)


# The parts of a config that are one of several classes: the field that names the class, and the places of the classes.
CHOICES = {ModelConfig: ("family", FAMILIES), DataConfig: ("kind", KINDS)}


def default_config(model: ModelConfig | None = None, data: DataConfig | None = None) -> ml_collections.ConfigDict:
    """Returns a typed, locked tree of all options for a config file to change.

    Args:
      model: options of the model; None: the defaults of a GPT.
      data: options of the data; None: the defaults of text.
    """
    return to_tree(Config(model=model or GPTConfig(), data=data or TextConfig()))


def to_tree(config: Config) -> ml_collections.ConfigDict:
    """Returns a config as a typed, locked tree."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_tree(tree: ml_collections.ConfigDict | dict) -> Config:
    """Returns the config of a tree.

    Raises:
      UserError: an unknown or missing key, a wrong type, or a value that its part refuses.
    """
    return _build(Config, dict(tree.items()), "")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns a nested dictionary in the form {"model.num_layers": 8, …}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} for the keys in which two configs differ."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    keys = dict.fromkeys([*before, *after])  # families and kinds have different keys
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def is_harmless(key: str) -> bool:
    """Returns whether a resumed run may change the value of a config key: see `gpt.runtime.fields.harmless`."""
    section, _, name = key.partition(".")
    part = typing.get_type_hints(Config)[section]
    classes = [named(place) for place in CHOICES[part][1].values()] if part in CHOICES else [part]
    return any(name in harmless_names(cls) for cls in classes if dataclasses.is_dataclass(cls))


def known_keys() -> list[str]:
    """Returns all config keys, those of every family and kind included."""
    keys = list(flatten(dataclasses.asdict(Config())))
    for section, places in (("model", FAMILIES), ("data", KINDS)):
        keys += [f"{section}.{field.name}" for place in places.values() for field in dataclasses.fields(named(place))]
    return list(dict.fromkeys(keys))


def nearest_keys(key: str) -> list[str]:
    """Returns the config keys that a misspelt key may stand for, the best first."""
    known = known_keys()
    by_leaf: dict[str, list[str]] = {}
    for name in known:
        by_leaf.setdefault(name.split(".")[-1], []).append(name)
    last = key.split(".")[-1]
    leaves = difflib.get_close_matches(last, by_leaf, n=2, cutoff=0.75)
    leaves = leaves or [leaf for leaf in by_leaf if len(last) > 2 and leaf.startswith(last)]
    groups = {name.split(".")[0] for name in known}
    whole = difflib.get_close_matches(key, [*sorted(groups), *known], n=2, cutoff=0.75)
    return list(dict.fromkeys(whole + [name for leaf in leaves for name in by_leaf[leaf]]))[:3]


def unknown_key(key: str) -> UserError:
    """Returns the error for a key that a config does not have."""
    if key in known_keys():
        return UserError(f"{key} is a key of another model.family or data.kind; start from a config file that has it.")
    near = nearest_keys(key)
    return UserError(f"There is no config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "."))


def _chosen_class(expected, values, key: str):
    """Returns the dataclass for a part of the config that has these values."""
    if expected not in CHOICES:
        return expected
    field, classes = CHOICES[expected]
    if field not in values:
        raise UserError(f"The config has no key '{key}.{field}'.")
    if not isinstance(values[field], str):
        raise UserError(f"{key}.{field}={values[field]!r} has to be of type str.")
    check_choice(f"{key}.{field}", values[field], classes)
    return named(classes[values[field]])


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
