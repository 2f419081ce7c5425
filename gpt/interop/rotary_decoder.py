"""Decoders with rotary positions and, in some layers, local attention: their keys in transformers 4 and 5."""

from typing import Any, ClassVar

from gpt.interop.architecture import Decoder
from gpt.interop.config_file import ConfigFile
from gpt.models import rotary
from gpt.models.gpt import GPTConfig
from gpt.models.transformer import MAX_LAYERS
from gpt.runtime.errors import UserError

CONTEXT = "original_max_position_embeddings"
# The kinds of scaling that can be converted, each with the keys that it needs and those that it may have.
SCALINGS: dict[str, tuple[list[str], list[str]]] = {
    "default": ([], []),
    "linear": (["factor"], []),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor", CONTEXT], []),
    "yarn": (["factor", CONTEXT], "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()),
}
LAYER_TYPES = {"L": "sliding_attention", "G": "full_attention"}


class RotaryDecoder(Decoder):
    """A decoder with rotary positions. Transformers 5 has their keys in `rope_parameters`, transformers 4 has its own.

    Attributes:
      theta, fraction, local_theta: transformers 4's key, and the default, of the base, of the fraction of a head that
        is rotated, and of the base in local layers. "": there is no key, and the default is the only value.
      window: the default of `sliding_window`; 0: the model has no local layers.
      has_layer_types: whether `layer_types` may say which layers are local.
    """

    theta: ClassVar[tuple[str, float]] = ("rope_theta", 10_000.0)
    fraction: ClassVar[tuple[str, float]] = ("", 1.0)
    local_theta: ClassVar[tuple[str, float]] = ("", 0.0)
    window: ClassVar[int] = 0
    has_layer_types: ClassVar[bool] = True

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        result = super().read_rest(file, fields)
        keys = {"rotary_base": self.theta, "rotary_fraction": self.fraction, "rotary_base_local": self.local_theta}
        result |= {name: file.number(key, float, default) if key else default for name, (key, default) in keys.items()}
        given = _object(file, file.get("rope_parameters"))
        if self.local_theta[0]:
            file.check("rope_parameters", given.keys() <= {*LAYER_TYPES.values()}, " and ".join(LAYER_TYPES.values()))
            local = self._read_rope(file, _object(file, given.get(LAYER_TYPES["L"])), fields)
            file.check("rope_parameters", not local["rotary_scaling"], "sliding_attention without scaling")
            result["rotary_base_local"] = local.get("rotary_base", result["rotary_base_local"])
            given = _object(file, given.get(LAYER_TYPES["G"]))
        result |= self._read_rope(file, given | _object(file, file.get("rope_scaling")), fields)
        return result | (self.read_window(file, fields["num_layers"]) if self.window else {})

    def _read_rope(self, file: ConfigFile, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the scaling, and the base and the rotated fraction if they are given, by our names."""
        values = {key: value for key, value in given.items() if value is not None}
        kind = values.pop("rope_type", values.pop("type", "default"))
        if kind in ("llama3", "yarn"):
            values.setdefault(CONTEXT, fields["block_size"])
        if "truncate" in values:
            values["truncate"] = int(bool(values["truncate"]))
        ours = {"rope_theta": "rotary_base"} | ({"partial_rotary_factor": "rotary_fraction"} if self.fraction[0] else {})
        inner, (required, optional) = ConfigFile(file.path, values), SCALINGS.get(str(kind), ([], []))
        if kind not in [*SCALINGS] or not set(required) <= values.keys() - ours.keys() <= {*required, *optional}:
            known = "; ".join(f"{name} {', '.join([*keys, *more])}" for name, (keys, more) in SCALINGS.items())
            raise UserError(f"{file.path}: rotary positions of {given} cannot be converted, only these: {known}.")
        numbers = {key: float(inner.number(key, float)) for key in values}
        found: dict[str, Any] = {name: numbers.pop(key) for key, name in ours.items() if key in numbers}
        return found | {"rotary_scaling": "" if kind == "default" else rotary.format(kind, numbers)}

    def read_window(self, file: ConfigFile, layers: int) -> dict[str, Any]:
        """Returns the fields of the local layers."""
        file.check("num_hidden_layers", 0 < layers <= MAX_LAYERS, f"1 to {MAX_LAYERS}")
        letters = (self.default_pattern(file, layers) * layers)[:layers]
        if self.has_layer_types and (types := file.get("layer_types")) is not None:
            names = {name: letter for letter, name in LAYER_TYPES.items()}
            is_known = isinstance(types, list) and len(types) == layers and all(kind in [*names] for kind in types)
            file.check("layer_types", is_known, f"a list of {layers} {' or '.join(names)}")
            letters = "".join(names[kind] for kind in types)
        if "L" not in letters or not file.get("sliding_window", self.window):
            return {"window": 0}
        pattern = next(letters[:n] for n in range(1, layers + 1) if (letters[:n] * layers)[:layers] == letters)
        return {"window": file.number("sliding_window", int, self.window), "window_pattern": pattern}

    def default_pattern(self, file: ConfigFile, layers: int) -> str:
        """Returns which layers are local if there is no `layer_types`; see `GPTConfig.window_pattern`."""
        return "L"

    def write_rest(self, config: GPTConfig) -> dict[str, Any]:
        scaling: dict[str, Any] | None = None
        if config.rotary_scaling:
            kind, numbers = rotary.parse(config.rotary_scaling)
            exact = {CONTEXT: int, "truncate": bool}
            scaling = {"rope_type": kind} | {key: exact.get(key, float)(value) for key, value in numbers.items()}
        local = config.rotary_base_local or config.rotary_base
        values = (self.theta, config.rotary_base), (self.fraction, config.rotary_fraction), (self.local_theta, local)
        keys = {key: value for (key, _), value in values if key} | {"rope_scaling": scaling}
        if self.window:
            keys["sliding_window"] = config.window or None
            pattern = config.window_pattern if config.window else "G"
            if self.has_layer_types:
                keys["layer_types"] = [LAYER_TYPES[pattern[i % len(pattern)]] for i in range(config.num_layers)]
        return super().write_rest(config) | keys


def _object(file: ConfigFile, value: Any) -> dict[str, Any]:
    """Returns a JSON object of the rotary positions; an empty one if there is none. Raises UserError if it is no object."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file.path}: the rotary positions {value!r} are no JSON object.")
    return value or {}
