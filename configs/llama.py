"""Llama-like decoders: grouped queries, gated MLP, RMSNorm, rotary positions, no biases.

Takes the size as an argument: --config=configs/llama.py:llama3.1-8b. `nano` and `micro` learn characters: `nano` on two
CPU cores, `micro` (the default) on an accelerator. The others have the shapes of released models, and batches and
learning rates like those of Llama 2 and 3 (arXiv 2307.09288 and 2407.21783); they need a tokenizer, for example that of
a released model: --config.tokenizer.path=FOLDER, and text: --config.data.path=PATH.

With ",muon" after the size, the kernels of the blocks learn by Muon with the settings of configs/char_speedrun.py:
--config=configs/llama.py:nano,muon.

Any size learns from other tokens too: --config.tokenizer.name=bpe --config.model.vocab_size=0.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt.config import default_config
from gpt.runtime.fields import check_choice


class Size(NamedTuple):
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    mlp_size: int
    vocab_size: int  # 0: that of the characters in the text
    block_size: int  # context length in tokens
    batch_size: int  # in sequences
    learning_rate: float
    others: Mapping[str, Any] = MappingProxyType({})


def scaled(factor: int) -> dict[str, Any]:
    """Returns the rotary positions of Llama 3.1 and 3.2, which stretch a context of 8,192 tokens."""
    numbers = "low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=8192"
    return {"rotary_base": 5e5, "rotary_scaling": f"llama3:factor={factor},{numbers}"}


TIED = {"tie_embeddings": True}
QWEN_3 = {"head_size": 128, "qk_norm": "head", "rotary_base": 1e6, "norm_epsilon": 1e-6}
SIZES = {
    "nano": Size(4, 4, 2, 128, 344, 0, 64, 32, 3e-3),
    "micro": Size(6, 6, 2, 384, 1024, 0, 256, 64, 1e-3),
    "smollm2-135m": Size(30, 9, 3, 576, 1536, 49_152, 2048, 512, 3e-3, TIED | {"rotary_base": 1e5}),
    "smollm2-360m": Size(32, 15, 5, 960, 2560, 49_152, 2048, 512, 3e-3, TIED | {"rotary_base": 1e5}),
    "smollm2-1.7b": Size(24, 32, 32, 2048, 8192, 49_152, 2048, 1024, 5e-4, TIED | {"rotary_base": 1.3e5}),
    "llama2-7b": Size(32, 32, 32, 4096, 11_008, 32_000, 4096, 1024, 3e-4),
    "llama2-13b": Size(40, 40, 40, 5120, 13_824, 32_000, 4096, 1024, 3e-4),
    "llama2-70b": Size(80, 64, 8, 8192, 28_672, 32_000, 4096, 1024, 1.5e-4),
    "llama3.2-1b": Size(16, 32, 8, 2048, 8192, 128_256, 8192, 512, 3e-4, TIED | scaled(32) | {"head_size": 64}),
    "llama3.2-3b": Size(28, 24, 8, 3072, 8192, 128_256, 8192, 512, 3e-4, TIED | scaled(32) | {"head_size": 128}),
    "llama3.1-8b": Size(32, 32, 8, 4096, 14_336, 128_256, 8192, 512, 3e-4, scaled(8)),
    "llama3.1-70b": Size(80, 64, 8, 8192, 28_672, 128_256, 8192, 1024, 1.5e-4, scaled(8)),
    "llama3.1-405b": Size(126, 128, 8, 16_384, 53_248, 128_256, 8192, 2048, 8e-5, scaled(8)),
    "qwen3-0.6b": Size(28, 16, 8, 1024, 3072, 151_936, 4096, 512, 1e-3, TIED | QWEN_3),
    "qwen3-1.7b": Size(28, 16, 8, 2048, 6144, 151_936, 4096, 1024, 5e-4, TIED | QWEN_3),
    "qwen3-4b": Size(36, 32, 8, 2560, 9728, 151_936, 4096, 1024, 3e-4, TIED | QWEN_3),
    "qwen3-8b": Size(36, 32, 8, 4096, 12_288, 151_936, 4096, 1024, 3e-4, QWEN_3),
    "qwen3-14b": Size(40, 40, 8, 5120, 17_408, 151_936, 4096, 1024, 3e-4, QWEN_3),
    "qwen3-32b": Size(64, 64, 8, 5120, 25_600, 151_936, 4096, 1024, 1.5e-4, QWEN_3),
}
SMALL = ("nano", "micro")


def get_config(argument: str = "micro"):
    size, *options = argument.split(",")
    check_choice("size", size, SIZES)
    for option in options:
        check_choice("option", option, ["muon"])
    shape = SIZES[size]
    config = default_config()
    names = "num_layers", "num_heads", "num_kv_heads", "embed_dim", "mlp_size", "vocab_size", "block_size"
    config.model.update({name: getattr(shape, name) for name in names} | dict(shape.others))
    config.model.tie_embeddings = "tie_embeddings" in shape.others
    config.model.gated_mlp = True
    config.model.activation = "silu"
    config.model.norm = "rmsnorm"
    config.model.bias = "none"
    config.model.positions = "rotary"
    config.model.attention = "auto"
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = shape.batch_size
    config.optimizer.learning_rate = shape.learning_rate
    if size in SMALL:
        config.train.steps = 3000
        config.optimizer.warmup_tokens = 100 * shape.batch_size * shape.block_size  # 100 steps
    else:
        config.model.scan_layers = True
        config.model.remat = "full"
        config.tokenizer.name = "gpt2"  # or the vocabulary in tokenizer.path
        config.mesh.rules = "fsdp"
        config.train.steps = 0
        config.train.tokens = 2e12
        config.train.eval_every = 1000
        config.optimizer.epsilon = 1e-5
        config.optimizer.warmup_tokens = 2000 * shape.batch_size * shape.block_size
    if "muon" in options:
        config.model.qk_norm = shape.others.get("qk_norm", "unit")
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 0.015
        config.optimizer.decay = "linear"
        config.optimizer.final_fraction = 0.0
        config.optimizer.weight_decay = 0.0
    return config
