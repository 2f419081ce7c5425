"""GPT-2 in transformers: `GPT2LMHeadModel`."""

from typing import ClassVar

from gpt.interop.architecture import Decoder


class GPT2(Decoder):
    """GPT-2, with learned positions, LayerNorm and biases."""

    model_type = "gpt2"
    model_class = "GPT2LMHeadModel"
    prefix = "transformer."
    embedding = "wte.weight"
    position_embedding = "wpe.weight"
    final_norm = "ln_f"
    layer = "h.{}."
    blocks: ClassVar = {"norm_1": "ln_1", "attention/qkv": "attn.c_attn", "attention/out": "attn.c_proj"}
    blocks |= {"norm_2": "ln_2", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    is_transposed = False
    constants: ClassVar = {"norm": "layernorm", "positions": "learned", "bias": "all"}
    fixed: ClassVar = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    activation = "activation_function"
    numbers: ClassVar = {
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "embed_dim": "n_embd",
        "mlp_size": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "embed_dropout": "embd_pdrop",
        "residual_dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    }
    defaults: ClassVar = {"vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    defaults |= {"layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    defaults |= {"activation_function": "gelu_new", "tie_word_embeddings": True}
