"""Llama 2, 3 and 3.x in transformers: `LlamaForCausalLM`, which many other models use too (SmolLM2, TinyLlama)."""

from typing import ClassVar

from gpt.interop.rotary_decoder import RotaryDecoder


class Llama(RotaryDecoder):
    """Llama: RMSNorm, rotary positions, grouped queries and a gated MLP."""

    model_type = "llama"
    model_class = "LlamaForCausalLM"
    prefix = "model."
    blocks: ClassVar = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attention/qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    constants: ClassVar = {"norm": "rmsnorm", "positions": "rotary", "gated_mlp": True}
    constants |= {"embed_dropout": 0.0, "residual_dropout": 0.0}
    biases: ClassVar = {"attention_bias": "qkv,out", "mlp_bias": "gate,up,down"}
    fixed: ClassVar = {"rope_interleaved": False}
    numbers: ClassVar = RotaryDecoder.numbers | {"num_kv_heads": "num_key_value_heads", "head_size": "head_dim"}
    numbers |= {"norm_epsilon": "rms_norm_eps"}
    defaults: ClassVar = {"vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096}
    defaults |= {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    defaults |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_dropout": 0.0}
