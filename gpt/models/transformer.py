"""TODO."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import attention, kernels
from gpt.models.base import ModelConfig
from gpt.models.layers import ACTIVATIONS, Linear, Norm, merged_rows, rotary, unit_rms
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_fraction, check_positive, harmless

# A model beyond these is a slip, or a stranger's trap: a trace of it would not end.
MAX_LAYERS, MAX_PARAMETERS = 10_000, 1e14

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

LORA_TARGETS = ("qkv", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class BlockConfig(ModelConfig):
    """Shape and options of the blocks, which the families share: what `Block` reads."""

    # Of a family, and no fields of the config: whether a token sees only those before it, and what it can choose from.
    causal: ClassVar = True
    position_kinds: ClassVar = ("learned", "rotary")
    attention_kinds: ClassVar = ("auto", *kernels.ATTENTION)

    num_layers: int = 8
    num_heads: int = 8
    embed_dim: int = 512
    mlp_factor: float = 4.0  # hidden width of the MLP, as a multiple of embed_dim
    bias: bool = True  # biases in linear layers and LayerNorm
    norm: str = "layernorm"  # or rmsnorm
    norm_epsilon: float = 1e-5  # added to the variance
    activation: str = "gelu_tanh"  # or gelu (exact), relu, relu_squared, silu
    positions: str = "learned"  # or rotary (gpt), sincos (vit)
    qk_norm: bool = False  # queries and keys of root mean square 1 (arXiv 2302.05442, 2010.04245)
    zero_init: bool = False  # kernels onto the residual stream begin with zeros: each block as the identity
    embed_dropout: float = 0.1
    residual_dropout: float = 0.1
    attention_dropout: float = 0.1
    # Or flax, chunked, or a kernel without dropout: cudnn (NVIDIA GPUs), splash (TPUs). auto is the kernel where it is
    # possible (see `GPTConfig.resolve`), else dense.
    attention: str = harmless("dense")
    dtype: str = "auto"  # of the computation: float32, bfloat16; auto is float32 on CPU, bfloat16 elsewhere
    scan_layers: bool = harmless(False)  # one compiled block in a loop: compiles faster, on for deep models
    remat: str = harmless("none")  # what the backward pass recomputes: none, dots (keep products), full
    lora_rank: int = 0  # of the adapters that are trained in place of train.init_from's weights; 0: none
    lora_alpha: float = 16.0  # what they add is scaled by lora_alpha/lora_rank
    lora_targets: str = "qkv"  # which kernels have one, of qkv, out, up, down: "qkv,out"

    def __post_init__(self):
        check_positive("model", self, "num_layers", "num_heads", "embed_dim", "mlp_factor", "norm_epsilon")
        check_fraction("model", self, "embed_dropout", "residual_dropout", "attention_dropout")
        check_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_choice("model.positions", self.positions, self.position_kinds)
        check_choice("model.attention", self.attention, self.attention_kinds)
        check_choice("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("model.remat", self.remat, REMAT_POLICIES)
        check_positive("model", self, "lora_alpha")
        if self.lora_rank < 0:
            raise UserError(f"model.lora_rank={self.lora_rank} has to be 0 (no LoRA) or more.")
        if not set(self.lora_targets.split(",")) <= set(LORA_TARGETS):
            raise UserError(f"model.lora_targets={self.lora_targets!r} has to name some of {','.join(LORA_TARGETS)}.")
        if not 1 <= self.mlp_factor * self.embed_dim < 2**31:
            raise UserError(
                f"model.mlp_factor={self.mlp_factor} gives an MLP without a hidden unit, or one beyond all bounds."
            )
        if self.num_layers > MAX_LAYERS or self.num_parameters() > MAX_PARAMETERS:
            raise UserError(
                f"model.num_layers={self.num_layers} and model.embed_dim={self.embed_dim}, with the other sizes under "
                f"model, are beyond {MAX_LAYERS:,} layers or {MAX_PARAMETERS:.0e} parameters."
            )
        if self.embed_dim % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def lora_scale(self) -> float:
        """Of what adapters add."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_factor * self.embed_dim)

    @property
    def kernel_scale(self) -> float:
        """Standard deviation of the values that kernels begin with: GPT-2's."""
        return 0.02

    def summary(self) -> str:
        return f"{self.num_layers} layers, {self.num_heads} heads, {self.embed_dim} wide"

    def resolved_dtype(self, platform: str) -> str:
        """The dtype, with what `auto` stands for on a platform."""
        return self.dtype if self.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"

    def without_kernel(self) -> "BlockConfig":
        """This config with `auto` in the place of a kernel of attention, to be used on whatever platform."""
        return dataclasses.replace(self, attention="auto") if self.attention in kernels.KERNELS else self

    @property
    def norm_parameters(self) -> int:
        return self.embed_dim * (2 if self.bias and self.norm == "layernorm" else 1)

    def block_parameters(self, blocks: int) -> int:
        """Number of parameters of that many blocks and of a norm after them, from the shapes alone."""
        d, bias = self.embed_dim, int(self.bias)
        attention_ = 4 * d * d + bias * 4 * d
        mlp = 2 * d * self.mlp_dim + bias * (self.mlp_dim + d)
        return blocks * (attention_ + mlp + 2 * self.norm_parameters) + self.norm_parameters

    def flops(self, length: int, other_weights: int) -> float:
        """Model FLOPs of forward and backward pass for one token of a row that is `length` tokens long.

        6 for each parameter that multiplies an activation (4 if it is frozen), plus 12·layers·width·length for the
        attention scores and values (PaLM's convention, arXiv 2204.02311 appendix B).

        Args:
          other_weights: those outside of the blocks.
        """
        d, f = self.embed_dim, self.mlp_dim
        weights = self.num_layers * (4 * d**2 + 2 * d * f) + other_weights
        scores = 12 * self.num_layers * d * length
        if not self.lora_rank:
            return 6 * weights + scores
        widths = {"qkv": d + 3 * d, "out": d + d, "up": d + f, "down": f + d}
        adapters = self.num_layers * self.lora_rank * sum(widths[name] for name in self.lora_targets.split(","))
        return 4 * weights + 6 * adapters + scores


class SelfAttention(nn.Module):
    """Self-attention, causal where the family is, with one packed projection for queries, keys and values."""

    config: BlockConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, positions: jax.Array | None, starts_BxT: jax.Array | None) -> jax.Array:
        """[B, T, D] from [B, T, D].

        Args:
          positions: of the tokens, for rotary ones and a cache: [T], or [B, T] where rows differ.
          starts_BxT: see `GPT`.
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
        if not self.is_initializing():  # for `gpt.explain`, which asks for them; else this does nothing
            self.sow("intermediates", "queries", q_BxTxHxK)
            self.sow("intermediates", "keys", k_BxTxHxK)
        if self.has_variable("cache", "keys") and positions.ndim == 2:
            out_BxTxHxK = self._decode(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, positions)
        else:
            out_BxTxHxK = self._attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT)
        out_BxTxHxK = nn.with_logical_constraint(out_BxTxHxK, ("batch", "length", "heads", "kv"))
        return linear(c, "out", (c.num_heads, c.head_dim), (c.embed_dim,), ("heads", "kv", "embed"))(out_BxTxHxK)

    def _attend(self, q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, starts_BxT) -> jax.Array:
        """Of all tokens at once, which begin at position 0; their keys and values go to the cache if there is one."""
        c = self.config
        self._fill(k_BxTxHxK, v_BxTxHxK)
        # Where the length is sharded, every query still has to see all keys before it.
        k_BxTxHxK = nn.with_logical_constraint(k_BxTxHxK, ("batch", "keys", "heads", "kv"))
        v_BxTxHxK = nn.with_logical_constraint(v_BxTxHxK, ("batch", "keys", "heads", "kv"))
        use_dropout = c.attention_dropout > 0 and not self.deterministic
        if c.causal:
            attend = kernels.by_name(c.attention, query_chunk=c.query_chunk, key_chunk=c.key_chunk)
        else:
            attend = functools.partial(kernels.ATTENTION[c.attention], causal=False)
        return attend(
            q_BxTxHxK,
            k_BxTxHxK,
            v_BxTxHxK,
            starts_BxT,
            dropout_rate=c.attention_dropout,
            dropout_key=self.make_rng("dropout") if use_dropout else None,
        )

    def _fill(self, k_BxTxHxK, v_BxTxHxK) -> None:
        """Puts keys and values of tokens from position 0 on into the cache if there is one."""
        if self.has_variable("cache", "keys"):
            for name, x_BxTxHxK in (("keys", k_BxTxHxK), ("values", v_BxTxHxK)):
                cache = attention.fill(self.get_variable("cache", name), x_BxTxHxK)
                self._put(name, cache, len(x_BxTxHxK))

    def _decode(self, q_Bx1xHxK, k_Bx1xHxK, v_Bx1xHxK, positions_Bx1) -> jax.Array:
        """Of one new token in each row, by the keys and values in the cache and its own."""
        rows = len(q_Bx1xHxK)
        out_BxHxK, keys, values = attention.decode(
            *(x[:, 0] for x in (q_Bx1xHxK, k_Bx1xHxK, v_Bx1xHxK)),
            self.get_variable("cache", "keys"),
            self.get_variable("cache", "values"),
            positions_Bx1[:, 0],
        )
        self._put("keys", keys, rows)
        self._put("values", values, rows)
        return out_BxHxK[:, None]

    def _put(self, name: str, cache: jax.Array, rows: int) -> None:
        self.put_variable("cache", name, nn.with_logical_constraint(cache, attention.cache_axes(rows)))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        c = self.config
        h_BxTxF = linear(c, "up", (c.embed_dim,), (c.mlp_dim,), ("embed", "mlp"))(x_BxTxD)
        h_BxTxF = ACTIVATIONS[c.activation](merged_rows(h_BxTxF)).reshape(h_BxTxF.shape)
        h_BxTxF = nn.with_logical_constraint(h_BxTxF, ("batch", "length", "mlp"))
        return linear(c, "down", (c.mlp_dim,), (c.embed_dim,), ("mlp", "embed"))(h_BxTxF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of GPT-2."""

    config: BlockConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, positions: jax.Array | None, starts_BxT: jax.Array | None) -> jax.Array:
        attend = SelfAttention(self.config, self.deterministic, name="attention")
        x_BxTxD = self._residual(x_BxTxD, attend(self._norm("norm_1")(x_BxTxD), positions, starts_BxT))
        return self._residual(x_BxTxD, MLP(self.config, name="mlp")(self._norm("norm_2")(x_BxTxD)))

    def _norm(self, name: str) -> Norm:
        c = self.config
        return Norm(c.norm, c.bias, jnp.dtype(c.dtype), c.norm_epsilon, name=name)

    def _residual(self, x_BxTxD: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        y_BxTxD = nn.Dropout(self.config.residual_dropout, deterministic=self.deterministic)(y_BxTxD)
        return nn.with_logical_constraint(x_BxTxD + y_BxTxD, ("batch", "length", "embed"))


def apply_blocks(
    config: BlockConfig,
    x_BxTxD: jax.Array,
    positions: jax.Array | None,
    starts_BxT: jax.Array | None,
    deterministic: bool,
) -> jax.Array:
    """The blocks, as modules of the model that calls this, one after the other or in a loop, and the norm after them.

    Args:
      positions, starts_BxT: as of `SelfAttention`.
    """
    c, block = config, Block
    if c.remat != "none":
        # Inside a scan, XLA cannot undo the recomputation, so nothing has to prevent it.
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
    return Norm(c.norm, c.bias, jnp.dtype(c.dtype), c.norm_epsilon, name="final_norm")(x_BxTxD)


def block_cache(config: BlockConfig, rows: int, capacity: int, layers: int | None = None) -> dict[str, Any]:
    """Room for the keys and values of a block, or of so many blocks that one loop goes over."""
    axes = attention.cache_axes(rows)
    shape = attention.cache_shape(rows, capacity, config.num_heads, config.head_dim)
    if layers:
        axes, shape = ("layers", *axes), (layers, *shape)
    zeros = [nn.with_logical_constraint(jnp.zeros(shape, config.dtype), axes) for _ in range(2)]
    return {"attention": dict(zip(("keys", "values"), zeros, strict=True))}


def linear(config: BlockConfig, name: str, in_shape: tuple, out_shape: tuple, axes: tuple) -> Linear:
    """A linear layer of a block, initialised like GPT-2's: the smaller the more layers add to the residual stream."""
    onto_residual = (0.0 if config.zero_init else config.kernel_scale) / (2 * config.num_layers) ** 0.5
    scale = onto_residual if name in ("out", "down") else config.kernel_scale
    rank = config.lora_rank if name in config.lora_targets.split(",") else 0
    lora = {"lora_rank": rank, "lora_scale": config.lora_scale}
    init, dtype = nn.initializers.normal(scale), jnp.dtype(config.dtype)
    return Linear(in_shape, out_shape, axes, init, config.bias, dtype, name=name, **lora)
