"""A vision transformer (arXiv 2010.11929): class logits from the patches of an image, on the GPT's blocks.

Shape suffixes: B batch, H and W height and width in pixels, C channels, N patches, T tokens (the patches, and before
them a class token if there is one), D width, L classes.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt.models.layers import Linear
from gpt.models.transformer import BlockConfig, apply_blocks
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_positive

# Name: (layers, heads, width). S and Ti are those of arXiv 2012.12877, the others of arXiv 2010.11929.
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (12, 3, 192),
    "S": (12, 6, 384),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "H": (32, 16, 1280),
}
MAX_SIZE = 1 << 14  # pixels; more is a slip


@dataclasses.dataclass(frozen=True)
class ViTConfig(BlockConfig):
    """Shape and options of the model. The defaults are a ViT-Ti/16 for photographs, but for the classes."""

    family: str = "vit"  # see gpt/models/base.py
    num_layers: int = 12
    num_heads: int = 3
    embed_dim: int = 192
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    image_size: int = 224  # height and width of an image, in pixels
    channels: int = 3  # 3: red, green, blue; 1: grey
    patch_size: int = 16  # height and width of a patch, in pixels
    vocab_size: int = 0  # classes; 0: the data's
    pooling: str = "class_token"  # what the head reads: a token of its own, or the mean of the patches'
    pixel_mean: str = "0.5"  # subtracted from pixels, which go from 0 to 1; "0.485,0.456,0.406": one for each channel
    pixel_std: str = "0.5"  # and what the difference is divided by

    reads: ClassVar[str] = "images"
    causal: ClassVar = False
    position_kinds: ClassVar = ("learned", "sincos")
    pooling_kinds: ClassVar = ("class_token", "mean")
    attention_kinds: ClassVar = ("auto", "dense", "flax")

    def __post_init__(self):
        check_positive("model", self, "image_size", "channels", "patch_size")
        check_choice("model.channels", self.channels, (1, 3))
        check_choice("model.pooling", self.pooling, self.pooling_kinds)
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size={self.vocab_size} has to be 0 (the data's) or more.")
        if self.image_size > MAX_SIZE:
            raise UserError(f"model.image_size={self.image_size} is beyond {MAX_SIZE:,} pixels.")
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise UserError(f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}.")
        if self.positions == "sincos" and self.embed_dim % 4:
            raise UserError(f"model.positions=sincos needs a multiple of 4, but model.embed_dim={self.embed_dim}.")
        self.pixel_scale()

    @property
    def length(self) -> int:
        """Tokens of an image: the patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "class_token")

    @property
    def kernel_scale(self) -> float:
        return self.embed_dim**-0.5

    def example_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = self.image_size, self.image_size, self.channels
        return {"inputs": jax.ShapeDtypeStruct(shape, jnp.uint8), "targets": jax.ShapeDtypeStruct((), jnp.int32)}

    def pixel_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of pixels, of [C] or [1]. Raises UserError where they are none."""
        found = []
        for key in ("pixel_mean", "pixel_std"):
            text = getattr(self, key)
            try:
                numbers = np.array([float(number) for number in text.split(",")])
            except ValueError:
                numbers = np.full(1, np.nan)
            if len(numbers) not in (1, self.channels) or not np.isfinite(numbers).all():
                raise UserError(
                    f"model.{key}={text!r} has to be a number, or one for each of model.channels={self.channels}."
                )
            found.append(numbers)
        if not (found[1] > 0).all():
            raise UserError(f"model.pixel_std={self.pixel_std} has to be greater than 0.")
        return found[0], found[1]

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> "ViTConfig":
        """This config with what `0` and `auto` stand for filled in.

        Args:
          platform: JAX's name of it, like "cpu".
          length_shards: is of no concern: no kernel is used.

        Raises:
          UserError: it is for another number of classes.
        """
        if self.vocab_size not in (0, vocab_size):
            raise UserError(f"model.vocab_size={self.vocab_size}, but the data has {vocab_size} classes; set 0.")
        attention = "dense" if self.attention == "auto" else self.attention
        dtype = self.resolved_dtype(platform)
        return dataclasses.replace(self, vocab_size=vocab_size, attention=attention, dtype=dtype)

    def num_parameters(self) -> int:
        """Number of parameters, from the shapes alone."""
        d, learned, token = self.embed_dim, self.positions == "learned", self.pooling == "class_token"
        patches = self.channels * self.patch_size**2 * d + self.bias * d
        head = d * self.vocab_size + self.bias * self.vocab_size
        return patches + (learned * self.length + token) * d + self.block_parameters(self.num_layers) + head

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward pass for one of the `length` tokens: see `BlockConfig.flops`."""
        patches = self.channels * self.patch_size**2 * self.embed_dim
        return self.flops(self.length, patches) + 6 * self.embed_dim * self.vocab_size / self.length

    def module(self) -> "ViT":
        return ViT(self)

    def summary(self) -> str:
        return f"{super().summary()}, {self.length} tokens of patches of {self.patch_size} × {self.patch_size} pixels"


class ViT(nn.Module):
    """Class logits from images. `config` has to be resolved: see `ViTConfig.resolve`."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits of the classes of each image.

        Args:
          images_BxHxWxC: uint8, H and W `image_size`.
          deterministic: False switches dropout on; it draws from the "dropout" rng.

        Returns:
          logits_BxL, float32.

        Raises:
          ValueError: the images have another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if images_BxHxWxC.shape[1:] != (c.image_size, c.image_size, c.channels):
            raise ValueError(f"images of {images_BxHxWxC.shape[1:]} are not of image_size={c.image_size}, {c.channels}")
        mean, std = c.pixel_scale()
        # Near 0 and 1 in size; the scaling is one product and one sum, and pixels travel as bytes.
        pixels_BxHxWxC = (images_BxHxWxC.astype(jnp.float32) / 255 - mean) / std
        patches_BxNxP = patches(pixels_BxHxWxC, c.patch_size)
        pixels = patches_BxNxP.shape[-1]
        embed = (pixels,), (c.embed_dim,), ("patch", "embed"), nn.initializers.normal(pixels**-0.5), c.bias, dtype
        x_BxTxD = Linear(*embed, name="patch_embedding")(patches_BxNxP)
        normal = nn.initializers.normal(0.02)
        if c.pooling == "class_token":
            token_D = self.param("class_token", nn.with_logical_partitioning(normal, ("embed",)), (c.embed_dim,))
            first_Bx1xD = jnp.broadcast_to(token_D.astype(dtype), (len(x_BxTxD), 1, c.embed_dim))
            x_BxTxD = jnp.concatenate([first_Bx1xD, x_BxTxD], axis=1)
        if c.positions == "learned":
            init = nn.with_logical_partitioning(normal, ("length", "embed"))
            x_BxTxD = x_BxTxD + self.param("position_embedding", init, (c.length, c.embed_dim)).astype(dtype)
        else:
            positions_NxD = sincos_positions(c.image_size // c.patch_size, c.embed_dim)
            before = c.length - len(positions_NxD)  # the class token has no place
            x_BxTxD = x_BxTxD + jnp.pad(positions_NxD, ((before, 0), (0, 0))).astype(dtype)
        x_BxTxD = nn.Dropout(c.embed_dropout, deterministic=deterministic)(x_BxTxD)
        x_BxTxD = nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed"))
        x_BxD = self.pooled(x_BxTxD, deterministic)
        head = (c.embed_dim,), (c.vocab_size,), ("embed", "classes"), nn.initializers.zeros, c.bias, dtype
        return Linear(*head, name="head")(x_BxD).astype(jnp.float32)

    def pooled(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        """[B, D]: what the blocks make of the tokens, in one vector."""
        x_BxTxD = apply_blocks(self.config, x_BxTxD, None, None, deterministic)
        return x_BxTxD[:, 0] if self.config.pooling == "class_token" else x_BxTxD.mean(axis=1)


def patches(pixels_BxHxWxC: jax.Array, size: int) -> jax.Array:
    """[B, N, size·size·C]: squares of `size` pixels, row by row; the numbers of each by row, column, channel."""
    batch, height, width, channels = pixels_BxHxWxC.shape
    x = pixels_BxHxWxC.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """[side², width]: sines and cosines of the column, then of the row of each patch, in `width`/4 frequencies each.

    Those of MoCo v3 (arXiv 2104.02057), as the simple ViT has them (arXiv 2205.01580).
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [places[:, None] * frequencies for places in (columns, rows)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1, dtype=np.float32)
