"""What one file for each architecture declares: names and shapes of tensors, keys of config.json, and the tokenizer."""

import dataclasses
import json
import math
import re
import typing
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from gpt.checkpointing.run import Run
from gpt.data.tokenizers import Labels, Tokenizer, TokenizerConfig
from gpt.interop import tokenizer_files
from gpt.interop.config_file import ConfigFile
from gpt.interop.safetensors_folder import SafetensorsFolder
from gpt.models.gpt import GPTConfig
from gpt.models.transformer import BlockConfig
from gpt.runtime.errors import UserError

# transformers' names of activations, and ours. The weights that OpenAI published for GPT-2 use gelu_new.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"silu": "silu", "swish": "silu"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of our models, and the tensors of transformers that hold the same numbers.

    Attributes:
      names: names of transformers' tensors, without the architecture's prefix; "{}" stands for the number of the layer.
        Several tensors follow one another along the last axis of our parameter.
      shape: shape of each of transformers' tensors.
      our_shape: shape of our parameter in one layer. It may have more elements than `shape`, for a vocabulary that is
        padded; these are 0.
      axes: order of transformers' axes that is our order; (): the two are the same.
      is_packed: our last axis holds the query, key and value of one head after the other, theirs all queries, all keys
        and then all values.
      num_layers: number of layers that have this parameter, which is stacked over them; 0: it is outside the layers.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    is_packed: bool = False
    num_layers: int = 0

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of our parameter in a checkpoint, with an axis for the layers in front if there are layers."""
        return (self.num_layers, *self.our_shape) if self.num_layers else self.our_shape

    @property
    def names_by_layer(self) -> list[list[str]]:
        """Names of transformers' tensors in each layer; one list for a parameter outside the layers."""
        return [[name.format(layer) for name in self.names] for layer in range(self.num_layers or 1)]

    def to_ours(self, arrays: list[np.ndarray], ours: np.ndarray) -> None:
        """Writes transformers' arrays of one layer into our array, which holds zeros."""
        parts = [array.transpose(self.axes or range(array.ndim)) for array in arrays]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if self.is_packed:
            *inputs, heads, width = self.our_shape
            joined = joined.reshape(*inputs, 3, heads, width // 3).swapaxes(-3, -2)
        if self._is_padded:
            ours[tuple(map(slice, joined.shape))] = joined
        else:
            ours[...] = joined.reshape(ours.shape)

    def to_theirs(self, ours: np.ndarray) -> list[np.ndarray]:
        """Returns transformers' arrays of one layer, from ours."""
        axes = self.axes or tuple(range(len(self.shape)))
        *rows, last = (self.shape[axis] for axis in axes)
        if self.is_packed:
            *inputs, heads, width = self.our_shape
            ours = ours.reshape(*inputs, heads, 3, width // 3).swapaxes(-3, -2)
        if self._is_padded:
            ours = ours[tuple(map(slice, (*rows, last)))]
        parts = np.split(ours.reshape(*rows, last * len(self.names)), len(self.names), axis=-1)
        return [part.transpose(np.argsort(axes)) for part in parts]

    @property
    def _is_padded(self) -> bool:
        return math.prod(self.our_shape) != len(self.names) * math.prod(self.shape)


def norm_tensors(name: str, their_name: str, width: int, num_layers: int = 0) -> dict[str, Tensor]:
    """Returns the parameters of a LayerNorm."""
    parts = {"scale": "weight", "bias": "bias"}
    return {
        f"{name}/{ours}": Tensor((f"{their_name}.{theirs}",), (width,), (width,), num_layers=num_layers)
        for ours, theirs in parts.items()
    }


def block_tensors(config: BlockConfig, names: dict[str, list[str]], is_transposed: bool) -> dict[str, Tensor]:
    """Returns the parameters of the blocks.

    Args:
      names: transformers' names of each layer of ours in a block, "{}" for the number of the block.
      is_transposed: transformers' kernels are [outputs, inputs]; ours are [inputs, outputs].
    """
    width, heads, layers = (config.embed_dim,), (config.num_heads, config.head_dim), config.num_layers
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "attention/qkv": (width, (config.num_heads, 3 * config.head_dim)),
        "attention/out": (heads, width),
        "mlp/up": (width, (config.mlp_dim,)),
        "mlp/down": ((config.mlp_dim,), width),
    }
    tensors: dict[str, Tensor] = {}
    for name, theirs in names.items():
        if name not in shapes:
            tensors |= norm_tensors(f"blocks/{name}", theirs[0], config.embed_dim, layers)
            continue
        inputs, outputs = shapes[name]
        rows, columns, is_packed = math.prod(inputs), math.prod(outputs) // len(theirs), name == "attention/qkv"
        kernels, biases = (tuple(f"{each}.{part}" for each in theirs) for part in ("weight", "bias"))
        shape, axes = ((columns, rows), (1, 0)) if is_transposed else ((rows, columns), ())
        tensors[f"blocks/{name}/kernel"] = Tensor(kernels, shape, (*inputs, *outputs), axes, is_packed, layers)
        tensors[f"blocks/{name}/bias"] = Tensor(biases, (columns,), outputs, (), is_packed, layers)
    return tensors


C = TypeVar("C", bound=BlockConfig)
Rest = tuple[dict[str, Any], Tokenizer | Labels, dict[str, Any]]


class Architecture(Generic[C]):
    """An architecture of transformers, as tables, and hooks for what tables cannot express.

    Attributes:
      model_type: the architecture's name in config.json.
      title, model_class: its names in messages, and in Python.
      config_class: our config of the same model.
      prefix: what the names of tensors begin with, except those that begin with `head`.
      buffers: names of tensors in old files that are no parameters.
      fixed: keys of config.json with the only value that can be converted, which is also their default.
      activation: the key of the activation, and its default.
      hidden_size: the key of the MLP's hidden width; its default is four times the width of the model.
      numbers: our config's fields, each with its key in config.json and the default there (None: there is none).
      required: fields of our config, each with the only value that transformers' model has.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    model_class: ClassVar[str]
    config_class: type[C]
    prefix: ClassVar[str]
    head: ClassVar[str]
    buffers: ClassVar[re.Pattern | None] = None
    fixed: ClassVar[dict[str, Any]]
    activation: ClassVar[tuple[str, str]]
    hidden_size: ClassVar[str]
    numbers: ClassVar[dict[str, tuple[str, float | None]]]
    required: ClassVar[dict[str, Any]] = {"norm": "layernorm", "positions": "learned", "bias": "all", "qk_norm": "none"}

    def tensors(self, config: C) -> dict[str, Tensor]:
        """Returns all parameters, by their names in a checkpoint."""
        raise NotImplementedError

    def read_rest(self, file: ConfigFile, vocab_multiple: int) -> Rest:
        """Reads what the tables do not have.

        Returns:
          Further fields of the model's config, the tokenizer (or the names of the classes), and parts of the run's
          config besides the model, by name.

        Raises:
          UserError: something is missing, damaged or not supported.
        """
        raise NotImplementedError

    def write_rest(self, config: C, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the keys of config.json that the tables do not have, and the texts of further files by name."""
        raise NotImplementedError

    def duplicates(self, config: C, folder: SafetensorsFolder) -> set[str]:
        """Returns the tensors that repeat another one and are not read. Raises UserError if they differ from it."""
        return set()

    def read_config(self, file: ConfigFile, vocab_multiple: int) -> tuple[C, Rest]:
        """Returns our config of the model that a config.json describes, and what `read_rest` returns.

        Raises:
          UserError: a value is missing, has the wrong type, or describes another function.
        """
        activation_key, default = self.activation
        file = file.with_defaults(self.fixed | {activation_key: default} | dict(self.numbers.values()))
        for key, value in self.fixed.items():
            file.check(key, file.values[key] == value, repr(value))
        activation = file.values[activation_key]
        file.check(activation_key, activation in [*ACTIVATIONS], ", ".join(ACTIVATIONS))
        kinds = typing.get_type_hints(self.config_class)
        fields: dict[str, Any] = {name: file.number(key, kinds[name]) for name, (key, _) in self.numbers.items()}
        is_given = file.values.get(self.hidden_size) is not None
        hidden = file.number(self.hidden_size, int) if is_given else 4 * fields["embed_dim"]
        fields |= {"activation": ACTIVATIONS[activation], "mlp_size": hidden}
        rest = self.read_rest(file, vocab_multiple)
        config = self.config_class(**fields, **rest[0])
        if config.mlp_dim != hidden:
            raise UserError(
                f"{file.path}: {self.hidden_size} is {hidden}, which no model.mlp_factor gives for this width."
            )
        return config, rest

    def write(self, config: C, run: Run) -> dict[str, str]:
        """Returns the text of config.json and of each further file, by name.

        Raises:
          UserError: transformers has no such model.
        """
        activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        allowed_values = {name: [value] for name, value in self.required.items()} | {"activation": [*activations]}
        for name, allowed in allowed_values.items():
            if (value := getattr(config, name)) not in allowed:
                raise UserError(
                    f"transformers' {self.title} has no model.{name}={value}, only {', '.join(map(str, allowed))}."
                )
        keys, files = self.write_rest(config, run)
        content = {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            **self.fixed,
            **{key: getattr(config, name) for name, (key, _) in self.numbers.items()},
            self.activation[0]: activations[config.activation],
            self.hidden_size: config.mlp_dim,
            "initializer_range": 0.02,
            "torch_dtype": "float32",
            **keys,
        }
        return {"config.json": json.dumps(content, indent=2) + "\n", **files}


class Decoder(Architecture[GPTConfig]):
    """A decoder-only language model, which has a tokenizer and may share its token embedding with the head.

    Attributes:
      embedding: name of the tensor with the token embedding; that of the head is `head` + "weight".
    """

    config_class = GPTConfig
    head = "lm_head."
    embedding: ClassVar[str]

    def read_rest(self, file: ConfigFile, vocab_multiple: int) -> Rest:
        tokenizer = tokenizer_files.read(file.path.parent)
        tie_embeddings = bool(file.values.get("tie_word_embeddings", True))
        fields = {"vocab_multiple": vocab_multiple, "tie_embeddings": tie_embeddings}
        return fields, tokenizer, {"tokenizer": TokenizerConfig(name=tokenizer.name)}

    def write_rest(self, config: GPTConfig, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        assert not isinstance(run.tokenizer, Labels)
        keys, files = tokenizer_files.write(run.tokenizer)
        return keys | {"tie_word_embeddings": config.tie_embeddings}, files

    def duplicates(self, config: GPTConfig, folder: SafetensorsFolder) -> set[str]:
        head, embedding = f"{self.head}weight", self.embedding
        if not config.tie_embeddings or not {head, embedding} <= folder.shapes.keys():
            return set()
        if not np.array_equal(folder.read(head), folder.read(embedding)):
            raise UserError(f"{folder.path}: {head} differs from {embedding}, but config.json has tie_word_embeddings.")
        return {head}
