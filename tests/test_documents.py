"""Tests of documents in a corpus; with `data.document_borders`, packed documents do not affect each other."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt import sharding, step, train
from gpt.checkpointing import loading
from gpt.checkpointing.stacking import stack_layers
from gpt.checkpointing.workdir import Workdir
from gpt.data import documents, text
from gpt.data.base import IGNORED
from gpt.data.bpe import BPETokenizer
from gpt.data.text import EvaluationWindows, TextConfig, TrainingWindows
from gpt.data.tokenizers import TokenizerConfig
from gpt.inference import generation
from gpt.models import attention, kernels
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime import progress
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

pytest.importorskip("tokenizers", reason='needs pip install -e ".[bpe]"')
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LENGTH, VOCAB = 16, 11
# Beginnings of documents in two rows: a document of one token, documents across chunks, and only the first.
BORDERS = [(0, 1, 7, 13), (0, 10)]
STARTS = np.array([np.repeat(row, np.diff([*row, LENGTH])) for row in BORDERS], np.int32)
ATTENTION = {
    "dense": attention.dense,
    "chunked": functools.partial(kernels.chunked, query_chunk=5, key_chunk=3),
}
CONFIG = GPTConfig(
    vocab_size=VOCAB, num_layers=2, num_heads=2, embed_dim=16, block_size=LENGTH, query_chunk=4, key_chunk=3,
    dtype="float32", attention="dense", embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)


DOCUMENTS = [
    (row, slice(start, end))
    for row, starts in enumerate(BORDERS)
    for start, end in zip(starts, (*starts[1:], LENGTH), strict=True)
]


def apart(x):
    """Returns [documents, LENGTH, …] with each document in a separate row; the zeros after it have no effect on it."""
    rows = np.zeros((len(DOCUMENTS), *x.shape[1:]), x.dtype)
    for i, (row, part) in enumerate(DOCUMENTS):
        rows[i, : part.stop - part.start] = x[row, part]
    return rows


@functools.partial(quick_jit, static_argnums=0)
def out_and_gradients(attend, q, k, v, cotangent):
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(cotangent)


@pytest.mark.parametrize("attend", ATTENTION.values(), ids=ATTENTION)
def test_attention_and_its_gradients_stay_within_a_document(attend):
    arrays = np.random.default_rng(1).normal(size=(4, 2, LENGTH, 2, 8)).astype(np.float32)
    packed = out_and_gradients(lambda q, k, v: attend(q, k, v, STARTS), *arrays)
    alone = out_and_gradients(attention.dense, *map(apart, arrays))
    real = apart(np.ones((2, LENGTH), bool))
    for found, expected in zip(packed, alone, strict=True):
        np.testing.assert_allclose(apart(np.asarray(found))[real], expected[real], rtol=0, atol=3e-6)


@functools.cache
def logits_of_each_alone(**options):
    """Returns the logits [2, LENGTH, VOCAB] of each document alone, and the parameters."""
    rng = np.random.default_rng(2)
    model = GPT(dataclasses.replace(CONFIG, **options))
    abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)
    logits = np.zeros((2, LENGTH, VOCAB), np.float32)
    for (row, part), alone in zip(DOCUMENTS, quick_jit(model.apply)(variables, apart(TOKENS)), strict=True):
        logits[row, part] = alone[: part.stop - part.start]
    return logits, variables


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "dense", "remat": "dots", "scan_layers": True},
        {"attention": "dense", "positions": "rotary", "window": 3},
        {"attention": "chunked", "scan_layers": True},
        {"attention": "chunked", "positions": "rotary", "remat": "full"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_document_has_the_logits_that_it_has_alone(options):
    config = dataclasses.replace(CONFIG, **options)
    expected, variables = logits_of_each_alone(positions=config.positions, window=config.window)
    apply = quick_jit(GPT(config).apply)
    variables = stack_layers(variables) if config.scan_layers else variables
    found = apply(variables, TOKENS, STARTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    whole = apply(variables, TOKENS, np.zeros_like(STARTS))  # the same program without borders
    assert np.abs(whole - expected).max() > 0.1


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    "mesh", [MeshConfig("sp", data=2, sequence=4), MeshConfig("sp", fsdp=2, sequence=2, model=2)], ids=str
)
def test_borders_on_a_sharded_length(name, mesh):
    config = dataclasses.replace(CONFIG, attention=name)
    expected, variables = logits_of_each_alone()
    layout = sharding.make_layout(mesh)
    with layout.use():
        found = jax.jit(GPT(config).apply, in_shardings=(None, layout.batch, layout.batch))(variables, TOKENS, STARTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Examples.

CORPUS = np.array([9, 1, 2, 9, 3, 4, 5, 6, 7, 9, 8, 9], np.uint16)  # 9 is the separator


def test_examples_have_the_beginnings_of_documents():
    examples = [EvaluationWindows(CORPUS, 4, border=9).example(0, i) for i in range(3)]
    np.testing.assert_array_equal(
        [example["inputs"] for example in examples], [[9, 1, 2, 9], [3, 4, 5, 6], [7, 9, 8, 0]]
    )
    np.testing.assert_array_equal(
        [example["starts"] for example in examples], [[0, 0, 0, 3], [0, 0, 0, 0], [0, 1, 1, 1]]
    )
    # The separator is the last target of one document and the first input of the next.
    np.testing.assert_array_equal(
        [example["targets"] for example in examples], [[1, 2, 9, 3], [4, 5, 6, 7], [9, 8, 9, IGNORED]]
    )
    source = TrainingWindows(CORPUS, 4, seed=0, border=9)
    for epoch in range(9):
        example = source.example(epoch, 1)
        np.testing.assert_array_equal(
            example["starts"], [max([0, *np.flatnonzero(example["inputs"][: i + 1] == 9)]) for i in range(4)]
        )


def test_without_borders_examples_are_unchanged():
    for source, other in (
        (EvaluationWindows(CORPUS, 4), EvaluationWindows(CORPUS, 4, border=9)),
        (TrainingWindows(CORPUS, 4, 0), TrainingWindows(CORPUS, 4, 0, border=9)),
    ):
        assert source.example(3, 0).keys() == {"inputs", "targets"}
        for name, array in source.example(3, 0).items():
            np.testing.assert_array_equal(array, other.example(3, 0)[name])


# Corpora.


@pytest.fixture
def load(tmp_path):
    """Writes files and loads them; with `is_whole` as the training text as a whole and as the validation text."""

    def load_(files: dict[str, str], tokenizer=None, is_whole=False, **options):
        for name, content in files.items():
            (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "texts" / name).write_text(content)
        path = str(tmp_path / "texts")
        options |= {"path": path, "validation_path": path if is_whole else ""}
        config = TextConfig(cache_dir=str(tmp_path / "cache"), **options)
        return text.load(config, tokenizer or TokenizerConfig("bpe", 300), 1)

    return load_


def test_separators_stand_before_between_and_after_documents(load):
    corpus = load({"a.txt": "one one", "b.txt": "two<|endoftext|>three"}, is_whole=True)
    tokens = corpus.train[:]
    separated = "<|endoftext|>one one<|endoftext|>two<|endoftext|>three<|endoftext|>"
    assert corpus.tokenizer.decode(tokens) == corpus.tokenizer.decode(corpus.validation[:]) == separated
    np.testing.assert_array_equal(tokens, corpus.tokenizer.encode(separated))
    assert corpus.tokenizer.byte_lengths[tokens].sum() == len("one onetwothree")
    assert (tokens.dtype, corpus.border) == (np.uint16, None)
    assert load({}, document_borders=True, validation_fraction=0.5).border == corpus.tokenizer.separator == 0


def test_trained_bpe_and_its_tokens_are_kept(load, monkeypatch):
    first = load({"a.txt": "the cat sat on the mat " * 50})
    with monkeypatch.context() as patch:
        patch.setattr(BPETokenizer, "train", None)
        patch.setattr(BPETokenizer, "encode_stream", None)
        patch.setattr(BPETokenizer, "encode_batch", None)
        again = load({})
    assert (again.tokenizer, again.fingerprint) == (first.tokenizer, first.fingerprint)
    other = load({}, TokenizerConfig("bpe", 265))
    assert other.tokenizer.vocab_size == 265
    assert other.fingerprint != first.fingerprint
    same = load({}, again.tokenizer)
    np.testing.assert_array_equal(same.train[:], first.train[:])


@pytest.mark.parametrize(("longest", "between"), [(0, ""), (documents.LONG, "<|endoftext|>")], ids=["long", "many"])
def test_reading_and_tokenising_show_how_far_they_are(load, monkeypatch, longest, between):
    """Both of one long document and of many short ones."""
    monkeypatch.setattr(documents, "BLOCK", 50)
    monkeypatch.setattr(documents, "LONG", longest)
    shares: dict[str, list[float]] = collections.defaultdict(list)

    class Task(progress.Task):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "done" and value:
                shares[self.text.split()[0]].append(value / self.total)

    monkeypatch.setattr(progress, "Task", Task)
    load({"a.txt": f"{'the cat sat ' * 10}{between}" * 10}, TokenizerConfig("byte"))
    assert shares.keys() == {"reading", "tokenising"}
    for found in shares.values():
        assert found == sorted(found)
        assert 0.85 < found[-1] <= 1
    assert len(shares["tokenising"]) > 1


def test_borders_without_a_separator_are_refused(load):
    message = r"^data\.document_borders and data\.whole_documents need .* tokenizer\.name=bpe or gpt2\.$"
    for option in ("document_borders", "whole_documents"):
        with pytest.raises(UserError, match=message):
            load({"a.txt": "one two three"}, TokenizerConfig("byte"), **{option: True})


# Sampling.


def test_an_empty_prompt_is_the_beginning_of_a_document():
    tokenizer = BPETokenizer.train(["abc"], 257)
    assert generation.encode_prompt(tokenizer, "", "--prompt").tolist() == [tokenizer.separator]


# A run.


def test_train_evaluate_and_sample_from_the_workdir_alone(tiny, play, tmp_path):
    """The loss over the whole split equals the loss of every document of an example alone."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, part in enumerate(play.read_text().split("\n\n")[:100]):
        (folder / f"{i:03}.txt").write_text(part)
    config = dataclasses.replace(
        tiny,
        tokenizer=TokenizerConfig("bpe", 320),
        data=TextConfig(path=str(folder), document_borders=True, cache_dir=str(tmp_path / "cache")),
        mesh=MeshConfig("sp", data=4, sequence=2),
        model=dataclasses.replace(tiny.model, num_layers=1, vocab_size=320),
        train=dataclasses.replace(tiny.train, steps=4, micro_batches=2, eval_every=0),
    )
    workdir = Workdir(tmp_path / "run")
    assert train.train(config, workdir) == 0

    run = loading.load(workdir, "last")
    corpus = run.dataset()
    assert run.step == 4
    source = EvaluationWindows(corpus.validation, 16, border=corpus.border)
    result = step.evaluate(run.program, run.params, source, run.batch_size)
    assert result["targets"] == len(corpus.validation) - 1
    inputs, targets = [], []
    for example in (source.example(0, i) for i in range(len(source))):
        starts = np.unique(example["starts"])
        for start, end in zip(starts, [*starts[1:], 16], strict=True):  # each document in a separate example
            inputs.append(np.pad(example["inputs"][start:end], (0, 16 - end + start)))
            targets.append(np.pad(example["targets"][start:end], (0, 16 - end + start), constant_values=IGNORED))
    assert len(inputs) > len(source) + 5

    @quick_jit
    def total(params, inputs, targets):
        return step.token_losses(GPT(run.model_config).apply({"params": params}, inputs), targets).sum()

    alone = total(jax.device_get(run.params), np.array(inputs), np.array(targets))
    assert result["loss"] == pytest.approx(float(alone) / result["targets"], rel=1e-5)
