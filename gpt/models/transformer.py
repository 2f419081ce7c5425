"""The transformer block, which all model families share. `gpt/models/base.py` has its options.

Shape suffixes: B batch, T sequence length, D width, F width of the MLP, H heads of queries, G heads of keys and
values, K head size, J numbers of a head of keys and values with the queries that it serves.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt.models import decoding, remat, rotary
from gpt.models.base import ModelConfig
from gpt.models.layers import ACTIVATIONS, Linear, Norm, unit_rms
from gpt.models.mesh import merged_rows, shard_residual


def apply_blocks(
    config: ModelConfig,
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

    config: ModelConfig
    deterministic: bool
    window: int | None  # see `SelfAttention`

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *places: Any) -> jax.Array:
        """Returns [B, T, D]. `places` are the other arguments of `SelfAttention`."""
        c, x_BxTxD = self.config, checkpoint_name(x_BxTxD, "input")
        attend = SelfAttention(c, self.deterministic, self.window, name="attention")
        y_BxTxD = branch(c, 1, x_BxTxD, self.deterministic, lambda x_BxTxD: attend(x_BxTxD, *places))
        return add_mlp(c, x_BxTxD, y_BxTxD, self.deterministic)


def branch(
    config: ModelConfig, number: int, x_BxTxD: jax.Array, deterministic: bool, layer: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns dropout(norm(layer(norm(x)))), [B, T, D], with the norms that the config has.

    Args:
      number: 1 for attention, 2 for the MLP, for the names of the norms.
    """
    y_BxTxD = layer(x_BxTxD if config.norm_places == "post" else norm(config, f"norm_{number}")(x_BxTxD))
    if config.norm_places != "pre":
        y_BxTxD = norm(config, f"post_norm_{number}")(y_BxTxD)
    return nn.Dropout(config.residual_dropout, deterministic=deterministic)(y_BxTxD)


def add_mlp(config: ModelConfig, x_BxTxD: jax.Array, y_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
    """Returns the output of a block, [B, T, D], from its input x and the branch y of its attention."""
    mlp, sum_BxTxD = MLP(config, name="mlp"), shard_residual(x_BxTxD + y_BxTxD)
    z_BxTxD = branch(config, 2, x_BxTxD if config.parallel_block else sum_BxTxD, deterministic, mlp)
    return shard_residual(sum_BxTxD + z_BxTxD)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with one packed projection for queries, keys and values.

    Attributes:
      window: number of tokens that a token attends to, itself included; 0: all; None: the argument of the call.
    """

    config: ModelConfig
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
            dropout: dict[str, Any] = {}  # kernels have none
            if c.attention_dropout > 0 and not self.deterministic:
                dropout = {"dropout_rate": c.attention_dropout, "dropout_key": self.make_rng("dropout")}
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

    config: ModelConfig

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


def linear(config: ModelConfig, name: str, in_shape: tuple, out_shape: tuple, axes: tuple) -> Linear:
    """Returns a linear layer of a block, initialized like GPT-2's.

    Projections onto the residual stream ("out" and "down") start smaller the more of them there are.
    """
    scale = config.kernel_scale
    if name in ("out", "down"):
        scale = (0.0 if config.zero_init else scale) / (2 * config.num_layers) ** 0.5
    init, dtype = nn.initializers.normal(scale), jnp.dtype(config.dtype)
    return Linear(in_shape, out_shape, axes, init, config.has_bias(name), dtype, config.products, name=name)


def norm(config: ModelConfig, name: str) -> Norm:
    """Returns a norm with the options of the config."""
    return Norm(config.norm, config.has_bias("norm"), jnp.dtype(config.dtype), config.norm_epsilon, name=name)
