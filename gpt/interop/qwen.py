"""Qwen2, Qwen2.5 and Qwen3 in transformers: `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""

from typing import Any, ClassVar

from gpt.interop.config_file import ConfigFile
from gpt.interop.llama import Llama
from gpt.models.gpt import GPTConfig


class Qwen2(Llama):
    """Llama with biases of queries, keys and values, and, if it is switched on, local attention in the last layers."""

    model_type = "qwen2"
    model_class = "Qwen2ForCausalLM"
    constants: ClassVar = Llama.constants | {"bias": "qkv"}
    biases: ClassVar = {}
    fixed: ClassVar = {"use_mrope": False}
    numbers: ClassVar = Llama.numbers | {"window": "sliding_window"}
    defaults: ClassVar = Llama.defaults | {"vocab_size": 151936, "max_position_embeddings": 32768}
    defaults |= {"intermediate_size": 22016, "num_key_value_heads": 32}
    defaults |= {"sliding_window": 4096, "max_window_layers": 28}

    def read_window(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        found = super().read_window(file, fields)
        return found if file.get("use_sliding_window") else {"window": 0}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        return ("G" * min(int(file.number("max_window_layers", int)), layers)).ljust(layers, "L")

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        return super().write_rest(config) | {"use_sliding_window": config.window > 0}


class Qwen3(Qwen2):
    """Qwen2 with norms of queries and keys, and biases as in Llama."""

    model_type = "qwen3"
    model_class = "Qwen3ForCausalLM"
    constants: ClassVar = Llama.constants | {"qk_norm": "head"}
    biases: ClassVar = {"attention_bias": "qkv,out"}
    blocks: ClassVar = Llama.blocks | {"attention/query_norm": "self_attn.q_norm"}
    blocks |= {"attention/key_norm": "self_attn.k_norm"}
    defaults: ClassVar = Qwen2.defaults | {"head_dim": 128}
