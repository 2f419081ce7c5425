"""Qwen2, Qwen2.5 and Qwen3 in transformers: `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""

from typing import Any, ClassVar

from gpt.interop.config_file import ConfigFile
from gpt.interop.llama import Llama
from gpt.models.gpt import GPTConfig


class Qwen2(Llama):
    """Llama with biases of queries, keys and values, and, if it is switched on, local attention in the last layers."""

    model_type = "qwen2"
    title = "Qwen2"
    model_class = "Qwen2ForCausalLM"
    biases: ClassVar = {"qkv": ("", True)}
    fixed: ClassVar = {"use_mrope": False}
    window = 4096
    numbers: ClassVar = Llama.numbers | {
        "vocab_size": ("vocab_size", 151936),
        "block_size": ("max_position_embeddings", 32768),
        "num_kv_heads": ("num_key_value_heads", 32),
        "mlp_size": ("intermediate_size", 22016),
    }

    def read_window(self, file: ConfigFile, layers: int) -> dict[str, Any]:
        fields = super().read_window(file, layers)
        return fields if file.get("use_sliding_window", False) else {"window": 0}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        first_local = max(0, int(file.number("max_window_layers", int, 28)))
        return ("G" * min(first_local, layers)).ljust(layers, "L")

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        return super().write_rest(config) | {"use_sliding_window": config.window > 0}


class Qwen3(Qwen2):
    """Qwen2 with a norm of each query and key, and biases as in Llama."""

    model_type = "qwen3"
    title = "Qwen3"
    model_class = "Qwen3ForCausalLM"
    constants: ClassVar = Llama.constants | {"qk_norm": "head"}
    biases: ClassVar = {"qkv,out": ("attention_bias", False)}
    blocks: ClassVar = Llama.blocks | {
        "attention/query_norm": "self_attn.q_norm",
        "attention/key_norm": "self_attn.k_norm",
    }
    numbers: ClassVar = Qwen2.numbers | {"head_size": ("head_dim", 128)}
