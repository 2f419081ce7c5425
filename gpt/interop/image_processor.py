"""Image processors of transformers: how a folder's images are resized, cropped and scaled, as our config says it."""

import re
from typing import Any

from gpt.data.images import ImagesConfig
from gpt.interop.config_file import ConfigFile
from gpt.models.vit import ViTConfig

FILE = "preprocessor_config.json"
NESTED_FILE = "processor_config.json"  # newer: holds the image processor under the key image_processor
# The image processors that can be converted, and their default values.
DEFAULTS: dict[str, Any] = {
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
CLIP_PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"resample": 2},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True},
    "CLIP": CLIP_PIXELS
    | {"size": 224, "crop_size": 224, "do_center_crop": True, "default_to_square": False, "do_convert_rgb": True},
}
RESAMPLING = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; its backends differ in other filters


def read(config: ConfigFile) -> tuple[dict[str, Any], ImagesConfig]:
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
    kind = str(file.values.get(key) or "ViTImageProcessor")
    name = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    file.check(key, name in PROCESSORS, f"those of {', '.join(PROCESSORS)}")
    file = file.with_defaults(DEFAULTS | {"size": size} | PROCESSORS[name])
    values = file.values

    def side_of(key: str, is_square: bool) -> tuple[int, bool]:
        """Returns the length of a side and whether both sides have it; (0, False) for sizes of another form."""
        value = values[key]
        match value:
            case int(side):
                return side, bool(is_square)
            case [int(side), width] | {"height": int(side), "width": width} if side == width and len(value) == 2:
                return side, True
            case {"shortest_edge": int(side)} if len(value) == 1:
                return side, False
        return 0, False

    def numbers_of(key: str, least: float) -> list[float]:
        """Returns a number greater than `least` for each channel."""
        numbers = values[key] if isinstance(values[key], list) else [values[key]] * channels
        are_valid = all(type(x) in (int, float) and least < x < 1e6 for x in numbers) and len(numbers) == channels
        bound = ", greater than 0," if least == 0 else ""
        file.check(key, are_valid, f"a number for each of {channels} channels{bound}")
        return numbers

    for key, default in DEFAULTS.items():
        if isinstance(default, bool):
            file.check(key, values[key] is None or isinstance(values[key], bool), "true or false")  # null is false
    file.check("do_resize", values["do_resize"], "true")
    for key in ("do_pad", "use_square_size"):
        file.check(key, not values[key], "false")
    file.check("do_convert_rgb", channels == 3 or not values["do_convert_rgb"], f"false with num_channels={channels}")
    filters = " or ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
    file.check("resample", type(values["resample"]) is int and values["resample"] in RESAMPLING, filters)
    side, is_square = side_of("size", values["default_to_square"])
    if values["do_center_crop"]:
        file.check("crop_size", side_of("crop_size", True) == (size, True), f"{size}, the image_size of the model,")
        file.check("size", size <= side < 1 << 20, f"a square or shortest_edge of at least crop_size={size}")
    else:
        file.check("size", (side, is_square) == (size, True), f"{size} × {size}, the image_size of the model,")
    factor = values["rescale_factor"] if values["do_rescale"] else 1
    file.check("rescale_factor", type(factor) in (int, float) and 1e-6 < factor < 1e6, "a number greater than 0")
    scale = {"pixel_mean": [0.0], "pixel_std": [1.0]}
    if values["do_normalize"]:
        scale = {"pixel_mean": numbers_of("image_mean", -1e6), "pixel_std": numbers_of("image_std", 0)}
    fields = {}
    for name, numbers in scale.items():
        # Our pixels are between 0 and 1 before mean and deviation are applied, theirs between 0 and 255 · factor.
        texts = [str(number / (255 * factor)) for number in numbers]
        fields[name] = texts[0] if len(set(texts)) == 1 else ",".join(texts)
    images = ImagesConfig(
        resize=side if side != size else 0,
        stretch=is_square,
        resample=RESAMPLING[values["resample"]],
        on_white=bool(values["do_convert_rgb"]),
    )
    return fields, images


def write(config: ViTConfig, images: ImagesConfig) -> dict[str, Any]:
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
