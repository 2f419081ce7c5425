"""Gemma 2 and the text models of Gemma 3 in transformers: `Gemma2ForCausalLM` and `Gemma3ForCausalLM`."""

import math
from typing import Any, ClassVar

from gpt.interop.config_file import ConfigFile
from gpt.interop.llama import Llama
from gpt.models.gpt import GPTConfig
from gpt.models.transformer import MAX_LAYERS


class Gemma2(Llama):
    """Gemma 2: norms before and after attention and MLP, every second layer local, and bounded logits."""

    model_type = "gemma2"
    title = "Gemma 2"
    model_class = "Gemma2ForCausalLM"
    ties = True
    constants: ClassVar = Llama.constants | {"norm": "rmsnorm_plus1", "norm_places": "both"}
    biases: ClassVar = {"qkv,out": ("attention_bias", False)}
    fixed: ClassVar = {"use_bidirectional_attention": False}
    blocks: ClassVar = Llama.blocks | {
        "post_norm_1": "post_attention_layernorm",
        "norm_2": "pre_feedforward_layernorm",
        "post_norm_2": "post_feedforward_layernorm",
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    window = 4096
    softcaps: ClassVar[dict[str, float]] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    numbers: ClassVar = Llama.numbers | {
        "vocab_size": ("vocab_size", 256000),
        "block_size": ("max_position_embeddings", 8192),
        "num_layers": ("num_hidden_layers", 26),
        "num_heads": ("num_attention_heads", 8),
        "num_kv_heads": ("num_key_value_heads", 4),
        "head_size": ("head_dim", 256),
        "embed_dim": ("hidden_size", 2304),
        "mlp_size": ("intermediate_size", 9216),
    }

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        file.get("hidden_act")  # in released files, but not used
        caps = [file.number(key, float, d) if file.get(key, d) else 0.0 for key, d in self.softcaps.items()]
        scalar = file.number("query_pre_attn_scalar", float, 256)
        file.check("query_pre_attn_scalar", scalar > 0, "a number greater than 0")
        return super().read_rest(file, fields) | {
            "attention_softcap": caps[0],
            "logit_softcap": caps[1],
            "attention_scale": scalar**-0.5,
            "embed_multiplier": math.sqrt(max(fields["embed_dim"], 0)),
        }

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        return "LG"

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        caps = config.attention_softcap or None, config.logit_softcap or None
        scale = config.attention_scale or config.head_dim**-0.5
        keys = {"query_pre_attn_scalar": round(scale**-2), **dict(zip(self.softcaps, caps, strict=True))}
        return super().write_rest(config) | keys


class Gemma3(Gemma2):
    """Gemma 3: Gemma 2 with norms of queries and keys, and with other rotary positions in its local layers."""

    model_type = "gemma3_text"
    title = "Gemma 3"
    model_class = "Gemma3ForCausalLM"
    constants: ClassVar = Gemma2.constants | {"qk_norm": "head"}
    blocks: ClassVar = Gemma2.blocks | {
        "attention/query_norm": "self_attn.q_norm",
        "attention/key_norm": "self_attn.k_norm",
    }
    theta = ("rope_theta", 1e6)
    local_theta = ("rope_local_base_freq", 1e4)
    softcaps: ClassVar[dict[str, float]] = {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}
    numbers: ClassVar = Gemma2.numbers | {
        "vocab_size": ("vocab_size", 262208),
        "block_size": ("max_position_embeddings", 131072),
    }

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        file.get("_sliding_window_pattern")  # written beside layer_types, and not read by transformers
        size = int(file.number("sliding_window_pattern", int, 6))
        file.check("sliding_window_pattern", 0 < size <= MAX_LAYERS, f"1 to {MAX_LAYERS}")
        return "L" * (size - 1) + "G"
