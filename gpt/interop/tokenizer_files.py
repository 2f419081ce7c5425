"""The tokenizer's files in a folder of transformers."""

import dataclasses
from pathlib import Path
from typing import Any

from gpt.data import bpe, tokenizers
from gpt.interop.config_file import ConfigFile
from gpt.runtime.errors import UserError

GENERATION = "generation_config.json"
DEFAULT_STOP = 50256  # transformers' default for eos_token_id in config.json


def read(folder: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a folder, with the tokens that end what transformers generates.

    Raises:
      UserError: the tokenizer is missing or damaged.
    """
    tokenizer = bpe.saved(str(folder), "--from_hf")
    path = folder / GENERATION
    has_generation = path.is_file()
    config = ConfigFile.read(path if has_generation else folder / "config.json")
    try:
        stops = tokenizers.token_ids(config.values.get("eos_token_id", None if has_generation else DEFAULT_STOP))
    except ValueError as error:
        raise UserError(f"{config.path}: eos_token_id {error}.") from None
    return with_stops(tokenizer, stops)


def with_stops(tokenizer: tokenizers.Tokenizer, stops: tuple[int, ...]) -> tokenizers.Tokenizer:
    """Returns the tokenizer with the tokens that end a sample."""
    stops = tuple(token for token in stops if token < tokenizer.vocab_size)  # the model cannot generate others
    tokenizer = dataclasses.replace(tokenizer, stops=None)
    return tokenizer if stops == tokenizer.stop_tokens else dataclasses.replace(tokenizer, stops=stops)


def write(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the keys of config.json that name the tokenizer's special tokens, and the text of each file by name."""
    stops = list(tokenizer.stop_tokens)
    keys: dict[str, Any] = {
        "bos_token_id": tokenizer.begin,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
    }
    if not isinstance(tokenizer, bpe.BPETokenizer):
        return keys, {bpe.OUR_FILE: tokenizer.to_json()}
    return keys | {"pad_token_id": tokenizer.role("pad_token")}, tokenizer.texts()
