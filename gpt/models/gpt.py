"""A decoder-only transformer, from the token embedding to the logits.

Shape suffixes: B batch, T length, D width, H heads, K size of a head, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, kernels
from gpt.models.layers import Embedding, Linear
from gpt.models.transformer import BlockConfig, apply_blocks, block_cache
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_positive, harmless

# Name: (layers, heads, width). The GPT-2 family is from Radford et al. 2019, gopher-44m from
# arXiv 2112.11446, and the three smallest are minGPT's.
SIZES: dict[str, tuple[int, int, int]] = {
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}


@dataclasses.dataclass(frozen=True)
class GPTConfig(BlockConfig):
    """Shape and options of the model. The defaults are a GPT-2 for characters."""

    family: str = "gpt"
    vocab_size: int = 0  # 0: the tokenizer's
    vocab_multiple: int = 1  # pad the table of embeddings to a multiple, so that a mesh axis divides it
    block_size: int = 128  # longest context, in tokens
    tie_embeddings: bool = True  # output head = transposed token embedding, as in GPT-2
    query_chunk: int = harmless(128)  # block sizes of chunked attention, in tokens
    key_chunk: int = harmless(128)

    def __post_init__(self):
        check_positive("model", self, "vocab_multiple", "block_size", "query_chunk", "key_chunk")
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size={self.vocab_size} has to be 0 (the tokenizer's) or more.")
        super().__post_init__()
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"model.positions=rotary needs an even head size, but model.embed_dim/model.num_heads={self.head_dim}."
            )

    @property
    def length(self) -> int:
        return self.block_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> "GPTConfig":
        """This config with what `0` and `auto` stand for filled in.

        Args:
          platform: JAX's name of it, like "cpu".
          length_shards: parts into which the mesh divides the length.

        Raises:
          UserError: it is for another vocabulary, or its attention is a kernel that cannot compute this.
        """
        if self.vocab_size not in (0, vocab_size):
            raise UserError(f"model.vocab_size={self.vocab_size}, but the tokenizer has {vocab_size} tokens; set 0.")
        resolved = dataclasses.replace(self, vocab_size=vocab_size, dtype=self.resolved_dtype(platform))
        kernel = self.attention
        if kernel == "auto":
            kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "dense")
        if why_not := resolved._lacks(kernel, platform, length_shards):
            if self.attention != "auto":
                raise UserError(f"model.attention={kernel} {why_not}; choose dense or chunked, or auto.")
            kernel = "dense"
        return dataclasses.replace(resolved, attention=kernel)

    def _lacks(self, kernel: str, platform: str, length_shards: int) -> str | None:
        """Why a kernel of attention cannot compute this; None if it can."""
        if kernel not in kernels.KERNELS:
            return None
        if platform != (wanted := kernels.KERNELS[kernel]):
            return f"runs on a {wanted.upper()}, and this is a {platform.upper()}"
        if self.attention_dropout:
            return f"has no dropout, but model.attention_dropout={self.attention_dropout}"
        if kernel == "splash":
            if self.num_targets % (kernels.LANES * length_shards) == 0:
                return None
            size, parts = f"{self.length_key}={self.num_targets}", f" in {length_shards} parts" * (length_shards > 1)
            return f"needs a multiple of {kernels.LANES} tokens, not {size}{parts}"
        if self.dtype == "float32":
            return "computes in bfloat16, not in model.dtype=float32"
        if self.head_dim % 8 or self.head_dim > 128:
            size = f"model.embed_dim/model.num_heads={self.head_dim}"
            return f"takes head sizes that are multiples of 8 up to 128, not {size}"
        return "does not take a part of the length, which mesh.sequence divides" if length_shards > 1 else None

    def module(self) -> "GPT":
        return GPT(self)

    def init_cache(self, first_latent_B: jax.Array, capacity: int) -> dict[str, Any]:
        """An empty "cache" collection for the module: room for the keys and values of `capacity` tokens in each row.

        Args:
          first_latent_B: int32, the position from which on the tokens of each row are latents, where a model has these.
        """
        rows = len(first_latent_B)
        if self.scan_layers:
            return {"blocks": block_cache(self, rows, capacity, self.num_layers)}
        return {f"block_{i}": block_cache(self, rows, capacity) for i in range(self.num_layers)}

    def summary(self) -> str:
        return f"{super().summary()}, block {self.block_size}"

    def num_parameters(self) -> int:
        """Number of parameters, embeddings included, from the shapes alone."""
        tables = self.padded_vocab_size * (1 if self.tie_embeddings else 2)
        positions = self.block_size if self.positions == "learned" else 0
        return (tables + positions) * self.embed_dim + self.block_parameters(self.num_layers)

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward pass for one trained token, at full block size: see `BlockConfig`."""
        return self.flops(self.block_size, self.vocab_size * self.embed_dim)


def embed(
    config: GPTConfig, tokens_BxT: jax.Array, positions: jax.Array, deterministic: bool
) -> tuple[jax.Array, Embedding]:
    """What goes into the blocks, and the table of tokens, as modules of the model that calls this."""
    c, init, dtype = config, nn.initializers.normal(0.02), jnp.dtype(config.dtype)
    token_embedding = Embedding(c.padded_vocab_size, c.embed_dim, "vocab", init, dtype, name="token_embedding")
    x_BxTxD = token_embedding(tokens_BxT)
    if c.positions == "learned":
        position_embedding = Embedding(c.block_size, c.embed_dim, "length", init, dtype, name="position_embedding")
        x_BxTxD = x_BxTxD + position_embedding(positions)
    x_BxTxD = nn.Dropout(c.embed_dropout, deterministic=deterministic)(x_BxTxD)
    return nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed")), token_embedding


def token_logits(config: GPTConfig, x_BxTxD: jax.Array, token_embedding: Embedding) -> jax.Array:
    """The logits of `GPT` from what comes out of the blocks; the head is a module of the model that calls this."""
    c = config
    if c.tie_embeddings:
        logits_BxTxV = token_embedding.attend(x_BxTxD)
    else:
        head = (c.embed_dim,), (c.padded_vocab_size,), ("embed", "vocab"), nn.initializers.normal(0.02)
        logits_BxTxV = Linear(*head, False, jnp.dtype(c.dtype), name="head")(x_BxTxD)
    logits_BxTxV = nn.with_logical_constraint(logits_BxTxV, ("batch", "length", "vocab")).astype(jnp.float32)
    if c.padded_vocab_size > c.vocab_size:
        is_padding = jnp.arange(c.padded_vocab_size) >= c.vocab_size
        logits_BxTxV = jnp.where(is_padding, attention.MASKED, logits_BxTxV)
    return logits_BxTxV


class GPT(nn.Module):
    """Token logits from tokens. `config` has to be resolved: see `GPTConfig.resolve`.

    Applied with a "cache" collection, as `GPTConfig.init_cache` makes it, to be returned changed
    (`mutable=["cache"]`), it leaves the keys and values of the tokens there. So a text is continued: first its tokens
    at once, from position 0 on, and then one token at a time, each with its position.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        starts_BxT: jax.Array | None = None,
        *,
        deterministic: bool = True,
        position_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token at each position.

        Args:
          tokens_BxT: int32 token ids, T at most `block_size`.
          starts_BxT: for each token, where in the row its document begins: it sees no other, and its position
            counts from there. None: all of the row is one document.
          deterministic: False switches dropout on; it draws from the "dropout" rng.
          position_B: the position of each row's only token, with a cache; None: the tokens begin at position 0.

        Returns:
          logits_BxTxV, float32, with V = `padded_vocab_size` and the padding at -1e30.

        Raises:
          ValueError: T is greater than `block_size`.
        """
        c = self.config
        length = tokens_BxT.shape[1]
        if length > c.block_size:
            raise ValueError(f"{length} tokens are more than block_size={c.block_size}")
        positions = jnp.arange(length) if position_B is None else position_B[:, None]
        if starts_BxT is not None:
            positions = positions - starts_BxT
        x_BxTxD, token_embedding = embed(c, tokens_BxT, positions, deterministic)
        x_BxTxD = apply_blocks(c, x_BxTxD, positions, starts_BxT, deterministic)
        return token_logits(c, x_BxTxD, token_embedding)


def named_size(name: str, sizes: dict[str, tuple[int, int, int]] = SIZES) -> dict[str, int]:
    """`num_layers`, `num_heads` and `embed_dim` of a known size, of `SIZES` or those of another family.

    Raises:
      UserError: there is no such size.
    """
    check_choice("size", name, sizes)
    return dict(zip(("num_layers", "num_heads", "embed_dim"), sizes[name], strict=True))
