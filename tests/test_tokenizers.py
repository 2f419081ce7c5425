"""Text to tokens and back, and what a tokenizer does with characters that it does not know."""

import json
import os
import random

import numpy as np
import pytest

from gpt import tokenizers
from gpt.errors import UserError
from gpt.tokenizers import ByteTokenizer, CharTokenizer, TokenizerConfig

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


CASES = [*TEXTS, *(random_text(seed) for seed in range(20))]
case_ids = [f"text{i}" for i in range(len(TEXTS))] + [f"random{i}" for i in range(20)]


@pytest.mark.parametrize("text", CASES, ids=case_ids)
@pytest.mark.parametrize("make", [CharTokenizer.from_text, lambda text: ByteTokenizer()], ids=["char", "byte"])
def test_what_is_encoded_is_decoded(make, text):
    tokenizer = make(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    # As a model gives them.
    assert tokenizer.decode(ids.astype(np.int32)) == text
    saved = tokenizers.from_json(tokenizer.to_json())
    assert saved == tokenizer
    np.testing.assert_array_equal(saved.encode(text), ids)


@pytest.mark.parametrize("text", CASES, ids=case_ids)
@pytest.mark.parametrize("make", [CharTokenizer.from_text, lambda text: ByteTokenizer()], ids=["char", "byte"])
def test_byte_lengths_add_up_to_the_bytes_of_the_text(make, text):
    """Bits per byte, by which models with other tokenizers are compared, depend on it."""
    tokenizer = make(text)
    assert len(tokenizer.byte_lengths) == tokenizer.vocab_size
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()], ids=["char", "byte"])
def test_nothing_is_encoded_as_nothing(tokenizer):
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


def test_broken_utf_8_is_shown_as_replacement_characters():
    """A model of bytes may write anything."""
    decode = ByteTokenizer().decode
    assert decode(np.array([0x61, 0xFF, 0x62])) == "a\ufffdb"
    assert decode(np.array([0x61, 0xE2, 0x82])) == "a\ufffd"
    assert decode(np.array([0x80, 0x80])) == "\ufffd\ufffd"
    for seed in range(20):
        decode(np.random.default_rng(seed).integers(0, 256, 100)).encode()


def test_bytes_of_the_command_line_that_are_not_utf_8_are_kept():
    """Python hands them over as lone surrogates, which have no UTF-8 form of their own."""
    argument = os.fsdecode(b"caf\xe9\xff")
    assert ByteTokenizer().encode(argument).tobytes() == b"caf\xe9\xff"


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.from_text('a"\\\n😀\u2028'), ByteTokenizer()], ids=["char", "byte"]
)
def test_saved_form_is_json_with_the_name(tokenizer):
    saved = json.loads(tokenizer.to_json())
    assert tokenizers.TOKENIZERS[saved["name"]] is type(tokenizer)
    assert tokenizers.from_json(json.dumps(saved, indent=1)) == tokenizer


@pytest.mark.parametrize("name", ["", "Char", "bpe2"])
def test_unknown_tokenizer_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=rf"tokenizer\.name='{name}' is not known; choose one of char, byte"):
        TokenizerConfig(name)


@pytest.mark.parametrize("name", list(tokenizers.TOKENIZERS))
def test_known_tokenizer_is_accepted(name):
    assert TokenizerConfig(name).name == name
