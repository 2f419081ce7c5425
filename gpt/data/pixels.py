"""Images as texts of pixels, for a GPT to draw (image GPT, Chen et al. 2020).

An image is read row by row, each pixel as the nearest colour of a palette, and before it comes a token for its class or
for any class. So the model draws with or without a class, and completes an image that is begun.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gpt.data import images, paths
from gpt.data.base import Dataset, ModelShape, Source
from gpt.data.tokenizers import Labels, Tokenizer
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_fraction, check_positive

FITTED_IMAGES, FITTED_PIXELS = 2000, 1 << 15  # that a palette is made of, at most


@dataclasses.dataclass(frozen=True)
class PixelsConfig(images.ImagesConfig):
    kind: str = "pixels"  # see gpt/data/base.py
    image_size: int = 8  # height and width that images are brought to; model.block_size is the square of it
    channels: int = 1  # 3: red, green, blue; 1: grey
    palette_size: int = 512  # colours; fewer where the images have fewer
    class_dropout: float = 0.1  # part of the rows in training whose class is not told

    gives: ClassVar[str] = "tokens"

    def __post_init__(self):
        super().__post_init__()
        check_positive("data", self, "image_size", "palette_size")
        check_choice("data.channels", self.channels, (1, 3))
        check_fraction("data", self, "class_dropout")
        for name in (
            "resize",
            "stretch",
            "resample",
            "on_white",
        ):  # a palette, which reads the images of prompts, has only these
            check_choice(f"data.{name}", getattr(self, name), (getattr(images.ImagesConfig, name),))

    @property
    def vocab_size(self) -> int:
        """Of the digits as they are: 17 greys, any class, and 10 classes. Of other images it is not known before."""
        as_they_are = (self.path, self.image_size, self.channels) == ("", 8, 1) and self.palette_size >= 17
        return 28 if as_they_are else 0

    def load(self, tokenizer, model, say=lambda line: None, status=lambda line: None) -> "Pixels":
        if model and model.length != self.image_size**2:
            raise UserError(
                f"model.block_size={model.length} has to be {self.image_size**2}, the pixels of an image with "
                f"data.image_size={self.image_size}."
            )
        palette = tokenizer if isinstance(tokenizer, Palette) else None
        if palette and (palette.size, palette.channels) != (self.image_size, self.channels):
            raise UserError(
                f"data.image_size={self.image_size} and data.channels={self.channels}, but the palette is for "
                f"{palette.size} and {palette.channels}."
            )
        folders = images.load(self, Labels(palette.names) if palette else None, say)
        if palette is None:
            source = folders.evaluation("train", self)
            chosen = np.unique(np.linspace(0, len(source) - 1, FITTED_IMAGES).astype(int))
            pixels = np.concatenate([source.example(0, int(i))["inputs"].reshape(-1, self.channels) for i in chosen])
            colors = fit_palette(pixels, self.palette_size)
            palette = Palette(tuple(map(tuple, colors.tolist())), self.image_size, folders.tokenizer.names)
        return Pixels(self, folders, palette)

    def example_shapes(self) -> dict[str, np.ndarray]:
        """An image before it becomes tokens, as `ModelConfig.example_shapes` of a model that reads images."""
        return {"inputs": np.zeros((self.image_size, self.image_size, self.channels), np.uint8)}

    def tokenizer(self, saved: dict) -> "Palette":
        return Palette.from_dict(saved)


def fit_palette(pixels_NxC: np.ndarray, size: int) -> np.ndarray:
    """uint8 colours of [size, C] for pixels, by k-means; all of their colours, where these are no more than `size`."""
    rng = np.random.default_rng(0)
    colors_NxC, counts_N = np.unique(pixels_NxC, axis=0, return_counts=True)
    if len(colors_NxC) <= size:
        return colors_NxC
    if len(colors_NxC) > FITTED_PIXELS:
        chosen = rng.choice(len(colors_NxC), FITTED_PIXELS, replace=False, p=counts_N / counts_N.sum())
        colors_NxC, counts_N = colors_NxC[chosen], counts_N[chosen]
    points_NxC = colors_NxC.astype(np.float32)
    # k-means++ (Arthur & Vassilvitskii 2007): each next one is likelier the farther it is from those before.
    means, distance_N = [], np.ones(len(points_NxC))
    for _ in range(size):
        means.append(points_NxC[rng.choice(len(points_NxC), p=(weights := distance_N * counts_N) / weights.sum())])
        new_N = np.square(points_NxC - means[-1]).sum(-1)
        distance_N = np.minimum(distance_N, new_N) if len(means) > 1 else new_N
    means_KxC, before_N = np.array(means), None
    for _ in range(100):
        nearest_N = nearest(points_NxC, means_KxC)
        if before_N is not None and (nearest_N == before_N).all():
            break
        before_N, held_K = nearest_N, np.bincount(nearest_N, counts_N, minlength=size)
        sums_KxC = np.stack([np.bincount(nearest_N, counts_N * x, minlength=size) for x in points_NxC.T], axis=1)
        means_KxC = np.where(held_K[:, None] > 0, sums_KxC / np.maximum(held_K, 1)[:, None], means_KxC)
    return np.unique(np.round(means_KxC).astype(np.uint8), axis=0)


def nearest(points_NxC: np.ndarray, colors_KxC: np.ndarray) -> np.ndarray:
    """[N] numbers of the nearest colours, the first of several that are as near."""
    points_NxC, colors_KxC = points_NxC.astype(np.float32), colors_KxC.astype(np.float32)
    return (np.square(colors_KxC).sum(-1) - 2 * points_NxC @ colors_KxC.T).argmin(-1)


@dataclasses.dataclass(frozen=True)
class Palette(Tokenizer):
    """Tokens of square images: first the colours, then "any class", then the classes.

    Attributes:
      colors: [K][C] numbers from 0 to 255.
      size: height and width of an image, in pixels.
      names: of the classes.
    """

    name: ClassVar[str] = "palette"
    colors: tuple[tuple[int, ...], ...]
    size: int
    names: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.colors) + 1 + len(self.names)

    @property
    def any_class(self) -> int:
        """The token before an image of which the class is not told."""
        return len(self.colors)

    @property
    def channels(self) -> int:
        return len(self.colors[0])

    def sample_length(self, prompts: Sequence[np.ndarray]) -> int:
        return self.size**2 + 1 - min(map(len, prompts))

    @functools.cached_property
    def _colors_KxC(self) -> np.ndarray:
        return np.array(self.colors, np.uint8)

    def tokens(self, pixels_HxWxC: np.ndarray) -> np.ndarray:
        """int32 of [H·W], for uint8 pixels."""
        return nearest(pixels_HxWxC.reshape(-1, self.channels), self._colors_KxC).astype(np.int32)

    def pixels(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 of [size, size, C]; black for what is missing or is no colour."""
        padded = np.full(self.size**2, -1)
        padded[: len(tokens)] = tokens[: self.size**2]
        is_color = (padded >= 0) & (padded < len(self.colors))
        pixels = np.where(is_color[:, None], self._colors_KxC[np.where(is_color, padded, 0)], 0)
        return pixels.astype(np.uint8).reshape(self.size, self.size, self.channels)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of the beginning of an image: "", "class:NAME", "half:FILE" or "class:NAME,half:FILE".

        Raises:
          UserError: it is none of these, there is no such class, or the file is no image.
        """
        told = re.fullmatch(r"(?:class:(?P<name>.*?))?(?:,?half:(?P<file>.+))?", text.strip(), re.DOTALL)
        if not told:
            raise UserError(f"{text!r} has to be class:NAME, half:FILE, class:NAME,half:FILE or empty.")
        first, name, file = self.any_class, told["name"], told["file"]
        if name is not None:
            if name not in self.names:
                raise UserError(f"there is no class {name!r}, but {', '.join(self.names)}.")
            first += 1 + self.names.index(name)
        if not file:
            return np.array([first], np.int32)
        image = images.decode(paths.located(file, "half", "file"), self.channels)
        tokens = self.tokens(images.fit(image, self.size, images.ImagesConfig()))
        return np.concatenate([[first], self.half(tokens)]).astype(np.int32)

    def half(self, tokens: np.ndarray) -> np.ndarray:
        """Those of the upper half of an image."""
        return tokens[: self.size // 2 * self.size]

    def decode(self, ids: np.ndarray) -> str:
        return ""

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "size": self.size, "names": self.names, "colors": self.colors})

    @classmethod
    def from_dict(cls, saved: dict) -> "Palette":
        colors, names, size = tuple(map(tuple, saved["colors"])), tuple(saved["names"]), saved["size"]
        lengths = {len(color) for color in colors}
        whole = all(type(x) is int and 0 <= x < 256 for color in colors for x in color)
        if saved["name"] != cls.name or lengths not in ({1}, {3}) or not whole or type(size) is not int or size < 1:
            raise ValueError("the palette has no colours of one or three bytes, or no size")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("the names of the classes are no texts")
        return cls(colors, size, names)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one image each, as tokens: see `gpt.data.pipeline`.

    Attributes:
      class_dropout: part of the rows whose class is not told; which ones is a function of (seed, epoch, row).
    """

    images: images.Images
    palette: Palette
    class_dropout: float = 0.0
    seed: int = 0

    @property
    def threads(self) -> int:
        return self.images.threads

    def __len__(self) -> int:
        return len(self.images)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """{"inputs": int32 [size²], a class and all pixels but the last, "targets": the pixels}."""
        image = self.images.example(epoch, index)
        tokens, first = self.palette.tokens(image["inputs"]), self.palette.any_class
        if np.random.default_rng((self.seed, epoch, index, 1)).random() >= self.class_dropout:
            first += 1 + int(image["targets"])
        return {"inputs": np.concatenate([[first], tokens[:-1]]).astype(np.int32), "targets": tokens}


@dataclasses.dataclass(frozen=True)
class Pixels(Dataset):
    """Images and the palette that they are read with."""

    config: PixelsConfig
    folders: images.Folders
    tokenizer: Palette

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256((self.folders.fingerprint + self.tokenizer.to_json()).encode()).hexdigest()[:32]

    def training(self, model: ModelShape, seed: int) -> Rows:
        return Rows(self.folders.training(self.config, seed), self.tokenizer, self.config.class_dropout, seed)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Rows:
        return Rows(self.folders.evaluation(split, self.config, stride), self.tokenizer)

    def describe(self) -> str:
        return f"{self.folders.describe()}, {len(self.tokenizer.colors)} colours"

    def report(self, source: Source, result: dict[str, Any]) -> dict[str, float]:
        """With the bits for each channel of a pixel, the class known, as far as the palette tells colours apart."""
        bits = result["loss"] / math.log(2) / self.config.channels
        return {"images": result["examples"], "loss": result["loss"], "bits_per_dimension": bits}
