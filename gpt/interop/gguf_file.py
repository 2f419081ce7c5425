"""GGUF files, the format of llama.cpp: weights, often quantized, with the shape of the model and its tokenizer.

The package `gguf` parses and dequantizes them. The format of the metadata is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.bpe import LONGEST_WORD, BPETokenizer
from gpt.data.tokenizers import Tokenizer
from gpt.interop import tokenizer_files
from gpt.interop.config_file import ConfigFile, tables
from gpt.models import rotary
from gpt.runtime.errors import UserError, one_line

_NAMES = tables("gguf.toml")
MODEL_TYPES, TENSORS, KEYS = _NAMES["model_types"], _NAMES["tensors"], _NAMES["keys"]
SCALING, PATTERNS = _NAMES["scaling"], _NAMES["patterns"]
# Keys that repeat others, or that llama.cpp does not use.
OTHERS = {"vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.finetuned"}
GEMMA = {"gemma2", "gemma3"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens
# Tokens that end a turn, of which many files hold no id; llama.cpp recognizes them by their texts too.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
MOST_PARTS = 1 << 22  # numbers and strings that the header may have


class GGUFFile:
    """A model in a GGUF file; see `SafetensorsFolder`, which has the same interface.

    Raises:
      UserError: the file is damaged, or its architecture is not known.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            from gguf.quants import dequantize
        except ImportError:
            raise UserError(f'{path} needs the package gguf: pip install -e ".[gguf]".') from None
        self._dequantize = dequantize
        try:
            reader = _reader(path)
            self._values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises exceptions of many types
            raise UserError(f"{path} is damaged or no GGUF file ({one_line(error)[:200]}).") from None
        if (parts := self._values.get("split.count", 1)) != 1:
            raise UserError(f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge.")
        self._kind = str(self._values.get("general.architecture"))
        if self._kind not in MODEL_TYPES:
            raise UserError(f"{path} holds a {self._kind}; only {', '.join(MODEL_TYPES)} can be converted.")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._frequencies = tensors.pop("rope_freqs.weight", None)
        self._tensors = {self._name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def _name(self, name: str) -> str:
        """Returns transformers' name of a tensor."""
        if not (found := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)):
            return name
        layer, place, part = found.groups()
        if place == "ffn_norm" and self._kind in GEMMA:
            return f"model.layers.{layer}.pre_feedforward_layernorm.{part}"
        return f"{TENSORS[place].format(layer)}.{part}" if place in TENSORS else name

    @functools.cached_property
    def config(self) -> ConfigFile:
        """The keys of config.json that the metadata gives."""
        start = f"{self._kind}."
        values = {name.removeprefix(start): value for name, value in self._values.items() if name.startswith(start)}
        # The converters of llama.cpp also write keys that are off: 0 or false, and true for causal attention.
        others = values.keys() - KEYS.keys() - SCALING.keys() - OTHERS
        if unknown := sorted(name for name in others if values[name] != (name == "attention.causal")):
            raise UserError(f"{self.path}: {start}{unknown[0]} is {values[unknown[0]]!r}, which is not known.")
        config = {key: values[name] for name, key in KEYS.items() if name in values}
        width, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 0)
        if not (isinstance(width, int) and isinstance(heads, int) and width >= heads > 0):
            raise UserError(f"{self.path}: {start}embedding_length or {start}attention.head_count is missing.")
        head_dim = config.setdefault("head_dim", width // heads)
        if values.get("rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.path}: {start}rope.dimension_count differs from the head size, {head_dim}.")
        config |= {"model_type": MODEL_TYPES[self._kind], "tie_word_embeddings": "lm_head.weight" not in self.shapes}
        config["vocab_size"] = (*self.shapes.get("model.embed_tokens.weight", ()), 0)[0]
        config["rope_scaling"] = self._scaling(values, config)
        if self._kind == "llama":
            biases = {name.rsplit(".", 2)[-2] for name in self.shapes if name.endswith("_proj.bias")}
            config |= {"attention_bias": "q_proj" in biases, "mlp_bias": "up_proj" in biases}
        if self._kind in GEMMA:
            # llama.cpp's rule: the file does not say it. Only the models of 27B scale by the width of a head's share.
            is_27b = (self._kind, config.get("num_hidden_layers")) in (("gemma2", 46), ("gemma3", 62))
            config["query_pre_attn_scalar"] = width // heads if is_27b else head_dim
        return ConfigFile(self.path, config)

    def _scaling(self, values: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the scaling of rotary positions. Llama 3.1's is in the file as the factor of each frequency."""
        scaling = {key: values[name] for name, key in SCALING.items() if name in values}
        if self._frequencies is None:
            kind = scaling.setdefault("rope_type", "linear" if scaling else "none")  # llama.cpp does so too
            return scaling if kind != "none" else None
        found = np.ravel(self._frequencies.data).astype(np.float64)
        base = ConfigFile(self.path, {"rope_theta": 1e4} | config).number("rope_theta", float)
        for factor in (8.0, 32.0):
            numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, rotary.LENGTH: 8192}
            forms = "", rotary.format("llama3", numbers)
            plain, stretched = (rotary.frequencies(2 * len(found), base, form)[0] for form in forms)
            if np.allclose(found, plain / stretched, rtol=1e-4):
                return {"rope_type": "llama3"} | numbers
        raise UserError(f"{self.path}: rope_freqs.weight is not that of Llama 3.1 or 3.2.")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, in the form that it has in transformers."""
        tensor = self._tensors[name]
        try:
            array = self._dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self.path}: {tensor.name} cannot be dequantized ({one_line(error)}).") from None
        if self._kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            # llama.cpp rotates pairs of neighbours: the numbers of each head are in another order.
            heads = array.shape[0] // self.config.values["head_dim"]
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array - 1 if self._kind in GEMMA and name.endswith("norm.weight") else array

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, with the chat template."""
        start = "tokenizer."
        values = {name.removeprefix(start): value for name, value in self._values.items() if name.startswith(start)}
        try:
            tokens, types = values["ggml.tokens"], values["ggml.token_type"]
            build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(values["ggml.model"])
            if build is None:
                raise ValueError(f"tokenizer.ggml.model is {values['ggml.model']!r}, but only gpt2 and llama are known")
            entries = [*zip(range(len(tokens)), tokens, types, strict=True)]
            definition = build(values, {token: i for i, token, kind in entries if kind != UNUSED})
            definition["added_tokens"] = [
                {"id": i, "content": token, "special": kind != USER_DEFINED, "normalized": False}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                for i, token, kind in entries
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
            roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
            ids = {role: values.get(f"ggml.{name}_token_id") for role, name in roles.items()}
            settings = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
            # llama.cpp's defaults where the file does not say it.
            adds_bos = values["ggml.model"] == "llama" or values["ggml.pre"] == "llama-bpe"
            if (bos := settings.get("bos_token")) and values.get("ggml.add_bos_token", adds_bos):
                single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
                definition["post_processor"] = {
                    "type": "TemplateProcessing",
                    "single": single,
                    "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {bos: {"id": bos, "ids": [ids["bos"]], "tokens": [bos]}},
                }
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings |= {"chat_template": values["chat_template"]} if "chat_template" in values else {}
            tokenizer = BPETokenizer.from_parts(json.dumps(definition), settings)
            tokenizer.encode("")  # raises an error if the library cannot use the definition
            ends = [values.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
            ends += [i for i, token in tokenizer.special.items() if token in TURN_ENDS]
            return tokenizer_files.with_stops(tokenizer, tuple({i: i for i in ends if i is not None and i >= 0}))
        except (UserError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{self.path} has no tokenizer that can be used: {one_line(error)[:200].rstrip('.')}."
            ) from None


def _reader(path: Path) -> Any:
    """Returns the package's reader of a file, which maps the file into memory.

    Raises:
      ValueError: the file ends early, its header is too long, or its numbers are big-endian.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        num_parts = 0

        # Behind the end of a file, the package reads empty arrays, for as many times as the header says.
        def _get(self, offset, dtype, count=1, override_order=None):
            self.num_parts += 1
            if self.num_parts > MOST_PARTS or offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends early, or its header is too long")
            return super()._get(offset, dtype, count, override_order)

    reader = Reader(path)
    if reader.byte_order != "I":
        raise ValueError("its numbers are big-endian")
    return reader


def _byte_level(values: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Returns the content of tokenizer.json for a byte-level BPE."""
    if (pattern := PATTERNS.get(kind := values.get("ggml.pre", ""))) is None:
        raise ValueError(f"tokenizer.ggml.pre is {kind!r}, but only {', '.join(PATTERNS)} are known")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    steps = [split] * bool(pattern) + [letters | {"use_regex": pattern in ("", r"\p{N}")}]
    return {
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": letters | {"use_regex": True},
        "model": {"type": "BPE", "vocab": ids, "merges": values["ggml.merges"], "ignore_merges": kind == "llama-bpe"},
    }


def _sentencepiece(values: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Returns the content of tokenizer.json for a BPE of SentencePiece, whose merges follow from the scores."""
    scores = values["ggml.scores"]
    merges = [
        (-scores[i], i, ids[token[:cut]], f"{token[:cut]} {token[cut:]}")
        for token, i in ids.items()
        if values["ggml.token_type"][i] == NORMAL and len(token) <= LONGEST_WORD
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    space, unknown = "▁", values.get("ggml.unknown_token_id")
    prepend = [{"type": "Prepend", "prepend": space}] * bool(values.get("ggml.add_space_prefix", True))
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * len(prepend)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    back = {"type": "Replace", "pattern": {"String": space}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [merge for *_, merge in sorted(merges)],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None if unknown is None else values["ggml.tokens"][unknown],
        },
    }
