"""The vision transformer in transformers, `ViTForImageClassification`, and its image processors.

An image processor defines how images are resized, cropped and scaled, for which our config has options.
"""

import dataclasses
import json
import re
from typing import Any

from gpt.checkpointing.run import Run
from gpt.data.images import ImagesConfig
from gpt.data.tokenizers import Labels
from gpt.interop.architecture import Architecture, Source, Tensor, Vocabulary
from gpt.interop.config_file import ConfigFile, tables
from gpt.models.vit import ViTConfig
from gpt.runtime.errors import UserError

FILE = "preprocessor_config.json"
NESTED_FILE = "processor_config.json"  # newer: holds the image processor under the key image_processor
RESAMPLING = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; its backends differ in other filters
PROCESSORS = tables("image_processors.toml")
# The values of keys with which our pixels are those of transformers.
SUPPORTED: dict[str, list[Any]] = {
    key: [None if value == "none" else value for value in values] for key, values in PROCESSORS.pop("supported").items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(Architecture[ViTConfig]):
    """A classifier of images, whose class names are in config.json and whose pixels an image processor scales."""

    config_class: type[ViTConfig] = ViTConfig

    def outer_tensors(self, config: ViTConfig) -> dict[str, Tensor]:
        width, length, classes = config.embed_dim, config.length, config.vocab_size
        channels, side = config.channels, config.patch_size
        # A convolution over patches that do not overlap. Its kernel is [output, channel, row, column].
        patches, kernel = "embeddings.patch_embeddings.projection", (width, channels, side, side)
        return {
            "class_token": Tensor(("embeddings.cls_token",), ((1, 1, width),), (width,)),
            "position_embedding": Tensor(("embeddings.position_embeddings",), ((1, length, width),), (length, width)),
            "patch_embedding/kernel": Tensor(
                (f"{patches}.weight",), (kernel,), (side * side * channels, width), axes=(2, 3, 1, 0)
            ),
            "patch_embedding/bias": Tensor((f"{patches}.bias",), ((width,),), (width,)),
            "head/kernel": Tensor(("classifier.weight",), ((classes, width),), (width, classes), axes=(1, 0)),
            "head/bias": Tensor(("classifier.bias",), ((classes,),), (classes,)),
        }

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"vocab_size": _labels(file).vocab_size}

    def read(self, source: Source, vocab_multiple: int) -> tuple[ViTConfig, Vocabulary, dict[str, Any]]:
        config = self.read_config(source.config)
        pixels, images = read_processor(source.config)
        return dataclasses.replace(config, **pixels), _labels(source.config), {"data": images}

    def write_rest(self, config: ViTConfig) -> dict[str, Any]:
        return {"id2label": {str(i): str(i) for i in range(config.vocab_size)}}  # `write_files` knows the names

    def write_files(self, config: ViTConfig, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        assert isinstance(run.tokenizer, Labels)
        assert isinstance(run.config.data, ImagesConfig)
        names = run.tokenizer.names
        keys = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        processor = write_processor(config, run.config.data)
        return keys, {FILE: json.dumps(processor, indent=2) + "\n"}


def _labels(file: ConfigFile) -> Labels:
    """Returns the names of the classes."""
    names = file.values.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers' default
    try:
        return Labels.from_dict({"names": [names[str(i)] for i in range(len(names))]})
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(f"{file.path}: id2label does not name the classes 0, 1, …") from None


def read_processor(config: ConfigFile) -> tuple[dict[str, Any], ImagesConfig]:
    """Reads how a folder's image processor computes pixels.

    A folder without a file for it has transformers' ViTImageProcessor with its defaults and the model's image size.

    Args:
      config: config.json, whose numbers have been checked.

    Returns:
      The fields `pixel_mean` and `pixel_std` of a ViTConfig, and how images are resized and cropped.

    Raises:
      UserError: our pixels would differ from those of transformers, or there would be none.
    """
    size, channels = config.values.get("image_size", 224), config.values.get("num_channels", 3)
    path, nested = config.path.with_name(FILE), config.path.with_name(NESTED_FILE)
    file = ConfigFile.read(path) if path.exists() else ConfigFile(path, {})
    if nested.exists() and isinstance(inner := ConfigFile.read(nested).values.get("image_processor"), dict):
        file = ConfigFile(nested, inner)
    key = "image_processor_type" if file.values.get("image_processor_type") else "feature_extractor_type"
    name = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(file.values.get(key) or "ViT"))
    file.check(key, name in PROCESSORS, f"those of {', '.join(PROCESSORS)}")
    file = file.with_defaults(dict.fromkeys(SUPPORTED) | {"size": size, "crop_size": None} | PROCESSORS[name])
    values = file.values
    for key, supported in SUPPORTED.items():
        file.check(key, values[key] in supported, " or ".join(map(json.dumps, supported)))
    on_white = bool(values["do_convert_rgb"])
    file.check("do_convert_rgb", channels == 3 or not on_white, f"false with num_channels={channels}")
    side, is_square = _side(values["size"], values.get("default_to_square", True))
    if values["do_center_crop"]:
        file.check("crop_size", _side(values["crop_size"], True) == (size, True), f"{size}, the model's image_size,")
        file.check("size", size <= side < 1 << 20, f"a square or shortest_edge of at least crop_size={size}")
    else:
        file.check("size", (side, is_square) == (size, True), f"{size} × {size}, the model's image_size,")
    fields = {"pixel_mean": "0.0", "pixel_std": "1.0"}
    for key, field, least in (("image_mean", "pixel_mean", -1e6), ("image_std", "pixel_std", 0)):
        if values["do_normalize"]:
            numbers = values[key] if isinstance(values[key], list) else [values[key]] * channels
            are_valid = all(type(x) in (int, float) and least < x < 1e6 for x in numbers) and len(numbers) == channels
            file.check(key, are_valid, f"a number above {least:g} for each of {channels} channels")
            fields[field] = ",".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))
    resize, resample = side if side != size else 0, RESAMPLING[values["resample"]]
    return fields, ImagesConfig(resize=resize, stretch=is_square, resample=resample, on_white=on_white)


def _side(size: Any, is_square: bool) -> tuple[int, bool]:
    """Returns the length of a side and whether both sides have it; (0, False) for sizes of another form."""
    match size:
        case int(side):
            return side, is_square
        case {"height": int(side), "width": width} if side == width and len(size) == 2:
            return side, True
        case {"shortest_edge": int(side)} if len(size) == 1:
            return side, False
    return 0, False


def write_processor(config: ViTConfig, images: ImagesConfig) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json, for an image processor that computes our pixels."""
    side = images.resize or config.image_size
    is_cropped = side != config.image_size or not images.stretch
    mean, std = (numbers.tolist() * (config.channels // len(numbers)) for numbers in config.pixel_scale())
    return {
        # transformers' ViTImageProcessor cannot crop before version 5.
        "image_processor_type": "CLIPImageProcessor" if is_cropped else "ViTImageProcessor",
        "do_convert_rgb": images.on_white and config.channels == 3,
        "do_resize": True,
        "size": {"height": side, "width": side} if images.stretch else {"shortest_edge": side},
        "resample": next(number for number, name in RESAMPLING.items() if name == images.resample),
        "do_center_crop": is_cropped,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
