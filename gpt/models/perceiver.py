"""Perceivers: a long input is read by cross-attention into fewer latents, and the blocks work on these alone.

`PerceiverAR` (arXiv 2202.07765) predicts text: its latents are the last tokens of a long context, and a token sees
itself and those before it, everywhere. `PerceiverIO` (arXiv 2107.14795) classifies images: its latents are learned, and
so is the query that reads the classes from them.

Shape suffixes: B batch, T length of the context, L latents, S length on the side of keys, D width, H heads, K size of a
head, V vocabulary, C classes.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, gpt, transformer
from gpt.models.gpt import GPTConfig
from gpt.models.layers import rotary, unit_rms
from gpt.models.transformer import MLP, REMAT_POLICIES, Block, BlockConfig, SelfAttention, apply_blocks, linear
from gpt.models.vit import ViT, ViTConfig
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_fraction, check_positive


@dataclasses.dataclass(frozen=True)
class PerceiverARConfig(GPTConfig):
    """Shape and options of the model; `num_layers` are the blocks on the latents, after the one that reads."""

    family: str = "perceiver_ar"  # see gpt/models/base.py
    block_size: int = 512  # longest context, in tokens
    num_latents: int = 128  # the last tokens of the context, which the blocks work on and which are predicted from
    # Of the rows in training, whose context is cut to begin at a random place before the latents, so that short
    # contexts are known too. (The paper leaves out single tokens.)
    prefix_dropout: float = 0.25
    positions: str = "rotary"

    def __post_init__(self):
        check_positive("model", self, "num_latents")
        check_fraction("model", self, "prefix_dropout")
        super().__post_init__()
        if self.num_latents > self.block_size:
            raise UserError(
                f"model.num_latents={self.num_latents} must not be more than model.block_size={self.block_size}."
            )

    @property
    def num_targets(self) -> int:
        return self.num_latents

    @property
    def length_key(self) -> str:
        return "model.num_latents"

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> "PerceiverARConfig":
        """As of a GPT; `mesh.sequence` has to divide the latents too."""
        check_latents(self.num_latents, length_shards)
        return super().resolve(vocab_size, platform, length_shards)

    def module(self) -> "PerceiverAR":
        return PerceiverAR(self)

    def init_cache(self, first_latent_B: jax.Array, capacity: int) -> dict[str, Any]:
        blocks = super().init_cache(first_latent_B, min(capacity, self.num_latents))
        read = transformer.block_cache(self, len(first_latent_B), capacity)
        return blocks | {"read": read, "first_latent": first_latent_B}

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_latents} latents"

    def num_parameters(self) -> int:
        """As of a GPT with one block more, which has another norm, for the context."""
        return super().num_parameters() + cross_parameters(self)

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward pass for one token of a whole context: see `BlockConfig.flops`."""
        latents = self.num_latents * self.flops(self.num_latents, self.vocab_size * self.embed_dim)
        return (latents + cross_flops(self, self.num_latents, self.block_size)) / self.block_size


def check_latents(latents: int, length_shards: int) -> None:
    """Raises UserError unless the mesh divides the latents where it divides the length."""
    if latents % length_shards:
        raise UserError(f"mesh.sequence={length_shards} does not divide model.num_latents={latents}.")


def cross_parameters(config: BlockConfig) -> int:
    """Number of parameters of a `CrossBlock`."""
    return config.block_parameters(1)


def cross_flops(config: BlockConfig, queries: int, keys: int) -> float:
    """Model FLOPs of forward and backward pass of a `CrossBlock`, by the convention of `BlockConfig.flops`."""
    d, f = config.embed_dim, config.mlp_dim
    return 6 * (queries * (2 * d * d + 2 * d * f) + keys * 2 * d * d) + 12 * d * queries * keys


class CrossAttention(SelfAttention):
    """Attention of some tokens to others, with one projection for queries and a packed one for keys and values."""

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        context_BxSxD: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        context_positions: jax.Array | None = None,
    ) -> jax.Array:
        """[B, L, D] of what each of x sees in the context.

        Args:
          mask: 0 or `attention.MASKED`, to be added to scores of [B, H, L, S].
          positions, context_positions: of the tokens, for rotary ones and a cache: [L] and [S], or [B, L] and [B, S].
        """
        c = self.config
        q_BxLxHxK = linear(c, "query", (c.embed_dim,), (c.num_heads, c.head_dim), ("embed", "heads", "kv"))(x_BxLxD)
        packed = (c.num_heads, 2 * c.head_dim), ("embed", "heads", "kv")
        kv_BxSxHx2K = linear(c, "key_value", (c.embed_dim,), *packed)(context_BxSxD)
        q_BxLxHxK = nn.with_logical_constraint(q_BxLxHxK, ("batch", "length", "heads", "kv"))
        kv_BxSxHx2K = nn.with_logical_constraint(kv_BxSxHx2K, ("batch", "keys", "heads", "kv"))
        k_BxSxHxK, v_BxSxHxK = jnp.split(kv_BxSxHx2K, 2, axis=-1)
        if c.qk_norm:
            q_BxLxHxK, k_BxSxHxK = unit_rms(q_BxLxHxK), unit_rms(k_BxSxHxK)
        if c.positions == "rotary":
            q_BxLxHxK, k_BxSxHxK = rotary(q_BxLxHxK, positions), rotary(k_BxSxHxK, context_positions)
        if self.has_variable("cache", "keys") and context_positions.ndim == 2:
            out_BxLxHxK = self._decode(q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, positions)
        else:
            self._fill(k_BxSxHxK, v_BxSxHxK)
            out_BxLxHxK = self._attend_to(q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, mask)
        out_BxLxHxK = nn.with_logical_constraint(out_BxLxHxK, ("batch", "length", "heads", "kv"))
        return linear(c, "out", (c.num_heads, c.head_dim), (c.embed_dim,), ("heads", "kv", "embed"))(out_BxLxHxK)

    def _attend_to(self, q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, mask) -> jax.Array:
        """`attention.dense` of queries to other tokens."""
        rate = self.config.attention_dropout
        q_BxLxHxK = q_BxLxHxK / math.sqrt(self.config.head_dim)
        scores_BxHxLxS = jnp.einsum("blhk,bshk->bhls", q_BxLxHxK, k_BxSxHxK, preferred_element_type=jnp.float32)
        weights_BxHxLxS = jax.nn.softmax(scores_BxHxLxS if mask is None else scores_BxHxLxS + mask, axis=-1)
        weights_BxHxLxS = nn.Dropout(rate, deterministic=self.deterministic)(weights_BxHxLxS)
        return jnp.einsum("bhls,bshk->blhk", weights_BxHxLxS.astype(v_BxSxHxK.dtype), v_BxSxHxK)


class CrossBlock(Block):
    """x + attention(norm(x), norm(context)), then x + mlp(norm(x)): `Block`, with keys and values from elsewhere."""

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, context_BxSxD: jax.Array, *places: jax.Array | None) -> jax.Array:
        """[B, L, D] from [B, L, D]; `places` are the mask and the positions that `CrossAttention` takes."""
        attend = CrossAttention(self.config, self.deterministic, name="attention")
        seen_BxLxD = attend(self._norm("norm_1")(x_BxLxD), self._norm("norm_context")(context_BxSxD), *places)
        x_BxLxD = self._residual(x_BxLxD, seen_BxLxD)
        return self._residual(x_BxLxD, MLP(self.config, name="mlp")(self._norm("norm_2")(x_BxLxD)))


class PerceiverAR(nn.Module):
    """Logits of the last tokens of a long context. `config` has to be resolved: see `GPTConfig.resolve`.

    The last `num_latents` tokens (all, if they are fewer) attend to all tokens up to themselves, and then in each block
    to the latents up to themselves. With `num_latents` = `block_size` it is a GPT of one block more.

    Applied with a "cache" collection, as `PerceiverARConfig.init_cache` makes it, it leaves there what `GPT` does.
    There `first_latent` [B] says for each row at what position its latents begin: they need not be the last tokens.
    """

    config: PerceiverARConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        starts_BxT: jax.Array | None = None,
        *,
        deterministic: bool = True,
        position_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token that follows each latent: [B, L, V], or as in `GPT`, of which the arguments are.

        Raises:
          ValueError: T is greater than `block_size`.
        """
        c = self.config
        length = tokens_BxT.shape[1]
        latents = min(c.num_latents, length)
        if length > c.block_size:
            raise ValueError(f"{length} tokens are more than block_size={c.block_size}")
        if not deterministic and c.prefix_dropout and latents < length:
            starts_BxT = self._cut(starts_BxT, tokens_BxT.shape)
        places = jnp.arange(length) if position_B is None else position_B[:, None]
        positions = places if starts_BxT is None else places - starts_BxT
        x_BxTxD, token_embedding = gpt.embed(c, tokens_BxT, positions, deterministic)

        # Of the latents: embeddings, places in the row, and numbers, which are their positions in the blocks.
        numbers, latent_starts_BxL = jnp.arange(latents), None
        if position_B is not None:
            x_BxLxD, latent_places = x_BxTxD, places
            numbers = places - self.get_variable("cache", "first_latent")[:, None]
        elif self.has_variable("cache", "first_latent"):
            latent_places = self.get_variable("cache", "first_latent")[:, None] + numbers
            # What lies past the end of the row is in the future of all that count.
            x_BxLxD = jnp.take_along_axis(x_BxTxD, latent_places[..., None], axis=1, mode="clip")
        else:
            x_BxLxD, latent_places = x_BxTxD[:, -latents:], places[-latents:]
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, ("batch", "length", "embed"))
        latent_positions = latent_places
        mask = jnp.where(latent_places[..., None, :, None] >= places, 0.0, attention.MASKED)
        if starts_BxT is not None:
            latent_starts_BxL = starts_BxT[:, -latents:]
            latent_positions = latent_places - latent_starts_BxL
            mask = mask + attention.document_mask(latent_starts_BxL, starts_BxT)

        cross_block = CrossBlock
        if c.remat != "none":
            cross_block = nn.remat(CrossBlock, policy=REMAT_POLICIES[c.remat])
        read = cross_block(c, deterministic, name="read")
        x_BxLxD = read(x_BxLxD, x_BxTxD, mask, latent_positions, positions)
        x_BxLxD = apply_blocks(c, x_BxLxD, numbers, latent_starts_BxL, deterministic)
        return gpt.token_logits(c, x_BxLxD, token_embedding)

    def _cut(self, starts_BxT: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
        """The starts of documents with another one in some rows: nothing after a random place sees what is before."""
        batch, length = shape
        is_cut, place = jax.random.split(self.make_rng("dropout"))
        place_Bx1 = jax.random.randint(place, (batch, 1), 1, length - self.config.num_latents + 1)
        place_Bx1 = jnp.where(jax.random.bernoulli(is_cut, self.config.prefix_dropout, (batch, 1)), place_Bx1, 0)
        starts_BxT = jnp.zeros(shape, jnp.int32) if starts_BxT is None else starts_BxT
        return jnp.where(jnp.arange(length) >= place_Bx1, jnp.maximum(starts_BxT, place_Bx1), starts_BxT)


@dataclasses.dataclass(frozen=True)
class PerceiverIOConfig(ViTConfig):
    """Shape and options of the model; `num_layers` are the blocks on the latents, between reading and answering."""

    family: str = "perceiver_io"  # see gpt/models/base.py
    image_size: int = 32
    patch_size: int = 1  # single pixels
    num_latents: int = 64
    pooling: str = "query"  # a learned one, which reads the classes from the latents

    pooling_kinds: ClassVar = ("query",)

    def __post_init__(self):
        check_positive("model", self, "num_latents")
        super().__post_init__()

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> "PerceiverIOConfig":
        """As of a ViT; `mesh.sequence` has to divide the latents too."""
        check_latents(self.num_latents, length_shards)
        return super().resolve(vocab_size, platform, length_shards)

    def module(self) -> "PerceiverIO":
        return PerceiverIO(self)

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_latents} latents"

    def num_parameters(self) -> int:
        """As of a ViT with two blocks more, each with another norm; latents and query."""
        return super().num_parameters() + 2 * cross_parameters(self) + (self.num_latents + 1) * self.embed_dim

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward pass for one patch of an image: see `BlockConfig.flops`."""
        d, latents = self.embed_dim, self.num_latents
        patch = 6 * self.channels * self.patch_size**2 * d
        cross = cross_flops(self, latents, self.length) + cross_flops(self, 1, latents)
        return patch + (cross + latents * self.flops(latents, 0) + 6 * d * self.vocab_size) / self.length


class PerceiverIO(ViT):
    """Class logits from images, as `ViT` with another way from the patches to the vector that the head reads.

    Learned latents attend to the patches and then to each other, and a learned query to what became of them.
    """

    config: PerceiverIOConfig

    def pooled(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        c, batch = self.config, len(x_BxTxD)

        def learned(name, axes, shape):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
            x = jnp.broadcast_to(self.param(name, init, shape).astype(x_BxTxD.dtype), (batch, *shape))
            return nn.with_logical_constraint(x, ("batch", *axes))

        latents_BxLxD = learned("latents", ("length", "embed"), (c.num_latents, c.embed_dim))
        latents_BxLxD = CrossBlock(c, deterministic, name="read")(latents_BxLxD, x_BxTxD)
        latents_BxLxD = apply_blocks(c, latents_BxLxD, None, None, deterministic)
        query_BxD = learned("query", ("embed",), (c.embed_dim,))
        return CrossBlock(c, deterministic, name="answer")(query_BxD[:, None], latents_BxLxD)[:, 0]
