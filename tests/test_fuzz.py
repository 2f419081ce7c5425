"""Properties over random configs, texts and resume points, by hypothesis.

Each has a short form, whose examples are the same each time, and a long one with others (`-m slow`).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from gpt import sharding, step, train
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, flatten, from_tree
from gpt.data import pipeline, text, tokenizers
from gpt.data.bpe import BPETokenizer
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.inference import generation
from gpt.runtime.errors import UserError

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}


def short(examples):
    return settings(max_examples=examples, derandomize=True, **QUIET)


def long(examples):
    return settings(max_examples=examples, **QUIET)


# Configs.

CHOICES = {
    "model.norm": ["layernorm", "rmsnorm"],
    "model.activation": ["gelu", "gelu_tanh", "relu", "relu_squared", "silu"],
    "model.positions": ["learned", "rotary"],
    "model.attention": ["dense", "chunked"],
    "model.dtype": ["auto", "float32", "bfloat16"],
    "model.remat": ["none", "dots", "full"],
    "tokenizer.name": ["char", "byte", "bpe", "gpt2"],
    "train.on_nonfinite": ["stop", "skip", "rollback"],
    "mesh.rules": ["dp", "fsdp", "fsdp_tp", "sp", "fsdp,embed=fsdp+data", "sp,vocab=", "fsdp_tp,kv=model,heads="],
}
SIZES = {
    "model.vocab_size": [0, 61],
    "model.block_size": [8, 16, 32],
    "model.embed_dim": [16, 24, 32],
    "model.num_layers": [1, 2],
    "train.batch_size": [8, 16, 64],
    "tokenizer.vocab_size": [257, 300],
    "train.sample_tokens": [0, 1],
    "train.steps": [1, 2, 3],
}
SIZES |= {f"mesh.{axis}": [-1, 0, 1, 2, 4] for axis in sharding.AXES}
WILD = {
    int: [-(2**40), -2, -1, 2**31 - 1, 2**31, 10**12, 10**30],
    str: ["", "x", "\0", "\ud800", "dp,", "fsdp,=", "sp,a=b"],
}
WILD[float] = [-1.0, 1.0, 1.5, float("nan"), float("inf"), 1e-300, 1e-45, 1e30, 1e300, 10**400]
WILD[bool] = []
BASE = flatten(
    dataclasses.asdict(
        Config(
            model=dataclasses.replace(Config().model, num_layers=1, num_heads=2, embed_dim=16, block_size=16),
            train=dataclasses.replace(Config().train, batch_size=32, steps=2, log_every=1, sample_tokens=0),
        )
    )
)


FLOATS = {"optimizer.clip_norm": [0.0, 10.0], "train.spike_factor": [0.0, 1.5, 3.0]}


def value_of(key: str) -> st.SearchStrategy:
    """Mostly what may be, and now and then what may not."""
    kind = type(BASE[key])
    usual = {
        bool: st.booleans(),
        int: st.sampled_from(SIZES.get(key, [1, 2, 3, 4, 8])),
        float: st.one_of(st.floats(1e-3, 0.99), st.sampled_from(FLOATS.get(key, [0.25, 0.5]))),
        str: st.sampled_from(CHOICES.get(key, [BASE[key]])),
    }[kind]
    other = [None, [], {}, 3, 3.5, "x", True]
    wild = st.sampled_from(WILD[kind] + other)
    return st.integers(0, 19).flatmap(lambda i: usual if i else wild)


@st.composite
def trees(draw):
    """The base config with a few keys changed."""
    keys = draw(st.lists(st.sampled_from(sorted(BASE)), min_size=1, max_size=8, unique=True))
    if draw(st.booleans()):  # sizes of the mesh are of use only with rules for them
        keys.append("mesh.rules")
    changes = {key: draw(value_of(key)) for key in keys}
    if draw(st.integers(0, 9)) and {"train.epochs", "train.tokens"} & changes.keys():  # one length, most of the time
        changes = {key: value for key, value in changes.items() if key != "train.tokens"} | {"train.steps": 0}
        changes.setdefault("train.epochs", 1.0)
    return changes


def nested(changes):
    tree = {}
    for key, value in (BASE | changes).items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def program_of(changes, vocab_size=61):
    """The program of a config, or None where it is refused by a sentence."""
    try:
        config = from_tree(nested(changes))
        layout = sharding.make_layout(config.mesh)
        total_steps = config.train.total_steps(config.model.block_size, 100)
        program = step.build(config, vocab_size, layout, total_steps)
        program.check_memory(program.abstract_state)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert said.endswith((".", ".)")), said
        assert len(said) < 600, said
        assert any(key.split(".")[-1] in said for key in changes), (said, changes)
        event("refused")
        return None, None
    return config, program


def refused_or_traced(changes):
    """A config is refused before anything is compiled, or a training step of it can be."""
    config, program = program_of(changes)
    if program is None:
        return
    event("traced")
    tokens = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.model.block_size), jnp.int32, sharding=program.layout.batch
    )
    names = ("inputs", "targets", "starts") if config.data.document_borders else ("inputs", "targets")
    with program.layout.use():
        program.train_step.lower(program.abstract_state, dict.fromkeys(names, tokens))


@short(25)
@given(trees())
def test_any_config_is_refused_or_traced(changes):
    refused_or_traced(changes)


@pytest.mark.slow
@long(300)
@given(trees())
def test_any_config_is_refused_or_traced_at_length(changes):
    refused_or_traced(changes)


def refused_or_trained(changes, play, path):
    """A config is refused, or one step of it is trained and saved."""
    changes = changes | {
        "train.steps": 1,
        "train.epochs": 0.0,
        "train.tokens": 0.0,
        "data.path": str(play),
        "data.validation_path": "",
        "data.cache_dir": "",
        "train.init_from": "",
    }
    try:
        config = from_tree(nested(changes))
        assert train.train(config, Workdir(path)) == 0
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    assert Workdir(path).checkpoints().last() == 1
    return "trained"


@pytest.mark.slow
@long(30)
@given(changes=trees())
def test_any_config_is_refused_or_trained_at_length(changes, play, tmp_path_factory):
    event(refused_or_trained(changes, play, tmp_path_factory.mktemp("run")))


TRAINED = (
    {"model.scan_layers": True, "model.attention": "chunked", "model.dtype": "bfloat16", "model.positions": "rotary"},
    {
        "model.bias": "qkv,norm",
        "model.tie_embeddings": False,
        "model.remat": "full",
        "tokenizer.name": "byte",
        "data.prefetch": 0,
    },
)


@pytest.mark.parametrize("changes", [TRAINED[0], pytest.param(TRAINED[1], marks=pytest.mark.slow)])
def test_some_configs_are_trained(changes, play, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_layout", lambda mesh, make=sharding.make_layout: make(mesh, jax.devices()[:1]))
    assert refused_or_trained(changes, play, tmp_path) == "trained"


# Tokenizers.

BPE = None


def tokenizer_of(name, corpus):
    global BPE
    if name == "char":
        return CharTokenizer.from_text(corpus)
    if name == "byte":
        return ByteTokenizer()
    BPE = BPE or BPETokenizer.train(["low lower lowest the then there 🙂 ß " * 20], 300)
    return BPE


def round_trip(name, content):
    """What is encoded is decoded, whole or in pieces, also by what was saved; and bytes are counted right."""
    tokenizer = tokenizer_of(name, content + " ")
    tokens = tokenizer.encode(content)
    assert tokenizer.decode(tokens) == content
    if "<|endoftext|>" not in content:
        assert tokenizer.byte_lengths[tokens].sum() == len(content.encode())
    pieces = [content[i : i + 3] for i in range(0, len(content), 3)]
    np.testing.assert_array_equal(np.concatenate([tokens[:0], *tokenizer.encode_stream(pieces)]), tokens)
    again = tokenizers.from_tree(json.loads(tokenizer.to_json()))
    assert again == tokenizer
    np.testing.assert_array_equal(again.encode(content), tokens)


TEXTS = st.one_of(st.text(max_size=60), st.text("ab \n\r\t'🙂é\u2028", max_size=60))


@short(40)
@given(st.sampled_from(["char", "byte", "bpe"]), TEXTS)
@example("bpe", "<|endoftext|> low\r\n<|endoftext|>")
def test_any_text_goes_there_and_back(name, content):
    round_trip(name, content)


@pytest.mark.slow
@long(3000)
@given(st.sampled_from(["char", "byte", "bpe"]), TEXTS)
def test_any_text_goes_there_and_back_at_length(name, content):
    round_trip(name, content)


def prompt_of_any_kind(name, prompt):
    """Tokens, or a sentence; also for halves of characters."""
    try:
        tokens = generation.encode_prompt(tokenizer_of(name, "abc"), prompt, "--prompt")
    except UserError as error:
        assert str(error).startswith("--prompt: ")  # noqa: PT017
        return
    assert len(tokens) > 0


PROMPTS = st.text(st.characters(), max_size=20)  # with surrogates


@short(40)
@given(st.sampled_from(["char", "byte", "bpe"]), PROMPTS)
def test_any_prompt_is_tokens_or_a_sentence(name, prompt):
    prompt_of_any_kind(name, prompt)


# Resume points and numbers of processes.


@st.composite
def courses(draw):
    block_size = draw(st.integers(1, 5))
    batch_size = draw(st.integers(1, 12))
    processes = draw(st.sampled_from([n for n in range(1, 13) if batch_size % n == 0]))
    return {
        "tokens": draw(st.integers(block_size + 1, 80)),
        "block_size": block_size,
        "batch_size": batch_size,
        "processes": processes,
        "seed": draw(st.integers(0, 2**31 - 1)),
        "start": draw(st.integers(0, 12)),
        "prefetch": draw(st.integers(0, 2)),
        "skipped": draw(st.lists(st.integers(0, 16), unique=True, max_size=6)),
    }


def same_course(course):
    """The rows of all processes from any step on are those of one process from the first on, less what is left out."""
    batch_size, seed, start = course["batch_size"], course["seed"], course["start"]
    source = text.TrainingWindows(np.arange(course["tokens"], dtype=np.uint16), course["block_size"], seed)
    # By hand: every batch from the first on, and those thrown away that are left out.
    every = pipeline.training_batches(source, batch_size, seed, range(batch_size))
    kept = [batch for number in range(start + 12) if (batch := next(every)) and number not in course["skipped"]]
    wanted = kept[start : start + 3]
    share = batch_size // course["processes"]
    parts = [
        pipeline.training_batches(
            source, batch_size, seed, range(p * share, (p + 1) * share), start, course["prefetch"], course["skipped"]
        )
        for p in range(course["processes"])
    ]
    for expected in wanted:
        found = [next(part) for part in parts]
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in found]), array)
    for iterator in (every, *parts):
        iterator.close()


@short(12)
@given(courses())
def test_the_order_of_the_data_depends_on_nothing_else(course):
    same_course(course)


@pytest.mark.slow
@long(1000)
@given(courses())
def test_the_order_of_the_data_depends_on_nothing_else_at_length(course):
    same_course(course)
