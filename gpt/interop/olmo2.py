"""OLMo 2 in transformers: `Olmo2ForCausalLM`."""

from typing import ClassVar

from gpt.interop.llama import Llama


class OLMo2(Llama):
    """Llama with norms of the outputs of attention and MLP in place of their inputs, and norms of queries and keys."""

    model_type = "olmo2"
    model_class = "Olmo2ForCausalLM"
    constants: ClassVar = Llama.constants | {"norm_places": "post", "qk_norm": "all"}
    biases: ClassVar = {"attention_bias": "qkv,out"}
    blocks: ClassVar = {name: theirs for name, theirs in Llama.blocks.items() if not name.startswith("norm_")}
    blocks |= {"post_norm_1": "post_attention_layernorm", "post_norm_2": "post_feedforward_layernorm"}
    blocks |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    defaults: ClassVar = Llama.defaults | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
