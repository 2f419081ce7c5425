"""Images as sequences of pixels, for a GPT to generate (image GPT, Chen et al. 2020).

The tokens of an image are the nearest colours in a palette of its pixels, from left to right and from top to bottom.
The first input is a token for the class of the image, or for any class. A model therefore generates images with or
without a given class, and completes a given upper half.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gpt.data import images, paths
from gpt.data.base import Dataset, ModelShape
from gpt.data.tokenizers import Labels, Tokenizer
from gpt.runtime import cache
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, option

FITTED_IMAGES, FITTED_COLORS = 2000, 1 << 15  # largest number of images and of their colours to fit a palette to


@dataclasses.dataclass(frozen=True)
class PixelsConfig(images.ImagesConfig):
    """Options of images as sequences of pixels."""

    kind: str = "pixels"
    image_size: int = option(8, "height and width of scaled images; model.block_size is its square", above=0)
    channels: int = option(1, "3: red, green and blue; 1: grey", choices=(1, 3))
    palette_size: int = option(512, "largest number of colours; images with fewer keep all of them", above=0)
    class_dropout: float = option(0.1, "training: fraction of images without their class", least=0, below=1)

    gives: ClassVar[str] = "tokens"

    def __post_init__(self):
        super().__post_init__()
        # A palette reads the images of prompts without these options.
        for name in ("resize", "stretch", "resample", "on_white"):
            check_choice(f"data.{name}", getattr(self, name), (getattr(images.ImagesConfig, name),))

    @property
    def vocab_size(self) -> int:
        """28 for scikit-learn's digits without scaling (17 greys, any class, and 10 classes), else 0."""
        is_unscaled = (self.path, self.image_size, self.channels) == ("", 8, 1) and self.palette_size >= 17
        return 28 if is_unscaled else 0

    def load(self, tokenizer, model) -> "Pixels":
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
        folders: Any = super().load(Labels(palette.names) if palette else None, None)
        if palette is None:
            source = folders.source("train", self.image_size, self.channels)
            chosen = np.unique(np.linspace(0, len(source) - 1, FITTED_IMAGES).astype(int))
            pixels = np.concatenate([source.example(0, int(i))["inputs"].reshape(-1, self.channels) for i in chosen])
            colors = fit_palette(pixels, self.palette_size)
            palette = Palette(tuple(map(tuple, colors.tolist())), self.image_size, folders.tokenizer.names)
        return Pixels(self, folders, palette, cache.digest(folders.fingerprint, palette.to_json()))

    def tokenizer(self, saved: dict) -> "Palette":
        return Palette.from_dict(saved)


def fit_palette(pixels_NxC: np.ndarray, size: int) -> np.ndarray:
    """Returns at most `size` colours, uint8 [K, C], that represent pixels, uint8 [N, C].

    These are all colours of the pixels if they have no more than `size`, else the centers that k-means finds.

    Raises:
      UserError: k-means is needed, and scikit-learn is not installed.
    """
    colors_KxC, counts_K = np.unique(pixels_NxC, axis=0, return_counts=True)
    if len(colors_KxC) <= size:
        return colors_KxC
    images.check_installed("sklearn", f"Fitting data.palette_size={size} colours needs scikit-learn")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if len(colors_KxC) > FITTED_COLORS:
        weights_K = counts_K / counts_K.sum()
        chosen = np.random.default_rng(0).choice(len(colors_KxC), FITTED_COLORS, replace=False, p=weights_K)
        colors_KxC, counts_K = colors_KxC[chosen], counts_K[chosen]
    with threadpool_limits(1):  # the order in which threads add up would change the rounding
        means = KMeans(size, n_init=4, random_state=0).fit(colors_KxC.astype(np.float32), sample_weight=counts_K)
    return np.unique(np.round(means.cluster_centers_).astype(np.uint8), axis=0)


def nearest(points_NxC: np.ndarray, colors_KxC: np.ndarray) -> np.ndarray:
    """Returns [N] indices of the colours that are nearest to points [N, C]; of equally near ones, the first."""
    points_NxC, colors_KxC = points_NxC.astype(np.float32), colors_KxC.astype(np.float32)
    return (np.square(colors_KxC).sum(-1) - 2 * points_NxC @ colors_KxC.T).argmin(-1)


@dataclasses.dataclass(frozen=True)
class Palette(Tokenizer):
    """A tokenizer of square images; its tokens are the colours, then "any class", then the classes.

    Attributes:
      colors: [K][C] numbers from 0 to 255.
      size: height and width of an image, in pixels.
      names: the names of the classes.
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
        """The first token of an image whose class is hidden."""
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
        """Returns the tokens, int32 [H·W], of pixels, uint8 [H, W, C]."""
        return nearest(pixels_HxWxC.reshape(-1, self.channels), self._colors_KxC).astype(np.int32)

    def pixels(self, tokens: np.ndarray) -> np.ndarray:
        """Returns pixels, uint8 [size, size, C]; they are black where tokens are missing or are not colours."""
        padded = np.full(self.size**2, -1)
        padded[: len(tokens)] = tokens[: self.size**2]
        is_color = (padded >= 0) & (padded < len(self.colors))
        pixels = np.where(is_color[:, None], self._colors_KxC[np.where(is_color, padded, 0)], 0)
        return pixels.astype(np.uint8).reshape(self.size, self.size, self.channels)

    def encode(self, text: str) -> np.ndarray:
        """Returns the first tokens of an image for a prompt "", "class:NAME", "half:FILE" or "class:NAME,half:FILE".

        Raises:
          UserError: the prompt has another form, the class does not exist, or the file is not an image.
        """
        match = re.fullmatch(r"(?:class:(?P<name>.*?))?(?:,?half:(?P<file>.+))?", text.strip(), re.DOTALL)
        if not match:
            raise UserError(f"{text!r} has to be class:NAME, half:FILE, class:NAME,half:FILE or empty.")
        first, name, file = self.any_class, match["name"], match["file"]
        if name is not None:
            if name not in self.names:
                raise UserError(f"there is no class {name!r}; choose one of {', '.join(self.names)}.")
            first += 1 + self.names.index(name)
        if not file:
            return np.array([first], np.int32)
        image = images.decode(paths.located(file, "half", "file"), self.channels)
        tokens = self.tokens(images.fit(image, self.size, images.ImagesConfig()))
        return np.concatenate([[first], self.half(tokens)]).astype(np.int32)

    def half(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the tokens of the upper half of an image, of all its tokens."""
        return tokens[: self.size // 2 * self.size]

    def decode(self, ids: np.ndarray) -> str:
        return ""

    @classmethod
    def from_dict(cls, saved: dict) -> "Palette":
        colors, names, size = tuple(map(tuple, saved["colors"])), tuple(saved["names"]), saved["size"]
        lengths = {len(color) for color in colors}
        are_bytes = all(type(x) is int and 0 <= x < 256 for color in colors for x in color)
        if saved["name"] != cls.name or lengths not in ({1}, {3}) or not are_bytes or type(size) is not int or size < 1:
            raise ValueError("the palette has no colours of one or three bytes, or no size")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("the names of the classes are not strings")
        return cls(colors, size, names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelExamples(images.Images):
    """Examples with an image as tokens.

    Attributes:
      palette: the tokenizer.
      class_dropout: fraction of the examples whose class is hidden, in training. The choice of these examples is a
        function of (seed, epoch, index).
    """

    palette: Palette
    class_dropout: float

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns "inputs", a class and all pixels but the last, and "targets", all pixels, as int32 [size²]."""
        image = super().example(epoch, index)
        tokens, first = self.palette.tokens(image["inputs"]), self.palette.any_class
        if self.seed is None or np.random.default_rng((self.seed, epoch, index, 1)).random() >= self.class_dropout:
            first += 1 + int(image["targets"])
        return {"inputs": np.concatenate([[first], tokens[:-1]]).astype(np.int32), "targets": tokens}


@dataclasses.dataclass(frozen=True)
class Pixels(Dataset):
    """Images, and the palette that converts them to tokens."""

    config: PixelsConfig
    folders: images.Folders
    tokenizer: Palette
    fingerprint: str

    def examples(self, split: str, model: ModelShape, seed: int | None = None) -> PixelExamples:
        source = self.folders.source(split, self.config.image_size, self.config.channels, seed)
        return PixelExamples(**vars(source), palette=self.tokenizer, class_dropout=self.config.class_dropout)

    def describe(self) -> str:
        return f"{self.folders.describe()}, {len(self.tokenizer.colors)} colours"

    def report(self, source: Any, result: dict[str, Any]) -> dict[str, float]:
        """Returns the number of images, the loss in nats per pixel, and bits per channel of a pixel given the class."""
        bits = result["loss"] / math.log(2) / self.config.channels
        return {"images": result["examples"], "loss": result["loss"], "bits_per_dimension": bits}
