"""Mistral in transformers: `MistralForCausalLM`."""

from typing import ClassVar

from gpt.interop.llama import Llama


class Mistral(Llama):
    """Llama without biases, and with local attention in all layers or in none."""

    model_type = "mistral"
    model_class = "MistralForCausalLM"
    biases: ClassVar = {}
    has_layer_types = False
    constants: ClassVar = Llama.constants | {"bias": "none"}
    numbers: ClassVar = Llama.numbers | {"window": "sliding_window"}
    defaults: ClassVar = Llama.defaults | {"max_position_embeddings": 131072, "sliding_window": 4096}
    defaults |= {"num_key_value_heads": 8, "intermediate_size": 14336}
