"""GPT-2 in transformers: `GPT2LMHeadModel`."""

from typing import ClassVar

from gpt.interop.architecture import Decoder


class GPT2(Decoder):
    """GPT-2, with learned positions, LayerNorm and biases."""

    model_type = "gpt2"
    title = "GPT-2"
    model_class = "GPT2LMHeadModel"
    prefix = "transformer."
    embedding = "wte.weight"
    position_embedding = "wpe.weight"
    final_norm = "ln_f"
    layer = "h.{}."
    blocks: ClassVar = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attention/qkv": "attn.c_attn",
        "attention/out": "attn.c_proj",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }
    is_transposed = False
    ties = True
    constants: ClassVar = {"norm": "layernorm", "positions": "learned"}
    biases: ClassVar = {"all": ("", True)}
    fixed: ClassVar = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    activation = ("activation_function", "gelu_new")
    numbers: ClassVar = {
        "vocab_size": ("vocab_size", 50257),
        "block_size": ("n_positions", 1024),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "embed_dim": ("n_embd", 768),
        "mlp_size": ("n_inner", None),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "embed_dropout": ("embd_pdrop", 0.1),
        "residual_dropout": ("resid_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
    }
