"""Weights of GPT-2 and ViT in the layout of Hugging Face's transformers: read array by array, and written."""

import dataclasses
import json
import math
import re
import secrets
import shutil
import typing
from pathlib import Path
from typing import Any

from gpt.checkpointing.loading import Weights
from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.checkpointing.writing import Deferred, write_params
from gpt.config import Config
from gpt.data import bpe, tokenizers
from gpt.data.images import ImagesConfig
from gpt.models.gpt import GPTConfig
from gpt.models.vit import ViTConfig
from gpt.runtime import files
from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json

INDEX = "model.safetensors.index.json"
PREPROCESSOR, NESTED_PREPROCESSOR = "preprocessor_config.json", "processor_config.json"
GENERATION = "generation_config.json"
OUR_TOKENIZER = "gpt_tokenizer.json"  # in a folder of transformers, a tokenizer of ours that it has no form for
# Their name of an activation: ours. All of GPT-2's own weights have gelu_new.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"silu": "silu", "swish": "silu"}
# The image processors of transformers that a ViT's folder may name, and their defaults for keys that it leaves out.
USUAL = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": False,
    "do_pad": False,
    "use_square_size": False,
    "default_to_square": True,
    "crop_size": None,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": 0.5,
    "image_std": 0.5,
}
CLIP_PIXELS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PROCESSORS = {
    "ViT": {"resample": 2},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True},
    "CLIP": CLIP_PIXELS
    | {"size": 224, "crop_size": 224, "do_center_crop": True, "default_to_square": False, "do_convert_rgb": True},
}
RESAMPLING = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; its backends differ on the other filters
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # masks that old files hold: no parameters


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter there and here.

    Attributes:
      names: there, without the prefix of its architecture; "{}" stands for the number of a layer, where there is one
        for each. Several are parts, one after the other along the last of our axes.
      shape: of each of them there.
      ours: its shape here, for one layer; those with a row for each token may have more rows, of zeros.
      order: of their axes, so that they come as ours do; (): as they are.
      packed: the last axis holds queries, keys and values: one kind after the other there, one head after the
        other here.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    order: tuple[int, ...] = ()
    packed: bool = False

    def read(self, theirs: list[Any], ours: Any) -> None:
        """Fills `ours`, of zeros, from `theirs`; NumPy arrays."""
        import numpy as np

        parts = [part.transpose(self.order or range(part.ndim)) for part in theirs]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if self.packed:
            *rows, heads, width = self.ours
            found = found.reshape(*rows, 3, heads, width // 3).swapaxes(-3, -2)
        if self._is_padded:
            ours[tuple(map(slice, found.shape))] = found
        else:
            ours[...] = found.reshape(ours.shape)

    def write(self, ours: Any) -> list[Any]:
        """Theirs of ours."""
        import numpy as np

        order = self.order or tuple(range(len(self.shape)))
        *rows, last = (self.shape[axis] for axis in order)
        if self.packed:
            *inputs, heads, width = self.ours
            ours = ours.reshape(*inputs, heads, 3, width // 3).swapaxes(-3, -2)
        if self._is_padded:
            ours = ours[tuple(map(slice, (*rows, last)))]
        parts = np.split(ours.reshape(*rows, last * len(self.names)), len(self.names), axis=-1)
        return [part.transpose(np.argsort(order)) for part in parts]

    @property
    def _is_padded(self) -> bool:
        return math.prod(self.ours) != len(self.names) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of model of transformers, and ours.

    Attributes:
      model_type: its name in config.json.
      title, model_class: its names for a person, and in Python.
      prefix: of the names of tensors, but for those of the head.
      head: the beginning of these.
      fixed: what config.json may say, with the value that is right where it says nothing: others are other functions.
      activation: the key there of the activation, and what it is where that is missing.
      needed: keys of our config, with the values without which transformers has no such model.
      numbers: keys there and here of what is a number in both, with what it is where it is missing (None: it may not).
    """

    model_type: str
    title: str
    model_class: str
    prefix: str
    head: str
    fixed: dict[str, Any]
    activation: tuple[str, str]
    needed: dict[str, Any]
    numbers: dict[str, tuple[str, float | None]]


SAME_BLOCKS = {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False}
ARCHITECTURES = {
    "gpt": Architecture(
        model_type="gpt2",
        title="GPT-2",
        model_class="GPT2LMHeadModel",
        prefix="transformer.",
        head="lm_head.",
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        activation=("activation_function", "gelu_new"),
        needed=SAME_BLOCKS,
        numbers={
            "vocab_size": ("vocab_size", None),
            "n_positions": ("block_size", None),
            "n_layer": ("num_layers", None),
            "n_head": ("num_heads", None),
            "n_embd": ("embed_dim", None),
            "layer_norm_epsilon": ("norm_epsilon", 1e-5),
            "embd_pdrop": ("embed_dropout", 0.1),
            "resid_pdrop": ("residual_dropout", 0.1),
            "attn_pdrop": ("attention_dropout", 0.1),
        },
    ),
    "vit": Architecture(
        model_type="vit",
        title="ViT",
        model_class="ViTForImageClassification",
        prefix="vit.",
        head="classifier.",
        fixed={"qkv_bias": True},
        activation=("hidden_act", "gelu"),
        needed=SAME_BLOCKS | {"pooling": "class_token"},
        numbers={
            "image_size": ("image_size", 224),
            "num_channels": ("channels", 3),
            "patch_size": ("patch_size", 16),
            "num_hidden_layers": ("num_layers", None),
            "num_attention_heads": ("num_heads", None),
            "hidden_size": ("embed_dim", None),
            "layer_norm_eps": ("norm_epsilon", 1e-12),
            "hidden_dropout_prob": ("residual_dropout", 0.0),
            "attention_probs_dropout_prob": ("attention_dropout", 0.0),
        },
    ),
}


def tensors(config: GPTConfig | ViTConfig) -> dict[str, Tensor]:
    """Every parameter of a model, by its name in a checkpoint."""
    return _vit_tensors(config) if config.family == "vit" else _gpt2_tensors(config)


def _gpt2_tensors(config: GPTConfig) -> dict[str, Tensor]:
    d, f, heads, kv = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim
    vocab, padded = config.vocab_size, config.padded_vocab_size
    found = {
        "token_embedding/embedding": Tensor(("wte.weight",), (vocab, d), (padded, d)),
        "position_embedding/embedding": Tensor(("wpe.weight",), (config.block_size, d), (config.block_size, d)),
    }
    norms = {"blocks/norm_1": "h.{}.ln_1", "blocks/norm_2": "h.{}.ln_2", "final_norm": "ln_f"}
    found |= _norms(norms, d)
    for name, theirs, inputs, outputs in (
        ("attention/qkv", "attn.c_attn", (d,), (heads, 3 * kv)),
        ("attention/out", "attn.c_proj", (heads, kv), (d,)),
        ("mlp/up", "mlp.c_fc", (d,), (f,)),
        ("mlp/down", "mlp.c_proj", (f,), (d,)),
    ):
        rows, width, packed = math.prod(inputs), math.prod(outputs), name == "attention/qkv"
        kernel, bias = ((f"h.{{}}.{theirs}.{part}",) for part in ("weight", "bias"))
        found[f"blocks/{name}/kernel"] = Tensor(kernel, (rows, width), (*inputs, *outputs), packed=packed)
        found[f"blocks/{name}/bias"] = Tensor(bias, (width,), outputs, packed=packed)
    if not config.tie_embeddings:
        found["head/kernel"] = Tensor(("lm_head.weight",), (vocab, d), (d, padded), order=(1, 0))
    return found


def _vit_tensors(config: ViTConfig) -> dict[str, Tensor]:
    d, f, heads, kv, length = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim, config.length
    channels, side, classes = config.channels, config.patch_size, config.vocab_size
    embeddings, layer = "embeddings.", "encoder.layer.{}."
    # A convolution whose steps are as wide as its kernel: output, channel, row and column there.
    patches, pixels = f"{embeddings}patch_embeddings.projection", side * side * channels
    found = {
        "class_token": Tensor((f"{embeddings}cls_token",), (1, 1, d), (d,)),
        "position_embedding": Tensor((f"{embeddings}position_embeddings",), (1, length, d), (length, d)),
        "patch_embedding/kernel": Tensor((f"{patches}.weight",), (d, channels, side, side), (pixels, d), (2, 3, 1, 0)),
        "patch_embedding/bias": Tensor((f"{patches}.bias",), (d,), (d,)),
        "head/kernel": Tensor(("classifier.weight",), (classes, d), (d, classes), order=(1, 0)),
        "head/bias": Tensor(("classifier.bias",), (classes,), (classes,)),
    }
    norms = {"blocks/norm_1": f"{layer}layernorm_before", "blocks/norm_2": f"{layer}layernorm_after"}
    found |= _norms(norms | {"final_norm": "layernorm"}, d)
    for name, theirs, inputs, outputs in (
        ("attention/qkv", [f"attention.attention.{kind}" for kind in ("query", "key", "value")], (d,), (heads, 3 * kv)),
        ("attention/out", ["attention.output.dense"], (heads, kv), (d,)),
        ("mlp/up", ["intermediate.dense"], (d,), (f,)),
        ("mlp/down", ["output.dense"], (f,), (d,)),
    ):
        rows, width, packed = math.prod(inputs), math.prod(outputs) // len(theirs), name == "attention/qkv"
        kernels, biases = (tuple(f"{layer}{each}.{part}" for each in theirs) for part in ("weight", "bias"))
        found[f"blocks/{name}/kernel"] = Tensor(kernels, (width, rows), (*inputs, *outputs), (1, 0), packed)
        found[f"blocks/{name}/bias"] = Tensor(biases, (width,), outputs, packed=packed)
    return found


def _norms(names: dict[str, str], width: int) -> dict[str, Tensor]:
    parts = {"scale": "weight", "bias": "bias"}
    return {
        f"{name}/{part}": Tensor((f"{theirs}.{their_part}",), (width,), (width,))
        for name, theirs in names.items()
        for part, their_part in parts.items()
    }


class Folder:
    """The tensors of a folder in the layout of transformers: headers now, each array when it is asked for.

    Attributes:
      shapes: of each tensor, by its name without the prefix.

    Raises:
      UserError: there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, path: Path, prefix: str):
        self._path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, str]] = {}  # file and full name
        for file in self._files():
            with self._open(file) as tensors_:
                for name in tensors_.keys():  # noqa: SIM118  not a dictionary
                    short = name.removeprefix(prefix)
                    if BUFFERS.fullmatch(short):
                        continue
                    if short in self._places:
                        raise UserError(f"{path / file}: {name} is there twice, here and in {self._places[short][0]}.")
                    part = tensors_.get_slice(name)
                    if part.get_dtype() not in ("F32", "F16", "BF16"):
                        raise UserError(
                            f"{path / file}: {name} is of type {part.get_dtype()}; only F32, F16 and BF16 can be read."
                        )
                    self.shapes[short] = tuple(part.get_shape())
                    self._places[short] = file, name

    def _files(self) -> list[str]:
        if (self._path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if (self._path / INDEX).is_file():
            names = _read_json(self._path / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{self._path / INDEX} has no weight_map that names files.")
            files, there = sorted(set(names.values())), {path.name for path in self._path.iterdir() if path.is_file()}
            for file in files:
                if Path(file).name != file or file not in there:
                    raise UserError(f"{self._path / INDEX} names {file}, which is not in the folder.")
            return files
        pickles = sorted(file.name for file in self._path.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{self._path / pickles[0]} is a pickle, and reading one can run any code that is in it, so it is "
                "not read; where you trust it, make model.safetensors of it: "
                'python -c "from transformers import GPT2LMHeadModel as G; '
                f"G.from_pretrained('{self._path}').save_pretrained('NEW_FOLDER')\"."
            )
        raise UserError(f"{self._path} has no model.safetensors.")

    def read(self, name: str) -> Any:
        """The array as float32."""
        file, full_name = self._places[name]
        # Opened anew for each: what was read through a memory map is held until it is closed.
        with self._open(file) as tensors_:
            return tensors_.get_tensor(full_name).astype("float32", copy=False)

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._path / file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path / file} is damaged or cut off ({error}).") from None


def read_config(path: Path, vocab_multiple: int) -> GPTConfig | ViTConfig:
    """The model that a config.json of transformers describes.

    Raises:
      UserError: it is missing, damaged, or of another architecture.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: it tells the shape of the model.")
    theirs = _read_json(path)
    known = {architecture.model_type: (family, architecture) for family, architecture in ARCHITECTURES.items()}
    if (model_type := theirs.get("model_type")) not in known:
        names = " and ".join(map(repr, known))
        raise UserError(f"{path}: model_type is {model_type!r}, but only {names} can be converted.")
    family, architecture = known[model_type]
    for key, right in architecture.fixed.items():
        if theirs.get(key, right) != right:
            raise UserError(f"{path}: {key} is {theirs[key]!r}, but only {right!r} can be converted.")
    key, usual = architecture.activation
    if (activation := theirs.get(key, usual)) not in ACTIVATIONS:
        raise UserError(f"{path}: {key} is {activation!r}, but only {', '.join(ACTIVATIONS)} can be converted.")

    def number(key: str, usual: float | None, kind: type) -> Any:
        value = theirs.get(key, usual)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise UserError(f"{path}: {key} is {value!r}, and not a number.")
        if not abs(value) < 2**31:
            raise UserError(f"{path}: {key} is beyond all models.")
        return kind(value)

    cls = {"gpt": GPTConfig, "vit": ViTConfig}[family]
    kinds = typing.get_type_hints(cls)
    ours = {name: number(key, usual, kinds[name]) for key, (name, usual) in architecture.numbers.items()} | {
        "activation": ACTIVATIONS[activation]
    }
    inner = {"gpt": "n_inner", "vit": "intermediate_size"}[family]
    hidden = number(inner, None, int) if theirs.get(inner) is not None else 4 * ours["embed_dim"]
    ours["mlp_factor"] = hidden / max(ours["embed_dim"], 1)
    if family == "gpt":
        ours |= {"vocab_multiple": vocab_multiple, "tie_embeddings": bool(theirs.get("tie_word_embeddings", True))}
    else:
        ours |= _read_processor(path, theirs)[0] | {"embed_dropout": ours["residual_dropout"]}
        ours["vocab_size"] = len(_read_labels(path, theirs).names)
    config = cls(**ours)
    if config.mlp_dim != hidden:
        raise UserError(f"{path}: {inner} is {hidden}, which no model.mlp_factor gives for this width.")
    return config


def _read_labels(path: Path, theirs: dict[str, Any]) -> tokenizers.Labels:
    """The names of the classes, by their numbers."""
    found = theirs.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # what a file may leave out
    try:
        return tokenizers.Labels.from_dict({"names": [found[str(i)] for i in range(len(found))]})
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(f"{path}: id2label does not name the classes 0, 1, …") from None


def _read_processor(config_path: Path, model: dict[str, Any]) -> tuple[dict[str, str], ImagesConfig]:
    """How the image processor of a folder makes pixels: keys of a ViTConfig, and how images are scaled and cut.

    Without a file, the defaults of transformers' ViTImageProcessor count, for images of the model's size.

    Args:
      config_path: config.json, beside which the file of the image processor is.
      model: what config.json holds; its numbers have been checked.

    Raises:
      UserError: transformers would make other pixels, or none.
    """
    size, channels = model.get("image_size", 224), model.get("num_channels", 3)
    path, nested = config_path.with_name(PREPROCESSOR), config_path.with_name(NESTED_PREPROCESSOR)
    theirs = _read_json(path) if path.exists() else {}
    if nested.exists() and isinstance(inner := _read_json(nested).get("image_processor"), dict):
        path, theirs = nested, inner
    key = "image_processor_type" if theirs.get("image_processor_type") else "feature_extractor_type"
    kind = str(theirs.get(key) or "ViTImageProcessor")
    name = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if name not in PROCESSORS:
        raise UserError(f"{path}: {key} is {kind!r}, but only those of {', '.join(PROCESSORS)} can be converted.")
    found = USUAL | {"size": size} | PROCESSORS[name] | theirs

    def check(key: str, is_right: bool, right: str) -> None:
        if not is_right:
            raise UserError(f"{path}: {key} is {found[key]!r}, but only {right} can be converted.")

    def sides(key: str, is_square: bool) -> tuple[int, bool]:
        """Length of a side, and whether both sides get it; (0, False) for other forms."""
        value = found[key]
        if isinstance(value, int):
            value = [value, value] if is_square else {"shortest_edge": value}
        if isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        match value:
            case {"height": int(side), "width": width} if side == width and len(value) == 2:
                return side, True
            case {"shortest_edge": int(side)} if len(value) == 1:
                return side, False
        return 0, False

    def numbers(key: str, least: float) -> list[float]:
        value = found[key] if isinstance(found[key], list) else [found[key]] * channels
        are_right = all(type(x) in (int, float) and least < x < 1e6 for x in value) and len(value) == channels
        check(key, are_right, f"a number for each of {channels} channels{', greater than 0,' if least == 0 else ''}")
        return value

    for key, usual in USUAL.items():
        if isinstance(usual, bool):
            check(key, found[key] is None or isinstance(found[key], bool), "true or false")  # null counts as false
    check("do_resize", found["do_resize"], "true")
    for key in ("do_pad", "use_square_size"):
        check(key, not found[key], "false")
    check("do_convert_rgb", channels == 3 or not found["do_convert_rgb"], f"false with num_channels={channels}")
    filters = " or ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
    check("resample", type(found["resample"]) is int and found["resample"] in RESAMPLING, filters)
    side, stretch = sides("size", found["default_to_square"])
    if found["do_center_crop"]:
        check("crop_size", sides("crop_size", True) == (size, True), f"{size}, the image_size of the model,")
        check("size", size <= side < 1 << 20, f"a square or shortest_edge of at least crop_size={size}")
    else:
        check("size", (side, stretch) == (size, True), f"{size} × {size}, the image_size of the model,")
    factor = found["rescale_factor"] if found["do_rescale"] else 1
    check("rescale_factor", type(factor) in (int, float) and 1e-6 < factor < 1e6, "a number greater than 0")
    scale = {"image_mean": [0.0], "image_std": [1.0]}
    if found["do_normalize"]:
        scale = {"image_mean": numbers("image_mean", -1e6), "image_std": numbers("image_std", 0)}
    # Here a pixel goes from 0 to 1 before mean and deviation count, there to 255 · factor.
    texts = ([str(x / (255 * factor)) for x in values] for values in scale.values())
    mean, std = (values[0] if len(set(values)) == 1 else ",".join(values) for values in texts)
    images = ImagesConfig(
        resize=side if side != size else 0,
        stretch=stretch,
        resample=RESAMPLING[found["resample"]],
        on_white=bool(found["do_convert_rgb"]),
    )
    return {"pixel_mean": mean, "pixel_std": std}, images


def write_processor(config: ViTConfig, images: ImagesConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json for an image processor that makes the pixels that a model was trained on."""
    side = images.resize or config.image_size
    is_cut = side != config.image_size or not images.stretch
    mean, std = (numbers.tolist() * (config.channels // len(numbers)) for numbers in config.pixel_scale())
    return {
        # Before version 5, transformers' ViTImageProcessor cannot cut.
        "image_processor_type": "CLIPImageProcessor" if is_cut else "ViTImageProcessor",
        "do_convert_rgb": images.on_white and config.channels == 3,
        "do_resize": True,
        "size": {"height": side, "width": side} if images.stretch else {"shortest_edge": side},
        "resample": next(number for number, name in RESAMPLING.items() if name == images.resample),
        "do_center_crop": is_cut,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def write_config(config: GPTConfig | ViTConfig, tokenizer: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """Name and content of config.json for a model.

    Raises:
      UserError: there is no form for it there.
    """
    architecture = ARCHITECTURES[config.family]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    for key, value in architecture.needed.items():
        if getattr(config, key) != value:
            raise UserError(
                f"transformers' {architecture.title} has no model.{key}={getattr(config, key)}, only {value}."
            )
    if config.activation not in names:
        raise UserError(
            f"transformers' {architecture.title} has no model.activation={config.activation}, only {', '.join(names)}."
        )
    theirs = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **architecture.fixed,
        **{key: getattr(config, name) for key, (name, _) in architecture.numbers.items()},
        architecture.activation[0]: names[config.activation],
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    if config.family == "gpt":
        stops = list(tokenizer.stop_tokens)
        tokens = {
            "bos_token_id": tokenizer.separator,
            "eos_token_id": stops if len(stops) > 1 else (stops or [None])[0],
        }
        if isinstance(tokenizer, bpe.BPETokenizer):
            tokens |= {f"{role}_id": tokenizer.role(role) for role in ("bos_token", "pad_token")}
        return {
            "config.json": theirs | tokens | {"n_inner": config.mlp_dim, "tie_word_embeddings": config.tie_embeddings}
        }
    theirs |= {
        "intermediate_size": config.mlp_dim,
        "id2label": dict(enumerate(tokenizer.names)),
        "label2id": {name: i for i, name in enumerate(tokenizer.names)},
    }
    return {"config.json": theirs}


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder of transformers, with the tokens that end what transformers generates.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = folder / OUR_TOKENIZER
    try:
        is_ours = path.is_file()
        tokenizer = tokenizers.from_tree(read_json(path)) if is_ours else bpe.BPETokenizer.from_folder(folder)
    except UserError as error:
        raise UserError(f"--from_hf: no tokenizer: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    path, default = folder / GENERATION, None
    if not path.is_file():
        path, default = folder / "config.json", 50256  # what transformers' GPT2Config has where the key is missing
    try:
        stops = tokenizers.token_ids(_read_json(path).get("eos_token_id", default))
    except ValueError as error:
        raise UserError(f"{path}: eos_token_id {error}.") from None
    stops = tuple(token for token in stops if token < tokenizer.vocab_size)  # no model makes the others
    tokenizer = dataclasses.replace(tokenizer, stops=None)
    return tokenizer if stops == tokenizer.stop_tokens else dataclasses.replace(tokenizer, stops=stops)


def write_tokenizer(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Names and texts of the tokenizer's files for a folder of transformers; names of classes are in config.json."""
    if isinstance(tokenizer, tokenizers.Labels):
        return {}
    if isinstance(tokenizer, bpe.BPETokenizer):
        return tokenizer.files()
    return {OUR_TOKENIZER: tokenizer.to_json()}


def from_hf(folder: Path, workdir: Workdir, vocab_multiple: int) -> GPTConfig | ViTConfig:
    """Makes a workdir of a folder.

    Raises:
      UserError: the folder is not a whole GPT-2 or ViT, or there is something in the workdir already.
    """
    import numpy as np

    if not folder.is_dir():
        raise UserError(f"--from_hf={folder}: there is no such folder.")
    _refuse_to_overwrite("workdir", workdir.path)
    path = folder / "config.json"
    config = read_config(path, vocab_multiple)
    is_classifier = config.family == "vit"
    tokenizer = _read_labels(path, _read_json(path)) if is_classifier else read_tokenizer(folder)
    there = Folder(folder, ARCHITECTURES[config.family].prefix)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: vocab_size is {config.vocab_size} in config.json, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens."
        )
    wanted = tensors(config)
    shapes = {}
    for name, tensor in wanted.items():
        for layer in _layers(name, config):
            shapes |= dict.fromkeys((part.format(layer) for part in tensor.names), tensor.shape)
    found, head, table = dict(there.shapes), "lm_head.weight", "wte.weight"
    if (
        not is_classifier and config.tie_embeddings and {head, table} <= found.keys()
    ):  # it may be there all the same, as a copy
        if not np.array_equal(there.read(head), there.read(table)):
            raise UserError(f"{folder}: {head} differs from {table}, but config.json has tie_word_embeddings.")
        del found[head]
    _compare_shapes(folder, found, shapes, ARCHITECTURES[config.family].title)

    def deferred(name: str, tensor: Tensor) -> Deferred:
        layers = _layers(name, config)
        lead = _lead(name, config)

        def make() -> np.ndarray:
            array = np.zeros((*lead, *tensor.ours), np.float32)
            for layer in layers:
                theirs = [there.read(part.format(layer)) for part in tensor.names]
                tensor.read(theirs, array[layer] if lead else array)
            return array

        return Deferred((*lead, *tensor.ours), make)

    model = dataclasses.replace(config, vocab_size=0)
    if is_classifier:
        recorded = Config(model=model, data=_read_processor(path, _read_json(path))[1])
    else:
        recorded = Config(model=model, tokenizer=tokenizers.TokenizerConfig(name=tokenizer.name))
    run = Run(recorded, tokenizer, None)
    workdir.create()
    write_params(
        workdir.path / "checkpoints" / "0",
        run,
        _tree({name: deferred(name, tensor) for name, tensor in wanted.items()}),
    )
    workdir.record(run)
    return config


def to_hf(workdir: Workdir, checkpoint: str, folder: Path) -> tuple[GPTConfig | ViTConfig, int]:
    """Makes a folder of a workdir; returns the model's config and the step.

    Raises:
      UserError: there is no such checkpoint, transformers has no such model, or there is something in the folder.
    """
    run = workdir.read()
    if (family := run.config.model.family) not in ARCHITECTURES:
        raise UserError(f"--workdir={workdir.path} holds a model.family={family}, and no GPT-2 or ViT.")
    config = run.config.model.without_kernel().resolve(run.tokenizer.vocab_size, "cpu")
    theirs = write_config(config, run.tokenizer)
    if family == "vit":
        theirs[PREPROCESSOR] = write_processor(config, run.config.data)
    weights = Weights(workdir, checkpoint)
    _refuse_to_overwrite("to_hf", folder)
    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{files.PARTIAL}")
    try:
        partial.mkdir(parents=True)
        write_safetensors(partial / "model.safetensors", config, weights)
        for name, text in write_tokenizer(run.tokenizer).items():
            (partial / name).write_text(text, encoding="utf-8")
        for name, content in theirs.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        files.publish(partial, folder)
    except OSError as error:
        raise UserError(f"Cannot write to --to_hf={folder}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config, weights.step


def write_safetensors(path: Path, config: GPTConfig | ViTConfig, weights: Weights) -> None:
    """Writes the parameters in the safetensors format, one after the other.

    The format is eight bytes with the header's length, the header in JSON, and the arrays one after the other
    (https://github.com/huggingface/safetensors#format). The library's own writer wants them all in memory.
    """
    wanted, header, offset = tensors(config), {"__metadata__": {"format": "pt"}}, 0
    architecture = ARCHITECTURES[config.family]
    for name, tensor in wanted.items():
        size = 4 * math.prod(tensor.shape)
        for layer in _layers(name, config):
            for part in tensor.names:
                prefix = "" if part.startswith(architecture.head) else architecture.prefix
                place = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (offset, offset + size)}
                header[prefix + part.format(layer)] = place
                offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        shapes = {name: _lead(name, config) + tensor.ours for name, tensor in wanted.items()}
        for (name, tensor), array in zip(wanted.items(), weights.restore_each(shapes), strict=True):
            for layer in _layers(name, config):
                ours = array[layer] if name.startswith("blocks/") else array
                for part in tensor.write(ours):
                    out.write(part.astype("<f4").tobytes())


def _layers(name: str, config: GPTConfig | ViTConfig) -> range:
    return range(config.num_layers if name.startswith("blocks/") else 1)


def _lead(name: str, config: GPTConfig | ViTConfig) -> tuple[int, ...]:
    """The axis of the layers, for what each of them has."""
    return (config.num_layers,) if name.startswith("blocks/") else ()


def _compare_shapes(
    folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], title: str
) -> None:
    for what, names in (
        ("missing", sorted(wanted.keys() - found.keys())),
        (f"not part of a {title} of this shape", sorted(found.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{folder}: {', '.join(names[:3])}{more}: {what}, by config.json.")
    for name, shape in wanted.items():
        if found[name] != shape:
            there, right = (" × ".join(map(str, sizes)) for sizes in (found[name], shape))
            raise UserError(f"{folder}: {name} is {there}, but has to be {right} by config.json.")


def _refuse_to_overwrite(flag: str, path: Any) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--{flag}={path} exists and is not an empty folder; choose another.")


def _read_json(path: Path) -> dict:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def import_folder(folder: str, workdir: str, vocab_multiple: int) -> str:
    """`from_hf` by the names of the folders; returns what was done, for the user."""
    _use_cpu()
    target = Workdir(workdir)
    config = from_hf(Path(folder).expanduser(), target, vocab_multiple)
    return f"{_describe(config)}\nDone: converted to {target.path}."


def export_folder(workdir: str, checkpoint: str, folder: str) -> str:
    """`to_hf` by the names of the folders; returns what was done, for the user."""
    _use_cpu()
    source, target = Workdir(workdir), Path(folder).expanduser()
    config, step = to_hf(source, checkpoint, target)
    return f"{_describe(config)}\nDone: step {step:,} of {source.path} converted to {target}."


def _use_cpu() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed


def _describe(config: GPTConfig | ViTConfig) -> str:
    return f"model  {config.num_parameters():,} parameters: {config.summary()}, vocabulary {config.vocab_size}"
