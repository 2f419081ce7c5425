"""The table of model families, and the options and the interface that all of them share.

A family is a module in this folder with a configuration class, a subclass of `ModelConfig`, and the Flax module that
the configuration creates. Its entry in `FAMILIES` makes it available as `config.model.family`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models import kernels, quantized, remat, rotary
from gpt.models.layers import ACTIVATIONS
from gpt.runtime.errors import UserError
from gpt.runtime.fields import Options, check_names, option

FAMILIES = {
    "gpt": "gpt.models.gpt:GPTConfig",
    "vit": "gpt.models.vit:ViTConfig",
    "perceiver_ar": "gpt.models.perceiver:PerceiverARConfig",
    "perceiver_io": "gpt.models.perceiver:PerceiverIOConfig",
}

# A larger model is a typing error, or a config that was made to keep the tracer busy indefinitely.
MAX_LAYERS, MAX_PARAMETERS = 10_000, 1e14

LAYERS = ("qkv", "out", "gate", "up", "down")  # the linear layers of a block
NORMS, PLACES = ("layernorm", "rmsnorm", "rmsnorm_plus1"), ("pre", "post", "both")
DTYPES, PRODUCTS = ("auto", "float32", "bfloat16"), ("dtype", *quantized.FORMATS)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Options):
    """Shape and options of a model. Each family subclasses it with a frozen dataclass that gives every field a default.

    Attributes:
      family: the name of the family in `FAMILIES`.
      vocab_size: the number of targets to choose from: tokens or classes. 0 takes the number from the data.
    """

    section: ClassVar[str] = "model"
    # What a family offers: these are not fields of the config.
    reads: ClassVar[str] = "tokens"  # the input: tokens, int32 [length], or images, uint8 [height, width, channels]
    position_kinds: ClassVar[tuple[str, ...]] = ("learned", "rotary", "none")
    attention_kinds: ClassVar[tuple[str, ...]] = ("auto", *kernels.ATTENTION)
    qk_norm_kinds: ClassVar[tuple[str, ...]] = ("none", "unit", "head", "all")
    vocab_source: ClassVar[str] = "tokenizer"  # where a `vocab_size` of 0 takes its value from
    unavailable: ClassVar[tuple[str, ...]] = ()  # fields below that have to keep their defaults

    family: str = option(dataclasses.MISSING, "model family, which decides about the other keys", choices=FAMILIES)
    vocab_size: int = option(dataclasses.MISSING, "number of tokens or classes; 0: that of the data", least=0)
    num_layers: int = option(8, "number of blocks", above=0)
    num_heads: int = option(8, "attention heads in a block; divides embed_dim unless head_size is given", above=0)
    # Grouped queries, arXiv 2305.13245.
    num_kv_heads: int = option(0, "heads of keys and values; divides num_heads; 0: num_heads", least=0)
    embed_dim: int = option(512, "width of the residual stream", above=0)
    head_size: int = option(0, "size of an attention head; 0: embed_dim/num_heads", least=0)
    base_width: int = option(0, "width that the learning rate is for, with µP (arXiv 2203.03466); 0: no µP", least=0)
    mlp_size: int = option(0, "hidden width of the MLP; 0: 4·embed_dim", least=0)
    gated_mlp: bool = option(False, "multiply the activation by another projection: SwiGLU, GeGLU (arXiv 2002.05202)")
    parallel_block: bool = option(False, "attention and MLP read the same input, as in GPT-NeoX (arXiv 2204.06745)")
    bias: str = option("all", "places with a bias: all, none, or some of qkv,out,gate,up,down,norm")
    norm: str = option("layernorm", "normalization; rmsnorm_plus1 scales by 1 + its parameter, as Gemma", choices=NORMS)
    norm_places: str = option("pre", "norms on inputs (pre) or outputs (post, as in OLMo 2) of layers", choices=PLACES)
    norm_epsilon: float = option(1e-5, "number that a norm adds to the variance", above=0)
    activation: str = option("gelu_tanh", "activation of the MLP; gelu is exact", choices=ACTIVATIONS)
    positions: str = option("learned", "position encoding", choices="position_kinds")
    rotary_base: float = option(10_000.0, "rotary: the greatest wavelength in tokens is about 2π times this", above=0)
    rotary_base_local: float = option(0.0, "rotary: base in local layers, without scaling; 0: rotary_base", least=0)
    rotary_fraction: float = option(1.0, "rotary: fraction of each head that is rotated", above=0, most=1)
    rotary_scaling: str = option("", "rotary: for long contexts, linear, llama3 or yarn with numbers; see rotary.py")
    qk_norm: str = option("none", "norm of queries and keys; head and all have scales", choices="qk_norm_kinds")
    attention_scale: float = option(0.0, "factor of attention scores; 0: 1/√(head size), or 8/(head size)", least=0)
    attention_softcap: float = option(0.0, "c: limits attention scores by c·tanh(x/c), as in Gemma 2; 0: no", least=0)
    window: int = option(0, "tokens that a token of a local layer attends to, with itself; 0: no local layers", least=0)
    window_pattern: str = option("L", "which layers are local (L) or global (G), repeated over all layers")
    zero_init: bool = option(False, "initialize the projections onto the residual stream with zeros")
    embed_dropout: float = option(0.1, "dropout probability of the embeddings", least=0, below=1)
    residual_dropout: float = option(0.1, "dropout probability of the output of attention and MLP", least=0, below=1)
    attention_dropout: float = option(0.1, "dropout probability of the attention weights", least=0, below=1)
    # cudnn is for NVIDIA GPUs and splash for TPUs, both without dropout.
    attention: str = option("auto", "implementation; auto: by platform", choices="attention_kinds", harmless=True)
    dtype: str = option("auto", "dtype of the computation; auto: float32 on a CPU, bfloat16 elsewhere", choices=DTYPES)
    products: str = option("dtype", "factors of the products with kernels, by default of dtype", choices=PRODUCTS)
    scan_layers: bool = option(False, "compile one block and loop over the layers, if there are many", harmless=True)
    remat: str = option("none", "recomputed backward: none, dots, full, or kept names; see remat.py", harmless=True)
    lora_rank: int = option(0, "rank of adapters to train on train.init_from's frozen weights; 0: none", least=0)
    lora_alpha: float = option(16.0, "the output of an adapter is multiplied by lora_alpha/lora_rank", above=0)
    lora_targets: str = option("qkv", "linear layers with an adapter, some of qkv,out,gate,up,down")

    def __post_init__(self):
        super().__post_init__()
        remat.check(self.remat)
        check_names("model.lora_targets", self.lora_targets, [*self.layer_weights])
        if self.bias not in ("all", "none"):
            check_names("model.bias", self.bias, [*LAYERS, "norm"], "all, none, or ")
        for field in dataclasses.fields(self):
            if field.name in self.unavailable and getattr(self, field.name) != field.default:
                raise UserError(f"model.{field.name} is not available for model.family={self.family}; leave it out.")
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
            if self.rotary_size % 2:
                raise UserError(
                    f"model.rotary_fraction={self.rotary_fraction} of a head size of {self.head_dim} gives "
                    f"{self.rotary_size} numbers to rotate; this has to be an even number."
                )
            if self.rotary_scaling:
                rotary.parse(self.rotary_scaling)

    @property
    def length(self) -> int:
        """Sequence length of an example, in tokens. The mesh axis `sequence` shards it; throughput is counted in it."""
        raise NotImplementedError

    @property
    def num_targets(self) -> int:
        """Number of tokens at the end of an example that have a target."""
        return self.length

    @property
    def length_key(self) -> str:
        """Config key of the sequence length in the blocks, for messages."""
        return "model.block_size"

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits, at least `vocab_size`."""
        return self.vocab_size

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.head_size or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP in a block."""
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
        """Width relative to that for which learning rates and initial values were found; see `optimizer`."""
        return self.embed_dim / (self.base_width or self.embed_dim)

    @property
    def lora_scale(self) -> float:
        """Factor by which the output of an adapter is multiplied."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, the number of tokens that a token attends to, or 0: all."""
        pattern = self.window_pattern
        return tuple(self.window * (pattern[i % len(pattern)] == "L") for i in range(self.num_layers))

    @property
    def layer_weights(self) -> dict[str, tuple[int, int]]:
        """The sizes (inputs, outputs) of the linear layers of a block, by name."""
        d, f, heads = self.embed_dim, self.mlp_dim, self.num_heads * self.head_dim
        sizes = {"qkv": (d, heads + 2 * self.kv_heads * self.head_dim), "out": (heads, d)}
        gate = {"gate": (d, f)} if self.gated_mlp else {}
        return sizes | gate | {"up": (d, f), "down": (f, d)}

    def has_bias(self, place: str) -> bool:
        """Returns whether a linear layer, by its name, or the norms ("norm") have a bias."""
        return self.bias == "all" or place in self.bias.split(",")

    def resolve(self, vocab_size: int, platform: str, length_shards: int = 1) -> Self:
        """Returns this config with concrete values in the place of `0` and `auto`.

        Args:
          vocab_size: the number of tokens or classes that the data has.
          platform: JAX's name of the platform, for example "cpu".
          length_shards: the number of shards of the sequence length on the mesh.

        Raises:
          UserError: the config is for another vocabulary, or its attention is not available for this platform or mesh.
        """
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
            kernel = next((name for name in self.attention_kinds if kernels.KERNELS.get(name) == platform), "dense")
        resolved = dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, dtype=dtype, attention=kernel)
        if obstacle := kernels.obstacle(kernel, resolved, platform, length_shards):
            if self.attention != "auto":
                raise UserError(f"model.attention={kernel} {obstacle}; choose dense or chunked, or auto.")
            resolved = dataclasses.replace(resolved, attention="dense")
        return resolved

    def without_kernel(self) -> Self:
        """Returns this config with an attention implementation that works on every platform."""
        return dataclasses.replace(self, attention="auto") if self.attention in kernels.KERNELS else self

    def attention_function(self, window: int) -> Callable[..., jax.Array]:
        """Returns the attention of a resolved config, with the signature of `attention.dense` up to the softcap."""
        raise NotImplementedError

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
        """Returns a short description of the model's shape for the log."""
        shared = f" ({self.kv_heads} of keys and values)" if self.kv_heads != self.num_heads else ""
        return f"{self.num_layers} layers, {self.num_heads} heads{shared}, {self.embed_dim} wide"
