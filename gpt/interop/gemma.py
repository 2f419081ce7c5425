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
    model_class = "Gemma2ForCausalLM"
    constants: ClassVar = Llama.constants | {"norm": "rmsnorm_plus1", "norm_places": "both"}
    biases: ClassVar = {"attention_bias": "qkv,out"}
    fixed: ClassVar = {"use_bidirectional_attention": False}
    blocks: ClassVar = Llama.blocks | {"post_norm_1": "post_attention_layernorm"}
    blocks |= {"norm_2": "pre_feedforward_layernorm", "post_norm_2": "post_feedforward_layernorm"}
    activation = "hidden_activation"
    numbers: ClassVar = Llama.numbers | {"window": "sliding_window"}
    numbers |= {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    defaults: ClassVar = Llama.defaults | {"vocab_size": 256000, "max_position_embeddings": 8192, "hidden_size": 2304}
    defaults |= {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    defaults |= {"intermediate_size": 9216, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
    defaults |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True}
    defaults |= {"query_pre_attn_scalar": 256}

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        file.get("hidden_act")  # in released files, but transformers does not use it
        scalar = file.number("query_pre_attn_scalar", float)
        file.check("query_pre_attn_scalar", scalar > 0, "a number greater than 0")
        multiplier = math.sqrt(max(fields["embed_dim"], 0))
        return super().read_rest(file, fields) | {"attention_scale": scalar**-0.5, "embed_multiplier": multiplier}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        return "LG"

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        scale = config.attention_scale or config.head_dim**-0.5
        return super().write_rest(config) | {"query_pre_attn_scalar": round(scale**-2)}


class Gemma3(Gemma2):
    """Gemma 3: Gemma 2 with norms of queries and keys, and with other rotary positions in its local layers."""

    model_type = "gemma3_text"
    model_class = "Gemma3ForCausalLM"
    constants: ClassVar = Gemma2.constants | {"qk_norm": "head"}
    blocks: ClassVar = Gemma2.blocks | {"attention/query_norm": "self_attn.q_norm"}
    blocks |= {"attention/key_norm": "self_attn.k_norm"}
    numbers: ClassVar = Gemma2.numbers | {"rotary_base_local": "rope_local_base_freq"}
    defaults: ClassVar = Gemma2.defaults | {"vocab_size": 262208, "max_position_embeddings": 131072}
    defaults |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    defaults |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        file.get("_sliding_window_pattern")  # written beside layer_types, and not read by transformers
        size = int(file.number("sliding_window_pattern", int))
        file.check("sliding_window_pattern", 0 < size <= MAX_LAYERS, f"1 to {MAX_LAYERS}")
        return "L" * (size - 1) + "G"
