"""Tests of mixtures, of packed documents, and of evaluations on several sets and on a sample."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest

from gpt import sharding, step
from gpt.config import Config, TrainConfig
from gpt.data import combined, pipeline, text
from gpt.data.base import IGNORED
from gpt.data.combined import BLOCK, Mixture, Sample, Sets
from gpt.data.packing import PackedDocuments
from gpt.data.text import EvaluationWindows, TextConfig, TrainingWindows
from gpt.data.tokenizers import TokenizerConfig
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError
from gpt.runtime.tensorboard import read_scalars
from gpt.sharding import MeshConfig


def windows(first: int, count: int) -> TrainingWindows:
    """A source of `count` examples of 4 tokens, whose tokens are numbers from `first` on."""
    return TrainingWindows(np.arange(first, first + 4 * count + 1), 4, 0)


def mixture(weights="a=0.7,b=0.2,c=0.1", sizes=(500, 70, 3), seed=0) -> Mixture:
    starts = np.cumsum([0, *(4 * size + 1 for size in sizes)])
    parts = {name: windows(int(at), size) for name, at, size in zip("abc", starts, sizes, strict=False)}
    return Mixture(parts, combined.parse_weights(weights), seed)


def owners(source: Mixture, places, batch_size=8) -> list[int]:
    return [source.locate(place, batch_size)[0] for place in places]


@pytest.mark.parametrize("weights", ["a=0.7,b=0.2,c=0.1", "a=5,b=3,c=1", "a=1,b=0.0001", "a=2,c=1e0"])
def test_counts_are_exact_over_a_million_examples(weights):
    """100 blocks; the counts of each are the weights, rounded to the nearest of 10,000."""
    source = mixture(weights)
    ((_, stage),) = source.stages
    total = sum(stage.values())
    expected = np.array([round(BLOCK * stage.get(name, 0) / total) for name in "abc"])
    found = np.zeros(3, int)
    for number in range(100):
        of_block = np.bincount(owners(source, range(number * BLOCK, (number + 1) * BLOCK)), minlength=3)
        np.testing.assert_array_equal(of_block, source.shares[0])
        found += of_block
    assert np.abs(source.shares[0] - expected).max() <= 1
    np.testing.assert_array_equal(found, 100 * source.shares[0])
    np.testing.assert_array_equal(source.drawn(100 * BLOCK, 8), found)


def test_weights_of_four_digits_are_met_exactly():
    np.testing.assert_array_equal(mixture("a=0.7321,b=0.2678,c=0.0001").shares[0], [7321, 2678, 1])


@pytest.mark.parametrize("count", [2, 30, 400])
def test_no_source_is_starved(count):
    """However small its weight, and however many sources there are, each has an example in each block."""
    weights = ",".join(f"s{i}={0.000001 if i else 1}" for i in range(count))
    source = Mixture({f"s{i}": windows(0, 5) for i in range(count)}, combined.parse_weights(weights), 0)
    assert source.shares[0].min() >= 1
    assert source.shares[0].sum() == BLOCK


@pytest.mark.parametrize("seed", [0, 1])
def test_each_source_comes_in_its_own_order_and_again_when_it_is_exhausted(seed):
    """The examples of a source are those that it would give alone: no one is left out, and epochs follow each other."""
    source = mixture(seed=seed)
    example = pipeline._endless(source, seed, 8)
    alone = [pipeline._endless(part, seed, 8) for part in source.parts.values()]
    seen = [0, 0, 0]
    for place in range(3000):
        owner, number = source.locate(place, 8)
        assert number == seen[owner]
        np.testing.assert_array_equal(example(place)["inputs"], alone[owner](number)["inputs"])
        seen[owner] += 1
    np.testing.assert_array_equal(source.drawn(3000, 8), seen)
    assert seen[2] > 30 * len(source.parts["c"])


def test_the_order_depends_on_the_seed_and_has_no_pattern():
    first, second = (owners(mixture(seed=seed), range(2000)) for seed in (0, 1))
    assert first != second
    runs = [np.bincount(first[at : at + 100], minlength=3) for at in range(0, 2000, 100)]
    assert 40 < np.mean([run[0] for run in runs]) < 90
    assert np.std([run[0] for run in runs]) > 1


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3, 1249, 1251, 1700])
def test_batches_are_functions_of_seed_and_step(processes, start):
    """After a resume and for any number of processes; the weights change at step 1,250, within a block."""
    source = mixture("a=0.7,b=0.3;1250:a=0.1,b=0.1,c=0.8")

    def batches(start, steps, positions):
        found = pipeline.training_batches(source, 8, 0, positions, start, 2)
        return [next(found)["inputs"] for _ in range(steps)]

    whole = batches(max(0, start - 2), start - max(0, start - 2) + 2, range(8))[-2:]
    size = 8 // processes
    parts = [batches(start, 2, range(p * size, (p + 1) * size)) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_stages_change_the_shares_from_their_step_on():
    source = mixture("a=1;100:b=1;200:a=0.5,b=0.5")
    assert set(owners(source, range(800))) == {0}
    assert set(owners(source, range(800, 1600))) == {1}
    assert set(owners(source, range(1600, 1700))) == {0, 1}
    assert source.locate(1600 + owners(source, range(1600, 1700)).index(0), 8)[1] == 800  # goes on where it was
    np.testing.assert_array_equal(source.drawn(1600, 8), [800, 800, 0])
    np.testing.assert_array_equal(source.drawn(900, 8), [800, 100, 0])


@pytest.mark.parametrize(
    "weights", ["a", "a=", "a=x", "a=-1", "a=0,b=0", "5:a=1", "a=1;a=2", "a=1;9:b=1;3:a=1", "a=1,a=2", "0.5"]
)
def test_odd_weights_are_refused(weights):
    with pytest.raises(UserError, match=r"data\.weights=.* has to be like a=0\.7,b=0\.3"):
        TextConfig(weights=weights)


# Runs.


@pytest.fixture
def sources(tmp_path):
    """Two texts, of which one is short, each of documents."""
    rng = random.Random(0)
    for name, letters, count in (("plays", "abcdefgh ", 200), ("code", "(){}=+ ", 40)):
        lines = [json.dumps({"text": "".join(rng.choices(letters, k=60))}) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return f"plays={tmp_path}/plays.jsonl,code={tmp_path}/code.jsonl"


FLAGS = ["--config=configs/char_tiny.py", "--config.model.embed_dim=16", "--config.model.num_layers=1"]
FLAGS += ["--config.train.batch_size=8", "--config.train.sample_tokens=0", "--config.model.block_size=16"]
FLAGS += ["--config.train.log_every=1", "--config.train.eval_every=2"]


def test_a_run_shows_its_sources_and_their_losses(tmp_path, sources, command):
    run = [*FLAGS, f"--workdir={tmp_path}/run", f"--config.data.path={sources}"]
    found = command("main", *run, "--config.data.weights=plays=0.75,code=0.25", "--config.train.steps=4")
    assert found.returncode == 0, found.stderr
    assert "of them from plays: " in found.stdout
    assert "epochs" in found.stdout
    line = next(line for line in found.stdout.splitlines() if "validation loss" in line)
    assert " plays " in line
    assert " code " in line
    assert re.search(r"tokens seen of plays \d+ \(0\.\d\d epochs\), code \d+ \(0\.\d\d epochs\)", found.stdout)
    tags = [f"sources/{name}/{value}" for name in ("plays", "code") for value in ("tokens", "epochs")]
    tags += [f"validation/{value}/{name}" for name in ("plays", "code") for value in ("loss", "bits_per_byte")]
    events = read_scalars(tmp_path / "run", tags)
    assert all(len(values) in (2, 4) for _, values in events.values())
    seen = [events[f"sources/{name}/tokens"][1][-1] for name in ("plays", "code")]
    assert sum(seen) == 4 * 8 * 16
    assert seen[0] > seen[1] > 0
    evaluated = command("evaluate", f"--workdir={tmp_path}/run", "--json")
    result = json.loads(evaluated.stdout)
    assert {"loss/plays", "loss/code", "bits_per_byte/plays", "bits_per_byte/code"} <= result.keys()
    assert (
        min(result["loss/plays"], result["loss/code"])
        <= result["loss"]
        <= max(result["loss/plays"], result["loss/code"])
    )

    # Other weights: refused without the flag; with it, they begin at the step where the run is.
    other = [*run, "--config.data.weights=plays=0.25,code=0.75", "--config.train.steps=6"]
    refused = command("main", *other)
    assert refused.returncode == 1
    assert "data.weights 'plays=0.75,code=0.25' → 'plays=0.25,code=0.75'" in refused.stderr
    allowed = command("main", *other, "--allow_config_change")
    assert allowed.returncode == 0, allowed.stderr
    weights = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["data"]["weights"]
    assert weights == "plays=0.75,code=0.25;4:plays=0.25,code=0.75"
    again = command("main", *other[:-2], f"--config.data.weights={weights}", "--config.train.steps=7")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("plays=1,poems=1", "for plays, poems, but the sources have plays, code"),
        ("a=1", "for a, but the sources have plays, code"),
    ],
)
def test_weights_of_other_sources_are_refused(sources, tmp_path, weights, message):
    config = TextConfig(path=sources, weights=weights, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        text.load(config, TokenizerConfig(), 4)
    config = dataclasses.replace(config, path=sources.partition("=")[2].partition(",")[0])
    with pytest.raises(UserError, match=r"name them: data\.path=a=PATH,b=PATH"):
        text.load(config, TokenizerConfig(), 4)


def test_validation_sets_are_named_by_folders(tmp_path):
    for name in ("train/a.txt", "val/plays/a.txt", "val/plays/b.txt", "val/code/c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name * 20)
    options = {"cache_dir": str(tmp_path / "cache")}
    corpus = text.load(TextConfig(path=str(tmp_path / "in"), **options), TokenizerConfig(), 4)
    assert {name: len(stream.tokens) for name, stream in corpus.held_out.items()} == {"code": 280, "plays": 600}
    assert len(corpus.train) == 11 * 20
    by_path = TextConfig(path=str(tmp_path / "in/train"), validation_path=str(tmp_path / "in/val"), **options)
    assert text.load(by_path, TokenizerConfig(), 4).fingerprint == corpus.fingerprint
    named = f"plays={tmp_path}/in/val/plays,code={tmp_path}/in/val/code/c.txt"
    by_name = TextConfig(path=str(tmp_path / "in/train"), validation_path=named, **options)
    assert {*text.load(by_name, TokenizerConfig(), 4).held_out} == {"plays", "code"}


# Evaluations.


def evaluated(source, batch_size=8):
    config = Config(
        model=GPTConfig(num_layers=1, num_heads=1, embed_dim=8, block_size=4), train=TrainConfig(batch_size=8)
    )
    program = step.build(config, 64, sharding.make_layout(MeshConfig()), 10)
    with program.layout.use():
        params = program.init().params
    return step.evaluate(program, params, source, batch_size)


def test_groups_add_up_to_the_whole():
    parts = {"a": EvaluationWindows(np.arange(41) % 64, 4), "b": EvaluationWindows(np.arange(23) % 50, 4)}
    result = evaluated(Sets(parts, np.ones(64, int)))
    alone = {name: evaluated(part) for name, part in parts.items()}
    assert result["groups"].keys() == {"a", "b"}
    for name, (loss, targets) in result["groups"].items():
        assert targets == alone[name]["targets"]
        np.testing.assert_allclose(loss, alone[name]["loss"], rtol=1e-5)
    total = sum(loss * targets for loss, targets in result["groups"].values())
    np.testing.assert_allclose(result["loss"], total / result["targets"], rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_is_spread_over_the_source_and_depends_on_the_seed(seed):
    source = EvaluationWindows(np.arange(4001), 4)
    sample = combined.bounded(source, 100, seed)
    assert isinstance(sample, Sample)
    assert len(set(sample.indices)) == len(sample) == 100
    assert (np.diff(sample.indices) > 0).all()
    assert (sample.indices // 10 == np.arange(100)).all()
    np.testing.assert_array_equal(sample.indices, combined.bounded(source, 100, seed).indices)
    assert not np.array_equal(sample.indices, combined.bounded(source, 100, seed + 1).indices)
    assert combined.bounded(source, 1000, seed) is source


def test_sets_share_the_bound():
    sets = Sets(
        {name: EvaluationWindows(np.arange(4 * n + 1), 4) for name, n in zip("abc", (1000, 5, 300), strict=True)},
        np.ones(5000),
    )
    bounded = combined.bounded(sets, 100, 0)
    assert {name: len(part) for name, part in bounded.sets.items()} == {"a": 48, "b": 5, "c": 47}
    assert [bounded.group(i) for i in (0, 47, 48, 52, 53, 99)] == ["a", "a", "b", "b", "c", "c"]


@pytest.mark.parametrize("tokens", [1e6, 1e7, 1e9, 1e12])
def test_an_evaluation_costs_at_most_two_percent_of_the_training_between_two(tokens):
    """The default settings of `TrainConfig`; a forward pass is a third of a training step."""
    train, length = TrainConfig(), GPTConfig().block_size
    windows = int(0.1 * tokens) // length
    share = train.evaluated(windows, length, train.steps) * length / 3
    share /= train.eval_every * train.batch_size * length
    assert share <= 0.02


def test_small_splits_are_evaluated_whole():
    """That of tinyshakespeare and that of the plays are, however short the run is; a larger one is not."""
    train = TrainConfig(batch_size=1, steps=10)
    for tokens in (111_540, 498_770):
        assert train.evaluated(tokens // 64, 64, 10) == tokens // 64
    assert train.evaluated(600_000 // 64, 64, 10) == 131_072 // 64
    assert dataclasses.replace(train, eval_tokens=6400).evaluated(1000, 64, 10) == 100


def test_bits_per_byte_of_a_sample_are_those_of_its_own_bytes():
    lengths = np.arange(64) + 1
    whole = Sets({"": EvaluationWindows(np.arange(401) % 64, 4)}, lengths)
    sample = combined.bounded(whole, 7, 0)
    targets = np.concatenate([sample.example(0, i)["targets"] for i in range(7)])
    assert sample.num_bytes == {"": lengths[targets].sum()}
    assert whole.num_bytes == {"": lengths[np.arange(1, 401) % 64].sum()}


# Packing.


def packed(lengths, block_size=16, has_first=False, counts=None) -> PackedDocuments:
    """Documents of consecutive numbers, after a separator 0, each ending with 0."""
    stream, at = [] if has_first else [0], 1
    for length in lengths:
        stream += [*range(at, at + length - 1), 0]
        at += length - 1
    ends = np.cumsum(lengths) + (0 if has_first else 1)
    return PackedDocuments(np.array(stream), block_size, ends, has_first, counts)


@pytest.mark.parametrize("has_first", [False, True])
def test_every_document_is_whole_in_one_window(has_first):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 17, 500)
    source = packed(lengths, has_first=has_first)
    found = []
    for i in range(len(source)):
        example = source.example(0, i)
        starts, counted = example["starts"], example["targets"] != IGNORED
        for start in np.unique(starts[counted]):
            inside = counted & (starts == start)
            inputs, targets = example["inputs"][inside], example["targets"][inside]
            np.testing.assert_array_equal(targets[:-1], inputs[1:])
            assert targets[-1] == 0
            found.append(len(targets))
        assert (example["inputs"][~counted] == 0).all()
        assert (starts[~counted] == counted.sum()).all()
    assert sorted(found) == sorted(lengths - has_first)
    assert len(source) * 16 < 1.06 * sum(lengths)
    assert "0 of 500 documents are cut" in source.summary


def test_longer_documents_are_cut_and_counted():
    source = packed([40, 3, 16, 17])
    targets = [t for i in range(len(source)) for t in source.example(0, i)["targets"] if t > 0]
    assert sorted(targets) == list(range(1, 73))
    assert "2 of 4 documents are cut" in source.summary


def test_prompts_do_not_count_in_packed_documents():
    counts = np.arange(101) % 3 > 0
    source = packed([10] * 10, counts=counts)
    example = source.example(0, 0)
    place = np.flatnonzero(example["targets"] != IGNORED)
    assert 0 < len(place) < 10
    assert all(counts[int(np.flatnonzero(source.tokens == t)[0])] for t in example["targets"][place] if t)


def test_a_run_with_whole_documents(tmp_path, sources, command):
    flags = [
        *FLAGS,
        f"--workdir={tmp_path}/run",
        f"--config.data.path={tmp_path}/plays.jsonl",
        "--config.train.steps=3",
    ]
    flags += ["--config.data.whole_documents", "--config.tokenizer.name=bpe", "--config.tokenizer.vocab_size=257"]
    found = command("main", *flags, "--config.model.block_size=130")
    assert found.returncode == 0, found.stderr
    assert "windows of whole documents are 9" in found.stdout
    assert "0 of " in found.stdout
    refused = command("main", *FLAGS, f"--workdir={tmp_path}/other", "--config.data.whole_documents")
    assert "need a tokenizer with a separator" in refused.stderr


def test_mistakes_of_a_sample_are_found_in_the_whole():
    """A kind of data shows the questions or files of wrong predictions by their index in the whole."""
    whole = EvaluationWindows(np.arange(401) % 64, 4)
    sample = combined.bounded(whole, 9, 0)
    for index, predictions in evaluated(sample)["mistakes"]:
        assert index in sample.indices
        assert (predictions != whole.example(0, index)["targets"]).any()


def test_a_run_on_a_sample_says_so_and_is_the_same_after_a_resume(tmp_path, sources, command):
    flags = [*FLAGS, f"--config.data.path={tmp_path}/plays.jsonl", "--config.train.eval_tokens=320"]
    for name, steps in (("a", 4), ("b", 2), ("b", 4)):
        found = command("main", *flags, f"--workdir={tmp_path}/{name}", f"--config.train.steps={steps}")
        assert found.returncode == 0, found.stderr
        assert re.search(r"^eval   20 of \d\d validation examples", found.stdout, re.M)
    losses = [read_scalars(tmp_path / name, ["validation/loss"])["validation/loss"] for name in "ab"]
    assert losses[0] == losses[1]
    assert len(losses[0][0]) == 2
