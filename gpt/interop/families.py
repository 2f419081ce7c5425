"""Hooks of families of decoders, for what their files in the folder `architectures` cannot express."""

import math
from typing import Any

from gpt.interop.config_file import ConfigFile
from gpt.interop.rotary_decoder import RotaryDecoder
from gpt.models.base import MAX_LAYERS
from gpt.models.gpt import GPTConfig


class Qwen(RotaryDecoder):
    """Qwen2, Qwen2.5 and Qwen3, whose local attention a key switches on for the layers after the first ones."""

    def read_window(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        found = super().read_window(file, fields)
        return found if file.get("use_sliding_window") else {"window": 0}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        return ("G" * min(int(file.number("max_window_layers", int)), layers)).ljust(layers, "L")

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        return super().write_rest(config) | {"use_sliding_window": config.window > 0}


class Gemma(RotaryDecoder):
    """Gemma 2 and the text models of Gemma 3, with a scale of attention, and embeddings multiplied by √width."""

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        scalar = file.number("query_pre_attn_scalar", float)
        file.check("query_pre_attn_scalar", scalar > 0, "a number greater than 0")
        multiplier = math.sqrt(max(fields["embed_dim"], 0))
        return super().read_rest(file, fields) | {"attention_scale": scalar**-0.5, "embed_multiplier": multiplier}

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        scale = config.attention_scale or config.head_dim**-0.5
        return super().write_rest(config) | {"query_pre_attn_scalar": round(scale**-2)}


class Gemma3(Gemma):
    """Gemma 3, where a key says how many layers there are from one global layer to the next."""

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        size = int(file.number("sliding_window_pattern", int))
        file.check("sliding_window_pattern", 0 < size <= MAX_LAYERS, f"1 to {MAX_LAYERS}")
        return "L" * (size - 1) + "G"
