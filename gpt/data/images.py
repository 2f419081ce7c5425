"""Images and their classes: scikit-learn's digits, or a folder with a subfolder for each class.

Threads that prepare batches decode the files. The augmentation of an image, which crops, moves or mirrors it, is a pure
function of (seed, epoch, index).
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from gpt.data import paths
from gpt.data.base import DataConfig, Dataset, ModelShape, Shown
from gpt.data.tokenizers import Labels
from gpt.runtime import cache
from gpt.runtime.errors import UserError
from gpt.runtime.fields import option

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pillow must not try other formats, whatever the suffix: its decoder of PostScript, for instance, starts a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # largest image to decode: 300 MB
VALIDATION_FOLDERS = ("val", "validation", "test")  # names for the folder beside `train`; the first that exists is read
RATIOS = (3 / 4, 4 / 3)  # least and greatest ratio of width to height of a random crop (arXiv 1409.4842)
FILTERS = ("bilinear", "bicubic", "lanczos")  # filters that are the same in Pillow and torchvision


@dataclasses.dataclass(frozen=True)
class ImagesConfig(DataConfig):
    """Options of images with classes.

    An image is scaled until its shorter side has `resize` pixels, and the square in its center is cut out, of the size
    that the model reads. In training, `crop`, `shift` and `flip` augment the images.
    """

    kind: str = "images"
    # Or a folder with two such folders, `train` and `val`. The digits are 1,797 images of 8 × 8 pixels.
    path: str = option("", "folder with a folder of images per class; empty: scikit-learn's digits", harmless=True)
    validation_fraction: float = option(0.2, "fraction for validation if there is no folder val", above=0, below=1)
    crop: float = option(1.0, "training: least part of the area to cut out at random; 1: the center", above=0, most=1)
    shift: int = option(0, "training: pixels by which to move an image at most, in each direction", least=0)
    flip: bool = option(False, "training: mirror half of the images")
    resize: int = option(0, "pixels of the shorter side before the cut; 0: as many as the model reads", least=0)
    stretch: bool = option(False, "scale both sides to data.resize pixels, which changes the aspect ratio")
    resample: str = option("bicubic", "filter to scale images with", choices=FILTERS)
    on_white: bool = option(False, "put transparent images on white instead of discarding the transparency")
    threads: int = option(4, "number of threads that decode images", above=0)

    gives: ClassVar[str] = "images"

    @property
    def vocab_size(self) -> int:
        return 0 if self.path else 10

    def load(self, tokenizer, model) -> Dataset:
        """Lists the images, without reading the files. A folder may lack classes of an existing model's `Labels`."""
        labels = tokenizer if isinstance(tokenizer, Labels) else None
        check_installed("PIL", "Images need Pillow")
        if self.path:
            return _load_folder(self, labels)
        check_installed("sklearn", 'data.path="" names scikit-learn\'s digits')
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        names = labels or Labels(tuple("0123456789"))
        return _split(self, images, digits.target.astype(np.int32), names, images.tolist())

    def inputs(self, prompt: str, model: ModelShape) -> np.ndarray:
        """Returns the image in a file as uint8 [size, size, channels]."""
        size, channels = self.shape(model)
        image = decode(paths.located(prompt, "--prompt", "file"), channels, on_white=self.on_white)
        return fit(image, size, self).reshape(size, size, channels)

    def shape(self, model: ModelShape) -> tuple[int, int]:
        """Returns size (pixels) and channels of the images that a model reads.

        Raises:
          UserError: `resize` is less than the size.
        """
        _, size, channels = model.example_shapes()["inputs"].shape
        if 0 < self.resize < size:
            raise UserError(
                f"data.resize={self.resize} has to be at least {size}, the size of the model's images, or 0."
            )
        return size, channels

    def opened(self, path: str | None = None) -> Self:
        return self if path is None else dataclasses.replace(self, path=path)


@dataclasses.dataclass(frozen=True)
class Images:
    """Examples with an image and its class.

    Attributes:
      images: [N] files, or uint8 [N, H, W] or [N, H, W, C].
      classes: int32 [N].
      size: height and width of the resulting images, in pixels.
      channels: 3 for red, green and blue, 1 for grey.
      config: the options of scaling and augmentation.
      seed: seed of the augmentation; None: no augmentation.
    """

    images: np.ndarray
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
        """Returns "inputs", uint8 [size, size, channels], and "targets", the class as int32.

        Raises:
          UserError: the file is not an image, or is damaged.
        """
        is_exact = self.seed is None or self.config.crop == 1
        image = decode(self.images[index], self.channels, 0 if is_exact else self.size, self.config.on_white)
        if self.seed is None:
            pixels = fit(image, self.size, self.config)
        else:
            pixels = _augmented(image, self.size, self.config, np.random.default_rng((self.seed, epoch, index)))
        return {"inputs": pixels.reshape(self.size, self.size, self.channels), "targets": self.classes[index]}


def decode(image: Path | np.ndarray, channels: int, size: int = 0, on_white: bool = False) -> "Image.Image":
    """Returns an image of one or three channels, upright according to its EXIF data.

    Args:
      image: a file, or uint8 [H, W] or [H, W, C].
      size: size in pixels to which the caller will scale the image. A JPEG may be decoded at a lower resolution, but
        not below twice this size. 0: full resolution.
      on_white: as in `ImagesConfig`. If False, colours are those of transformers' `load_image`, else those of its
        `do_convert_rgb`.

    Raises:
      UserError: the file is not an image, is damaged, or has too many pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    mode = {1: "L", 3: "RGB"}[channels]
    if not isinstance(image, Path):
        return Image.fromarray(image).convert(mode)
    Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS  # limits the memory that opening a file allocates
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
    except Exception as error:  # Pillow's decoders raise many types of errors for damaged files
        reason = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = getattr(error, "strerror", None) or reason or type(error).__name__
        raise UserError(f"{image} cannot be read as an image ({reason}); repair or remove it.") from None


def fit(image: "Image.Image", size: int, config: ImagesConfig) -> np.ndarray:
    """Scales an image and cuts out its center as `config` defines; returns uint8 [size, size] or [size, size, 3].

    The pixels equal those of transformers' image processors, which scale the whole image before they cut it. This
    function scales only the part that remains.
    """
    side, shorter = config.resize or size, min(image.size)
    box = []
    for length in image.size:
        scaled = side if config.stretch else int(side * length / shorter)
        first = (scaled - size) // 2
        box.append((first * length / scaled, (first + size) * length / scaled))
    (left, right), (top, bottom) = box
    return _cut(image, size, (left, top, right, bottom), config.resample)


def _augmented(image: "Image.Image", size: int, config: ImagesConfig, rng: np.random.Generator) -> np.ndarray:
    if config.crop < 1:  # cut out a part of random area, aspect ratio and place (arXiv 1409.4842)
        area = rng.uniform(config.crop, 1) * math.prod(image.size)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        sides = min(math.sqrt(area * ratio), image.size[0]), min(math.sqrt(area / ratio), image.size[1])
        left, top = (rng.uniform(0, whole - part) for whole, part in zip(image.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        pixels = _cut(image, size, box, config.resample, reducing_gap=3.0)  # faster, with nearly equal pixels
    else:
        pixels = fit(image, size, config)
    if config.shift:
        first_row, first_column = rng.integers(0, 2 * config.shift, 2, endpoint=True)
        padded = np.pad(pixels, [(config.shift, config.shift)] * 2 + [(0, 0)] * (pixels.ndim - 2))
        pixels = padded[first_row : first_row + size, first_column : first_column + size]
    return pixels[:, ::-1] if config.flip and rng.random() < 0.5 else pixels


def _cut(
    image: "Image.Image", size: int, box: tuple[float, float, float, float], resample: str, **options: Any
) -> np.ndarray:
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling[resample.upper()], box, **options))


@dataclasses.dataclass(frozen=True)
class Folders(Dataset):
    """Images and classes in two splits.

    Attributes:
      images, classes: as in `Images`, those for training first.
      num_train: number of images for training.
      tokenizer: the names of the classes.
      fingerprint: a digest that changes with the names, sizes, classes and split of the files.
    """

    config: ImagesConfig
    images: np.ndarray
    classes: np.ndarray
    num_train: int
    tokenizer: Labels
    fingerprint: str

    def source(self, split: str, size: int, channels: int, seed: int | None = None) -> Images:
        """Returns the examples of a split; see `Images` for size, channels and seed."""
        part = {"train": slice(self.num_train), "val": slice(self.num_train, None), "all": slice(None)}[split]
        return Images(self.images[part], self.classes[part], size, channels, self.config, seed)

    def examples(self, split: str, model: ModelShape, seed: int | None = None) -> Images:
        return self.source(split, *self.config.shape(model), seed)

    def describe(self) -> str:
        held_out = len(self.images) - self.num_train
        sizes = f"{self.num_train:,} training and {held_out:,} validation images"
        return f"{sizes}, {self.tokenizer.vocab_size} classes"

    def report(self, source: Any, result: dict[str, Any]) -> dict[str, float]:
        return {"images": result["examples"]} | {name: result[name] for name in ("loss", "accuracy")}

    def mistakes(self, source: Any, result: dict[str, Any]) -> Shown:
        """Returns lines with the true and the predicted class of wrongly classified images, and a picture of them."""
        if not result["mistakes"]:
            return Shown()
        names, lines, pixels = self.tokenizer.names, [], []
        for index, prediction in result["mistakes"]:
            example = source.example(0, index)
            place = f" ({source.images[index]})" if isinstance(source.images[index], Path) else ""
            lines.append(f"{names[int(example['targets'])]} taken for {names[int(prediction)]}{place}")
            pixels.append(example["inputs"])
        return Shown("\n".join(lines), {"mistakes": np.concatenate(pixels, axis=1)})


def check_installed(package: str, reason: str) -> None:
    """Raises UserError with a reason and a command unless a package of the extra `images` is installed."""
    paths.of_package(package, f'{reason}: pip install -e ".[images]".')


def _load_folder(config: ImagesConfig, labels: Labels | None) -> Folders:
    root = paths.located(config.path, "data.path", "folder")
    if not root.is_dir():
        raise UserError(f"data.path: {root} is a file; images are read from a folder with a subfolder for each class.")
    listing = paths.Listing(root, "data.path")
    folders = _subfolders(listing, root)
    sides = [folders]
    if "train" in folders:
        held_out = next((name for name in VALIDATION_FOLDERS if name in folders), None)
        if held_out is None:
            raise UserError(f"{root} has a folder train, but no folder val with images for validation.")
        for name, folder in folders.items():
            if name not in ("train", held_out):
                listing.leave_out(f"beside train and {held_out}", folder)
        sides = [_subfolders(listing, folders[side]) for side in ("train", held_out)]
    labels = labels or Labels(tuple(sides[0]))
    parts = [_listed(listing, side, labels.names) for side in sides]
    listing.say()
    # Names and sizes identify the files, because reading the contents of a large folder would take hours.
    listed = [[str(file.relative_to(root)), file.stat().st_size] for files, _ in parts for file in files]
    if len(parts) == 1:
        return _split(config, *parts[0], labels, listed)
    images, classes = (np.concatenate(both) for both in zip(*parts, strict=True))
    return Folders(config, images, classes, len(parts[0][0]), labels, cache.digest(listed))


def _subfolders(listing: paths.Listing, folder: Path) -> dict[str, Path]:
    """Returns {name: folder} of the folders in a folder, in the order of their names."""
    folders = {}
    for path in listing.children(folder):
        if path.is_dir():
            folders[path.name] = path
        else:
            listing.leave_out("outside the folders of classes", path)
    if len(folders) < 2:
        has = f"only one, {next(iter(folders))}" if folders else "none"
        raise UserError(f"{folder} needs a folder of images for each of at least two classes, and has {has}.")
    return folders


def _listed(listing: paths.Listing, folders: dict[str, Path], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images in the folders of classes, in the order of their names, and the numbers of their classes."""
    files, classes = [], []
    for name, folder in folders.items():
        if name not in names:
            raise UserError(f"{folder} is none of the {len(names)} classes that the model was trained on.")
        inside = listing.files(folder, SUFFIXES)
        if not inside:
            raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
        files += inside
        classes += [names.index(name)] * len(inside)
    return np.array(files, object), np.array(classes, np.int32)


def _split(config: ImagesConfig, images: np.ndarray, classes: np.ndarray, labels: Labels, listed: list) -> Folders:
    """Splits the images, which `listed` identifies, at random; the split does not depend on the seed of the run."""
    order = np.random.default_rng(0).permutation(len(images))
    held_out = round(config.validation_fraction * len(images))
    if not 0 < held_out < len(images):
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} of {len(images)} images leaves a split empty."
        )
    order = np.concatenate([np.sort(order[held_out:]), np.sort(order[:held_out])])
    fingerprint = cache.digest(listed, held_out)
    return Folders(config, images[order], classes[order], len(images) - held_out, labels, fingerprint)
