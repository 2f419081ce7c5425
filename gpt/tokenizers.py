"""Text to token ids and back. A tokenizer is saved as JSON in the workdir."""

import dataclasses
import functools
import json
from typing import ClassVar, Protocol

import numpy as np

from gpt.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    name: str = "char"  # char: one token per character of the corpus; byte: one per byte

    def __post_init__(self):
        check_choice("tokenizer.name", self.name, TOKENIZERS)


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] number of UTF-8 bytes that each token stands for."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, in the smallest unsigned dtype. Raises UserError for unknown characters."""

    def decode(self, ids: np.ndarray) -> str: ...

    def to_json(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token per character (Unicode code point) of a fixed, sorted alphabet."""

    name: ClassVar[str] = "char"
    alphabet: str

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    @functools.cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.alphabet)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.array([len(character.encode()) for character in self.alphabet])

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            raise UnknownCharacters(sorted({chr(code) for code in codes[unknown]}), self.vocab_size)
        return ids.astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "alphabet": self.alphabet})

    @classmethod
    def from_dict(cls, saved: dict) -> "CharTokenizer":
        return cls(saved["alphabet"])


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte of the text's UTF-8 form; knows every text."""

    name: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256
    byte_lengths: ClassVar[np.ndarray] = np.ones(256, int)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"name": self.name})

    @classmethod
    def from_dict(cls, saved: dict) -> "ByteTokenizer":
        return cls()


class UnknownCharacters(UserError):
    """A text has characters that are not in the tokenizer's alphabet."""

    def __init__(self, characters: list[str], vocab_size: int):
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:5])
        more = f" and {len(characters) - 5} more" if len(characters) > 5 else ""
        super().__init__(f"unknown characters {shown}{more}: not in the model's alphabet of {vocab_size}.")


TOKENIZERS = {cls.name: cls for cls in (CharTokenizer, ByteTokenizer)}


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` saved."""
    saved = json.loads(text)
    return TOKENIZERS[saved["name"]].from_dict(saved)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
