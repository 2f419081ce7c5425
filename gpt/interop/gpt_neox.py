"""GPT-NeoX and Pythia in transformers: `GPTNeoXForCausalLM`."""

from typing import Any, ClassVar

from gpt.interop.config_file import ConfigFile
from gpt.interop.rotary_decoder import RotaryDecoder
from gpt.models.gpt import GPTConfig


class GPTNeoX(RotaryDecoder):
    """GPT-NeoX: LayerNorm, attention beside the MLP, and rotary positions in a part of each head."""

    model_type = "gpt_neox"
    model_class = "GPTNeoXForCausalLM"
    prefix = "gpt_neox."
    head = "embed_out."
    embedding = "embed_in.weight"
    final_norm = "final_layer_norm"
    blocks: ClassVar = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attention/qkv": "attention.query_key_value",
        "attention/out": "attention.dense",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
    }
    is_packed = True
    constants: ClassVar = {"norm": "layernorm", "positions": "rotary", "bias": "up,down,norm"}
    biases: ClassVar = {"attention_bias": "qkv,out"}
    numbers: ClassVar = RotaryDecoder.numbers | {"norm_epsilon": "layer_norm_eps", "embed_dropout": "hidden_dropout"}
    numbers |= {"residual_dropout": "hidden_dropout", "rotary_base": "rotary_emb_base", "rotary_fraction": "rotary_pct"}
    defaults: ClassVar = {"vocab_size": 50432, "max_position_embeddings": 2048, "hidden_size": 6144}
    defaults |= {"num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576}
    defaults |= {"layer_norm_eps": 1e-5, "hidden_dropout": 0.0, "attention_dropout": 0.0, "hidden_act": "gelu"}
    defaults |= {"rotary_emb_base": 10_000.0, "rotary_pct": 0.25, "attention_bias": True, "use_parallel_residual": True}

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().read_rest(file, fields)
        # Some releases of transformers 4 also write the names that other architectures have.
        for key, name in {"rope_theta": "rotary_base", "partial_rotary_factor": "rotary_fraction"}.items():
            file.check(key, file.get(key) in (None, fields[name]), str(fields[name]))
        return fields | {"parallel_block": bool(file.get("use_parallel_residual"))}

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        return super().write_rest(config) | {"use_parallel_residual": config.parallel_block}
