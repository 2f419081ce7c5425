"""GPT: a decoder-only transformer that predicts the next token.

Shape suffixes: B batch, T sequence length, D width, V padded vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, decoding, kernels, lora
from gpt.models.gradients import add_bias
from gpt.models.layers import Embedding, Linear
from gpt.models.transformer import ModelConfig, apply_blocks
from gpt.runtime.fields import check_not_negative, check_positive, harmless


@dataclasses.dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Shape and options of a GPT. The defaults are a small GPT-2 for characters."""

    family: str = "gpt"  # model family: gpt, vit, perceiver_ar or perceiver_io
    vocab_size: int = 0  # number of tokens; 0: the tokenizer's
    vocab_multiple: int = 1  # pad the vocabulary to a multiple of this, so that a mesh axis divides it
    block_size: int = 128  # context length, in tokens
    tie_embeddings: bool = True  # use the token embedding as the output head, as in GPT-2
    embed_multiplier: float = 1.0  # factor of the token embeddings, as in Gemma
    logit_softcap: float = 0.0  # limit logits by c·tanh(x/c), as in Gemma 2; 0: no limit
    query_chunk: int = harmless(128)  # block of queries in chunked attention, in tokens
    key_chunk: int = harmless(128)  # block of keys in chunked attention, in tokens

    def __post_init__(self):
        check_positive("model", self, "vocab_multiple", "block_size", "query_chunk", "key_chunk", "embed_multiplier")
        check_not_negative("model", self, "logit_softcap")
        super().__post_init__()

    @property
    def length(self) -> int:
        return self.block_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def attention_function(self, window: int) -> Callable[..., jax.Array]:
        function = kernels.by_name(self.attention, query_chunk=self.query_chunk, key_chunk=self.key_chunk)
        return functools.partial(function, window=window, softcap=self.attention_softcap)

    def module(self) -> nn.Module:
        return GPT(self)

    def head(self, params: Any) -> jax.Array:
        """Returns the matrix [V, D] whose products with the activations are the logits."""
        return params["token_embedding"]["embedding"] if self.tie_embeddings else params["head"]["kernel"].T

    def init_cache(self, first_latent_B: jax.Array, capacity: int) -> dict[str, Any]:
        """Returns an empty "cache" collection for the module.

        Args:
          first_latent_B: int32, the position of the first latent token in each row. Only its length matters to a model
            without latents.
          capacity: number of tokens in each row that the cache has room for.
        """
        rows = len(first_latent_B)
        if self.scan_layers:
            return {"blocks": decoding.block_cache(self, rows, capacity, self.num_layers)}
        return {f"block_{i}": decoding.block_cache(self, rows, capacity) for i in range(self.num_layers)}

    def num_parameters(self) -> int:
        tables = self.padded_vocab_size * (1 if self.tie_embeddings else 2)
        positions = self.block_size if self.positions == "learned" else 0
        return (tables + positions) * self.embed_dim + self.block_parameters(self.num_layers)

    def flops_per_token(self) -> float:
        return self.flops(self.block_size, self.vocab_size * self.embed_dim)

    def summary(self) -> str:
        return f"{super().summary()}, block {self.block_size}"


class GPT(nn.Module):
    """A GPT with a resolved `config`, see `ModelConfig.resolve`.

    With a "cache" collection from `GPTConfig.init_cache`, and `mutable=["cache"]`, the module stores the keys and
    values of the tokens there. Decoding first passes the whole prompt, and then one token at a time with its position.
    """

    config: GPTConfig

    @nn.compact
    @lora.adapted
    def __call__(
        self,
        tokens_BxT: jax.Array,
        starts_BxT: jax.Array | None = None,
        *,
        deterministic: bool = True,
        position_B: jax.Array | None = None,
        with_head: bool = True,
    ) -> jax.Array:
        """Computes the logits of the next token at each position.

        Args:
          tokens_BxT: int32 token ids, T at most `block_size`.
          starts_BxT: for each token, the index of the first token of its document. Positions count from there, and a
            token attends to its own document only. None means that each row is one document.
          deterministic: whether dropout is off. Dropout draws from the "dropout" random stream.
          position_B: with a cache, the position of the only token of each row. None means that positions begin at 0.
          with_head: whether to apply the output head.

        Returns:
          logits_BxTxV, float32, those of padding in the vocabulary -1e30; without the head, the activations [B, T, D].

        Raises:
          ValueError: T is greater than `block_size`.
        """
        c = self.config
        positions = token_positions(c, tokens_BxT, position_B)
        if starts_BxT is not None:
            positions = positions - starts_BxT
        x_BxTxD, token_embedding = embed(c, tokens_BxT, positions, deterministic)
        x_BxTxD = apply_blocks(c, x_BxTxD, positions, starts_BxT, deterministic)
        return token_logits(c, x_BxTxD, token_embedding) if with_head else x_BxTxD


def token_positions(config: GPTConfig, tokens_BxT: jax.Array, position_B: jax.Array | None) -> jax.Array:
    """Returns the indices of tokens in their rows: [T], or [B, 1] from `position_B` in decoding.

    Raises:
      ValueError: T is greater than `block_size`.
    """
    length = tokens_BxT.shape[1]
    if length > config.block_size:
        raise ValueError(f"{length} tokens are more than block_size={config.block_size}")
    return jnp.arange(length) if position_B is None else position_B[:, None]


def embed(
    config: GPTConfig, tokens_BxT: jax.Array, positions: jax.Array, deterministic: bool
) -> tuple[jax.Array, Embedding]:
    """Returns the embeddings [B, T, D] of tokens and positions, and the token embedding, for a tied output head.

    The modules become submodules of the module that calls this function.
    """
    c, init, dtype = config, nn.initializers.normal(0.02), jnp.dtype(config.dtype)
    token_embedding = Embedding(c.padded_vocab_size, c.embed_dim, "vocab", init, dtype, name="token_embedding")
    x_BxTxD = token_embedding(tokens_BxT)
    if c.embed_multiplier != 1:
        x_BxTxD = x_BxTxD * jnp.asarray(c.embed_multiplier, dtype)
    if c.positions == "learned":
        position_embedding = Embedding(c.block_size, c.embed_dim, "length", init, dtype, name="position_embedding")
        x_BxTxD = add_bias(x_BxTxD, position_embedding(positions))
    x_BxTxD = nn.Dropout(c.embed_dropout, deterministic=deterministic)(x_BxTxD)
    return nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed")), token_embedding


def token_logits(config: GPTConfig, x_BxTxD: jax.Array, token_embedding: Embedding) -> jax.Array:
    """Returns the logits [B, T, V] for the output of the blocks, see `GPT`.

    An untied head becomes a submodule of the module that calls this function.
    """
    c = config
    if c.tie_embeddings:
        logits_BxTxV = token_embedding.attend(x_BxTxD)
    else:
        head = (c.embed_dim,), (c.padded_vocab_size,), ("embed", "vocab"), nn.initializers.normal(0.02)
        logits_BxTxV = Linear(*head, False, jnp.dtype(c.dtype), name="head")(x_BxTxD)
    return finish_logits(c, nn.with_logical_constraint(logits_BxTxV, ("batch", "length", "vocab")))


def finish_logits(config: GPTConfig, logits: jax.Array) -> jax.Array:
    """Returns products with the head, [..., V], as float32 logits with the softcap, -1e30 for padding."""
    logits = attention.soft_cap(logits.astype(jnp.float32), config.logit_softcap)
    if config.padded_vocab_size > config.vocab_size:
        is_padding = jnp.arange(config.padded_vocab_size) >= config.vocab_size
        logits = jnp.where(is_padding, attention.MASKED, logits)
    return logits
