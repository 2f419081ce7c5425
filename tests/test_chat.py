"""Tokenizers and chat templates in the manner of released models, conversations as data, and chats.

The tests that compare with transformers (`pip install -e ".[parity]"`) are skipped without it.
"""

import itertools
import json
import random
import time

import numpy as np
import pytest
import released
from test_tokenizers import HARD, TEXTS, random_text, white_space_and_words, without_blanks

from gpt import train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, OptimizerConfig, TrainConfig
from gpt.data import bpe, chat, tokenizers
from gpt.data.base import IGNORED
from gpt.data.bpe import BPETokenizer
from gpt.data.text import TextConfig
from gpt.data.tokenizers import ByteTokenizer, TokenizerConfig
from gpt.inference import sampling
from gpt.inference.generation import Sampling
from gpt.inference.model import TrainedModel
from gpt.interop import tokenizer_files
from gpt.models.gpt import GPTConfig
from gpt.runtime import output
from gpt.runtime.errors import UsageError, UserError

pytest.importorskip("tokenizers", reason='needs pip install -e ".[bpe]"')
pytest.importorskip("jinja2", reason='needs pip install -e ".[chat]"')

every_family = pytest.mark.parametrize("name", released.FAMILIES)
every_chat = pytest.mark.parametrize("name", released.CHATS)
CONVERSATION = [
    {"role": "user", "content": "The cat or the rat?"},
    {"role": "assistant", "content": "The cat,  of course.\nIt sat on the mat."},
    {"role": "user", "content": " Why <s>? "},
    {"role": "assistant", "content": "They'll see: 中文 👍"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief & <good>."}, *CONVERSATION]


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason='needs pip install -e ".[parity]"')


@pytest.fixture
def family(tmp_path):
    return lambda name, **changes: BPETokenizer.from_folder(released.write(name, tmp_path / name, **changes))


# Tokens.


@every_family
def test_tokens_are_those_of_transformers(name, transformers, tmp_path):
    tokenizer = BPETokenizer.from_folder(released.write(name, tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*HARD, *TEXTS, *(random_text(seed) for seed in range(5)), "a</s>b <s>c", "<|im_start|> x<|eot_id|>  y"]
    for text in texts:
        assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode_prompt(text).tolist() == theirs(text)["input_ids"]
        expected = theirs.decode(theirs.encode(text, add_special_tokens=False), skip_special_tokens=True)
        assert tokenizer.decode_answer(tokenizer.encode(text)) == expected
    assert tokenizer.vocab_size == len(theirs)
    for role in ("bos_token", "eos_token", "pad_token"):
        assert tokenizer.role(role) == getattr(theirs, f"{role}_id")


@every_family
def test_files_are_kept_as_they_are(name, family, tmp_path):
    tokenizer = family(name)
    kept = tokenizers.from_tree(json.loads(tokenizer.to_json()))
    assert kept == tokenizer
    folder = tmp_path / name
    texts = tokenizer_files.write(kept)[1]
    assert texts.keys() == {path.name for path in folder.iterdir()} - {"config.json"}
    for file, text in texts.items():
        before = (folder / file).read_text(encoding="utf-8")
        assert text == before if file.endswith(".jinja") else json.loads(text) == json.loads(before)
        (folder / file).write_text(text, encoding="utf-8")
    assert BPETokenizer.from_folder(folder) == tokenizer


@every_family
def test_a_text_may_be_cut_anywhere(name, family, monkeypatch):
    for constant, value in {"READ": 1024, "SHORT": 64, "PART": 16, "BATCH": 4}.items():
        monkeypatch.setattr(bpe, constant, value)
    tokenizer = family(name)
    texts = [white_space_and_words(0) * 5, released.TEXT * 20, "".join(random.Random(0).choices(HARD, k=60))]
    for text in [*texts, *without_blanks(3000).values()]:
        whole = tokenizer._model.encode(text, add_special_tokens=False).ids
        for size in (50, 10_000):
            parts = tokenizer.encode_stream(text[i : i + size] for i in range(0, len(text), size))
            assert np.concatenate(list(parts)).tolist() == whole
    assert len([*tokenizer.encode_stream(["the cat sat on the mat and the dog " * 100])]) > 50


def test_special_tokens_begin_and_separate_documents(family):
    marks = {
        name: (family(name).begin, family(name).separator) for name in ("llama2", "gemma", "llama3", "qwen", "neox")
    }
    assert marks == {"llama2": (1, 2), "gemma": (2, 1), "llama3": (0, 4), "qwen": (0, 0), "neox": (0, 0)}
    assert family("gemma").opening().tolist() == family("gemma").encode_prompt("").tolist() == [2]
    assert family("llama2", add_bos_token=False).encode_prompt("x").tolist() == family("llama2").encode("x").tolist()
    both = family("llama2", add_eos_token=True)
    assert both.encode_prompt("x").tolist() == [1, *both.encode("x"), 2]
    assert family("llama3").byte_lengths[family("llama3").encode("<|eot_id|>é")].sum() == 2


def test_padding_and_truncation_in_the_file_change_nothing(family, tmp_path):
    definition = json.loads(released.write("smollm", tmp_path / "x").joinpath("tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    changed = BPETokenizer.from_parts(definition, {})
    assert (
        changed.encode("The cat sat on the mat").tolist() == family("smollm").encode("The cat sat on the mat").tolist()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["model"].update(type="WordPiece"), "describes WordPiece"),
        (lambda saved: saved["model"].update(dropout=0.1), "BPE with dropout=0.1, and not BPE without"),
        (lambda saved: saved.update(decoder={"type": "CTC"}), "a decoder that is not known"),
        (lambda saved: saved["model"]["vocab"].update(far=2**31), "ids that are not numbers below"),
        (lambda saved: saved["model"]["vocab"].update(a="b"), "ids that are not numbers below"),
        (lambda saved: saved["model"]["vocab"].update({"\ud800": 5}), "surrogates not allowed"),
        (lambda saved: saved["model"].update(merges=[["a", "of no token"]]), "cannot use"),
        (lambda saved: saved["model"].update(merges=7), "cannot use"),
        (lambda saved: saved.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "cannot use"),
        (lambda saved: saved.update(added_tokens=[{"id": 3, "content": "<x>"}]), "missing field"),
        (lambda saved: saved.pop("model"), "can be used: model"),
    ],
)
def test_damaged_tokenizers_are_refused_with_a_sentence(change, message, tmp_path):
    path = released.write("smollm", tmp_path) / "tokenizer.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=message) as caught:
        BPETokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


# Templates.


def accepted(name: str) -> list[list[dict]]:
    conversations = [WITH_SYSTEM[:n] for n in (2, 4)] + [CONVERSATION[:n] for n in range(1, 5)]
    return [CONVERSATION[:n] for n in (1, 2, 4)] if name == "gemma" else conversations


@every_chat
def test_texts_are_those_of_transformers(name, transformers, family, tmp_path):
    tokenizer = family(name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    for messages, has_prompt in itertools.product(accepted(name), (False, True)):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=has_prompt)
        found = chat.render(tokenizer, messages, add_generation_prompt=has_prompt)
        assert found == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=has_prompt, return_dict=False)
        assert tokenizer.encode(found).tolist() == ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        (
            "{%- for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{{ loop.last }}{% endfor %}",
            "0False1False",
        ),
        ("{% for i in range(3) %}{{ loop.length }}{{ loop.revindex }} {% endfor %}", "33 32 31 "),
        ("{% for m in messages recursive %}{{ m.role }}{% endfor %}", "user"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(tools is none) }}{{ missing is defined }}", "[True]False"),
        ("{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}a{% endgeneration %}{{ n.x }}", "a2"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ eos_token }}{{ add_generation_prompt }}{{ 3 * 4 }}{{ 'ab' * 2 }}", "</s>False12abab"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_functions_of_templates(template, expected, family, transformers, tmp_path):
    tokenizer = family("llama2", chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama2")
    assert chat.render(tokenizer, CONVERSATION[:1]) == expected
    assert theirs.apply_chat_template(CONVERSATION[:1], tokenize=False) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 262,144 steps"),
        ("{% macro m(n) %}{{ m(n) if n }}{{ m(n) if n }}{% endmacro %}{{ m(3) }}", "steps|recursion"),
        ("{{ 'a' * 10**12 }}", "computes"),
        ("{% for i in range(99999) %}" + "a" * 99_999 + "{% endfor %}", "writes more than"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|safely"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('the roles are wrong') }}", "the roles are wrong"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{% if", "chat template fails"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "chat template fails"),
        ("a" * (1 << 19), "more than 262,144 characters"),
        ([{"name": "tool_use", "template": "x"}], "chat template fails: default"),
        (7, "chat template fails"),
    ],
)
def test_hostile_templates_end_with_a_sentence(template, message, family):
    began = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        chat.render(family("llama2", chat_template=template), CONVERSATION)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 20


def test_a_tokenizer_without_a_template_is_named(family):
    for tokenizer in (family("neox"), ByteTokenizer()):
        with pytest.raises(UserError, match=r"^the tokenizer has no chat template; "):
            chat.render(tokenizer, CONVERSATION)


# Data.


def counted(corpus) -> list[str]:
    """Returns the texts whose tokens count in the loss of the training."""
    stream = corpus.split("train")[""]
    ids, counts = stream.tokens[1:], stream.counts[1:]  # the first token is no target
    borders = np.flatnonzero(np.diff(counts.astype(int), prepend=0, append=0))
    return [corpus.tokenizer.decode(ids[start:end]) for start, end in borders.reshape(-1, 2)]


@pytest.fixture
def load(tmp_path):
    """Writes records to a file and loads it, as the training text as a whole and as the validation text."""

    def run(tokenizer, records, **options):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = {"validation_path": str(path), "cache_dir": str(tmp_path / "cache")} | options
        config = TextConfig(path=str(path), **options)
        return config.load(tokenizer, GPTConfig(block_size=16))

    return run


ENDS = {"llama2": " </s>", "mistral": " </s>", "zephyr": "</s>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}


@every_chat
def test_only_answers_and_their_ends_count(name, family, load, transformers, tmp_path):
    tokenizer = family(name)
    corpus = load(tokenizer, [{"messages": CONVERSATION}] * 3)
    starts = {"llama2": " ", "mistral": " "}.get(name, "")
    answers = [starts + message["content"] + ENDS.get(name, "<|im_end|>") for message in CONVERSATION[1::2]]
    if name == "qwen":  # with what the template puts before the last answer
        answers[1] = "<think>\n\n</think>\n\n" + answers[1]
    assert counted(corpus) == answers * 3
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    ids = theirs.apply_chat_template(CONVERSATION, return_dict=False)
    text = "".join(f" {i}" for i in corpus.train[:])
    assert text.count("".join(f" {i}" for i in ids)) == 3
    marks = [token for token in corpus.train[:] if token in (tokenizer.begin, tokenizer.separator)]
    own = [token for token in ids if token in (tokenizer.begin, tokenizer.separator)] * 3
    # A template that writes the first and last token of a document gets no second ones.
    assert len(marks) - len(own) == {"llama2": 0, "mistral": 0, "zephyr": 6, "gemma": 3, "llama3": 0}.get(name, 4)


def test_documents_are_those_of_prompts(family, load):
    """A document begins as a prompt does, and the first token is the border; `<|endoftext|>` in a text ends one."""
    tokenizer = family("mistral")
    corpus = load(tokenizer, [{"text": "one cat"}, {"prompt": "the", "completion": "rat"}] * 20, document_borders=True)
    ends = [tokenizer.separator]
    documents = [
        [*tokenizer.encode_prompt("one cat"), *ends],
        [*tokenizer.encode_prompt("the"), *tokenizer.encode("rat"), *ends],
    ]
    np.testing.assert_array_equal(corpus.train[:], np.concatenate(documents * 20))
    assert corpus.border == tokenizer.begin
    found = [text.replace("<s>", "").replace(" ", "") for text in counted(corpus)]
    assert found == ["onecat</s>", *["rat</s>onecat</s>"] * 19, "rat</s>"]


def test_documents_in_a_file_begin_as_prompts_do(family, tmp_path):
    tokenizer = family("mistral")
    (tmp_path / "a.txt").write_text("one cat<|endoftext|>the rat" * 20)
    path = str(tmp_path / "a.txt")
    config = TextConfig(path=path, validation_path=path, cache_dir=str(tmp_path / "cache"))
    corpus = config.load(tokenizer, None)
    first = [*tokenizer.encode_prompt("one cat").tolist(), tokenizer.separator]
    second = [*tokenizer.encode_prompt("the ratone cat").tolist(), tokenizer.separator]
    assert corpus.train[: len(first) + len(second)].tolist() == first + second
    assert corpus.split("all")[""].counts is None


def test_windows_of_conversations_have_borders(family, load):
    corpus = load(family("smollm"), [{"messages": CONVERSATION}] * 9, document_borders=True)
    example = corpus.training(GPTConfig(block_size=16), 0).example(0, 3)
    assert (example["targets"] != IGNORED).sum() < 16
    assert "starts" in example


def test_both_forms_of_conversations_are_the_same_data(family, load, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason='needs pip install -e ".[parquet]"')
    from pyarrow import parquet

    records = [{"messages": WITH_SYSTEM, "tools": None}] * 9
    first = load(family("smollm"), records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chats.parquet")
    path = str(tmp_path / "chats.parquet")
    config = TextConfig(path=path, validation_path=path, cache_dir=str(tmp_path / "cache"))
    assert config.load(family("smollm"), None).fingerprint == first.fingerprint


USER, ANSWER = CONVERSATION[:2]
OTHER_ORDER = "{% for m in messages | reverse %}{{ m.role }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, r'line 2 has "tools", which are not supported'),
        ({"messages": []}, "line 2 has to hold"),
        ({"messages": "hello"}, "line 2 has to hold"),
        ({"messages": [USER, "hello"]}, "line 2 has to hold"),
        ({"messages": [{"role": "user"}]}, "line 2 has to hold"),
        ({"messages": [{"role": "user", "content": 7}]}, "line 2 has to hold"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 2 has '.ud800', half of a surrogate"),
        ({"messages": [USER], "text": "a"}, "line 2 has to hold"),
        ({"messages": [ANSWER, USER]}, "line 2: the chat template fails: the roles have to alternate"),
    ],
)
def test_a_wrong_conversation_is_named(record, message, family, load):
    with pytest.raises(UserError, match=message) as caught:
        load(family("llama2"), [{"messages": CONVERSATION}, record])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [OTHER_ORDER, "{{ messages | length }}"])
def test_templates_whose_answers_cannot_be_found_are_refused(template, family, load):
    with pytest.raises(UserError, match="line 1: the chat template changes the text before or in message 2"):
        load(family("smollm", chat_template=template), [{"messages": CONVERSATION}])


def test_conversations_need_a_template(load):
    with pytest.raises(UserError, match=r"chats\.jsonl, line 1: the tokenizer has no chat template"):
        load(TokenizerConfig("byte"), [{"messages": CONVERSATION}])


def test_the_date_of_training_data_is_fixed(family):
    tokenizer = family("smollm", chat_template="{{ strftime_now('%d %b %Y') }}" + released.TURN_MARKS)
    assert chat.turns(tokenizer, CONVERSATION)[0].startswith("26 Jul 2024<|im_start|>")


# Chats.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that was trained on a conversation, until it answers its question with its answer."""
    folder = tmp_path_factory.mktemp("chat")
    data = folder / "chats.jsonl"
    data.write_text((json.dumps({"messages": CONVERSATION[:2]}) + "\n") * 20)
    config = Config(
        model=GPTConfig(num_layers=1, num_heads=2, embed_dim=32, block_size=64, dtype="float32"),
        tokenizer=TokenizerConfig("gpt2", path=str(released.write("smollm", folder / "hf"))),
        data=TextConfig(
            path=str(data), validation_path=str(data), document_borders=True, cache_dir=str(folder / "cache")
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(batch_size=8, steps=150, log_every=100, sample_tokens=0, eval_every=0),
    )
    assert train.train(config, Workdir(folder / "run")) == 0
    return TrainedModel(**vars(loading.load(Workdir(folder / "run"), "last")))


def said(model, capsys, prompts, **options) -> tuple[str, str]:
    sampling.run(model, prompts, sampling.Options(Sampling(0.0), chat=True, **options))
    return capsys.readouterr()


def test_a_chat_prints_the_answer_alone(model, capsys):
    question, answer = (message["content"] for message in CONVERSATION[:2])
    assert said(model, capsys, [question], num_tokens=50) == (f"{answer}\n", "")
    assert model.chat(CONVERSATION[:1], temperature=0.0) == answer


def test_a_long_conversation_loses_its_oldest_turns(model, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(output, "prints_result", True)  # as gpt.sample sets it
    render = chat.render
    monkeypatch.setattr(
        chat, "render", lambda *arguments, **how: seen.append([*arguments[1]]) or render(*arguments, **how)
    )
    out, err = said(model, capsys, ["The cat?", "The rat?", "The mat?", "Why?"], num_tokens=6, system="Be")
    assert out.count("\n") >= 4
    assert err.count("note: the conversation exceeds the context length") == err.count("\n") > 0
    assert all([message["role"] for message in messages][:2] == ["system", "user"] for messages in seen[1:])
    assert seen[-1][-1] == {"role": "user", "content": "Why?"}
    assert len(render(model.tokenizer, seen[-1])) < len(render(model.tokenizer, seen[-2]))


def test_a_chat_on_a_terminal_goes_on_after_an_error(model, capsys, monkeypatch):
    typed = iter(["The cat or the rat?", "caf\udce9", "Why?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    out, _ = said(model, capsys, None, num_tokens=30)
    assert f"{CONVERSATION[1]['content']}\n" in out
    assert "error: the text has bytes that are not UTF-8." in out


def test_flags_that_do_not_fit_a_chat_are_refused(model, capsys):
    for options in ({"num_samples": 2}, {"logprobs": True}):
        with pytest.raises(UsageError, match="--chat prints one answer to each message"):
            said(model, capsys, ["a"], **options)
    with pytest.raises(UsageError, match="--system=a is for --chat"):
        sampling.run(model, ["a"], sampling.Options(Sampling(), system="a"))
