"""The table of model families, and the interface that each of them implements.

A family is a module in this folder with a configuration class, a subclass of `ModelConfig`, and the Flax module that
the configuration creates. Its entry in `FAMILIES` makes it available as `config.model.family`.
"""

import dataclasses
from typing import Any, ClassVar, Self

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
    """Shape and options of a model. Each family subclasses it with a frozen dataclass that gives every field a default.

    Attributes:
      family: the name of the family in `FAMILIES`.
      vocab_size: the number of targets to choose from: tokens or classes. 0 takes the number from the data.
      num_layers: the number of blocks.
      num_heads: the number of attention heads in each block.
      embed_dim: the width of the residual stream.
      attention: the name of the attention implementation.
      attention_dropout: the probability of dropping an attention weight.
      attention_softcap: limit of the attention scores. 0 means no limit.
      dtype: the dtype of the computation. Parameters are float32.
      scan_layers: whether one compiled block runs in a loop over the layers.
      remat: what the backward pass recomputes.
      lora_rank: the rank of the LoRA adapters. 0 means no adapters.
      lora_targets: the linear layers that have an adapter.
      reads: the kind of input: "tokens", int32 [length], or "images", uint8 [height, width, channels].
    """

    family: str
    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    attention: str
    attention_dropout: float
    attention_softcap: float
    dtype: str
    scan_layers: bool
    remat: str
    lora_rank: int
    lora_targets: str

    reads: ClassVar[str] = "tokens"
    attention_kinds: ClassVar[tuple[str, ...]]  # the values that `attention` may have

    @property
    def length(self) -> int:
        """Sequence length of an example, in tokens. The mesh axis `sequence` shards it; throughput is counted in it."""
        raise NotImplementedError

    @property
    def width_ratio(self) -> float:
        """Width relative to that for which learning rates and initial values were found; see `optimizer`."""
        return 1.0

    @property
    def num_targets(self) -> int:
        """Number of tokens at the end of an example that have a target."""
        return self.length

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP in a block."""
        raise NotImplementedError

    @property
    def layer_weights(self) -> dict[str, tuple[int, int]]:
        """The sizes (inputs, outputs) of the linear layers of a block, by name."""
        raise NotImplementedError

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits, at least `vocab_size`."""
        return self.vocab_size

    @property
    def lora_scale(self) -> float:
        """Factor by which the output of an adapter is multiplied."""
        raise NotImplementedError

    @property
    def length_key(self) -> str:
        """Config key of the sequence length in the blocks, for messages."""
        return "model.block_size"

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """Returns this config with concrete values in the place of `0` and `auto`.

        Args:
          vocab_size: the number of tokens or classes that the data has.
          platform: JAX's name of the platform, for example "cpu".
          length_shards: the number of shards of the sequence length on the mesh.

        Raises:
          UserError: the config is for another vocabulary, or its attention is not available for this platform or mesh.
        """
        raise NotImplementedError

    def without_kernel(self) -> Self:
        """Returns this config with an attention implementation that works on every platform."""
        return self

    def example_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of "inputs" and of "targets" (int32) in one example, without the batch axis.

        The module's logits are float32 of shape [batch, *targets, padded_vocab_size].
        """
        tokens = jax.ShapeDtypeStruct((self.length,), jnp.int32)
        return {"inputs": tokens, "targets": jax.ShapeDtypeStruct((self.num_targets,), jnp.int32)}

    def blank(self, rows: int) -> jax.Array:
        """Returns inputs of zeros for a batch of `rows` examples."""
        inputs = self.example_shapes()["inputs"]
        return jnp.zeros((rows, *inputs.shape), inputs.dtype)

    def module(self) -> nn.Module:
        """Returns the Flax module of a resolved config. It maps inputs and `deterministic` to logits."""
        raise NotImplementedError

    def head(self, params: Any) -> jax.Array:
        """Returns the matrix [V, D] of a model of tokens whose products with the last activations are the logits."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Returns the number of parameters, computed from the shapes alone, without adapters."""
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """Returns the model FLOPs of the forward and backward pass for one of the `length` tokens of an example."""
        raise NotImplementedError

    def summary(self) -> str:
        """Returns a short description of the model's shape for the log."""
        raise NotImplementedError
