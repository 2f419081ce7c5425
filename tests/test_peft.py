"""LoRA adapters in folders of PEFT: both ways, and equal to what `peft` computes with them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_options import FAMILIES
from safetensors.numpy import load_file, save_file

from gpt import train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.interop import huggingface, peft
from gpt.models.gpt import GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.runtime.errors import UserError

LAYERS = {"gpt2": "qkv,out,up,down", "neox": "qkv,out,up,down", "llama": "qkv,out,gate,up,down"}
GPT2 = {"num_heads": 4, "positions": "learned"}
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 12))


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox"])
def workdirs(request, play, tmp_path_factory):
    """Returns the workdirs of a short run and of the adapters that were trained on top of it."""
    name, path = request.param, tmp_path_factory.mktemp("peft")
    options = GPT2 if name == "gpt2" else FAMILIES[name]
    times = {"batch_size": 16, "steps": 3, "eval_every": 0, "checkpoint_every": 3, "sample_tokens": 0}
    config = Config(
        model=GPTConfig(num_layers=2, embed_dim=32, block_size=16, vocab_multiple=8, **options),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=dataclasses.replace(Config().train, **times),
        optimizer=OptimizerConfig(learning_rate=3e-2),
    )
    base, adapted = Workdir(path / "base"), Workdir(path / "adapted")
    assert train.train(config, base) == 0
    model = dataclasses.replace(config.model, lora_rank=2, lora_alpha=6.0, lora_targets=LAYERS[name])
    config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(base.path)))
    assert train.train(config, adapted) == 0
    return name, base, adapted


def arrays(workdir):
    params = loading.load(workdir, "last").params
    return {"/".join(name): np.asarray(x) for name, x in flatten_dict(params).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)


def test_there_and_back(workdirs, tmp_path):
    name, base, adapted = workdirs
    peft.to_peft(adapted, "last", tmp_path / "peft")
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    modules = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    }
    assert set(content["target_modules"]) == modules[name]
    assert (content["r"], content["lora_alpha"], content["fan_in_fan_out"]) == (2, 6.0, name == "gpt2")
    config = peft.from_peft(tmp_path / "peft", base, Workdir(tmp_path / "back"))
    assert (config.lora_rank, config.lora_scale) == (2, 3.0)
    assert_equal(arrays(Workdir(tmp_path / "back")), arrays(adapted))
    peft.to_peft(Workdir(tmp_path / "back"), "last", tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert_equal(ours, theirs)


def test_adapters_of_single_layers_and_with_other_matrices_become_one_of_a_larger_rank(workdirs, tmp_path):
    """As `peft` makes them: an adapter of the queries and values alone, each with matrices of its own."""
    name, base, adapted = workdirs
    if name != "llama":
        pytest.skip("the model has one layer for queries, keys and values")
    peft.to_peft(adapted, "last", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    rng, tensors = np.random.default_rng(1), load_file(file)
    kept = {
        name: rng.normal(0, 0.1, x.shape).astype(np.float32)
        for name, x in tensors.items()
        if re.search("q_proj|v_proj", name)
    }
    save_file(kept, file)
    config = peft.from_peft(tmp_path / "peft", base, Workdir(tmp_path / "back"))
    assert (config.lora_rank, config.lora_targets, config.lora_scale) == (6, "qkv", 3.0)
    found, before = arrays(Workdir(tmp_path / "back")), arrays(base)
    huggingface.to_hf(Workdir(tmp_path / "back"), "last", tmp_path / "merged")
    huggingface.to_hf(base, "last", tmp_path / "base")
    merged, plain = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "base"))
    for i in range(2):
        for layer in "qkv":
            weight = f"model.layers.{i}.self_attn.{layer}_proj"
            a, b = (kept.get(f"base_model.model.{weight}.lora_{matrix}.weight", np.zeros((1, 1))) for matrix in "AB")
            difference = merged[f"{weight}.weight"] - plain[f"{weight}.weight"]
            np.testing.assert_allclose(difference, np.broadcast_to(3 * b @ a, difference.shape), atol=1e-6)
    assert np.array_equal(found["block_0/mlp/up/kernel"], before["block_0/mlp/up/kernel"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, asked by peft
def test_peft_computes_the_same(workdirs, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    library = pytest.importorskip("peft")
    _, base, adapted = workdirs
    huggingface.to_hf(base, "last", tmp_path / "hf")
    peft.to_peft(adapted, "last", tmp_path / "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        plain = model(tokens).logits
        adapted_model = library.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        theirs = adapted_model(tokens).logits
    run = loading.load(adapted, "last")
    with run.program.layout.for_decoding(len(TOKENS)).use():
        ours = run.program.model.apply({"params": run.params}, TOKENS)[..., : theirs.shape[-1]]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert (theirs - plain).abs().max() > 1e-2

    # And back: what `peft` saves is read.
    adapted_model.save_pretrained(tmp_path / "saved")
    peft.from_peft(tmp_path / "saved", base, Workdir(tmp_path / "back"))
    assert_equal(arrays(Workdir(tmp_path / "back")), arrays(adapted))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but only 'LORA' can be converted"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 3}, "does not have the rank r=3"),
        ({"r": "x"}, "r is 'x', which is not a whole number"),
    ],
    ids=str,
)
def test_adapters_that_compute_something_else_are_refused(workdirs, tmp_path, keys, message):
    _, base, adapted = workdirs
    peft.to_peft(adapted, "last", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(UserError, match=re.escape(message)):
        peft.from_peft(tmp_path / "peft", base, Workdir(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_adapters_for_other_layers_and_a_run_without_adapters_are_refused(workdirs, tmp_path):
    _, base, adapted = workdirs
    peft.to_peft(adapted, "last", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 32), np.float32)}, file)
    with pytest.raises(UserError, match=r"lm_head\.lora_A\.weight is not for a layer of this model"):
        peft.from_peft(tmp_path / "peft", base, Workdir(tmp_path / "new"))
    with pytest.raises(UserError, match="has no adapters; export its weights with --to_hf"):
        peft.to_peft(base, "last", tmp_path / "other")
    with pytest.raises(UserError, match=r"--to_peft=.* exists and is not an empty folder"):
        peft.to_peft(adapted, "last", tmp_path / "peft")
