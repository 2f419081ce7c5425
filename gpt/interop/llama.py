"""Llama 2, 3 and 3.x in transformers: `LlamaForCausalLM`, which many other models use too (SmolLM2, TinyLlama)."""

from typing import ClassVar

from gpt.interop.rotary_decoder import RotaryDecoder


class Llama(RotaryDecoder):
    """Llama: RMSNorm, rotary positions, grouped queries and a gated MLP."""

    model_type = "llama"
    title = "Llama"
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
    constants: ClassVar = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "gated_mlp": True,
        "embed_dropout": 0.0,
        "residual_dropout": 0.0,
    }
    biases: ClassVar = {"qkv,out": ("attention_bias", False), "gate,up,down": ("mlp_bias", False)}
    fixed: ClassVar = {"rope_interleaved": False}
    activation = ("hidden_act", "silu")
    numbers: ClassVar = {
        "vocab_size": ("vocab_size", 32000),
        "block_size": ("max_position_embeddings", 2048),
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_size": ("head_dim", None),
        "embed_dim": ("hidden_size", 4096),
        "mlp_size": ("intermediate_size", 11008),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "attention_dropout": ("attention_dropout", 0.0),
    }
