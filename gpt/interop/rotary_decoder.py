"""Decoders with rotary positions and, in some layers, local attention: their keys in transformers 4 and 5.

The classes of families have hooks for what their files in the folder `architectures` cannot express.
"""

import dataclasses
import math
from typing import Any

from gpt.interop.architecture import Decoder
from gpt.interop.config_file import ConfigFile
from gpt.models import rotary
from gpt.models.base import MAX_LAYERS
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError

LAYER_TYPES = {"L": "sliding_attention", "G": "full_attention"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryDecoder(Decoder):
    """A decoder with rotary positions, and local attention in some layers if `numbers` has a key for the window.

    Transformers 5 has the keys of the positions in `rope_parameters`, transformers 4 has those of `numbers` beside
    `rope_scaling`, which transformers 5 reads too.

    Attributes:
      has_layer_types: whether `layer_types` may say which layers are local.
      pattern: which layers are local if there is no `layer_types`; see `GPTConfig.window_pattern`.
    """

    has_layer_types: bool = True
    pattern: str = "L"

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        fields, given = super().read_rest(file, fields), _object(file, file.get("rope_parameters"))
        if "rotary_base_local" in self.numbers:
            file.check("rope_parameters", given.keys() <= {*LAYER_TYPES.values()}, " and ".join(LAYER_TYPES.values()))
            local, given = (_object(file, given.get(name)) for name in LAYER_TYPES.values())
            found = self._read_rope(file, local, fields)
            file.check("rope_parameters", not found["rotary_scaling"], "sliding_attention without scaling")
            fields["rotary_base_local"] = found.get("rotary_base", fields["rotary_base_local"])
        fields |= self._read_rope(file, given | _object(file, file.get("rope_scaling")), fields)
        return fields | (self.read_window(file, fields) if "window" in self.numbers else {})

    def _read_rope(self, file: ConfigFile, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the scaling, and the base and the rotated fraction if they are given, by our names."""
        values = {key: value for key, value in given.items() if value is not None}
        kind = values.pop("rope_type", values.pop("type", "default"))
        if kind in ("llama3", "yarn"):
            values.setdefault(rotary.LENGTH, fields["block_size"])
        if "truncate" in values:
            values["truncate"] = int(bool(values["truncate"]))
        inner = ConfigFile(file.path, values)
        numbers = {key: float(inner.number(key, float)) for key in values}
        ours = {"rope_theta": "rotary_base", "partial_rotary_factor": "rotary_fraction"}
        found: dict[str, Any] = {
            name: numbers.pop(key) for key, name in ours.items() if key in numbers and name in self.numbers
        }
        if kind == "default" and not numbers:
            return found | {"rotary_scaling": ""}
        required, optional = rotary.KINDS.get(str(kind), (set(), {}))
        if not required or not required <= numbers.keys() <= required | optional.keys():
            known = "; ".join(", ".join([name, *sorted(keys)]) for name, (keys, _) in rotary.KINDS.items())
            raise UserError(f"{file.path}: rotary positions of {given} cannot be converted, but only default; {known}.")
        return found | {"rotary_scaling": rotary.format(kind, numbers)}

    def read_window(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of the local layers."""
        layers = fields["num_layers"]
        file.check("num_hidden_layers", 0 < layers <= MAX_LAYERS, f"1 to {MAX_LAYERS}")
        letters = (self.default_pattern(file, layers) * layers)[:layers]
        if self.has_layer_types and (types := file.get("layer_types")) is not None:
            names = {name: letter for letter, name in LAYER_TYPES.items()}
            is_known = isinstance(types, list) and len(types) == layers and all(kind in [*names] for kind in types)
            file.check("layer_types", is_known, f"a list of {layers} {' or '.join(names)}")
            letters = "".join(names[kind] for kind in types)
        if "L" not in letters or not fields["window"]:
            return {"window": 0}
        repeats = (letters[:n] for n in range(1, layers + 1) if (letters[:n] * layers).startswith(letters))
        return {"window_pattern": next(repeats)}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        """Returns which layers are local if there is no `layer_types`; see `GPTConfig.window_pattern`."""
        return self.pattern

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        scaling: dict[str, Any] | None = None
        if config.rotary_scaling:
            kind, numbers = rotary.parse(config.rotary_scaling)
            exact = {rotary.LENGTH: int, "truncate": bool}
            scaling = {key: exact.get(key, float)(value) for key, value in numbers.items() if value is not None}
            scaling["rope_type"] = kind
        keys: dict[str, Any] = {"rope_scaling": scaling}
        if "window" in self.numbers and self.has_layer_types:
            pattern = config.window_pattern if config.window else "G"
            keys["layer_types"] = [LAYER_TYPES[pattern[i % len(pattern)]] for i in range(config.num_layers)]
        return super().write_rest(config) | keys


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


def _object(file: ConfigFile, value: Any) -> dict[str, Any]:
    """Returns a part of the rotary positions, {} if it is missing. Raises UserError if it is no JSON object."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file.path}: the rotary positions {value!r} are no JSON object.")
    return value or {}
