"""Images and their classes: scikit-learn's digits, or a folder with a subfolder for each class.

Files are decoded when their row is asked for, by threads that prepare batches ahead. What is cut out of an image in
training, and whether it is mirrored, is a pure function of (seed, epoch, index).
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt.data import paths
from gpt.data.base import DataConfig, Dataset, ModelShape, Say, Shown
from gpt.data.tokenizers import Labels
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.fields import check_choice, harmless

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Whatever the suffix, Pillow may try no other format: that of PostScript, for one, starts a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # of an image that is decoded: 300 MB
VALIDATION_FOLDERS = ("val", "validation", "test")  # beside `train`, the first that is there
RATIOS = (3 / 4, 4 / 3)  # between which the sides of a cut are, as of arXiv 1409.4842
FILTERS = ("bilinear", "bicubic", "lanczos")  # that Pillow and torchvision compute alike


@dataclasses.dataclass(frozen=True)
class ImagesConfig(DataConfig):
    kind: str = "images"  # see gpt/data/base.py
    # A folder with a subfolder of images for each class, or with two such folders, `train` and `val`; "": the 1,797
    # digits of 8 × 8 pixels that come with scikit-learn.
    path: str = harmless("")
    validation_fraction: float = 0.2  # part of the images held out, at random but always the same; not where `val` is
    crop: float = 1.0  # in training, cut out at least this part of an image's area; 1: the square in its middle
    shift: int = 0  # in training, move an image by up to so many pixels, to each side
    flip: bool = False  # in training, mirror half of the images
    # An image is scaled until its shorter side has `resize` pixels, and the square in its middle is cut out.
    resize: int = 0  # 0: the size of the images that the model reads
    stretch: bool = False  # scale both sides to `resize` pixels, which changes the proportions of an image
    resample: str = "bicubic"  # filter that images are scaled with: bilinear, bicubic or lanczos
    on_white: bool = False  # put transparent images on a white ground; False: drop their transparency
    threads: int = 4  # that decode images
    prefetch: int = harmless(4)  # batches prepared ahead

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} has to lie between 0 and 1.")
        if not 0 < self.crop <= 1:
            raise UserError(f"data.crop={self.crop} has to be greater than 0 and at most 1.")
        for name in ("shift", "prefetch", "resize"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name}={getattr(self, name)} must not be negative.")
        if self.threads < 1:
            raise UserError(f"data.threads={self.threads} has to be at least 1.")
        check_choice("data.resample", self.resample, FILTERS)

    gives: ClassVar[str] = "images"

    @property
    def vocab_size(self) -> int:
        return 0 if self.path else 10

    def load(self, tokenizer, model, say=lambda line: None, status=lambda line: None) -> "Folders":
        return load(self, tokenizer if isinstance(tokenizer, Labels) else None, say)

    def inputs(self, prompt: str, model: ModelShape) -> np.ndarray:
        size, channels = self.shape(model)
        image = decode(paths.located(prompt, "--prompt", "file"), channels, on_white=self.on_white)
        return fit(image, size, self).reshape(size, size, channels)

    def shape(self, model: ModelShape) -> tuple[int, int]:
        """Size and channels of the images that a model reads. Raises UserError if `resize` is less than the size."""
        _, size, channels = model.example_shapes()["inputs"].shape
        if 0 < self.resize < size:
            raise UserError(
                f"data.resize={self.resize} has to be at least {size}, the size of the model's images, or 0."
            )
        return size, channels

    def opened(self, path: str | None = None) -> "ImagesConfig":
        return self if path is None else dataclasses.replace(self, path=path)


@dataclasses.dataclass(frozen=True)
class Images:
    """Rows of one image and its class each: see `gpt.data.pipeline`.

    Attributes:
      images: of each row, the file, or uint8 of [H, W] or [H, W, C].
      classes: of each row, int32.
      size: height and width that an image is brought to, in pixels.
      channels: 3 for red, green and blue, 1 for grey.
      config: tells how images are changed in training.
      seed: of these changes; None: there are none.
    """

    images: list[Path] | np.ndarray
    classes: np.ndarray
    size: int
    channels: int
    config: ImagesConfig
    seed: int | None = None

    @property
    def threads(self) -> int:
        return self.config.threads

    def __len__(self) -> int:
        return len(self.images)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """{"inputs": uint8 [size, size, channels], "targets": the class, int32}.

        Raises:
          UserError: the file is no image, or damaged.
        """
        exact = self.seed is None or self.config.crop == 1
        image = decode(self.images[index], self.channels, 0 if exact else self.size, self.config.on_white)
        if self.seed is None:
            pixels = fit(image, self.size, self.config)
        else:
            pixels = _augmented(image, self.size, self.config, np.random.default_rng((self.seed, epoch, index)))
        return {"inputs": pixels.reshape(self.size, self.size, self.channels), "targets": self.classes[index]}


def decode(image: Path | np.ndarray, channels: int, size: int = 0, on_white: bool = False):
    """The image as Pillow has it, of one or three channels, upright. Raises UserError where it is none.

    Args:
      size: to which it will be brought: a JPEG is decoded at a lower resolution, but not below twice that; 0: exactly.
      on_white: as in `ImagesConfig`. Without it, colours are those of transformers' `load_image`, with it, those of
        `do_convert_rgb`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    mode = {1: "L", 3: "RGB"}[channels]
    if not isinstance(image, Path):
        return Image.fromarray(image).convert(mode)
    Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS  # a bound for what is allocated when a file is opened
    try:
        with paths.open_regular(image) as file, Image.open(file, formats=FORMATS) as opened:
            if size:
                opened.draft(mode, (2 * size, 2 * size))
            if (pixels := math.prod(opened.size)) > MAX_PIXELS:
                raise ValueError(f"{pixels:,} pixels are more than {MAX_PIXELS:,}")
            upright = ImageOps.exif_transpose(opened)
            if on_white and upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert(mode)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise all sorts of errors for damaged files
        reason = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = getattr(error, "strerror", None) or reason or type(error).__name__
        raise UserError(f"{image} cannot be read as an image ({reason}); mend it, or take it away.") from None


def fit(image, size: int, config: ImagesConfig) -> np.ndarray:
    """An image scaled and cut as `config` says, as uint8 of [size, size] or [size, size, 3].

    The pixels are those of transformers' image processors, which scale the whole image and then cut out its middle.
    Only that part is computed here.
    """
    side, shorter = config.resize or size, min(image.size)
    box = []
    for length in image.size:
        scaled = side if config.stretch else int(side * length / shorter)
        first = (scaled - size) // 2
        box.append((first * length / scaled, (first + size) * length / scaled))
    (left, right), (top, bottom) = box
    return _cut(image, size, (left, top, right, bottom), config.resample)


def _augmented(image, size: int, config: ImagesConfig, rng: np.random.Generator) -> np.ndarray:
    if config.crop < 1:  # a part of random area and shape, somewhere (arXiv 1409.4842)
        area = rng.uniform(config.crop, 1) * math.prod(image.size)
        ratio = math.exp(rng.uniform(*map(math.log, RATIOS)))
        sides = min(math.sqrt(area * ratio), image.size[0]), min(math.sqrt(area / ratio), image.size[1])
        left, top = (rng.uniform(0, whole - part) for whole, part in zip(image.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        pixels = _cut(image, size, box, config.resample, reducing_gap=3.0)  # nearly as good, and faster
    else:
        pixels = fit(image, size, config)
    if config.shift:
        first_row, first_column = rng.integers(0, 2 * config.shift, 2, endpoint=True)
        padded = np.pad(pixels, [(config.shift, config.shift)] * 2 + [(0, 0)] * (pixels.ndim - 2))
        pixels = padded[first_row : first_row + size, first_column : first_column + size]
    return pixels[:, ::-1] if config.flip and rng.random() < 0.5 else pixels


def _cut(image, size: int, box: tuple[float, float, float, float], resample: str, **options: float) -> np.ndarray:
    from PIL import Image

    if box == (0, 0, size, size):
        return np.asarray(image.crop(box))
    return np.asarray(image.resize((size, size), Image.Resampling[resample.upper()], box, **options))


@dataclasses.dataclass(frozen=True)
class Folders(Dataset):
    """Images by their place, with their classes by number, split.

    Attributes:
      train, validation: images and classes, as of `Images`.
      tokenizer: the names of the classes.
      fingerprint: changes with the names, sizes, classes and split of the files.
    """

    config: "ImagesConfig"
    train: tuple[Any, np.ndarray]
    validation: tuple[Any, np.ndarray]
    tokenizer: Labels
    fingerprint: str

    def training(self, model: ModelShape, seed: int) -> Images:
        return Images(*self.train, *self.config.shape(model), self.config, seed)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Images:
        if stride:
            raise UsageError("--stride is for windows over a text, not for images.")
        parts = {"train": [self.train], "val": [self.validation], "all": [self.train, self.validation]}[split]
        images, classes = (np.concatenate(both) for both in zip(*parts, strict=True))
        return Images(images, classes, *self.config.shape(model), self.config)

    def describe(self) -> str:
        sizes = f"{len(self.train[1]):,} training and {len(self.validation[1]):,} validation images"
        return f"{sizes}, {self.tokenizer.vocab_size} classes"

    def report(self, source: Images, result: dict[str, Any]) -> dict[str, float]:
        return {"images": result["examples"]} | {name: result[name] for name in ("loss", "accuracy")}

    def mistakes(self, source: Images, result: dict[str, Any]) -> Shown:
        """The images that the model took for others."""
        if not result["mistakes"]:
            return Shown()
        names, lines, pixels = self.tokenizer.names, [], []
        for row, said in result["mistakes"]:
            found = source.example(0, row)
            place = f" ({source.images[row]})" if isinstance(source.images[row], Path) else ""
            lines.append(f"{names[int(found['targets'])]} taken for {names[int(said)]}{place}")
            pixels.append(found["inputs"])
        return Shown("\n".join(lines), {"mistakes": np.concatenate(pixels, axis=1)})


def load(config: ImagesConfig, labels: Labels | None, say: Say = lambda line: None) -> Folders:
    """The images that the config names; files are listed, and not read.

    Args:
      labels: where there is a model for certain classes already: a folder may lack some of them.
      say: called with a line for the user if files are left out.

    Raises:
      UserError: there are none, or of one class only, or of others than `labels`; or a package is missing.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError('Images need Pillow: pip install "gpt-spmd[images]".')
    if config.path:
        return _load_folder(config, labels, say)
    if importlib.util.find_spec("sklearn") is None:
        raise UserError('data.path="" names scikit-learn\'s digits: pip install "gpt-spmd[images]".')
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    digest = hashlib.sha256(images.tobytes())
    return _split(config, images, digits.target.astype(np.int32), labels or Labels(tuple("0123456789")), digest)


def _load_folder(config: ImagesConfig, labels: Labels | None, say: Say) -> Folders:
    root = paths.located(config.path, "data.path", "folder")
    listing = paths.Listing(root, "data.path")
    folders = _subfolders(listing, root)
    if "train" not in folders:
        names = labels.names if labels else tuple(folders)
        files, classes = _listed(listing, folders, names)
        listing.say(say)
        return _split(config, files, classes, Labels(names), _digest(root, files))
    held_out = next((name for name in VALIDATION_FOLDERS if name in folders), None)
    if held_out is None:
        raise UserError(f"{root} has a folder train, but none named val, with images for validation.")
    for name, folder in folders.items():
        if name not in ("train", held_out):
            listing.leave_out(f"beside train and {held_out}", folder)
    sides = [_subfolders(listing, folders[side]) for side in ("train", held_out)]
    names = labels.names if labels else tuple(sides[0])
    train, validation = (_listed(listing, side, names) for side in sides)
    listing.say(say)
    fingerprint = _digest(root, [*train[0], *validation[0]]).hexdigest()[:32]
    return Folders(config, train, validation, Labels(names), fingerprint)


def _subfolders(listing: paths.Listing, folder: Path) -> dict[str, Path]:
    """The folders in a folder by their name, in the order of their names."""
    if not folder.is_dir():
        raise UserError(
            f"data.path: {folder} is a file; images are read from a folder with a subfolder for each class."
        )
    found = {}
    for path in listing.children(folder):
        if path.is_dir():
            found[path.name] = path
        else:
            listing.leave_out("outside the folders of classes", path)
    if len(found) < 2:
        has = f"only one, {next(iter(found))}" if found else "none"
        raise UserError(f"{folder} needs a folder of images for each of at least two classes, and has {has}.")
    return found


def _listed(listing: paths.Listing, folders: dict[str, Path], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The images in the folders of classes and their classes by number, in the order of their names."""
    files, classes = [], []
    for name, folder in folders.items():
        if name not in names:
            raise UserError(f"{folder} is none of the {len(names)} classes that training knows.")
        inside = listing.files(folder, SUFFIXES)
        if not inside:
            raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
        files += inside
        classes += [names.index(name)] * len(inside)
    return np.array(files, object), np.array(classes, np.int32)


def _digest(root: Path, files: Sequence[Path]) -> Any:
    """Of names and sizes: to read the contents would take hours for a large folder."""
    listed = [[str(file.relative_to(root)), file.stat().st_size] for file in files]
    return hashlib.sha256(json.dumps(listed).encode())


def _split(config: ImagesConfig, images: np.ndarray, classes: np.ndarray, labels: Labels, digest: Any) -> Folders:
    """Holds out a part at random, which is the same whatever the seed of a run."""
    order = np.random.default_rng(0).permutation(len(images))
    held_out = round(config.validation_fraction * len(images))
    if not 0 < held_out < len(images):
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} of {len(images)} images leaves none on one side."
        )
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    digest.update(f"{held_out}".encode())
    parts = ((images[rows], classes[rows]) for rows in (train, validation))
    return Folders(config, *parts, labels, digest.hexdigest()[:32])
