"""Tests of questions with answers: how they are posed, held out, evaluated and shown."""

import dataclasses
import re

import numpy as np
import pytest

from gpt.config import Config, default_config, from_tree
from gpt.data.arithmetic import ArithmeticConfig, Questions, SortConfig, _scattered
from gpt.data.base import IGNORED
from gpt.data.tokenizers import CharTokenizer, TokenizerConfig
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UsageError, UserError

KINDS = [
    ArithmeticConfig(digits=2),
    ArithmeticConfig(digits=2, operators="-"),
    ArithmeticConfig(digits=1, operators="*+-", validation_rows=40),
    ArithmeticConfig(modulus=23, operators="*", validation_rows=50),
    ArithmeticConfig(modulus=23, operators="-+", validation_rows=50),
    SortConfig(size=4, digits=5, validation_rows=100),
]


def load(config, **model) -> tuple[Questions, GPTConfig]:
    return config.load(TokenizerConfig(), None), GPTConfig(block_size=config.length, **model)


def answer(config, question: str) -> str:
    """Returns the answer by Python's arithmetic."""
    if isinstance(config, SortConfig):
        return "".join(sorted(question.removesuffix("=")))
    a, operator, b = re.fullmatch(r"(\d+)(\D)(\d+)=", question).groups()
    value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
    return str(value % config.modulus if config.modulus else value)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4097])
def test_numbers_are_scattered_one_to_one(size):
    assert sorted(_scattered(i, size) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_answers_are_right_and_only_answers_are_targets(config):
    dataset, model = load(config)
    source = dataset.evaluation("all", model)
    assert len(source) == config.num_questions
    for index in range(0, len(source), 7):
        question, written = source.pose(0, index)
        assert config.show(written) == answer(config, question)
        example = source.example(0, index)
        text = "".join(config.alphabet[i] for i in example["inputs"])
        assert text == question + written
        counted = example["targets"] != IGNORED
        assert counted.tolist() == [False] * (len(question) - 1) + [True] * (len(written) + 1)
        asked = "".join(config.alphabet[i] for i in example["targets"][counted])
        assert asked == written + "\n"


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_what_is_held_out_is_never_trained_on(config):
    """This holds in all epochs and for both orders of the operands. Each other question occurs once in an epoch."""
    dataset, model = load(config)
    training, held_out = dataset.training(model, seed=3), dataset.evaluation("val", model)

    def questions(source, epoch):
        return {source.pose(epoch, i)[0] for i in range(len(source))}

    def numbers(question):
        return (
            question
            if config.kind == "sort"
            else (*sorted(re.findall(r"\d+", question)), *re.findall("[-+*]", question))
        )

    seen = questions(training, 0) | questions(training, 1)
    unseen = questions(held_out, 0)
    assert len(unseen) == config.validation_rows
    assert not set(map(numbers, seen)) & set(map(numbers, unseen))
    assert len(questions(training, 0)) == len(training) == config.num_questions - len(unseen)


def test_another_epoch_asks_the_other_way_round_by_the_seed():
    dataset, model = load(ArithmeticConfig())
    source = dataset.training(model, seed=0)
    asked = {source.pose(epoch, 5)[0] for epoch in range(20)}
    assert len(asked) == 2
    assert source.pose(1, 5) == dataset.training(model, seed=0).pose(1, 5)
    other = dataset.training(model, seed=1)
    assert [source.pose(0, i) for i in range(99)] != [other.pose(0, i) for i in range(99)]


def test_examples_fill_a_longer_context():
    config = ArithmeticConfig(digits=1, validation_rows=9)
    example = config.load(TokenizerConfig(), None).training(GPTConfig(block_size=12), 0).example(0, 0)
    assert example["inputs"].shape == example["targets"].shape == (12,)
    assert (example["targets"][7:] == IGNORED).all()
    assert (example["targets"] != IGNORED).sum() == config.answer_length + 1


def test_a_prompt_is_written_as_people_do_and_so_is_the_answer():
    tokenizer = ArithmeticConfig(operators="+-").tokenizer({})
    alphabet = tokenizer.alphabet
    assert "".join(alphabet[i] for i in tokenizer.encode(" 7 + 45= ")) == "007+045="

    def read(written):
        return tokenizer.decode(np.array([alphabet.index(character) for character in written]))

    assert read("2500") == "52"
    assert read("833-") == "-338"
    assert read("0000") == "0"
    assert read("-3-3") == "3-3-"  # not a number: the characters in reverse
    assert read("250") == "\ufffd" * 3  # incomplete
    for wrong in ("7+45", "7*45=", "1000+1=", "", "x"):
        with pytest.raises(UserError, match=r"is not a question like \d{3}[+-]\d{3}="):
            tokenizer.encode(wrong)
    with pytest.raises(UserError, match="is not a question like"):
        tokenizer.opening()
    sorting = SortConfig(size=3, digits=3, validation_rows=9).tokenizer({})
    assert "".join(sorting.alphabet[i] for i in sorting.encode("2, 0 1")) == "201="
    with pytest.raises(UserError, match="is not a question like"):
        sorting.encode("203")


def test_mistakes_are_shown_as_text():
    dataset, model = load(ArithmeticConfig(digits=1, validation_rows=9))
    source = dataset.evaluation("val", model)
    predictions = source.example(0, 2)["targets"].copy()
    predictions[3:5] = [dataset.tokenizer.alphabet.index(character) for character in "99"]
    question, written = source.pose(0, 2)
    shown = dataset.mistakes(source, {"mistakes": [(2, predictions)]}).text
    assert shown == f"mistake  {question}99, right is {int(written[::-1])}"
    assert dataset.mistakes(source, {"mistakes": []}).text == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArithmeticConfig(operators="+/"), r"data\.operators='\+/' has to name"),
        (lambda: ArithmeticConfig(operators="++"), r"data\.operators"),
        (lambda: ArithmeticConfig(digits=0), r"data\.digits=0"),
        (lambda: ArithmeticConfig(digits=1), r"data\.validation_rows=2000 is more than half of the 55 questions"),
        (lambda: SortConfig(digits=11), r"data\.digits=11"),
        (lambda: SortConfig(prefetch=-1), r"data\.prefetch=-1"),
        (
            lambda: ArithmeticConfig().load(TokenizerConfig("byte"), None),
            "leave the keys under tokenizer at their defaults",
        ),
        (lambda: ArithmeticConfig().load(CharTokenizer("ab"), None), "start from weights for the same kind"),
        (lambda: ArithmeticConfig().load(TokenizerConfig(), GPTConfig(block_size=8)), r"set model\.block_size=12"),
        (lambda: ArithmeticConfig().opened("x.txt"), r"--data=x\.txt: data\.kind=arithmetic reads no files"),
    ],
)
def test_mistakes_of_the_user_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_stride_is_for_texts():
    dataset, model = load(ArithmeticConfig())
    with pytest.raises(UsageError, match="--stride=3 is for texts"):
        dataset.evaluation("val", model, 3)


def test_other_questions_have_another_fingerprint():
    prints = [load(config)[0].fingerprint for config in KINDS]
    assert len(set(prints)) == len(KINDS)
    assert load(dataclasses.replace(KINDS[0], prefetch=0))[0].fingerprint == prints[0]


def test_the_config_chooses_family_and_kind_by_name():
    config = from_tree(default_config(data=SortConfig()))
    assert config == Config(data=SortConfig())
    tree = default_config(data=SortConfig()).to_dict()
    for key, field, value, message in (
        ("data", "kind", "sorts", r"data\.kind='sorts' is not known; choose one of .*sort"),
        (
            "data",
            "kind",
            "text",
            r"data\.(size|digits|validation_rows) is a key of another model\.family or data\.kind",
        ),
        ("data", "kind", 3, r"data\.kind=3 has to be of type str"),
        ("model", "family", "rnn", r"model\.family='rnn' is not known"),
    ):
        with pytest.raises(UserError, match=message):
            from_tree(tree | {key: tree[key] | {field: value}})
    del tree["model"]["family"]
    with pytest.raises(UserError, match=r"no key 'model\.family'"):
        from_tree(tree)


@pytest.mark.slow
def test_the_commands_train_evaluate_and_answer(tmp_path, command):
    """The answers of a barely trained model are numbers; most are wrong, and are reported."""
    model = ("--config.model.num_layers=1", "--config.model.num_heads=2", "--config.model.embed_dim=16")
    data = ("--config.data.digits=1", "--config.data.operators=+-", "--config.data.validation_rows=30")
    length = ("--config.train.steps=20", "--config.train.eval_every=0", "--config.train.batch_size=8")
    run = f"--workdir={tmp_path}"
    trained = command("main", "--config=configs/adder.py", *model, *data, *length, run)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "80 training and 30 held-out questions like" in trained.stdout
    assert re.search(r"step 20/20  validation loss [\d.]+  accuracy [\d.]+%  exact match [\d.]+%", trained.stdout)
    assert len(re.findall(r"  │ mistake  \d[+-]\d=\S+, right is -?\d+\n", trained.stdout)) == 8
    evaluated = command("evaluate", run)
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.search(
        r"val split, 30 examples\nloss +[\d.]+\naccuracy +0[\d.]+\nexact match +0[\d.]+\nmistake", evaluated.stdout
    )
    sampled = command("sample", run, "--prompt=7 - 5 =")
    assert re.fullmatch(r"7 - 5 =\S+\n", sampled.stdout), (sampled.stdout, sampled.stderr)
    refused = command("sample", run, "--prompt=77-5=")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: --prompt: '77-5=' is not a question like ")
