"""The model families, and what the rest of the program asks of one.

A family is a file here with a configuration, a subclass of `ModelConfig`, and the Flax module that it makes; and its
line in `FAMILIES`. `config.model.family` chooses it.
"""

import dataclasses
from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

FAMILIES = {
    "gpt": "gpt.models.gpt:GPTConfig",
    "vit": "gpt.models.vit:ViTConfig",
    "perceiver_ar": "gpt.models.perceiver:PerceiverARConfig",
    "perceiver_io": "gpt.models.perceiver:PerceiverIOConfig",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a model: the base of a frozen dataclass for each family, which gives each field a default.

    Attributes:
      family: name in `FAMILIES`.
      vocab_size: number of different targets, tokens or classes; 0: as the data has.
      num_layers, num_heads, embed_dim: number of blocks, of attention heads in each, and width of the residual stream.
      attention: the implementation of attention.
      dtype: of the computation.
      scan_layers: one compiled block in a loop over the layers.
      remat: what the backward pass recomputes.
      lora_rank, lora_targets: rank of adapters (0: none), and the kernels that have one.
      reads: what the inputs are: "tokens", int32 [length], or "images", uint8 [height, width, channels].
    """

    family: str
    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    attention: str
    dtype: str
    scan_layers: bool
    remat: str
    lora_rank: int
    lora_targets: str

    reads: ClassVar[str] = "tokens"

    @property
    def length(self) -> int:
        """Tokens of an example: what warm-up, speed and `train.tokens` count, and the mesh axis `sequence` divides."""
        raise NotImplementedError

    @property
    def num_targets(self) -> int:
        """How many of the last tokens of an example have a target."""
        return self.length

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP of a block."""
        raise NotImplementedError

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits, which `vocab_size` of them use."""
        return self.vocab_size

    @property
    def lora_scale(self) -> float:
        """The factor of what adapters add."""
        raise NotImplementedError

    @property
    def length_key(self) -> str:
        """The config key of the length of what the blocks work on."""
        return "model.block_size"

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """This config with what `0` and `auto` stand for filled in.

        Args:
          platform: JAX's name of it, like "cpu".
          length_shards: parts into which the mesh divides the length.

        Raises:
          UserError: it is for another vocabulary, or cannot be computed there.
        """
        raise NotImplementedError

    def without_kernel(self) -> Self:
        """This config without what only some platforms have, to be used on whatever platform."""
        return self

    def example_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a row: "inputs", and "targets", int32. The module's logits are [*targets, V], float32."""
        tokens = jax.ShapeDtypeStruct((self.length,), jnp.int32)
        return {"inputs": tokens, "targets": jax.ShapeDtypeStruct((self.num_targets,), jnp.int32)}

    def blank(self, rows: int) -> jax.Array:
        """Inputs of zeros."""
        inputs = self.example_shapes()["inputs"]
        return jnp.zeros((rows, *inputs.shape), inputs.dtype)

    def module(self) -> nn.Module:
        """The model of a resolved config: inputs and `deterministic` to logits; its attribute `config` is this."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Number of parameters, from the shapes alone."""
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward pass for one of the `length` tokens of a row."""
        raise NotImplementedError

    def summary(self) -> str:
        """Its shape in a few words."""
        raise NotImplementedError
