"""Workdirs, weights and prompts from untrusted sources: no code runs, no other file changes, memory stays bounded."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
import tensorstore

from gpt import sharding, train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, TrainConfig
from gpt.data import bpe, tokenizers
from gpt.inference import generation
from gpt.interop import huggingface, tokenizer_files
from gpt.interop.safetensors_folder import INDEX
from gpt.models.gpt import GPTConfig
from gpt.runtime import tensorboard
from gpt.runtime.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(play) -> Config:
    return Config(
        model=GPTConfig(num_layers=1, num_heads=2, embed_dim=16, block_size=16),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=TrainConfig(batch_size=16, steps=2, log_every=1, sample_tokens=0),
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    """Returns the workdir of a run of two steps."""
    path = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_layout", lambda mesh: LAYOUT(mesh, jax.devices()[:1]))
        train.train(config, Workdir(path))
    return path


LAYOUT = sharding.make_layout


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_layout", lambda mesh: LAYOUT(mesh, jax.devices()[:1]))


@pytest.fixture
def workdir_copy(trained, tmp_path) -> Path:
    """Returns a copy of the workdir, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Returns a folder in the format of transformers, which a test may change."""
    huggingface.to_hf(Workdir(trained), "last", tmp_path / "hf")
    return tmp_path / "hf"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self):
        return Path.touch, (self._marker,)


@pytest.fixture
def payload(tmp_path) -> bytes:
    return pickle.dumps(Payload(tmp_path / "marker"), protocol=4)


def refused_or_done(function, *arguments) -> bool:
    """Returns whether a call raised UserError. Any other exception fails the test."""
    try:
        function(*arguments)
    except UserError:
        return True
    return False


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# No code runs.


def test_the_payload_is_one(payload, tmp_path):
    pickle.loads(payload)
    assert (tmp_path / "marker").exists()


def test_no_file_of_a_workdir_is_unpickled(trained, payload, config, tmp_path):
    """Each file in turn is a pickle. Loading, reading events and restoring for training run no code."""
    files = [path.relative_to(trained) for path in sorted(trained.rglob("*")) if path.is_file()]
    assert len(files) > 20
    refused = 0
    for name in files:
        if "optimizer/d" in str(name) or "ocdbt.process" in str(name):  # like params/d
            continue
        path = Path(shutil.copytree(trained, tmp_path / "run", dirs_exist_ok=True))
        (path / name).write_bytes(payload)
        for extra in ("pytorch_model.bin", "checkpoint.pkl", "arrays.npy", "checkpoints/2/params/checkpoint"):
            (path / extra).write_bytes(payload)
        workdir = Workdir(path)

        def open_it(workdir=workdir, name=name):
            if name.parts[0].startswith("events"):
                tensorboard.read_scalars(workdir.path, ["train/loss"])
                return
            run = loading.load(workdir, "last")
            run.dataset()
            if "optimizer" in name.parts:
                train.restore(workdir.checkpoints(), 2, run.program)

        refused += refused_or_done(open_it)
        assert not (tmp_path / "marker").exists(), name
        shutil.rmtree(path)
    assert refused > 5


def test_no_file_of_weights_is_unpickled_or_imported(folder, payload, tmp_path):
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    edit_json(
        folder / "config.json",
        lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling.Model"}, trust_remote_code=1),
    )
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(payload)
    assert not refused_or_done(huggingface.from_hf, folder, Workdir(tmp_path / "fine"), 1)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    read = {"config.json", tokenizer_files.GENERATION, "model.safetensors", bpe.OUR_FILE, INDEX}
    read |= {"vocab.json", "tokenizer.json"}
    for name in sorted(read | {path.name for path in whole}):
        if name == INDEX:
            (folder / "model.safetensors").unlink()
        if name in ("vocab.json", "tokenizer.json"):  # without them
            (folder / bpe.OUR_FILE).unlink(missing_ok=True)
        (folder / name).write_bytes(payload)
        refused = refused_or_done(huggingface.from_hf, folder, Workdir(tmp_path / f"run-{name}"), 1)
        assert refused == (name in read), name
        assert not (tmp_path / "marker").exists(), name
        (folder / name).unlink()
        for path, content in whole.items():
            path.write_bytes(content)


# No other file changes.


def test_a_workdir_does_not_say_where_to_write(workdir_copy, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    edit_json(
        workdir_copy / "run.json",
        lambda record: (
            record["config"]["data"].update(cache_dir=str(outside)),
            record["config"]["train"].update(init_from=str(outside)),
            record["config"]["tokenizer"].update(name="gpt2", path=str(outside)),
        ),
    )
    before = sorted(workdir_copy.rglob("*"))
    run = loading.load(Workdir(workdir_copy), "last")
    run.dataset()
    assert not outside.exists()
    assert sorted(workdir_copy.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "a/b", "x" * 5000, "a\0b", "\ud800"])
def test_an_index_names_files_of_its_folder_alone(folder, tmp_path, name):
    shutil.copy(folder / "model.safetensors", tmp_path / "x.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match=r"names .*, which is not in the folder"):
        huggingface.from_hf(folder, Workdir(tmp_path / "new"), 1)
    assert not (tmp_path / "new").exists()


# Memory stays bounded.

ZARR = b"token_embedding.embedding/.zarray"


def _zarr(path, **values):
    base = f"file://{path}/checkpoints/2/params/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store.write(ZARR, json.dumps(json.loads(store.read(ZARR).result().value) | values).encode()).result()


def _model(path, **values):
    edit_json(path / "run.json", lambda record: record["config"]["model"].update(values))


def _tokenizer(path, content):
    (path / "tokenizer.json").write_text(content)


def _sparse(path):
    os.truncate(path, 1 << 40)


BPE = '{"name": "bpe", "files": {"tokenizer.json": {"model": {"vocab": IDS}}, "tokenizer_config.json": {}}}'
TOO_LARGE = "Parameters and optimizer state need .* GB on each device, which has"
ABSURD = {
    "an array": (
        lambda path: _zarr(path, shape=[10**12, 16]),
        "does not fit the config: token_embedding/embedding is 10",
    ),
    "its pieces": (
        lambda path: _zarr(path, chunks=[10**9, 16]),
        "has chunks of 1000000000 × 16, larger than the array",
    ),
    "negative": (lambda path: _zarr(path, shape=[-1, 16]), "is damaged|does not fit"),
    "vocabulary": (
        lambda path: _model(path, vocab_multiple=10**9),
        TOO_LARGE,
    ),
    "vocabulary beyond": (lambda path: _model(path, vocab_multiple=10**12), r"vocab_multiple has to be less than 2³¹"),
    "layers": (lambda path: _model(path, num_layers=10**9), "run.json: model.num_layers=1000000000 .* beyond 10,000"),
    "width": (lambda path: _model(path, embed_dim=2 * 10**9), r"model\.embed_dim=2000000000.* beyond|mlp_size"),
    "block": (
        lambda path: _model(path, block_size=2 * 10**9),
        TOO_LARGE,
    ),
    "both agree": (
        lambda path: (_model(path, vocab_multiple=10**9), _zarr(path, shape=[10**9, 16])),
        TOO_LARGE,
    ),
    "a number without end": (
        lambda path: (path / "run.json").write_text('{"config": ' + "9" * 10_000),
        r"run\.json or tokenizer\.json is damaged",
    ),
    "infinity": (
        lambda path: _model(path, rotary_base=float("inf")),
        r"model\.rotary_base=inf has to be a finite number",
    ),
    "deep": (lambda path: (path / "run.json").write_text("[" * 10**6), "run.json is nested too deeply"),
    "deep tokenizer": (lambda path: _tokenizer(path, '{"a":' * 10**6), "tokenizer.json is nested too deeply"),
    "long": (lambda path: _sparse(path / "run.json"), "run.json has more than 64 MiB"),
    "long tokenizer": (lambda path: _sparse(path / "tokenizer.json"), "tokenizer.json has more than 64 MiB"),
    "tokenizer of nothing": (lambda path: _tokenizer(path, '{"name": "char", "alphabet": ""}'), "damaged"),
    "tokenizer of no text": (lambda path: _tokenizer(path, '{"name": "char", "alphabet": 7}'), "damaged"),
    "tokenizer unsorted": (lambda path: _tokenizer(path, '{"name": "char", "alphabet": "ba"}'), "damaged"),
    "tokenizer of halves": (lambda path: _tokenizer(path, r'{"name": "char", "alphabet": "a\ud800"}'), "damaged"),
    "tokenizer elsewhere": (lambda path: _tokenizer(path, '{"name": "../../x"}'), "damaged"),
    "tokenizer of a list": (lambda path: _tokenizer(path, '{"name": ["char"]}'), "damaged"),
    "bpe without a decoder": (
        lambda path: _tokenizer(path, BPE.replace("IDS", '{"a": 0}')),
        "a decoder that is not known",
    ),
    "bpe of numbers": (lambda path: _tokenizer(path, BPE.replace("IDS", "[1, 2]")), "damaged"),
    "skipped batches": (
        lambda path: edit_json(path / "run.json", lambda record: record.update(skipped_batches="x")),
        "damaged",
    ),
}


def _header(folder, header: bytes, size=None):
    size = len(header) if size is None else size
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)


def _shaped(shape, end):
    return json.dumps({"wte.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


ABSURD_WEIGHTS = {
    "header": (lambda folder: _header(folder, b"{}", 2**63), "model.safetensors is damaged or cut off"),
    "header of all bits": (lambda folder: _header(folder, b"{}", 2**64 - 1), "is damaged or cut off"),
    "shape": (lambda folder: _header(folder, _shaped([10**12, 10**12], 4)), "is damaged or cut off"),
    "shape and place": (lambda folder: _header(folder, _shaped([10**12], 4 * 10**12)), "is damaged or cut off"),
    "vocabulary": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(vocab_size=10**12)),
        "vocab_size is not less than 2³¹",
    ),
    "layers": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(n_layer=10**9)),
        "model.num_layers=1000000000 .* beyond 10,000 layers",
    ),
    "hidden": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(n_inner=10**400)),
        "n_inner is not less than 2³¹",
    ),
    "dropout": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(embd_pdrop=float("nan"))),
        "embd_pdrop is not less than 2³¹",
    ),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 10**6), "nested too deeply"),
    "long": (lambda folder: _sparse(folder / "config.json"), "more than 64 MiB"),
    "deep tokenizer": (
        lambda folder: (folder / bpe.OUR_FILE).write_text("[" * 10**6),
        "nested too deeply",
    ),
    "tokenizer of a list": (lambda folder: (folder / bpe.OUR_FILE).write_text("[1]"), "is damaged"),
}


@pytest.fixture(scope="module")
def attempts(trained, tmp_path_factory):
    """Returns {case: (message, peak memory in GB)} from one process that is limited to 12 GB of address space."""
    tmp, cases = tmp_path_factory.mktemp("absurd"), {}
    huggingface.to_hf(Workdir(trained), "last", tmp / "hf")
    for source, wanted, way in ((trained, ABSURD, "load"), (tmp / "hf", ABSURD_WEIGHTS, "from_hf")):
        for i, (name, (damage, _)) in enumerate(wanted.items()):
            path = Path(shutil.copytree(source, tmp / f"{way}-{i}"))
            damage(path)
            cases[f"{way} {name}"] = way, str(path)
    script = """
        import json, re, resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        from pathlib import Path
        from gpt.checkpointing import loading
        from gpt.checkpointing.workdir import Workdir
        from gpt.interop import huggingface
        from gpt.runtime import errors

        ways = {
            "load": lambda path: loading.load(Workdir(path), "last"),
            "from_hf": lambda path: huggingface.from_hf(Path(path), Workdir(path + "-run"), 1),
        }
        for name, (way, path) in json.loads(sys.argv[1]).items():
            try:
                ways[way](path)
                message = "no error"
            except errors.UserError as error:
                message = str(error)
            except BaseException as error:
                message = f"TRACEBACK {error!r}"
            # Not getrusage, which counts the memory of the process that started this one.
            peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
            print(json.dumps([name, message, int(peak[1]) / 1e6]), flush=True)
    """
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(cases)]
    result = subprocess.run(command, env=env, cwd=tmp, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(cases), (found[-1:], result.stderr[-2000:])
    return {name: (message, peak) for name, message, peak in found}


@pytest.mark.parametrize("case", [f"load {name}" for name in ABSURD] + [f"from_hf {name}" for name in ABSURD_WEIGHTS])
def test_absurd_sizes_are_refused_before_memory_is_taken(attempts, case):
    message, peak = attempts[case]
    way, _, name = case.partition(" ")
    assert re.search({"load": ABSURD, "from_hf": ABSURD_WEIGHTS}[way][name][1], message), message
    assert len(message) < 700
    assert "\n" not in message
    assert peak < 2  # GB, of all cases so far, JAX included


# Prompts.


@pytest.mark.parametrize("name", ["char", "byte", "bpe"])
@pytest.mark.parametrize(
    "prompt",
    [os.fsdecode(b"caf\xe9 \xff\xfe"), "\0", "\ud800", "a" * 100_000, "\r\n\x1b[31m\u202e", "🙂" * 1000],
    ids=["latin-1", "nul", "half", "long", "controls", "emoji"],
)
def test_prompts_of_any_bytes_are_tokens_or_one_sentence(name, prompt):
    tokenizer = {
        "char": lambda: tokenizers.CharTokenizer.from_text("abc \n"),
        "byte": tokenizers.ByteTokenizer,
        "bpe": bpe.gpt2,
    }[name]()
    if name == "char" or prompt == "\ud800" or (name == "bpe" and "\udce9" in prompt):
        if name == "char" and prompt[0] == "a":
            assert len(generation.encode_prompt(tokenizer, prompt, "--prompt")) == 100_000
            return
        with pytest.raises(UserError, match=r"^--prompt: .*\.$"):
            generation.encode_prompt(tokenizer, prompt, "--prompt")
        return
    tokens = generation.encode_prompt(tokenizer, prompt, "--prompt")
    assert 0 < len(tokens) <= len(prompt) * 4
    assert tokens.max() < tokenizer.vocab_size


def test_prompts_of_a_command_line(trained, command):
    """A prompt of 100 kB is cut to the context length, and bytes that are not UTF-8 are refused."""
    sample = f"--workdir={trained}", "--num_tokens=3"
    long = command("sample", *sample, "--prompt=" + "the " * 25_000)
    assert long.returncode == 0, long.stderr
    assert "note: the prompt has 100000 tokens; the model sees the last 16." in long.stderr
    broken = command("sample", *sample, os.fsdecode(b"--prompt=caf\xe9"))
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert broken.stderr.startswith("error: --prompt: unknown characters '\\udce9'")
