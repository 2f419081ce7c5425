"""GPT-2 in transformers: `GPT2LMHeadModel`."""

import re
from typing import ClassVar

from gpt.interop.architecture import Decoder, Tensor, block_tensors, norm_tensors
from gpt.models.gpt import GPTConfig


class GPT2(Decoder):
    """GPT-2, with learned positions, LayerNorm and biases."""

    model_type = "gpt2"
    title = "GPT-2"
    model_class = "GPT2LMHeadModel"
    prefix = "transformer."
    embedding = "wte.weight"
    buffers = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks
    fixed: ClassVar = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    activation = ("activation_function", "gelu_new")
    hidden_size = "n_inner"
    numbers: ClassVar = {
        "vocab_size": ("vocab_size", None),
        "block_size": ("n_positions", None),
        "num_layers": ("n_layer", None),
        "num_heads": ("n_head", None),
        "embed_dim": ("n_embd", None),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "embed_dropout": ("embd_pdrop", 0.1),
        "residual_dropout": ("resid_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
    }

    def tensors(self, config: GPTConfig) -> dict[str, Tensor]:
        width, length = config.embed_dim, config.block_size
        vocab_size, padded = config.vocab_size, config.padded_vocab_size
        tensors = {
            "token_embedding/embedding": Tensor(("wte.weight",), (vocab_size, width), (padded, width)),
            "position_embedding/embedding": Tensor(("wpe.weight",), (length, width), (length, width)),
        }
        tensors |= norm_tensors("final_norm", "ln_f", width)
        tensors |= block_tensors(
            config,
            {
                "norm_1": ["h.{}.ln_1"],
                "norm_2": ["h.{}.ln_2"],
                "attention/qkv": ["h.{}.attn.c_attn"],
                "attention/out": ["h.{}.attn.c_proj"],
                "mlp/up": ["h.{}.mlp.c_fc"],
                "mlp/down": ["h.{}.mlp.c_proj"],
            },
            is_transposed=False,
        )
        if not config.tie_embeddings:
            tensors["head/kernel"] = Tensor(("lm_head.weight",), (vocab_size, width), (width, padded), axes=(1, 0))
        return tensors
