"""Architectures of transformers: names and shapes of tensors, keys of config.json, and the tokenizer.

The folder `architectures` has a file for each, whose format is explained in llama.toml.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from gpt.checkpointing.run import Run
from gpt.data.tokenizers import Labels, Tokenizer, TokenizerConfig
from gpt.interop import tokenizer_files
from gpt.interop.config_file import ConfigFile, tables
from gpt.interop.gguf_file import GGUFFile
from gpt.interop.safetensors_folder import SafetensorsFolder
from gpt.models import rotary
from gpt.models.base import ModelConfig
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError
from gpt.runtime.fields import harmless_names

# transformers' names of activations, and ours. The weights that OpenAI published for GPT-2 use gelu_new.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"silu": "silu", "swish": "silu"}
# Sizes of our config whose default, 0, is computed from others, as None is in transformers.
SIZES = {"num_kv_heads": "kv_heads", "head_size": "head_dim", "mlp_size": "mlp_dim"}
# Fields of our config that change the training only, or have no key in config.json.
UNRELATED = {"vocab_multiple", "dtype", "zero_init", "lora_rank", "lora_alpha", "lora_targets"}
UNRELATED |= {"embed_dropout", "residual_dropout", "attention_dropout", "pixel_mean", "pixel_std"}


# A model in a format of another library. Both have the path and the config.json of the model, the shape of each tensor
# by transformers' name, a method that reads a tensor, and one that returns the tokenizer.
Source = SafetensorsFolder | GGUFFile


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of our models, and the tensors of transformers that hold the same numbers.

    Attributes:
      names: names of transformers' tensors, without the architecture's prefix; "{}" stands for the number of the layer.
      shapes: shape of each of transformers' tensors.
      our_shape: shape of our parameter in one layer. It may have more elements than transformers' tensors, for a
        vocabulary that is padded; these are 0.
      axes: order of transformers' axes that is our order; (): the two are the same.
      packed: sizes of all queries, all keys and all values along the last axis, in which transformers' tensors have
        them. Our last two axes are the groups of heads, and the queries, key and value of one group after the other.
        (): the order of the elements is the same.
      num_layers: number of layers that have this parameter, which is stacked over them; 0: it is outside the layers.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    our_shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    num_layers: int = 0

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of our parameter in a checkpoint, with an axis for the layers in front if there are layers."""
        return (self.num_layers, *self.our_shape) if self.num_layers else self.our_shape

    @property
    def names_by_layer(self) -> list[list[str]]:
        """Names of transformers' tensors in each layer; one list for a parameter outside the layers."""
        return [[name.format(layer) for name in self.names] for layer in range(self.num_layers or 1)]

    @property
    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of transformers' tensors in all layers, by name."""
        return {name: shape for names in self.names_by_layer for name, shape in zip(names, self.shapes, strict=True)}

    def to_ours(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns our array of one layer without its padding, from transformers' arrays; a view if that is possible."""
        arrays = [array.transpose(self.axes or range(array.ndim)) for array in arrays]
        if self.packed:
            if len(arrays) == 1:
                arrays = np.split(arrays[0], np.cumsum(self.packed)[:-1], axis=-1)
            groups = self.our_shape[-2]
            return np.concatenate([array.reshape(*array.shape[:-1], groups, -1) for array in arrays], axis=-1)
        return arrays[0] if self._is_padded else arrays[0].reshape(self.our_shape)

    def to_theirs(self, ours: np.ndarray) -> list[np.ndarray]:
        """Returns transformers' arrays of one layer, from ours."""
        arrays = [ours]
        if self.packed:
            parts = np.split(ours, np.cumsum(self.packed)[:-1] // ours.shape[-2], axis=-1)
            arrays = [part.reshape(*part.shape[:-2], -1) for part in parts]
            arrays = arrays if len(self.names) > 1 else [np.concatenate(arrays, axis=-1)]
        axes = self.axes or tuple(range(len(self.shapes[0])))
        result = []
        for array, shape in zip(arrays, self.shapes, strict=True):
            in_our_order = tuple(shape[axis] for axis in axes)
            if self._is_padded:
                array = array[tuple(map(slice, in_our_order))]
            result.append(array.reshape(in_our_order).transpose(np.argsort(axes)))
        return result

    @property
    def _is_padded(self) -> bool:
        return math.prod(self.our_shape) != sum(map(math.prod, self.shapes))


def norm_tensors(c: ModelConfig, name: str, their_name: str, *shape: int, layers: int = 0) -> dict[str, Tensor]:
    """Returns the parameters of a norm, whose scale has this shape, by name."""
    parts = {"scale": "weight"} | ({"bias": "bias"} if c.norm == "layernorm" and c.has_bias("norm") else {})
    return {
        f"{name}/{ours}": Tensor((f"{their_name}.{theirs}",), ((math.prod(shape),),), shape, num_layers=layers)
        for ours, theirs in parts.items()
    }


C = TypeVar("C", bound=ModelConfig)
Vocabulary = Tokenizer | Labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(Generic[C]):
    """An architecture of transformers, as tables, and hooks for what tables cannot express.

    Attributes:
      model_type, model_class: the architecture's name in config.json, and in Python.
      config_class: our config of the same model.
      prefix: what the names of tensors begin with, except those that begin with `head`.
      layer: what the names of a layer's tensors begin with, "{}" for its number.
      blocks: transformers' names, separated by spaces, of each layer of ours in a block.
      final_norm: name of the last norm.
      is_transposed: whether transformers' kernels are [outputs, inputs]; ours are [inputs, outputs].
      is_packed: whether a single tensor with queries, keys and values has those of one head after the other, like ours.
      constants: fields of our config with the value that they have in each model of this architecture.
      activation: the key of the activation.
      numbers: our config's fields, each with its key in config.json. Where 0 is our default, it is null there.
      flags: our config's fields that are True or False, each with its key in config.json.
      biases: the places of biases in our config that a key of config.json switches on, by key. The other biases are
        those of `constants`.
      fixed: keys of config.json with the only value, True or False, that can be converted; it is also their default.
      repeated: keys that some config.json have, and the field of our config whose value they repeat.
      ignored: keys that transformers does not use.
      defaults: transformers' defaults of the keys.
    """

    model_type: str
    model_class: str
    config_class: type[C]
    prefix: str
    head: str = "lm_head."
    layer: str = "layers.{}."
    blocks: dict[str, str]
    final_norm: str = "norm"
    is_transposed: bool = True
    is_packed: bool = False
    constants: dict[str, Any]
    activation: str = "hidden_act"
    numbers: dict[str, str]
    flags: dict[str, str] = dataclasses.field(default_factory=dict)
    biases: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: dict[str, bool] = dataclasses.field(default_factory=dict)
    repeated: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    defaults: dict[str, Any]

    def tensors(self, config: C) -> dict[str, Tensor]:
        """Returns all parameters, by their names in a checkpoint."""
        final_norm = norm_tensors(config, "final_norm", self.final_norm, config.embed_dim)
        return self.outer_tensors(config) | final_norm | self._block_tensors(config)

    def outer_tensors(self, config: C) -> dict[str, Tensor]:
        """Returns the parameters before the blocks and after the last norm, by their names in a checkpoint."""
        raise NotImplementedError

    def _block_tensors(self, c: C) -> dict[str, Tensor]:
        heads, groups, size, layers = c.num_heads, c.kv_heads, c.head_dim, c.num_layers
        each = c.qk_norm == "all"  # whether each head has its own scales
        scales = {"query_norm": (heads, size)[not each :], "key_norm": (groups, size)[not each :]}
        tensors: dict[str, Tensor] = {}
        for name, names in self.blocks.items():
            theirs, place = [self.layer + part for part in names.split()], name.rpartition("/")[2]
            if place not in c.layer_weights:
                shape = scales.get(place, (c.embed_dim,))
                tensors |= norm_tensors(c, f"blocks/{name}", theirs[0], *shape, layers=layers)
                continue
            rows, columns = c.layer_weights[place]
            inputs = (heads, size) if place == "out" else (rows,)
            outputs = (groups, columns // groups) if place == "qkv" else (columns,)
            packed = (heads * size, groups * size, groups * size) if place == "qkv" and not self.is_packed else ()
            widths = packed if len(theirs) > 1 else (columns,)
            kernels = tuple((width, rows) if self.is_transposed else (rows, width) for width in widths)
            axes, weights = (1, 0) if self.is_transposed else (), tuple(f"{each}.weight" for each in theirs)
            tensors[f"blocks/{name}/kernel"] = Tensor(weights, kernels, (*inputs, *outputs), axes, packed, layers)
            if c.has_bias(place):
                biases, shapes = tuple(f"{each}.bias" for each in theirs), tuple((width,) for width in widths)
                tensors[f"blocks/{name}/bias"] = Tensor(biases, shapes, outputs, (), packed, layers)
        return tensors

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns all fields of our config that config.json describes, from those that the tables have.

        Raises:
          UserError: a key is missing, damaged or not supported.
        """
        return fields

    def write_rest(self, config: C) -> dict[str, Any]:
        """Returns the keys of config.json that the tables do not have."""
        return {}

    def read(self, source: Source, vocab_multiple: int) -> tuple[C, Vocabulary, dict[str, Any]]:
        """Returns our config of a model, its tokenizer or classes, and other parts of the run's config by name.

        Raises:
          UserError: something is missing, damaged or not supported.
        """
        raise NotImplementedError

    def write_files(self, config: C, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the keys of config.json that describe the vocabulary, and the texts of further files by name."""
        raise NotImplementedError

    def duplicates(self, config: C, source: Source, names: dict[str, str]) -> set[str]:
        """Returns the tensors that repeat another one and are not read.

        Args:
          names: the tensors' names in the source, by those without the architecture's prefix.

        Raises:
          UserError: a repeated tensor differs from the other one.
        """
        return set()

    def read_config(self, file: ConfigFile) -> C:
        """Returns our config of the model that a config.json describes.

        Raises:
          UserError: a key is not known, or a value is missing, has the wrong type, or describes another function.
        """
        file = file.with_defaults(self.defaults)
        kinds, fields = typing.get_type_hints(self.config_class), dict(self.constants)
        for name, key in self.numbers.items():
            is_zero = file.get(key) is None and getattr(self.config_class, name) == 0
            fields[name] = 0 if is_zero else file.number(key, kinds[name])
        name = file.get(self.activation)
        file.check(self.activation, name in [*ACTIVATIONS], ", ".join(ACTIVATIONS))
        fields["activation"] = ACTIVATIONS[name]
        fixed = {"add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": False} | self.fixed
        for key, value in fixed.items():
            file.check(key, bool(file.get(key, value)) == value, repr(value))
        places = [place for key, place in self.biases.items() if file.get(key)]
        fields["bias"] = ",".join([*places, *filter(None, [fields.get("bias")])]) or "none"
        fields |= {name: bool(file.get(key)) for name, key in self.flags.items()}
        fields = self.read_rest(file, fields)
        for key, name in self.repeated.items():
            file.check(key, file.get(key) in (None, fields[name]), str(fields[name]))
        file.read_keys.update(self.ignored)
        config = self.config_class(**fields)
        file.check_all_read()
        return config

    def write_config(self, config: C) -> dict[str, Any]:
        """Returns the content of config.json for a model that transformers has, see `differences`."""
        default = self.defaults[self.activation]
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {ACTIVATIONS[default]: default}
        content: dict[str, Any] = {"architectures": [self.model_class], "model_type": self.model_type}
        for name, key in self.numbers.items():
            if (value := getattr(config, name)) or getattr(self.config_class, name) != 0:
                content[key] = value
            elif self.defaults.get(key) is not None:
                content[key] = getattr(config, SIZES[name]) if name in SIZES else None
        content |= {self.activation: names.get(config.activation, default)}
        content |= {key: config.has_bias(place.split(",")[0]) for key, place in self.biases.items()}
        content |= {key: getattr(config, name) for name, key in self.flags.items()}
        return content | {"initializer_range": 0.02, "torch_dtype": "float32"} | self.write_rest(config)

    def differences(self, config: C) -> list[str]:
        """Returns what a model has that transformers' does not, each like "model.norm=rmsnorm, only layernorm"."""
        theirs = self.read_config(ConfigFile(Path("config.json"), self.write_config(config)))
        ours, wanted = comparable(config), comparable(theirs)
        return [
            f"model.{name}={getattr(config, name)}, only {getattr(theirs, name)}"
            for name, value in ours.items()
            if name in wanted and not _equal(value, wanted[name])
        ]

    def write(self, config: C, run: Run) -> dict[str, str]:
        """Returns the text of config.json and of each further file, by name.

        Raises:
          UserError: transformers has no such model.
        """
        for difference in self.differences(config):
            raise UserError(f"transformers' {self.model_class} has no {difference}.")
        keys, files = self.write_files(config, run)
        return {"config.json": json.dumps(self.write_config(config) | keys, indent=2) + "\n", **files}


def declaration(name: str) -> dict[str, Any]:
    """Returns the attributes of an `Architecture` that its file has or inherits, see llama.toml."""
    own = tables(f"architectures/{name}.toml")
    inherited = own.pop("extends", None)
    return _merged(declaration(inherited) if inherited else {}, own)


def _merged(inherited: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    parts = {key: _merged(inherited.get(key, {}), value) for key, value in own.items() if isinstance(value, dict)}
    return {key: value for key, value in (inherited | own | parts).items() if value != "none"}


def comparable(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config that determine what a model computes, in the same form for equal models."""
    unrelated = UNRELATED | harmless_names(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {name: getattr(config, resolved) for name, resolved in SIZES.items()}
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    places = ["qkv", "out", "up", "down", *["gate"] * config.gated_mlp, *["norm"] * (config.norm == "layernorm")]
    values["rotary_base_local"] = config.rotary_base_local or config.rotary_base
    values["rotary_scaling"] = config.rotary_scaling and rotary.parse(config.rotary_scaling)
    if config.positions != "rotary":
        unrelated |= {name for name in values if name.startswith("rotary_")}
    if not config.window:
        unrelated |= {"window_pattern", "rotary_base_local"}
    # The biases come last: which there are depends on the kind of the norm and the MLP.
    bias = {place for place in places if config.has_bias(place)}
    return {name: value for name, value in values.items() if name not in unrelated | {"bias"}} | {"bias": bias}


def _equal(ours: Any, theirs: Any) -> bool:
    return math.isclose(ours, theirs) if isinstance(ours, float) else ours == theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Architecture[GPTConfig]):
    """A decoder-only language model, which has a tokenizer and may share its token embedding with the head.

    Attributes:
      embedding, position_embedding: names of the tensors with the embeddings; that of the head is `head` + "weight".
    """

    config_class: type[GPTConfig] = GPTConfig
    embedding: str = "embed_tokens.weight"
    position_embedding: str = ""

    def outer_tensors(self, config: GPTConfig) -> dict[str, Tensor]:
        width, table = config.embed_dim, (config.vocab_size, config.embed_dim)
        tensors = {"token_embedding/embedding": Tensor((self.embedding,), (table,), (config.padded_vocab_size, width))}
        if self.position_embedding:
            shape = config.block_size, width
            tensors["position_embedding/embedding"] = Tensor((self.position_embedding,), (shape,), shape)
        if not config.tie_embeddings:
            padded = width, config.padded_vocab_size
            tensors["head/kernel"] = Tensor((f"{self.head}weight",), (table,), padded, axes=(1, 0))
        return tensors

    def read(self, source: Source, vocab_multiple: int) -> tuple[GPTConfig, Vocabulary, dict[str, Any]]:
        config = dataclasses.replace(self.read_config(source.config), vocab_multiple=vocab_multiple)
        tokenizer = source.tokenizer()
        return config, tokenizer, {"tokenizer": TokenizerConfig(name=tokenizer.name)}

    def write_files(self, config: GPTConfig, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        assert not isinstance(run.tokenizer, Labels)
        return tokenizer_files.write(run.tokenizer)

    def duplicates(self, config: GPTConfig, source: Source, names: dict[str, str]) -> set[str]:
        head, table = f"{self.head}weight", self.embedding
        if not config.tie_embeddings or not {head, table} <= names.keys():
            return set()
        if not np.array_equal(source.read(names[head]), source.read(names[table])):
            raise UserError(f"{source.path}: {head} differs from {table}, but config.json has tie_word_embeddings.")
        return {head}
