"""Perceivers: models whose cross-attention reads a long input into fewer latents, on which all blocks work.

`PerceiverAR` (arXiv 2202.07765) predicts text. Its latents are the last tokens of a long context, and every token
attends only to itself and to earlier tokens. `PerceiverIO` (arXiv 2107.14795) classifies images. Its latents are
learned, and so is the query that reads the class from them.

Shape suffixes: B batch, T context length, L latents, S length on the side of keys, D width, H heads, K head size,
V vocabulary, C classes.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, decoding, remat, rotary
from gpt.models.base import ModelConfig
from gpt.models.gpt import GPT, GPTConfig, since
from gpt.models.layers import unit_rms
from gpt.models.transformer import add_mlp, apply_blocks, branch, linear, norm
from gpt.models.vit import ViT, ViTConfig
from gpt.runtime.errors import UserError
from gpt.runtime.fields import option

# What the cross-attention does not have.
ATTENTION = ("num_kv_heads", "rotary_base_local", "attention_scale", "attention_softcap", "window", "base_width")
UNAVAILABLE = ("parallel_block", *ATTENTION)


@dataclasses.dataclass(frozen=True)
class PerceiverARConfig(GPTConfig):
    """Shape and options of a Perceiver AR. `num_layers` counts the blocks on the latents, not the cross-attention."""

    family: str = "perceiver_ar"
    block_size: int = 512
    num_latents: int = option(128, "tokens at the end of the context that are latents and have a target", above=0)
    # Their context begins at a random token before the latents. (The paper drops single tokens instead.)
    prefix_dropout: float = option(0.25, "fraction of the examples with a shorter context", least=0, below=1)
    positions: str = "rotary"

    qk_norm_kinds: ClassVar[tuple[str, ...]] = ("none", "unit")
    unavailable: ClassVar[tuple[str, ...]] = UNAVAILABLE

    def __post_init__(self):
        super().__post_init__()
        if self.num_latents > self.block_size:
            raise UserError(f"model.num_latents={self.num_latents} must not exceed model.block_size={self.block_size}.")

    @property
    def num_targets(self) -> int:
        return self.num_latents

    @property
    def length_key(self) -> str:
        return "model.num_latents"

    def module(self) -> nn.Module:
        return PerceiverAR(self)

    def init_cache(self, first_latent_B: jax.Array, capacity: int) -> dict[str, Any]:
        blocks = super().init_cache(first_latent_B, min(capacity, self.num_latents))
        read = decoding.block_cache(self, len(first_latent_B), capacity)
        return blocks | {"read": read, "first_latent": first_latent_B}

    def num_parameters(self) -> int:
        """Returns the number of parameters: those of a GPT, and of the cross-attention's block with its third norm."""
        return super().num_parameters() + self.block_parameters(1)

    def flops_per_token(self) -> float:
        latents = self.num_latents * self.flops(self.num_latents, self.vocab_size * self.embed_dim)
        return (latents + cross_flops(self, self.num_latents, self.block_size)) / self.block_size

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_latents} latents"


@dataclasses.dataclass(frozen=True)
class PerceiverIOConfig(ViTConfig):
    """Shape and options of a Perceiver IO. `num_layers` counts the blocks on the latents, not the cross-attentions."""

    family: str = "perceiver_io"
    image_size: int = 32
    patch_size: int = 1
    num_latents: int = option(64, "number of learned latents", above=0)
    pooling: str = option("query", "what the head reads: a learned query's attention", choices="pooling_kinds")

    pooling_kinds: ClassVar[tuple[str, ...]] = ("query",)
    qk_norm_kinds: ClassVar[tuple[str, ...]] = ("none", "unit")
    unavailable: ClassVar[tuple[str, ...]] = UNAVAILABLE

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """Returns this config with concrete values, see `ModelConfig.resolve`. The mesh has to divide the latents."""
        if self.num_latents % length_shards:
            raise UserError(f"mesh.sequence={length_shards} does not divide model.num_latents={self.num_latents}.")
        return super().resolve(vocab_size, platform, length_shards)

    def module(self) -> nn.Module:
        return PerceiverIO(self)

    def num_parameters(self) -> int:
        """Returns the number of parameters: those of a ViT, of two cross-attentions' blocks, latents and query."""
        return super().num_parameters() + 2 * self.block_parameters(1) + (self.num_latents + 1) * self.embed_dim

    def flops_per_token(self) -> float:
        d, latents = self.embed_dim, self.num_latents
        patch = 6 * self.channels * self.patch_size**2 * d
        cross = cross_flops(self, latents, self.length) + cross_flops(self, 1, latents)
        return patch + (cross + latents * self.flops(latents, 0) + 6 * d * self.vocab_size) / self.length

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_latents} latents"


def cross_flops(config: ModelConfig, queries: int, keys: int) -> float:
    """Returns the model FLOPs of the forward and backward pass of a `CrossBlock`, counted as in `ModelConfig.flops`."""
    sizes = config.layer_weights
    weights = sum(inputs * outputs for inputs, outputs in sizes.values())
    context, heads = config.embed_dim * 2 * sizes["out"][0], sizes["out"][0]
    return 6 * (queries * (weights - context) + keys * context) + 12 * heads * queries * keys


class PerceiverAR(GPT):
    """A Perceiver AR with a resolved `config`, see `ModelConfig.resolve`: a `GPT` with logits [B, L, V] of latents.

    The last `num_latents` tokens (all tokens if there are fewer) attend to the context up to themselves, and then in
    each block to the latents up to themselves. With `num_latents` equal to `block_size` this is a GPT with one more
    block.

    With a "cache" collection from `PerceiverARConfig.init_cache`, the module decodes as `GPT` does. The variable
    `first_latent` [B] is the position of the first latent in each row: latents need not be the last tokens there.
    """

    config: PerceiverARConfig

    def documents(self, starts_BxT: jax.Array | None, shape: tuple[int, ...], deterministic: bool) -> jax.Array | None:
        """Returns the starts of documents, in training with another start at a random token in some of the rows."""
        c, (batch, length) = self.config, shape
        if deterministic or not c.prefix_dropout or length <= c.num_latents:
            return starts_BxT
        cut_key, start_key = jax.random.split(self.make_rng("dropout"))
        start_Bx1 = jax.random.randint(start_key, (batch, 1), 1, length - c.num_latents + 1)
        start_Bx1 = jnp.where(jax.random.bernoulli(cut_key, c.prefix_dropout, (batch, 1)), start_Bx1, 0)
        starts_BxT = jnp.zeros(shape, jnp.int32) if starts_BxT is None else starts_BxT
        return jnp.where(jnp.arange(length) >= start_Bx1, jnp.maximum(starts_BxT, start_Bx1), starts_BxT)

    def hidden(
        self, x_BxTxD: jax.Array, starts_BxT: jax.Array | None, indices: jax.Array, deterministic: bool
    ) -> jax.Array:
        c = self.config
        latents = min(c.num_latents, x_BxTxD.shape[1])
        # `latent_indices` are the latents' indices in the row, and `numbers` their positions in the blocks.
        numbers = jnp.arange(latents)
        if indices.ndim == 2:
            x_BxLxD, latent_indices = x_BxTxD, indices
            numbers = indices - self.get_variable("cache", "first_latent")[:, None]
        elif self.has_variable("cache", "first_latent"):
            latent_indices = self.get_variable("cache", "first_latent")[:, None] + numbers
            # An index beyond the row is clipped: such a latent is in the future of all that have a prediction.
            x_BxLxD = jnp.take_along_axis(x_BxTxD, latent_indices[..., None], axis=1, mode="clip")
        else:
            x_BxLxD, latent_indices = x_BxTxD[:, -latents:], indices[-latents:]
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, ("batch", "length", "embed"))
        latent_starts_BxL = None if starts_BxT is None else starts_BxT[:, -latents:]
        mask = jnp.where(latent_indices[..., None, :, None] >= indices, 0.0, attention.MASKED)
        if latent_starts_BxL is not None and starts_BxT is not None:
            mask = mask + attention.document_mask(latent_starts_BxL, starts_BxT)
        block = CrossBlock if c.remat == "none" else nn.remat(CrossBlock, policy=remat.policy(c.remat))
        places = since(latent_starts_BxL, latent_indices), since(starts_BxT, indices), mask
        x_BxLxD = block(c, deterministic, name="read")(x_BxLxD, x_BxTxD, *places)
        return apply_blocks(c, x_BxLxD, numbers, latent_starts_BxL, deterministic)


class PerceiverIO(ViT):
    """A `ViT` in which latents take the place of the patches in the blocks, and a query that of the class token.

    Learned latents attend to the patches and then to each other. A learned query attends to the latents.
    """

    config: PerceiverIOConfig

    def pooled(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        c, batch, dtype = self.config, len(x_BxTxD), x_BxTxD.dtype
        patches, latents = jnp.arange(x_BxTxD.shape[1]), jnp.arange(c.num_latents)
        latents_BxLxD = self.add_learned("latents", jnp.zeros((batch, c.num_latents, c.embed_dim), dtype))
        latents_BxLxD = CrossBlock(c, deterministic, name="read")(latents_BxLxD, x_BxTxD, latents, patches)
        latents_BxLxD = apply_blocks(c, latents_BxLxD, latents, None, deterministic)
        query_Bx1xD = self.add_learned("query", jnp.zeros((batch, c.embed_dim), dtype))[:, None]
        answer = CrossBlock(c, deterministic, name="answer")
        return answer(query_Bx1xD, latents_BxLxD, jnp.zeros(1, jnp.int32), latents)[:, 0]


class CrossBlock(nn.Module):
    """A block with cross-attention: x + attention(norm(x), norm(context)), then x + mlp(norm(x))."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, context_BxSxD: jax.Array, *places: jax.Array) -> jax.Array:
        """Returns [B, L, D]. `places` are the positions and the mask that `CrossAttention` takes."""
        c = self.config
        attend = CrossAttention(c, self.deterministic, name="attention")
        context_BxSxD = norm(c, "norm_context")(context_BxSxD)
        y_BxLxD = branch(c, 1, x_BxLxD, self.deterministic, lambda x_BxLxD: attend(x_BxLxD, context_BxSxD, *places))
        return add_mlp(c, x_BxLxD, y_BxLxD, self.deterministic)


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens to others, with a packed projection for keys and values."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        context_BxSxD: jax.Array,
        positions: jax.Array,
        context_positions: jax.Array,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the attention of each token of x to the context.

        Args:
          x_BxLxD: activations of the tokens that attend.
          context_BxSxD: activations of the tokens that they attend to.
          positions: positions of the tokens of x for rotary encoding, [L], or [B, L] if they differ between rows.
          context_positions: positions of the context, [S] or [B, S]. With a "cache" collection, a [B, 1] array selects
            decoding: the positions of one new token in each row.
          mask: 0 or `attention.MASKED`, to be added to scores of shape [B, H, L, S]. None means no mask.

        Returns:
          [B, L, D].
        """
        c = self.config
        q_BxLxHxK = linear(c, "query", (c.embed_dim,), (c.num_heads, c.head_dim), ("embed", "heads", "kv"))(x_BxLxD)
        packed = (c.num_heads, 2 * c.head_dim), ("embed", "heads", "kv")
        kv_BxSxHx2K = linear(c, "key_value", (c.embed_dim,), *packed)(context_BxSxD)
        q_BxLxHxK = nn.with_logical_constraint(q_BxLxHxK, ("batch", "length", "heads", "kv"))
        kv_BxSxHx2K = nn.with_logical_constraint(kv_BxSxHx2K, ("batch", "keys", "heads", "kv"))
        k_BxSxHxK, v_BxSxHxK = jnp.split(kv_BxSxHx2K, 2, axis=-1)
        if c.qk_norm == "unit":
            q_BxLxHxK, k_BxSxHxK = unit_rms(q_BxLxHxK), unit_rms(k_BxSxHxK)
        if c.positions == "rotary":
            angles = rotary.frequencies(c.rotary_size, c.rotary_base, c.rotary_scaling)
            q_BxLxHxK = rotary.rotary(q_BxLxHxK, positions, *angles)
            k_BxSxHxK = rotary.rotary(k_BxSxHxK, context_positions, *angles)
        q_BxLxHxK = q_BxLxHxK / math.sqrt(c.head_dim)
        if self.has_variable("cache", "keys") and context_positions.ndim == 2:
            out_BxLxHxK = decoding.decode_with_cache(self, q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, positions)
        else:
            decoding.fill_cache(self, k_BxSxHxK, v_BxSxHxK)
            scores_BxHxLxS = jnp.einsum("blhk,bshk->bhls", q_BxLxHxK, k_BxSxHxK, preferred_element_type=jnp.float32)
            weights_BxHxLxS = jax.nn.softmax(scores_BxHxLxS if mask is None else scores_BxHxLxS + mask, axis=-1)
            weights_BxHxLxS = nn.Dropout(c.attention_dropout, deterministic=self.deterministic)(weights_BxHxLxS)
            out_BxLxHxK = jnp.einsum("bhls,bshk->blhk", weights_BxHxLxS.astype(v_BxSxHxK.dtype), v_BxSxHxK)
        out_BxLxHxK = nn.with_logical_constraint(out_BxLxHxK, ("batch", "length", "heads", "kv"))
        return linear(c, "out", (c.num_heads, c.head_dim), (c.embed_dim,), ("heads", "kv", "embed"))(out_BxLxHxK)
