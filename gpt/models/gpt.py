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
from gpt.models.base import ModelConfig
from gpt.models.gradients import add_bias
from gpt.models.layers import Embedding, Linear
from gpt.models.transformer import apply_blocks
from gpt.runtime.fields import option


@dataclasses.dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Shape and options of a GPT. The defaults are a small GPT-2 for characters."""

    family: str = "gpt"
    vocab_size: int = 0
    vocab_multiple: int = option(1, "pad the vocabulary to a multiple of this, so that a mesh axis divides it", above=0)
    block_size: int = option(128, "context length, in tokens", above=0)
    tie_embeddings: bool = option(True, "use the token embedding as the output head, as in GPT-2")
    embed_multiplier: float = option(1.0, "factor of the token embeddings, as in Gemma", above=0)
    logit_softcap: float = option(0.0, "c: limits logits by c·tanh(x/c), as in Gemma 2; 0: no limit", least=0)
    query_chunk: int = option(128, "block of queries in chunked attention, in tokens", harmless=True, above=0)
    key_chunk: int = option(128, "block of keys in chunked attention, in tokens", harmless=True, above=0)

    @property
    def length(self) -> int:
        return self.block_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def attention_function(self, window: int) -> Callable[..., jax.Array]:
        chunks = {"query_chunk": self.query_chunk, "key_chunk": self.key_chunk} if self.attention == "chunked" else {}
        function = kernels.ATTENTION[self.attention]
        return functools.partial(function, window=window, softcap=self.attention_softcap, **chunks)

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
        c, length = self.config, tokens_BxT.shape[1]
        if length > c.block_size:
            raise ValueError(f"{length} tokens are more than block_size={c.block_size}")
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(c.dtype)
        indices = jnp.arange(length) if position_B is None else position_B[:, None]
        starts_BxT = self.documents(starts_BxT, tokens_BxT.shape, deterministic)
        token_embedding = Embedding(c.padded_vocab_size, c.embed_dim, "vocab", init, dtype, name="token_embedding")
        x_BxTxD = token_embedding(tokens_BxT)
        if c.embed_multiplier != 1:
            x_BxTxD = x_BxTxD * jnp.asarray(c.embed_multiplier, dtype)
        if c.positions == "learned":
            position_embedding = Embedding(c.block_size, c.embed_dim, "length", init, dtype, name="position_embedding")
            x_BxTxD = add_bias(x_BxTxD, position_embedding(since(starts_BxT, indices)))
        x_BxTxD = nn.Dropout(c.embed_dropout, deterministic=deterministic)(x_BxTxD)
        x_BxTxD = nn.with_logical_constraint(x_BxTxD, ("batch", "length", "embed"))
        x_BxTxD = self.hidden(x_BxTxD, starts_BxT, indices, deterministic)
        if not with_head:
            return x_BxTxD
        if c.tie_embeddings:
            logits_BxTxV = token_embedding.attend(x_BxTxD)
        else:
            head = (c.embed_dim,), (c.padded_vocab_size,), ("embed", "vocab"), init
            logits_BxTxV = Linear(*head, False, dtype, name="head")(x_BxTxD)
        return finish_logits(c, nn.with_logical_constraint(logits_BxTxV, ("batch", "length", "vocab")))

    def documents(self, starts_BxT: jax.Array | None, shape: tuple[int, ...], deterministic: bool) -> jax.Array | None:
        """Returns the starts of the documents that the model sees; `shape` is that of the tokens."""
        return starts_BxT

    def hidden(
        self, x_BxTxD: jax.Array, starts_BxT: jax.Array | None, indices: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Returns what the output head reads, [B, T, D], from embeddings [B, T, D].

        Args:
          starts_BxT, deterministic: see `__call__`.
          indices: indices of the tokens in their rows: [T], or [B, 1] in decoding.
        """
        return apply_blocks(self.config, x_BxTxD, since(starts_BxT, indices), starts_BxT, deterministic)


def since(starts_BxT: jax.Array | None, indices: jax.Array) -> jax.Array:
    """Returns the positions of tokens in their documents, from their indices in their rows."""
    return indices if starts_BxT is None else indices - starts_BxT


def finish_logits(config: GPTConfig, logits: jax.Array) -> jax.Array:
    """Returns products with the head, [..., V], as float32 logits with the softcap, -1e30 for padding."""
    logits = attention.soft_cap(logits.astype(jnp.float32), config.logit_softcap)
    if config.padded_vocab_size > config.vocab_size:
        is_padding = jnp.arange(config.padded_vocab_size) >= config.vocab_size
        logits = jnp.where(is_padding, attention.MASKED, logits)
    return logits
