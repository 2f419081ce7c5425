"""Images that a model of pixels generates, in a grid and as PNG files."""

import io
import math
from collections.abc import Sequence

import numpy as np

from gpt.data.pixels import Palette
from gpt.inference.generation import Continuation

MIN_SIDE = 64  # an image in a grid has at least this height and width in pixels


def png(pixels_HxWxC: np.ndarray) -> bytes:
    """Returns a PNG file of uint8 pixels, with one or three channels."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels_HxWxC.squeeze(-1) if pixels_HxWxC.shape[-1] == 1 else pixels_HxWxC).save(out, "PNG")
    return out.getvalue()


def join(prompts: Sequence[np.ndarray], samples: Sequence[Continuation]) -> list[np.ndarray]:
    """Returns the tokens of each sample after those of its prompt; the samples of a prompt follow one another."""
    number = len(samples) // len(prompts)
    return [np.append(prompts[i // number], sample.tokens) for i, sample in enumerate(samples)]


def grid(palette: Palette, samples: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Returns a picture with the images of samples side by side on grey.

    Args:
      samples: token ids of each image, with the class as the first token.
      columns: number of images in a row of the grid; None: about the number of rows.

    Returns:
      uint8 pixels, [H, W, C].
    """
    columns = columns or math.ceil(math.sqrt(len(samples)))
    scale, rows = -(-MIN_SIDE // palette.size), -(-len(samples) // columns)
    border = max(1, scale // 4)
    side = palette.size * scale + border
    canvas = np.full((rows * side + border, columns * side + border, palette.channels), 128, np.uint8)
    for i, sample in enumerate(samples):
        top, left = border + i // columns * side, border + i % columns * side
        large = palette.pixels(np.asarray(sample)[1:]).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    return canvas
