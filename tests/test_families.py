"""Llama and the other families of language models: equal to transformers' models, there and back, and what is refused.

For GPT-2 see test_convert.py, for ViT test_convert_vit.py. The tests that need transformers and torch
(`pip install -e ".[parity]"`) are skipped without.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from gpt import sharding, step
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.data.tokenizers import ByteTokenizer
from gpt.inference import generation
from gpt.interop import huggingface, safetensors_folder
from gpt.interop.config_file import ConfigFile
from gpt.checkpointing.stacking import stack_layers
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig
from gpt.step import build

ARCHITECTURES = {architecture.model_type: architecture for architecture in huggingface.ARCHITECTURES}
TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = TINY | {"num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = GROUPED | {"head_dim": 12, "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 5}

# The variants that released models have: model_type, and the keys of config.json.
CASES = {
    "llama 2": ("llama", TINY | {"rms_norm_eps": 1e-5}),
    "llama 3.1": ("llama", GROUPED | {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama 3.2, tied": ("llama", GROUPED | {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 12}),
    "llama, linear": ("llama", TINY | {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama, biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 7, "head_dim": 12}),
    "mistral, no window": ("mistral", GROUPED | {"sliding_window": None, "rope_theta": 1e6}),
    "qwen 2": ("qwen2", GROUPED | {"tie_word_embeddings": True, "sliding_window": 64, "max_window_layers": 1}),
    "qwen 2.5, yarn": ("qwen2", GROUPED | {"rope_scaling": YARN, "rope_theta": 1e6}),
    "qwen 2, windows": (
        "qwen2",
        GROUPED | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen 3": ("qwen3", GROUPED | {"head_dim": 12, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen 3, yarn": (
        "qwen3",
        TINY | {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}
        | {"rope_scaling": YARN | {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.2, "truncate": False}},
    ),
    "olmo 2": ("olmo2", TINY | {"rope_theta": 5e5}),
    "olmo 2, grouped": ("olmo2", GROUPED),
    "gemma 2": ("gemma2", GEMMA),
    "gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "num_key_value_heads": 1}),
    "gemma 3, linear": (
        "gemma3_text",
        GEMMA | {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        | {"final_logit_softcapping": 20.0},
    ),
    "pythia": ("gpt_neox", TINY | {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    "gpt-neox, serial": (
        "gpt_neox",
        TINY | {"use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def random_model(transformers, folder, model_type, keys):
    """Returns a random model of transformers that was saved to a folder, with random norms and biases."""
    import torch

    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    folder.mkdir()
    # The keys are read from a file, as those of a released model are.
    (folder / "config.json").write_text(
        json.dumps({"model_type": model_type, "initializer_range": 0.4, **keys, **tokens})
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as 0 or 1
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "gpt_tokenizer.json").write_text(ByteTokenizer().to_json())
    return model


def converted(folder, path, vocab_multiple=128):
    huggingface.from_hf(folder, Workdir(path), vocab_multiple)
    return Workdir(path)


@dataclasses.dataclass
class Pair:
    """A model of transformers, and the workdir that it was converted to."""

    model: object
    folder: object
    workdir: Workdir


@pytest.fixture(scope="module", params=CASES)
def pair(request, transformers, tmp_path_factory):
    path = tmp_path_factory.mktemp("family")
    model = random_model(transformers, path / "hf", *CASES[request.param])
    return Pair(model, path / "hf", converted(path / "hf", path / "run", 100))


def test_there_and_back_to_the_bit(pair, transformers, tmp_path):
    import torch

    huggingface.to_hf(pair.workdir, "best", tmp_path / "back")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (pair.folder, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = torch.arange(40)[None] * 5
    with torch.no_grad():
        assert torch.equal(pair.model(tokens).logits, again(tokens).logits)
    again_ours = converted(tmp_path / "back", tmp_path / "again", 100).read()
    assert again_ours.config == pair.workdir.read().config


def test_logits_loss_and_gradients_equal_those_of_transformers(pair):
    import torch

    run = loading.load(pair.workdir, "best")
    tokens = np.random.default_rng(0).integers(0, 256, (3, 64))
    outputs = pair.model(torch.tensor(tokens), labels=torch.tensor(tokens))
    outputs.loss.backward()

    def ours(params):
        logits = run.program.model.apply({"params": params}, jnp.asarray(tokens))[..., :256]
        return step.token_losses(logits[:, :-1], jnp.asarray(tokens[:, 1:])).mean(), logits

    with run.program.layout.for_decoding(len(tokens)).use():
        (loss, logits), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(run.params)
    expected = outputs.logits.detach().numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert float(loss) == pytest.approx(outputs.loss.item(), abs=1e-4)
    architecture = ARCHITECTURES[pair.model.config.model_type]
    found = flatten_dict(jax.tree.map(np.asarray, stack_layers(gradients)), sep="/")
    theirs = {name: parameter.grad.numpy() for name, parameter in pair.model.named_parameters()}
    pair.model.zero_grad()
    tensors = architecture.tensors(run.model_config)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for names, layer in zip(
            tensor.names_by_layer, found[name].reshape(-1, *tensor.our_shape), strict=True
        ):
            for their_name, array in zip(names, tensor.to_theirs(layer), strict=True):
                full = {"embed_out.weight": "lm_head.weight"}.get(their_name, their_name)
                wanted = theirs[full if full in theirs else architecture.prefix + full]
                np.testing.assert_allclose(array, wanted, atol=1e-4 * max(1, np.abs(wanted).max()), err_msg=name)


def test_100_tokens_equal_those_of_transformers(pair):
    import torch

    prompt = np.array([72, 101, 108, 108, 111])
    expected = pair.model.generate(torch.tensor(prompt[None]), max_new_tokens=100, do_sample=False, pad_token_id=0)
    run = loading.load(pair.workdir, "best")
    generator = generation.Generator(run.program.model, run.program.layout, generation.Sampling(temperature=0))
    *_, (sample,) = generation.continuations(generator.start(run.params, [prompt]), run.tokenizer.decode, 100)
    assert len(set(sample.tokens)) > 10
    np.testing.assert_array_equal(sample.tokens[:100], expected[0, 5:].numpy())


@pytest.mark.parametrize("scan", [False, True])
def test_sharded_logits_are_equal(pair, scan, tmp_path):
    """On a mesh of 2 × 2 × 2 devices. Two heads of keys and values can be sharded; a single one cannot."""
    import torch

    run = pair.workdir.read()
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    mesh = MeshConfig(rules="fsdp_tp", data=2, fsdp=2, model=2)
    model = dataclasses.replace(run.config.model, scan_layers=scan)
    layout = sharding.make_layout(mesh)
    program = build(dataclasses.replace(run.config, mesh=mesh, model=model), 256, layout, total_steps=1)
    params = loading.Weights(pair.workdir, "best").restore(program)
    with layout.use():
        logits = jax.jit(program.model.apply)({"params": params}, jnp.asarray(tokens))[..., :256]
    with torch.no_grad():
        expected = pair.model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
