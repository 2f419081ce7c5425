"""The transformer block and its options, which all model families share.

Shape suffixes: B batch, T sequence length, D width, F width of the MLP, H heads of queries, G heads of keys and
values, K head size, J numbers of a head of keys and values with the queries that it serves.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt.models import decoding, kernels, quantized, remat, rotary
from gpt.models.base import ModelConfig
from gpt.models.layers import ACTIVATIONS, Linear, Norm, unit_rms
from gpt.models.mesh import merged_rows, shard_residual
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, check_fraction, check_names, check_not_negative, check_positive, harmless

# A larger model is a typing error, or a config that was made to keep the tracer busy indefinitely.
MAX_LAYERS, MAX_PARAMETERS = 10_000, 1e14

LAYERS = ("qkv", "out", "gate", "up", "down")  # the linear layers of a block


@dataclasses.dataclass(frozen=True)
class BlockConfig(ModelConfig):
    """Shape and options of the blocks. Each model family subclasses it."""

    # What a family offers: these are not fields of the config.
    position_kinds: ClassVar[tuple[str, ...]] = ("learned", "rotary", "none")
    attention_kinds: ClassVar[tuple[str, ...]] = ("auto", *kernels.ATTENTION)
    qk_norm_kinds: ClassVar[tuple[str, ...]] = ("none", "unit", "head", "all")
    vocab_source: ClassVar[str] = "tokenizer"  # where a `vocab_size` of 0 takes its value from
    unavailable: ClassVar[tuple[str, ...]] = ()  # fields below that have to keep their defaults

    num_layers: int = 8  # number of blocks
    num_heads: int = 8  # number of attention heads in a block; divides embed_dim unless head_size is given
    num_kv_heads: int = 0  # heads of keys and values (arXiv 2305.13245); divides num_heads; 0: num_heads
    embed_dim: int = 512  # width of the residual stream
    head_size: int = 0  # size of an attention head; 0: embed_dim/num_heads
    base_width: int = 0  # width whose learning rate and initial values µP scales to embed_dim (arXiv 2203.03466); 0: no
    mlp_size: int = 0  # hidden width of the MLP; 0: 4·embed_dim
    gated_mlp: bool = False  # multiply the activation of one projection by another: SwiGLU, GeGLU (arXiv 2002.05202)
    parallel_block: bool = False  # add attention and MLP of the same input, as in GPT-NeoX (arXiv 2204.06745)
    bias: str = "all"  # places that have a bias: all, none, or some of qkv, out, gate, up, down, norm, with commas
    norm: str = "layernorm"  # normalization: layernorm, rmsnorm, or rmsnorm_plus1 (scale 1 + parameter, as in Gemma)
    norm_places: str = "pre"  # norms of attention and MLP: pre (on inputs), post (on outputs, as in OLMo 2) or both
    norm_epsilon: float = 1e-5  # number that a norm adds to the variance
    activation: str = "gelu_tanh"  # activation of the MLP: gelu_tanh, gelu (exact), relu, relu_squared or silu
    positions: str = "learned"  # position encoding: learned, rotary or none (not for images), sincos (images only)
    rotary_base: float = 10_000.0  # rotary: the greatest wavelength in tokens is about 2π times this
    rotary_base_local: float = 0.0  # rotary: base in local layers, which then have no rotary_scaling; 0: rotary_base
    rotary_fraction: float = 1.0  # rotary: fraction of each head that is rotated
    rotary_scaling: str = ""  # rotary: for longer contexts, linear, llama3 or yarn with numbers; see models/rotary.py
    qk_norm: str = "none"  # normalize queries and keys: none, unit (root mean square 1), head or all (learned scales)
    attention_scale: float = 0.0  # factor of the attention scores; 0: 1/√(head size), or with µP 8/(head size)
    attention_softcap: float = 0.0  # limit attention scores by c·tanh(x/c), as in Gemma 2 (arXiv 2408.00118); 0: no
    window: int = 0  # number of tokens that a token of a local layer attends to, itself included; 0: no local layers
    window_pattern: str = "L"  # which layers are local (L) or global (G), repeated over all layers
    zero_init: bool = False  # initialize the projections onto the residual stream with zeros
    embed_dropout: float = 0.1  # dropout probability of the embeddings
    residual_dropout: float = 0.1  # dropout probability of the output of attention and MLP
    attention_dropout: float = 0.1  # dropout probability of the attention weights
    # Implementation of attention: dense, chunked, cudnn (NVIDIA GPUs, no dropout), splash (TPUs, no dropout), or auto:
    # the kernel of the platform if it supports the model, else dense.
    attention: str = harmless("auto")
    dtype: str = "auto"  # dtype of the computation: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere
    # Factors of the blocks' products with kernels: dtype's, or int8 or fp8, which some accelerators compute faster.
    products: str = "dtype"
    scan_layers: bool = harmless(False)  # compile one block and loop over the layers: faster to compile if deep
    # What the backward pass recomputes: none, dots (all but linear layers and attention kernels), full, or all but the
    # named outputs; see models/remat.py.
    remat: str = harmless("none")
    lora_rank: int = 0  # rank of the adapters to train on top of train.init_from's frozen weights; 0: no adapters
    lora_alpha: float = 16.0  # the output of an adapter is multiplied by lora_alpha/lora_rank
    lora_targets: str = "qkv"  # linear layers with an adapter, of qkv, out, gate, up and down, separated by commas

    def __post_init__(self):
        check_positive("model", self, "num_layers", "num_heads", "embed_dim", "norm_epsilon", "lora_alpha")
        check_not_negative("model", self, "num_kv_heads", "head_size", "mlp_size", "window", "lora_rank", "base_width")
        check_not_negative("model", self, "attention_scale", "attention_softcap", "rotary_base_local")
        check_fraction("model", self, "embed_dropout", "residual_dropout", "attention_dropout")
        check_choice("model.norm", self.norm, ("layernorm", "rmsnorm", "rmsnorm_plus1"))
        check_choice("model.norm_places", self.norm_places, ("pre", "post", "both"))
        check_choice("model.qk_norm", self.qk_norm, self.qk_norm_kinds)
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_choice("model.positions", self.positions, self.position_kinds)
        check_choice("model.attention", self.attention, self.attention_kinds)
        check_choice("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("model.products", self.products, ("dtype", *quantized.FORMATS))
        remat.check(self.remat)
        check_names("model.lora_targets", self.lora_targets, [*self.layer_weights])
        if self.bias not in ("all", "none"):
            check_names("model.bias", self.bias, [*LAYERS, "norm"], "all, none, or ")
        for field in dataclasses.fields(self):
            if field.name in self.unavailable and getattr(self, field.name) != field.default:
                raise UserError(f"model.{field.name} is not available for model.family={self.family}; leave it out.")
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size={self.vocab_size} has to be 0 (the {self.vocab_source}'s) or more.")
        if not self.window_pattern or set(self.window_pattern) - {"L", "G"}:
            raise UserError(f"model.window_pattern={self.window_pattern!r} has to consist of the letters L and G.")
        if self.num_layers > MAX_LAYERS or self.num_parameters() > MAX_PARAMETERS:
            raise UserError(
                f"model.num_layers={self.num_layers} and model.embed_dim={self.embed_dim}, with the other sizes under "
                f"model, are beyond {MAX_LAYERS:,} layers or {MAX_PARAMETERS:.0e} parameters."
            )
        if not self.head_size and self.embed_dim % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}.")
        if self.num_heads % self.kv_heads:
            raise UserError(f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}.")
        if self.positions == "rotary":
            check_positive("model", self, "rotary_base")
            if not 0 < self.rotary_fraction <= 1 or self.rotary_size % 2:
                raise UserError(
                    f"model.rotary_fraction={self.rotary_fraction} of a head size of {self.head_dim} gives "
                    f"{self.rotary_size} numbers to rotate; this has to be an even number, and the fraction at most 1."
                )
            if self.rotary_scaling:
                rotary.parse(self.rotary_scaling)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.mlp_size or 4 * self.embed_dim

    @property
    def rotary_size(self) -> int:
        """Number of rotated numbers of a head."""
        return int(self.rotary_fraction * self.head_dim)

    @property
    def kernel_scale(self) -> float:
        """Standard deviation of the initial kernels: GPT-2's, at µP's base width."""
        return 0.02 / self.width_ratio**0.5

    @property
    def width_ratio(self) -> float:
        return self.embed_dim / (self.base_width or self.embed_dim)

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, the number of tokens that a token attends to, or 0: all."""
        pattern = self.window_pattern
        return tuple(self.window * (pattern[i % len(pattern)] == "L") for i in range(self.num_layers))

    def has_bias(self, place: str) -> bool:
        """Returns whether a linear layer, by its name, or the norms ("norm") have a bias."""
        return self.bias == "all" or place in self.bias.split(",")

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """Returns this config with concrete values, see `ModelConfig.resolve`."""
        # The vocabulary of released models often has unused tokens after those of the tokenizer.
        is_text = self.reads == "tokens"
        if self.vocab_size not in (0, vocab_size) and not (is_text and self.vocab_size > vocab_size):
            raise UserError(
                f"model.vocab_size={self.vocab_size}, but the {self.vocab_source} has {vocab_size} "
                f"{'tokens' if is_text else 'classes'}; set 0."
            )
        dtype = self.dtype if self.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
        kernel = self.attention
        if kernel == "auto":
            kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "dense")
            kernel = kernel if kernel in self.attention_kinds else "dense"
        resolved = dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, dtype=dtype, attention=kernel)
        if obstacle := kernels.obstacle(kernel, resolved, platform, length_shards):
            if self.attention != "auto":
                raise UserError(f"model.attention={kernel} {obstacle}; choose dense or chunked, or auto.")
            resolved = dataclasses.replace(resolved, attention="dense")
        return resolved

    def without_kernel(self) -> Self:
        return dataclasses.replace(self, attention="auto") if self.attention in kernels.KERNELS else self

    def attention_function(self, window: int) -> Callable[..., jax.Array]:
        """Returns the attention of a resolved config, with the signature of `attention.dense` up to the softcap."""
        raise NotImplementedError

    @property
    def layer_weights(self) -> dict[str, tuple[int, int]]:
        d, f, heads = self.embed_dim, self.mlp_dim, self.num_heads * self.head_dim
        sizes = {"qkv": (d, heads + 2 * self.kv_heads * self.head_dim), "out": (heads, d)}
        gate = {"gate": (d, f)} if self.gated_mlp else {}
        return sizes | gate | {"up": (d, f), "down": (f, d)}

    def block_parameters(self, blocks: int) -> int:
        """Returns the number of parameters of `blocks` blocks and one norm."""
        linear_ = sum(
            inputs * outputs + self.has_bias(name) * outputs for name, (inputs, outputs) in self.layer_weights.items()
        )
        norm_ = self.embed_dim * (2 if self.has_bias("norm") and self.norm == "layernorm" else 1)
        scales = {"head": 2, "all": self.num_heads + self.kv_heads}.get(self.qk_norm, 0) * self.head_dim
        return blocks * (linear_ + scales + (4 if self.norm_places == "both" else 2) * norm_) + norm_

    def flops(self, length: int, other_weights: int) -> float:
        """Returns the model FLOPs of the forward and backward pass for one token of a sequence of `length` tokens.

        The number is 6 for each weight (4 if it is frozen), plus 12·heads·head size·length in each layer for the
        products of attention, as in PaLM (arXiv 2204.02311, appendix B), with the window as the length in local layers.

        Args:
          length: sequence length, in tokens.
          other_weights: number of weights outside of the blocks that multiply an activation.
        """
        sizes = self.layer_weights
        weights = self.num_layers * sum(inputs * outputs for inputs, outputs in sizes.values()) + other_weights
        lengths = sum(min(window or length, length) for window in self.windows)
        scores = 12 * self.num_heads * self.head_dim * lengths
        if not self.lora_rank:
            return 6 * weights + scores
        adapters = self.num_layers * self.lora_rank * sum(sum(sizes[name]) for name in self.lora_targets.split(","))
        return 4 * weights + 6 * adapters + scores

    def summary(self) -> str:
        shared = f" ({self.kv_heads} of keys and values)" if self.kv_heads != self.num_heads else ""
        return f"{self.num_layers} layers, {self.num_heads} heads{shared}, {self.embed_dim} wide"


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
        block = nn.remat(Block, policy=remat.policy(c.remat), prevent_cse=not c.scan_layers)
    windows = c.windows
    if c.scan_layers:
        # Windows that differ between layers are passed to each iteration; a common one is an attribute of the block.
        window, each = (None, jnp.array(windows)) if len(set(windows)) > 1 else (windows[0], None)
        scan = nn.scan(
            lambda module, x, window: (module(x, positions, starts_BxT, window), None),
            variable_axes={"params": 0, "lora": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BxTxD, _ = scan(block(c, deterministic, window, name="blocks"), x_BxTxD, each)
    else:
        for i, window in enumerate(windows):
            x_BxTxD = block(c, deterministic, window, name=f"block_{i}")(x_BxTxD, positions, starts_BxT)
    return norm(c, "final_norm")(x_BxTxD) / c.width_ratio  # so that logits do not grow with the width under µP


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)), as in GPT-2.

    `norm_places` moves the norms, and `parallel_block` lets both branches read the same x.
    """

    config: BlockConfig
    deterministic: bool
    window: int | None  # see `SelfAttention`

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        positions: jax.Array,
        starts_BxT: jax.Array | None,
        window: jax.Array | None = None,
    ) -> jax.Array:
        """Returns [B, T, D]. The arguments are those of `SelfAttention`."""
        c, x_BxTxD = self.config, checkpoint_name(x_BxTxD, "input")
        attend = SelfAttention(c, self.deterministic, self.window, name="attention")
        y_BxTxD = branch(
            c, 1, x_BxTxD, self.deterministic, lambda x_BxTxD: attend(x_BxTxD, positions, starts_BxT, window)
        )
        return add_mlp(c, x_BxTxD, y_BxTxD, self.deterministic)


def branch(
    config: BlockConfig, number: int, x_BxTxD: jax.Array, deterministic: bool, layer: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns dropout(norm(layer(norm(x)))), [B, T, D], with the norms that the config has.

    Args:
      number: 1 for attention, 2 for the MLP, for the names of the norms.
    """
    y_BxTxD = layer(x_BxTxD if config.norm_places == "post" else norm(config, f"norm_{number}")(x_BxTxD))
    if config.norm_places != "pre":
        y_BxTxD = norm(config, f"post_norm_{number}")(y_BxTxD)
    return nn.Dropout(config.residual_dropout, deterministic=deterministic)(y_BxTxD)


def add_mlp(config: BlockConfig, x_BxTxD: jax.Array, y_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
    """Returns the output of a block, [B, T, D], from its input x and the branch y of its attention."""
    mlp, sum_BxTxD = MLP(config, name="mlp"), shard_residual(x_BxTxD + y_BxTxD)
    z_BxTxD = branch(config, 2, x_BxTxD if config.parallel_block else sum_BxTxD, deterministic, mlp)
    return shard_residual(sum_BxTxD + z_BxTxD)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with one packed projection for queries, keys and values.

    Attributes:
      window: number of tokens that a token attends to, itself included; 0: all; None: the argument of the call.
    """

    config: BlockConfig
    deterministic: bool
    window: int | None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        positions: jax.Array,
        starts_BxT: jax.Array | None,
        window: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the attention of each token to the tokens that it may see.

        Args:
          x_BxTxD: activations of the tokens.
          positions: positions of the tokens for rotary encoding, [T], or [B, T] if they differ between rows. With a
            "cache" collection, a [B, 1] array selects decoding: the positions of one new token in each row.
          starts_BxT: see `attention.dense`.
          window: the window if the attribute is None.

        Returns:
          [B, T, D].
        """
        c = self.config
        is_local = bool(self.window) if window is None else window > 0
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = self._project(x_BxTxD, positions, is_local)
        if not self.is_initializing():  # `gpt.explain` asks for these; otherwise `sow` does nothing
            self.sow("intermediates", "queries", q_BxTxHxK)
            self.sow("intermediates", "keys", k_BxTxGxK)
        if self.has_variable("cache", "keys") and positions.ndim == 2:
            visible = jnp.where(is_local, c.window, 2**31 - 1) if c.window else 0
            out_BxTxHxK = decoding.decode_with_cache(self, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, positions, visible)
        else:
            decoding.fill_cache(self, k_BxTxGxK, v_BxTxGxK)
            # If the length is sharded, every query still needs the keys and values of all tokens.
            k_BxTxGxK = nn.with_logical_constraint(k_BxTxGxK, ("batch", "keys", "heads", "kv"))
            v_BxTxGxK = nn.with_logical_constraint(v_BxTxGxK, ("batch", "keys", "heads", "kv"))
            use_dropout = c.attention_dropout > 0 and not self.deterministic
            dropout_key = self.make_rng("dropout") if use_dropout else None
            dropout = {"dropout_rate": c.attention_dropout, "dropout_key": dropout_key}
            local, everywhere = (functools.partial(c.attention_function(size), **dropout) for size in (c.window, 0))
            operands = q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, starts_BxT
            if isinstance(is_local, bool):
                out_BxTxHxK = (local if is_local else everywhere)(*operands)
            else:
                out_BxTxHxK = jax.lax.cond(is_local, local, everywhere, *operands)
        out_BxTxHxK = nn.with_logical_constraint(out_BxTxHxK, ("batch", "length", "heads", "kv"))
        return linear(c, "out", (c.num_heads, c.head_dim), (c.embed_dim,), ("heads", "kv", "embed"))(out_BxTxHxK)

    def _project(self, x_BxTxD: jax.Array, positions: jax.Array, is_local: bool | jax.Array) -> tuple[jax.Array, ...]:
        """Returns queries [B, T, H, K], keys and values [B, T, G, K], normalized and rotated as the config asks.

        The projection has for each head of keys and values the queries that it serves, the key and the value.
        """
        c, kv = self.config, self.config.head_dim
        packed = c.kv_heads, (c.num_heads // c.kv_heads + 2) * kv
        qkv = linear(c, "qkv", (c.embed_dim,), packed, ("embed", "heads", "kv"))
        parts = qkv(x_BxTxD, ((c.num_heads, kv), (c.kv_heads, kv), (c.kv_heads, kv)))
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = (
            nn.with_logical_constraint(part, ("batch", "length", "heads", "kv")) for part in parts
        )
        if c.qk_norm == "unit":
            q_BxTxHxK, k_BxTxGxK = unit_rms(q_BxTxHxK), unit_rms(k_BxTxGxK)
        elif c.qk_norm != "none":
            axes = ("kv",) if c.qk_norm == "head" else ("heads", "kv")
            kind = "rmsnorm" if c.norm == "layernorm" else c.norm
            options = kind, False, jnp.dtype(c.dtype), c.norm_epsilon, axes
            q_BxTxHxK = Norm(*options, name="query_norm")(q_BxTxHxK)
            k_BxTxGxK = Norm(*options, name="key_norm")(k_BxTxGxK)
        if c.positions == "rotary":
            angles = rotary.frequencies(c.rotary_size, c.rotary_base, c.rotary_scaling)
            if c.rotary_base_local:
                local = rotary.frequencies(c.rotary_size, c.rotary_base_local, "")
                angles = jax.tree.map(functools.partial(jnp.where, is_local), local, angles)
            q_BxTxHxK = rotary.rotary(q_BxTxHxK, positions, *angles)
            k_BxTxGxK = rotary.rotary(k_BxTxGxK, positions, *angles)
        # Under µP, scores are divided by the head size, with a factor that gives the usual scores for heads of 64.
        scale = c.attention_scale or (8 / kv if c.base_width else 0)
        q_BxTxHxK = q_BxTxHxK * scale if scale else q_BxTxHxK / kv**0.5
        operands = q_BxTxHxK, k_BxTxGxK, v_BxTxGxK
        # What attention reads is kept, rather than the products; but the backward pass of a norm needs the products.
        return operands if c.qk_norm != "none" else tuple(checkpoint_name(x, "qkv") for x in operands)


class MLP(nn.Module):
    """Two linear layers with an activation between them, or with a gated activation of two projections."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        c = self.config
        sizes = (c.embed_dim,), (c.mlp_dim,), ("embed", "mlp")
        up_BxTxF = linear(c, "up", *sizes)(x_BxTxD)
        h_BxTxF = linear(c, "gate", *sizes)(x_BxTxD) if c.gated_mlp else up_BxTxF
        h_BxTxF = ACTIVATIONS[c.activation](merged_rows(h_BxTxF)).reshape(h_BxTxF.shape)
        h_BxTxF = h_BxTxF * up_BxTxF if c.gated_mlp else h_BxTxF
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
    return Linear(in_shape, out_shape, axes, init, config.has_bias(name), dtype, config.products, name=name)


def norm(config: BlockConfig, name: str) -> Norm:
    """Returns a norm with the options of the config."""
    return Norm(config.norm, config.has_bias("norm"), jnp.dtype(config.dtype), config.norm_epsilon, name=name)
