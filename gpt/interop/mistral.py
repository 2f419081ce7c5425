"""Mistral in transformers: `MistralForCausalLM`."""

from typing import ClassVar

from gpt.interop.llama import Llama


class Mistral(Llama):
    """Llama without biases, and with local attention in all layers or in none."""

    model_type = "mistral"
    title = "Mistral"
    model_class = "MistralForCausalLM"
    biases: ClassVar = {}
    window = 4096
    has_layer_types = False
    numbers: ClassVar = Llama.numbers | {
        "block_size": ("max_position_embeddings", 131072),
        "num_kv_heads": ("num_key_value_heads", 8),
        "mlp_size": ("intermediate_size", 14336),
    }
