"""The transformer block and its options, which all model families share.

Shape suffixes: B batch, T sequence length, D width, F width of the MLP, H heads, K head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, kernels
from gpt.models.base import ModelConfig
from gpt.models.layers import ACTIVATIONS, Linear, Norm, merged_rows, rotary, unit_rms
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_fraction, check_positive, harmless

# A larger model is a typing error, or a config that was made to keep the tracer busy indefinitely.
MAX_LAYERS, MAX_PARAMETERS = 10_000, 1e14

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

LORA_TARGETS = ("qkv", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class BlockConfig(ModelConfig):
    """Shape and options of the blocks. Each model family subclasses it."""

    # What a family offers: these are not fields of the config.
    position_kinds: ClassVar[tuple[str, ...]] = ("learned", "rotary")
    attention_kinds: ClassVar[tuple[str, ...]] = ("auto", *kernels.ATTENTION)
    vocab_source: ClassVar[str] = "tokenizer"  # where a `vocab_size` of 0 takes its value from

    num_layers: int = 8  # number of blocks
    num_heads: int = 8  # number of attention heads in a block; has to divide embed_dim
    embed_dim: int = 512  # width of the residual stream
    mlp_factor: float = 4.0  # hidden width of the MLP as a multiple of embed_dim
    bias: bool = True  # biases in linear layers and LayerNorm
    norm: str = "layernorm"  # normalization: layernorm or rmsnorm
    norm_epsilon: float = 1e-5  # number that a norm adds to the variance
    activation: str = "gelu_tanh"  # activation of the MLP: gelu_tanh, gelu (exact), relu, relu_squared or silu
    positions: str = "learned"  # position encoding: learned, rotary (not for images) or sincos (images only)
    qk_norm: bool = False  # normalize queries and keys to a root mean square of 1 (arXiv 2302.05442, 2010.04245)
    zero_init: bool = False  # initialize the projections onto the residual stream with zeros
    embed_dropout: float = 0.1  # dropout probability of the embeddings
    residual_dropout: float = 0.1  # dropout probability of the output of attention and MLP
    attention_dropout: float = 0.1  # dropout probability of the attention weights
    # Implementation of attention: dense, flax, chunked, cudnn (NVIDIA GPUs, no dropout), splash (TPUs, no dropout), or
    # auto: the kernel of the platform if it supports the model, else dense.
    attention: str = harmless("dense")
    dtype: str = "auto"  # dtype of the computation: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere
    scan_layers: bool = harmless(False)  # compile one block and loop over the layers: faster to compile if deep
    remat: str = harmless("none")  # what the backward pass recomputes: none, dots (all but matrix products) or full
    lora_rank: int = 0  # rank of the adapters to train on top of train.init_from's frozen weights; 0: no adapters
    lora_alpha: float = 16.0  # the output of an adapter is multiplied by lora_alpha/lora_rank
    lora_targets: str = "qkv"  # linear layers with an adapter, of qkv, out, up and down, separated by commas

    def __post_init__(self):
        check_positive(
            "model", self, "num_layers", "num_heads", "embed_dim", "mlp_factor", "norm_epsilon", "lora_alpha"
        )
        check_fraction("model", self, "embed_dropout", "residual_dropout", "attention_dropout")
        check_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_choice("model.positions", self.positions, self.position_kinds)
        check_choice("model.attention", self.attention, self.attention_kinds)
        check_choice("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("model.remat", self.remat, REMAT_POLICIES)
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size={self.vocab_size} has to be 0 (the {self.vocab_source}'s) or more.")
        if self.lora_rank < 0:
            raise UserError(f"model.lora_rank={self.lora_rank} has to be 0 (no LoRA) or more.")
        if not set(self.lora_targets.split(",")) <= set(LORA_TARGETS):
            raise UserError(f"model.lora_targets={self.lora_targets!r} has to name some of {','.join(LORA_TARGETS)}.")
        if not 1 <= self.mlp_factor * self.embed_dim < 2**31:
            raise UserError(f"model.mlp_factor={self.mlp_factor} makes the MLP narrower than 1 or wider than 2³¹.")
        if self.num_layers > MAX_LAYERS or self.num_parameters() > MAX_PARAMETERS:
            raise UserError(
                f"model.num_layers={self.num_layers} and model.embed_dim={self.embed_dim}, with the other sizes under "
                f"model, are beyond {MAX_LAYERS:,} layers or {MAX_PARAMETERS:.0e} parameters."
            )
        if self.embed_dim % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}.")

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_factor * self.embed_dim)

    @property
    def kernel_scale(self) -> float:
        """Standard deviation of the initial kernels: GPT-2's."""
        return 0.02

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """Returns this config with concrete values, see `ModelConfig.resolve`."""
        if self.vocab_size not in (0, vocab_size):
            raise UserError(
                f"model.vocab_size={self.vocab_size}, but the {self.vocab_source} has {vocab_size} "
                f"{'tokens' if self.reads == 'tokens' else 'classes'}; set 0."
            )
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        kernel = self.attention
        if kernel == "auto":
            kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "dense")
            kernel = kernel if kernel in self.attention_kinds else "dense"
        resolved = dataclasses.replace(self, vocab_size=vocab_size, dtype=dtype, attention=kernel)
        if obstacle := kernels.obstacle(kernel, resolved, platform, length_shards):
            if self.attention != "auto":
                raise UserError(f"model.attention={kernel} {obstacle}; choose dense or chunked, or auto.")
            resolved = dataclasses.replace(resolved, attention="dense")
        return resolved

    def without_kernel(self) -> Self:
        return dataclasses.replace(self, attention="auto") if self.attention in kernels.KERNELS else self

    def attention_function(self) -> Callable[..., jax.Array]:
        """Returns the attention of a resolved config, with the signature of `attention.dense` without `causal`."""
        raise NotImplementedError

    def block_parameters(self, blocks: int) -> int:
        """Returns the number of parameters of `blocks` blocks and one norm."""
        d, bias = self.embed_dim, int(self.bias)
        attention_ = 4 * d * d + bias * 4 * d
        mlp = 2 * d * self.mlp_dim + bias * (self.mlp_dim + d)
        norm_ = d * (2 if self.bias and self.norm == "layernorm" else 1)
        return blocks * (attention_ + mlp + 2 * norm_) + norm_

    def flops(self, length: int, other_weights: int) -> float:
        """Returns the model FLOPs of the forward and backward pass for one token of a sequence of `length` tokens.

        The number is 6 for each weight (4 if it is frozen), plus 12·layers·width·length for the products of attention,
        as in PaLM (arXiv 2204.02311, appendix B).

        Args:
          length: sequence length, in tokens.
          other_weights: number of weights outside of the blocks that multiply an activation.
        """
        d, f = self.embed_dim, self.mlp_dim
        weights = self.num_layers * (4 * d**2 + 2 * d * f) + other_weights
        scores = 12 * self.num_layers * d * length
        if not self.lora_rank:
            return 6 * weights + scores
        widths = {"qkv": d + 3 * d, "out": d + d, "up": d + f, "down": f + d}
        adapters = self.num_layers * self.lora_rank * sum(widths[name] for name in self.lora_targets.split(","))
        return 4 * weights + 6 * adapters + scores

    def summary(self) -> str:
        return f"{self.num_layers} layers, {self.num_heads} heads, {self.embed_dim} wide"


def apply_blocks(
    config: BlockConfig,
    x_BxTxD: jax.Array,
    positions: jax.Array,
    starts_BxT: jax.Array | None,
    deterministic: bool,
) -> jax.Array:
    """Applies all blocks and the final norm. The modules become submodules of the module that calls this function.

    Args:
      config: options of the blocks.
      x_BxTxD: embeddings of the tokens.
      positions: see `SelfAttention`.
      starts_BxT: see `SelfAttention`.
      deterministic: whether dropout is off.

    Returns:
      [B, T, D].
    """
    c, block = config, Block
    if c.remat != "none":
        # XLA cannot merge the recomputation with the forward pass across a scan, so nothing has to prevent it there.
        block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
    if c.scan_layers:
        scan = nn.scan(
            lambda module, x, _: (module(x, positions, starts_BxT), None),
            variable_axes={"params": 0, "lora": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BxTxD, _ = scan(block(c, deterministic, name="blocks"), x_BxTxD, None)
    else:
        for i in range(c.num_layers):
            x_BxTxD = block(c, deterministic, name=f"block_{i}")(x_BxTxD, positions, starts_BxT)
    return norm(c, "final_norm")(x_BxTxD)


class Block(nn.Module):
    """The pre-norm block of GPT-2: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: BlockConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, positions: jax.Array, starts_BxT: jax.Array | None) -> jax.Array:
        """Returns [B, T, D]. The arguments are those of `SelfAttention`."""
        c = self.config
        attend = SelfAttention(c, self.deterministic, name="attention")
        y_BxTxD = attend(norm(c, "norm_1")(x_BxTxD), positions, starts_BxT)
        x_BxTxD = add_residual(c, x_BxTxD, y_BxTxD, self.deterministic)
        y_BxTxD = MLP(c, name="mlp")(norm(c, "norm_2")(x_BxTxD))
        return add_residual(c, x_BxTxD, y_BxTxD, self.deterministic)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with one packed projection for queries, keys and values."""

    config: BlockConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, positions: jax.Array, starts_BxT: jax.Array | None) -> jax.Array:
        """Computes the attention of each token to the tokens that it may see.

        Args:
          x_BxTxD: activations of the tokens.
          positions: positions of the tokens for rotary encoding, [T], or [B, T] if they differ between rows. With a
            "cache" collection, a [B, 1] array selects decoding: the positions of one new token in each row.
          starts_BxT: see `attention.dense`.

        Returns:
          [B, T, D].
        """
        c = self.config
        packed = c.num_heads, 3 * c.head_dim
        qkv_BxTxHx3K = linear(c, "qkv", (c.embed_dim,), packed, ("embed", "heads", "kv"))(x_BxTxD)
        qkv_BxTxHx3K = nn.with_logical_constraint(qkv_BxTxHx3K, ("batch", "length", "heads", "kv"))
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = jnp.split(qkv_BxTxHx3K, 3, axis=-1)
        if c.qk_norm:
            q_BxTxHxK, k_BxTxHxK = unit_rms(q_BxTxHxK), unit_rms(k_BxTxHxK)
        if c.positions == "rotary":
            q_BxTxHxK, k_BxTxHxK = rotary(q_BxTxHxK, positions), rotary(k_BxTxHxK, positions)
        if not self.is_initializing():  # `gpt.explain` asks for these; otherwise `sow` does nothing
            self.sow("intermediates", "queries", q_BxTxHxK)
            self.sow("intermediates", "keys", k_BxTxHxK)
        if self.has_variable("cache", "keys") and positions.ndim == 2:
            out_BxTxHxK = decode_with_cache(self, q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, positions)
        else:
            fill_cache(self, k_BxTxHxK, v_BxTxHxK)
            # If the length is sharded, every query still needs the keys and values of all tokens.
            k_BxTxHxK = nn.with_logical_constraint(k_BxTxHxK, ("batch", "keys", "heads", "kv"))
            v_BxTxHxK = nn.with_logical_constraint(v_BxTxHxK, ("batch", "keys", "heads", "kv"))
            use_dropout = c.attention_dropout > 0 and not self.deterministic
            dropout_key = self.make_rng("dropout") if use_dropout else None
            dropout = {"dropout_rate": c.attention_dropout, "dropout_key": dropout_key}
            out_BxTxHxK = c.attention_function()(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT, **dropout)
        out_BxTxHxK = nn.with_logical_constraint(out_BxTxHxK, ("batch", "length", "heads", "kv"))
        return linear(c, "out", (c.num_heads, c.head_dim), (c.embed_dim,), ("heads", "kv", "embed"))(out_BxTxHxK)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        c = self.config
        h_BxTxF = linear(c, "up", (c.embed_dim,), (c.mlp_dim,), ("embed", "mlp"))(x_BxTxD)
        h_BxTxF = ACTIVATIONS[c.activation](merged_rows(h_BxTxF)).reshape(h_BxTxF.shape)
        h_BxTxF = nn.with_logical_constraint(h_BxTxF, ("batch", "length", "mlp"))
        return linear(c, "down", (c.mlp_dim,), (c.embed_dim,), ("mlp", "embed"))(h_BxTxF)


def linear(config: BlockConfig, name: str, in_shape: tuple, out_shape: tuple, axes: tuple) -> Linear:
    """Returns a linear layer of a block, initialized like GPT-2's.

    Projections onto the residual stream ("out" and "down") start smaller the more of them there are.
    """
    scale = config.kernel_scale
    if name in ("out", "down"):
        scale = (0.0 if config.zero_init else scale) / (2 * config.num_layers) ** 0.5
    init, dtype = nn.initializers.normal(scale), jnp.dtype(config.dtype)
    return Linear(in_shape, out_shape, axes, init, config.bias, dtype, name=name)


def norm(config: BlockConfig, name: str) -> Norm:
    """Returns a norm with the options of the config."""
    return Norm(config.norm, config.bias, jnp.dtype(config.dtype), config.norm_epsilon, name=name)


def add_residual(config: BlockConfig, x_BxTxD: jax.Array, y_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
    """Returns x + dropout(y), [B, T, D]."""
    y_BxTxD = nn.Dropout(config.residual_dropout, deterministic=deterministic)(y_BxTxD)
    return nn.with_logical_constraint(x_BxTxD + y_BxTxD, ("batch", "length", "embed"))


def block_cache(config: BlockConfig, rows: int, capacity: int, layers: int | None = None) -> dict[str, Any]:
    """Returns an empty cache for the keys and values of a block.

    Args:
      config: options of the block.
      rows: number of sequences in the batch.
      capacity: number of tokens in each row that the cache has room for.
      layers: the number of blocks if they are scanned: the arrays then have the layers as their first axis.
    """
    axes = attention.cache_axes(rows)
    shape = attention.cache_shape(rows, capacity, config.num_heads, config.head_dim)
    if layers:
        axes, shape = ("layers", *axes), (layers, *shape)
    zeros = [nn.with_logical_constraint(jnp.zeros(shape, config.dtype), axes) for _ in range(2)]
    return {"attention": dict(zip(("keys", "values"), zeros, strict=True))}


def fill_cache(module: nn.Module, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array) -> None:
    """Writes keys and values of tokens from position 0 on into the module's cache, if there is one."""
    if module.has_variable("cache", "keys"):
        for name, x_BxTxHxK in (("keys", k_BxTxHxK), ("values", v_BxTxHxK)):
            _put(module, name, attention.fill(module.get_variable("cache", name), x_BxTxHxK), len(x_BxTxHxK))


def decode_with_cache(
    module: nn.Module, q_Bx1xHxK: jax.Array, k_Bx1xHxK: jax.Array, v_Bx1xHxK: jax.Array, positions_Bx1: jax.Array
) -> jax.Array:
    """Returns the attention [B, 1, H, K] of one new token in each row, and writes its key and value to the cache."""
    q_BxHxK, k_BxHxK, v_BxHxK, position_B = (x[:, 0] for x in (q_Bx1xHxK, k_Bx1xHxK, v_Bx1xHxK, positions_Bx1))
    keys: jax.Array = module.get_variable("cache", "keys")
    values: jax.Array = module.get_variable("cache", "values")
    out_BxHxK, keys, values = attention.decode(q_BxHxK, k_BxHxK, v_BxHxK, keys, values, position_B)
    _put(module, "keys", keys, len(out_BxHxK))
    _put(module, "values", values, len(out_BxHxK))
    return out_BxHxK[:, None]


def _put(module: nn.Module, name: str, cache: jax.Array, rows: int) -> None:
    module.put_variable("cache", name, nn.with_logical_constraint(cache, attention.cache_axes(rows)))
