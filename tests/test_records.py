"""Tests of JSONL and Parquet: documents, prompts whose tokens do not count, and messages about damaged files."""

import dataclasses
import json

import numpy as np
import pytest

from gpt.data import tokens
from gpt.data.base import IGNORED
from gpt.data.text import TextConfig
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError

PAIRS = [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(60)]
STREAM = "".join(f"{pair['prompt']}{pair['completion']}\n" for pair in PAIRS)
MODEL = GPTConfig(block_size=16)


def write_jsonl(path, records):
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")  # blank lines are ignored
    return path


def write_parquet(path, records):
    pytest.importorskip("pyarrow", reason='needs pip install -e ".[parquet]"')
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture
def load(tmp_path):
    def run(path, name="char", model=MODEL, **options):
        config = TextConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options)
        return config.load(TokenizerConfig(name, 300), model)

    return run


def texts(corpus) -> dict[str, str]:
    """Returns the text of each split."""
    return {name: corpus.tokenizer.decode(corpus.split(name)[""].tokens[:]) for name in ("train", "val", "all")}


def in_order(load, path, *arguments, **options):
    """Loads a file as the training text as a whole, and returns the corpus and that text."""
    corpus = load(path, *arguments, validation_path=str(path), **options)
    assert texts(corpus)["train"] == texts(corpus)["val"]
    return corpus, texts(corpus)["train"]


def pair_of(i: int) -> str:
    """Returns the text of a record."""
    return f"{PAIRS[i]['prompt']}{PAIRS[i]['completion']}\n"


def counted(corpus, split="all") -> str:
    """Returns the text of a corpus that counts in the loss of an evaluation."""
    source = corpus.evaluation(split, MODEL)
    targets = np.concatenate([source.example(0, i)["targets"] for i in range(len(source))])
    return corpus.tokenizer.decode(targets[targets != IGNORED])


@pytest.mark.parametrize("form", WRITERS)
def test_only_completions_count(load, tmp_path, form):
    """The validation text has some of the records, which are chosen by their content."""
    assert in_order(load, WRITERS[form](tmp_path / f"pairs.{form}", PAIRS))[1] == STREAM
    corpus = load(tmp_path / f"pairs.{form}")
    splits = {
        name: [i for i in range(60) if f"\n{pair_of(i)}" in f"\n{texts(corpus)[name]}"] for name in ("train", "val")
    }
    assert sorted(splits["train"] + splits["val"]) == list(range(60))
    assert 3 <= len(splits["val"]) <= 12
    for name, numbers in splits.items():
        assert texts(corpus)[name] == "".join(map(pair_of, numbers))
        assert counted(corpus, name) == "".join(f"{2 * i}\n" for i in numbers)
    # In training windows, which begin at another offset in each epoch, the same tokens count.
    source = corpus.training(MODEL, seed=0)
    for epoch in range(3):
        for i in range(len(source)):
            example = source.example(epoch, i)
            start = texts(corpus)["train"].index(corpus.tokenizer.decode(example["inputs"]))
            expected = corpus.split("train")[""].counts[start + 1 : start + 17]
            np.testing.assert_array_equal(example["targets"] != IGNORED, expected)
    # The same holds for tokens from the cache.
    assert counted(load(tmp_path / f"pairs.{form}")) == counted(corpus)


def test_both_forms_are_the_same_data(load, tmp_path):
    forms = [load(write(tmp_path / f"pairs.{form}", PAIRS)) for form, write in WRITERS.items()]
    assert forms[0].fingerprint == forms[1].fingerprint
    unlike = [*PAIRS[:-1], {"prompt": PAIRS[-1]["prompt"] + "1", "completion": PAIRS[-1]["completion"][1:]}]
    path = write_jsonl(tmp_path / "other.jsonl", unlike)  # the same text with longer prompts
    other, content = in_order(load, path)
    assert content == STREAM
    assert other.fingerprint != in_order(load, tmp_path / "pairs.jsonl")[0].fingerprint
    assert load(path).fingerprint != forms[0].fingerprint


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "ab", "completion": "cdef"}', "cdef\n"),
        ("b.jsonl", '{"prompt": "abc", "completion": "def"}', "def\n"),
        ("c.jsonl", '{"text": "abcdef"}', "bcdef\n"),
        ("d.jsonl", '{"prompt": "", "completion": "abcdef"}', "bcdef\n"),
        ("e.txt", "abcdef", "bcdef"),
    ],
)
def test_one_text_in_several_forms_has_tokens_for_each_form(load, tmp_path, name, content, expected):
    """The cache tells them apart although their text is the same."""
    for other, text in (("0.jsonl", '{"prompt": "a", "completion": "bcdef"}'), (name, content)):
        (tmp_path / other).write_text(text)
        corpus = load(tmp_path / other, "byte", model=None)
    assert counted(corpus) == expected


@pytest.mark.parametrize("form", WRITERS)
def test_records_of_text_all_count(load, tmp_path, form):
    path = WRITERS[form](tmp_path / f"texts.{form}", [{"text": f"line {i}"} for i in range(60)])
    for corpus in (load(path), in_order(load, path)[0]):
        assert [corpus.split(name)[""].counts for name in ("train", "val", "all")] == [None] * 3
    assert texts(corpus)["train"] == "".join(f"line {i}\n" for i in range(60))


def test_a_folder_may_hold_all_forms(load, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("plain text, " * 9)
    write_jsonl(folder / "b.jsonl", PAIRS[:9])
    write_parquet(folder / "c.parquet", [{"text": "a table"}])
    corpus, content = in_order(load, folder)
    expected = "plain text, " * 9 + "".join(f"{p['prompt']}{p['completion']}\n" for p in PAIRS[:9]) + "a table\n"
    assert content == expected
    answers = "".join(f"{pair['completion']}\n" for pair in PAIRS[:9])
    assert counted(corpus, "train") == ("plain text, " * 9)[1:] + answers + "a table\n"


def test_with_bpe_separators_stand_around_records_and_count_after_them(load, tmp_path):
    pytest.importorskip("tokenizers")
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    corpus, content = in_order(load, path, "bpe", document_borders=True)
    end = "<|endoftext|>"
    expected = end + "".join(f"{pair['prompt']}{pair['completion']}{end}" for pair in PAIRS)
    assert content == expected
    assert counted(corpus, "train") == "".join(f"{pair['completion']}{end}" for pair in PAIRS)
    # A prompt has the same tokens as without its completion.
    prompt = corpus.tokenizer.encode(PAIRS[0]["prompt"])
    np.testing.assert_array_equal(corpus.train[1 : 1 + len(prompt)], prompt)
    starts = corpus.training(MODEL, 0).example(0, 0)["starts"]
    assert starts.max() > 0


def test_bits_per_byte_are_those_of_the_text_that_counts(load, tmp_path):
    corpus = load(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    source = corpus.evaluation("all", MODEL)
    size = sum(len(pair["completion"]) + 1 for pair in PAIRS)
    report = corpus.report(source, {"loss": np.log(2.0), "targets": size, "groups": {"": (np.log(2.0), size)}})
    assert report["bits_per_byte"] == pytest.approx(1.0)


GOOD = json.dumps(PAIRS[0])
WRONG = {
    "half a line": (f"{GOOD}\n{GOOD[:9]}\n{GOOD}", r"pairs\.jsonl, line 2 is not JSON \(.*\); each line has to hold"),
    "an array": (
        f"{GOOD}\n\n[1]\n",
        r"pairs\.jsonl, line 3 has to hold a \"text\", or a \"prompt\" and a \"completion\"",
    ),
    "no completion": ('{"prompt": "a"}', "line 1 has to hold"),
    "a number": ('{"text": 3}', "line 1 has to hold"),
    "both": ('{"text": "a", "prompt": "b", "completion": "c"}', "line 1 has to hold"),
    "half a character": ('{"text": "\\ud800"}', r"line 1 has '\\ud800', half of a surrogate pair"),
    "not UTF-8": (b'{"text": "\xff"}', r"line 1 is not UTF-8: byte 0xff"),
    "too deep": ("[" * 100_000, "line 1 is not JSON"),
    "nothing but blank lines": ("\n\n", "holds no records"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(load, tmp_path, name):
    content, message = WRONG[name]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_wrong_table_is_named(load, tmp_path):
    path = tmp_path / "pairs.parquet"
    for records, message in (
        ([{"text": "a"}] * 9 + [{"text": None}], r"pairs\.parquet, row 10 has to hold"),
        ([{"words": "a"}], r"pairs\.parquet: each row has to hold .*, but the columns are words\."),
    ):
        write_parquet(path, records)
        with pytest.raises(UserError, match=message):
            load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"pairs\.parquet cannot be read as Parquet: "):
        load(path)


def test_a_split_of_prompts_alone_is_refused(load, tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "0 and 0 is " * 9, "completion": ""}])
    corpus = load(write_jsonl(tmp_path / "pairs.jsonl", PAIRS), validation_path=str(validation))
    prompt = corpus.held_out[""].between(0, len(corpus.validation) - 1)
    with pytest.raises(UserError, match=r"The val split has no completions.*--split=all"):
        dataclasses.replace(corpus, held_out={"": prompt}).evaluation("val", MODEL)


def test_plain_text_has_no_mask(load, tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 99)
    corpus = load(tmp_path / "a.txt")
    assert [corpus.split(name)[""].counts for name in ("train", "val")] == [None, None]
    assert corpus.training(MODEL, 0).example(0, 0)["targets"].min() >= 0
    assert not list((tmp_path / "cache").rglob("*.counts.npy"))
    assert tokens.DOCUMENT_END not in corpus.tokenizer.alphabet
