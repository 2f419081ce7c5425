"""The tokenizer's files in a folder of transformers."""

import dataclasses
from pathlib import Path
from typing import Any

from gpt.data import bpe, tokenizers
from gpt.interop.config_file import ConfigFile
from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json

OUR_TOKENIZER = "gpt_tokenizer.json"  # holds a tokenizer of ours for which transformers has no format
GENERATION = "generation_config.json"
DEFAULT_STOP = 50256  # transformers' default for eos_token_id in config.json


def read(folder: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a folder, with the tokens that end what transformers generates.

    Raises:
      UserError: the tokenizer is missing or damaged.
    """
    path = folder / OUR_TOKENIZER
    try:
        is_ours = path.is_file()
        tokenizer = tokenizers.from_tree(read_json(path)) if is_ours else bpe.BPETokenizer.from_folder(folder)
        if isinstance(tokenizer, tokenizers.Labels):
            raise ValueError("it holds names of classes")
    except UserError as error:
        raise UserError(f"--from_hf: no tokenizer: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    path = folder / GENERATION
    has_generation = path.is_file()
    config = ConfigFile.read(path if has_generation else folder / "config.json")
    try:
        stops = tokenizers.token_ids(config.values.get("eos_token_id", None if has_generation else DEFAULT_STOP))
    except ValueError as error:
        raise UserError(f"{config.path}: eos_token_id {error}.") from None
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
        return keys, {OUR_TOKENIZER: tokenizer.to_json()}
    return keys | {"pad_token_id": tokenizer.role("pad_token")}, tokenizer.texts()
