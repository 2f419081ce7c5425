"""ViT: a vision transformer that classifies images (arXiv 2010.11929), built from the GPT's blocks.

Shape suffixes: B batch, H and W height and width in pixels, C channels, N patches, P numbers in a patch, T tokens (the
patches, after a class token if there is one), D width, L classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt.models import lora
from gpt.models.attention import dense
from gpt.models.base import ModelConfig
from gpt.models.gradients import add_bias
from gpt.models.layers import Linear, parameter
from gpt.models.transformer import apply_blocks
from gpt.runtime.errors import UserError
from gpt.runtime.fields import option

MAX_SIZE = 1 << 14  # pixels; a larger image is a typing error


@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Shape and options of a vision transformer. The defaults are those of ViT-Ti/16 for photographs."""

    family: str = "vit"
    num_layers: int = 12
    num_heads: int = 3
    embed_dim: int = 192
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    image_size: int = option(224, "height and width of an image, in pixels", above=0, most=MAX_SIZE)
    channels: int = option(3, "3: red, green and blue; 1: gray", choices=(1, 3))
    patch_size: int = option(16, "height and width of a patch, in pixels", above=0)
    vocab_size: int = 0
    pooling: str = option("class_token", "what the head reads; mean: the mean of all patches", choices="pooling_kinds")
    pixel_mean: str = option("0.5", "subtracted from pixels in [0, 1]; a number, or one per channel with commas")
    pixel_std: str = option("0.5", "the difference is divided by this; a number, or one per channel")

    reads: ClassVar[str] = "images"
    position_kinds: ClassVar[tuple[str, ...]] = ("learned", "sincos")
    pooling_kinds: ClassVar[tuple[str, ...]] = ("class_token", "mean")
    attention_kinds: ClassVar[tuple[str, ...]] = ("auto", "dense")
    unavailable: ClassVar[tuple[str, ...]] = ("window",)
    vocab_source: ClassVar[str] = "data"

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise UserError(f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}.")
        if self.positions == "sincos" and self.embed_dim % 4:
            raise UserError(f"model.positions=sincos needs a multiple of 4, but model.embed_dim={self.embed_dim}.")
        self.pixel_scale()

    @property
    def length(self) -> int:
        """Number of tokens of an image: the patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "class_token")

    @property
    def kernel_scale(self) -> float:
        """Standard deviation of the initial kernels: 1/√width."""
        return self.embed_dim**-0.5

    def example_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = self.image_size, self.image_size, self.channels
        return {"inputs": jax.ShapeDtypeStruct(shape, jnp.uint8), "targets": jax.ShapeDtypeStruct((), jnp.int32)}

    def pixel_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and the standard deviation of pixels, each of shape [C] or [1].

        Raises:
          UserError: `pixel_mean` or `pixel_std` is not a list of numbers for the channels.
        """
        return self._per_channel("pixel_mean"), self._per_channel("pixel_std")

    def _per_channel(self, key: str) -> np.ndarray:
        text = getattr(self, key)
        try:
            numbers = np.array([float(number) for number in text.split(",")])
        except ValueError:
            numbers = np.full(1, np.nan)
        if len(numbers) not in (1, self.channels) or not np.isfinite(numbers).all():
            raise UserError(
                f"model.{key}={text!r} has to be a number, or one for each of model.channels={self.channels}."
            )
        if key == "pixel_std" and not (numbers > 0).all():
            raise UserError(f"model.pixel_std={text} has to be greater than 0.")
        return numbers

    def attention_function(self, window: int) -> Callable[..., jax.Array]:
        return functools.partial(dense, causal=False, softcap=self.attention_softcap)

    def module(self) -> nn.Module:
        return ViT(self)

    def num_parameters(self) -> int:
        d, learned, token = self.embed_dim, self.positions == "learned", self.pooling == "class_token"
        patches = self.channels * self.patch_size**2 * d + self.has_bias("patch") * d
        head = d * self.vocab_size + self.has_bias("head") * self.vocab_size
        return patches + (learned * self.length + token) * d + self.block_parameters(self.num_layers) + head

    def flops_per_token(self) -> float:
        patches = self.channels * self.patch_size**2 * self.embed_dim
        return self.flops(self.length, patches) + 6 * self.embed_dim * self.vocab_size / self.length

    def summary(self) -> str:
        return f"{super().summary()}, {self.length} tokens of patches of {self.patch_size} × {self.patch_size} pixels"


class ViT(nn.Module):
    """A vision transformer with a resolved `config`, see `ModelConfig.resolve`."""

    config: ViTConfig

    @nn.compact
    @lora.adapted
    def __call__(self, images_BxHxWxC: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Computes the logits of the classes of each image.

        Args:
          images_BxHxWxC: uint8, with H and W equal to `image_size`.
          deterministic: whether dropout is off. Dropout draws from the "dropout" random stream.

        Returns:
          logits_BxL, float32.

        Raises:
          ValueError: the images have another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if images_BxHxWxC.shape[1:] != (c.image_size, c.image_size, c.channels):
            raise ValueError(f"images of {images_BxHxWxC.shape[1:]} are not of image_size={c.image_size}, {c.channels}")
        # Pixels travel to the device as bytes and are scaled there.
        mean, std = c.pixel_scale()
        pixels_BxHxWxC = (images_BxHxWxC.astype(jnp.float32) / 255 - mean) / std
        patches_BxNxP = patches(pixels_BxHxWxC, c.patch_size)
        pixels = patches_BxNxP.shape[-1]
        init = nn.initializers.normal(pixels**-0.5)
        embed = (pixels,), (c.embed_dim,), ("patch", "embed"), init, c.has_bias("patch"), dtype
        x_BxTxD = Linear(*embed, name="patch_embedding")(patches_BxNxP)
        if c.pooling == "class_token":
            first_BxD = self.add_learned("class_token", jnp.zeros((len(x_BxTxD), c.embed_dim), dtype))
            x_BxTxD = jnp.concatenate([first_BxD[:, None], x_BxTxD], axis=1)
        if c.positions == "learned":
            x_BxTxD = self.add_learned("position_embedding", x_BxTxD)
        else:
            positions_NxD = sincos_positions(c.image_size // c.patch_size, c.embed_dim)
            before = c.length - len(positions_NxD)  # the class token has no position
            x_BxTxD = x_BxTxD + jnp.pad(positions_NxD, ((before, 0), (0, 0))).astype(dtype)
        x_BxTxD = nn.Dropout(c.embed_dropout, deterministic=deterministic)(x_BxTxD)
        x_BxTxD = nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed"))
        x_BxD = self.pooled(x_BxTxD, deterministic)
        head = (c.embed_dim,), (c.vocab_size,), ("embed", "classes"), nn.initializers.zeros, c.has_bias("head"), dtype
        return Linear(*head, name="head")(x_BxD).astype(jnp.float32)

    def add_learned(self, name: str, x: jax.Array) -> jax.Array:
        """Adds a parameter to x, [B, D] or [B, T, D], that is the same for all images."""
        axes = ("length", "embed")[3 - x.ndim :]
        value = parameter(self, name, nn.initializers.normal(0.02), axes, x.shape[1:])
        return nn.with_logical_constraint(add_bias(x, value.astype(x.dtype)), ("batch", *axes))

    def pooled(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        """Applies the blocks and returns one vector for each image: [B, D] from the embedded tokens [B, T, D]."""
        x_BxTxD = apply_blocks(self.config, x_BxTxD, jnp.arange(x_BxTxD.shape[1]), None, deterministic)
        return x_BxTxD[:, 0] if self.config.pooling == "class_token" else x_BxTxD.mean(axis=1)


def patches(pixels_BxHxWxC: jax.Array, size: int) -> jax.Array:
    """Cuts images into squares of `size` × `size` pixels.

    Returns:
      [B, N, size·size·C], with the patches row by row, and the numbers of a patch by row, column and channel.
    """
    batch, height, width, channels = pixels_BxHxWxC.shape
    x = pixels_BxHxWxC.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """Returns fixed position embeddings [side², width] for a square of patches, as in arXiv 2104.02057 and 2205.01580.

    Each has the sines and cosines of the patch's column and then of its row, in width/4 frequencies.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [indices[:, None] * frequencies for indices in (columns, rows)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1, dtype=np.float32)
