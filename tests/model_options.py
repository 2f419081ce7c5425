"""Options of `GPTConfig` that make it the released models, for tests."""

# The options of released models, which need few layers to be told apart.
FAMILIES = {
    "llama": {"num_kv_heads": 2, "gated_mlp": True, "activation": "silu", "norm": "rmsnorm", "bias": "none"},
    "qwen2": {"num_kv_heads": 1, "gated_mlp": True, "activation": "silu", "norm": "rmsnorm", "bias": "qkv"},
    "qwen3": {
        "num_kv_heads": 2,
        "gated_mlp": True,
        "norm": "rmsnorm",
        "bias": "none",
        "qk_norm": "head",
        "head_size": 6,
    },
    "olmo2": {"gated_mlp": True, "norm": "rmsnorm", "bias": "none", "qk_norm": "all", "norm_places": "post"},
    "gemma2": {
        "num_kv_heads": 2,
        "gated_mlp": True,
        "norm": "rmsnorm_plus1",
        "norm_places": "both",
        "bias": "none",
        "embed_multiplier": 4.0,
        "attention_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "window": 3,
        "window_pattern": "LG",
    },
    "gemma3": {
        "num_layers": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "gated_mlp": True,
        "norm": "rmsnorm_plus1",
        "norm_places": "both",
        "bias": "none",
        "qk_norm": "head",
        "window": 2,
        "window_pattern": "LLG",
        "rotary_base": 500.0,
        "rotary_base_local": 20.0,
        "rotary_scaling": "linear:factor=8",
    },
    "neox": {"parallel_block": True, "rotary_fraction": 0.5, "activation": "gelu", "tie_embeddings": False},
    "mistral": {"num_kv_heads": 2, "gated_mlp": True, "norm": "rmsnorm", "bias": "none", "window": 3},
    "no positions": {"positions": "none"},
}
FAMILIES = {name: {"num_heads": 4, "positions": "rotary"} | options for name, options in FAMILIES.items()}
