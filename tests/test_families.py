"""Llama and the other families of language models: equal to transformers' models, there and back, and what is refused.

For GPT-2 see test_convert.py, for ViT test_convert_vit.py. The tests that need transformers and torch
(`pip install -e ".[parity]"`) are skipped without.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from gpt import sharding, step
from gpt.checkpointing import loading, writing
from gpt.checkpointing.run import Run
from gpt.checkpointing.stacking import stack_layers
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.data.tokenizers import ByteTokenizer
from gpt.inference import generation
from gpt.interop import huggingface, safetensors_folder
from gpt.interop.architecture import comparable
from gpt.interop.config_file import ConfigFile
from gpt.interop.huggingface import ARCHITECTURES
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig
from gpt.step import build

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
        if "gemma" in model_type:  # else its factor of the embeddings outweighs the layers
            model.get_input_embeddings().weight.mul_(0.1)
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
    again = converted(tmp_path / "back", tmp_path / "run").read().config.model
    assert comparable(again) == comparable(pair.workdir.read().config.model)


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
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert float(loss) == pytest.approx(outputs.loss.item(), abs=1e-4)
    architecture = ARCHITECTURES[pair.model.config.model_type]
    found = flatten_dict(jax.tree.map(np.asarray, stack_layers(gradients)), sep="/")
    theirs = {name: parameter.grad.numpy() for name, parameter in pair.model.named_parameters()}
    pair.model.zero_grad()
    tensors = architecture.tensors(run.model_config)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for names, layer in zip(tensor.names_by_layer, found[name].reshape(-1, *tensor.our_shape), strict=True):
            for their_name, array in zip(names, tensor.to_theirs(layer), strict=True):
                full = {"embed_out.weight": "lm_head.weight"}.get(their_name, their_name)
                wanted = theirs[full if full in theirs else architecture.prefix + full]
                np.testing.assert_allclose(array, wanted, atol=1e-4 * max(1, np.abs(wanted).max()), err_msg=name)


@pytest.mark.slow
def test_100_tokens_equal_those_of_transformers(pair):
    import torch

    prompt = np.array([72, 101, 108, 108, 111])
    # Without the penalty, many random models repeat one token.
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.5}
    expected = pair.model.generate(torch.tensor(prompt[None]), **options)
    run = loading.load(pair.workdir, "best")
    greedy = generation.Sampling(temperature=0, repetition_penalty=1.5)
    generator = generation.Generator(run.program.model, run.program.layout, greedy)
    *_, (sample,) = generation.continuations(generator.start(run.params, [prompt]), run.tokenizer.decode, 100)
    assert len(set(sample.tokens)) > 5
    np.testing.assert_array_equal(sample.tokens[:100], expected[0, 5:].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_sharded_logits_are_equal(pair, scan):
    """On a mesh of 2 × 2 × 2 devices. A single head of keys and values cannot be sharded, so the length is."""
    import torch

    run = pair.workdir.read()
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    third = {"rules": "fsdp_tp", "model": 2} if run.config.model.kv_heads > 1 else {"rules": "sp", "sequence": 2}
    mesh = MeshConfig(data=2, fsdp=2, **third)
    model = dataclasses.replace(run.config.model, scan_layers=scan)
    layout = sharding.make_layout(mesh)
    program = build(dataclasses.replace(run.config, mesh=mesh, model=model), 256, layout, total_steps=1)
    params = loading.Weights(pair.workdir, "best").restore(program)
    with layout.use():
        logits = jax.jit(program.model.apply)({"params": params}, jnp.asarray(tokens))[..., :256]
    with torch.no_grad():
        expected = pair.model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def read_config(model_type, **keys):
    return ARCHITECTURES[model_type].read_config(ConfigFile("config.json", {"model_type": model_type, **keys}))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_defaults_are_those_of_transformers(model_type, transformers):
    architecture, config = ARCHITECTURES[model_type], transformers.AutoConfig.for_model(model_type)
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"] | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    old = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    kept = {"max_window_layers", "sliding_window", "sliding_window_pattern"}  # read below
    unused = {"hidden_act", "hidden_activation"} - {architecture.activation}  # Gemma's has another name
    keys = {*architecture.defaults, *architecture.numbers.values(), *getattr(architecture, "biases", ())}
    for key in keys - kept - unused:
        name = old.get(key, key)
        expected = rope[name] if name in rope else getattr(config, name, None)
        ours = architecture.defaults.get(key)
        is_computed = ours is None and key in ("num_key_value_heads", "head_dim", "n_inner")
        assert is_computed or (ours or None) == (expected or None), key
    if model_type == "vit":
        return
    model = read_config(model_type)
    assert model.tie_embeddings == config.tie_word_embeddings
    windows = [
        0 if kind == "full_attention" else config.sliding_window for kind in getattr(config, "layer_types", None) or []
    ]
    assert model.windows == tuple(windows or [getattr(config, "sliding_window", None) or 0] * model.num_layers)
    assert model.kv_heads == (getattr(config, "num_key_value_heads", None) or model.num_heads)


def test_both_forms_of_rotary_positions_are_read():
    theta = {"rope_theta": 5e5}
    assert read_config("llama", rope_parameters=LLAMA3 | theta) == read_config("llama", rope_scaling=LLAMA3, **theta)
    both = YARN | {"type": "yarn"}
    without = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    assert read_config("qwen2", rope_scaling=both) == read_config("qwen2", rope_scaling=YARN)
    assert read_config("qwen2", rope_scaling=without, max_position_embeddings=32).rotary_scaling.endswith("=32")
    linear = {"rope_type": "linear", "factor": 8}
    nested = {"full_attention": linear | {"rope_theta": 7e5}, "sliding_attention": {"rope_theta": 300}}
    old = {"rope_scaling": linear, "rope_theta": 7e5, "rope_local_base_freq": 300}
    assert read_config("gemma3_text", rope_parameters=nested) == read_config("gemma3_text", **old)
    assert read_config("gemma3_text", **old).rotary_base_local == 300
    partial = {"rope_theta": 500, "partial_rotary_factor": 0.5}
    old = {"rotary_emb_base": 500, "rotary_pct": 0.5}
    assert read_config("gpt_neox", rope_parameters=partial) == read_config("gpt_neox", **old)
    assert read_config("gpt_neox", **old, **partial).rotary_fraction == 0.5


def test_keys_of_released_files_are_accepted():
    for model_type, keys in {
        "llama": {"pretraining_tp": 1, "rope_interleaved": False, "is_llama_config": True, "head_dim": None},
        "mistral": {"sliding_window": None, "architectures": ["MistralForCausalLM"], "torch_dtype": "bfloat16"},
        "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 21},
        "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "_name_or_path": "x"},
        "gemma3_text": {"eos_token_id": [1, 106], "attn_logit_softcapping": None, "sliding_window_pattern": 6},
        "gpt_neox": {"classifier_dropout": 0.1, "gradient_checkpointing": False, "use_cache": True},
        "gpt2": {"n_ctx": 1024, "summary_type": "cls_index", "task_specific_params": {"max_length": 50}},
    }.items():
        read_config(model_type, **keys)


REFUSED = {
    "an unknown key": ("llama", {"new_trick": 2}, r"config\.json: new_trick is 2, which is not known"),
    "quantized weights": ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config is .* not known"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"'dynamic'.*cannot be converted"),
    "longrope": ("mistral", {"rope_parameters": {"rope_type": "longrope"}}, r"'longrope'.*llama3, factor"),
    "part of a rope": ("llama", {"rope_scaling": {"type": "linear"}}, r"linear.*cannot be converted"),
    "more of a rope": ("qwen2", {"rope_scaling": YARN | {"mrope_section": 1}}, r"mrope_section.*cannot be converted"),
    "no number": ("qwen2", {"rope_scaling": YARN | {"factor": "4"}}, r"factor is '4', which is not a number"),
    "no object": ("qwen3", {"rope_scaling": "yarn"}, r"'yarn' are no JSON object"),
    "a flat rope": ("gemma3_text", {"rope_parameters": {"rope_theta": 1}}, r"only sliding_attention and full_att"),
    "layers": ("qwen3", {"layer_types": ["full_attention"]}, r"layer_types is .* only a list of 32"),
    "a layer": ("gemma2", {"num_hidden_layers": 1, "layer_types": ["chunked"]}, r"layer_types is \['chunked'\]"),
    "both ways": ("gemma3_text", {"use_bidirectional_attention": True}, r"use_bidirectional_attention is True"),
    "an activation": ("llama", {"hidden_act": "xielu"}, r"hidden_act is 'xielu', but only"),
    "another base": ("gpt_neox", {"rope_theta": 3}, r"rope_theta is 3, but only 10000\.0"),
    "too many layers": ("gemma3_text", {"num_hidden_layers": 2**30}, r"num_hidden_layers is .* only 1 to"),
    "heads": ("llama", {"num_key_value_heads": 5}, r"num_kv_heads=5 does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_models_lack_is_refused(case):
    model_type, keys, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_config(model_type, **keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "learned"}, "positions=learned, only rotary"),
        ({"window": 5, "window_pattern": "LG"}, "window=5, only 0|window_pattern=LG, only L"),
        ({"qk_norm": "unit"}, "qk_norm=unit, only"),
        ({"logit_softcap": 3.0}, "logit_softcap=3.0, only 0"),
        ({"bias": "up"}, "bias=up, only none"),
    ],
)
def test_models_that_transformers_lacks_are_not_written(change, message):
    config = dataclasses.replace(read_config("llama"), vocab_size=256, **change)
    with pytest.raises(UserError, match=f"transformers' LlamaForCausalLM has no model.({message})"):
        ARCHITECTURES["llama"].write(config, Run(Config(), ByteTokenizer(), None))


def llama_folder(folder, dtype="float32", **keys):
    """A folder with a random Llama, and its tensors."""
    folder.mkdir()
    config = GROUPED | {"model_type": "llama", "eos_token_id": None} | keys
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gpt_tokenizer.json").write_text(ByteTokenizer().to_json())
    rng, architecture = np.random.default_rng(0), ARCHITECTURES["llama"]
    tensors = {
        ("" if name.startswith("lm_head") else "model.") + name: rng.normal(size=shape).astype(dtype)
        for tensor in architecture.tensors(read_config(**config)).values()
        for name, shape in tensor.their_shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_vocabulary_beyond_the_tokenizer_and_bfloat16_in_several_files(tmp_path):
    """The numbers of tokens that are not used are kept; the padding of the table is 0."""
    folder = tmp_path / "hf"
    tensors = llama_folder(folder, ml_dtypes.bfloat16, vocab_size=300)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / safetensors_folder.INDEX).write_text(json.dumps({"weight_map": files}))
    workdir = converted(folder, tmp_path / "run")
    run = loading.load(workdir, "best")
    assert (workdir.read().config.model.vocab_size, run.model_config.padded_vocab_size) == (300, 384)
    table, head = run.params["token_embedding"]["embedding"], run.params["head"]["kernel"]
    np.testing.assert_array_equal(table[:300], tensors["model.embed_tokens.weight"].astype(np.float32))
    np.testing.assert_array_equal(head[:, :300].T, tensors["lm_head.weight"].astype(np.float32))
    assert not table[300:].any()
    assert not head[:, 300:].any()
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array.astype(np.float32), err_msg=name)


def test_large_arrays_are_written_chunk_by_chunk(tmp_path, monkeypatch):
    """Chunks smaller than a layer and a table, which do not divide the vocabulary."""
    monkeypatch.setattr(writing, "CHUNK", 4096)
    monkeypatch.setattr(safetensors_folder, "BLOCK", 100)
    tensors = llama_folder(tmp_path / "hf", vocab_size=301)
    workdir = converted(tmp_path / "hf", tmp_path / "run")
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.gate_proj.weight"), r"layers\.1\.mlp\.gate_proj\.weight: missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}),
            r"q_proj\.bias: not part",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": t["lm_head.weight"]}), r"256 × 32.* 16 × 32"),
        (lambda t: t.update({"norm.weight": t["model.norm.weight"]}), r"with and without the prefix model\."),
    ],
)
def test_folders_with_other_tensors_are_refused(change, message, tmp_path):
    tensors = llama_folder(tmp_path / "hf")
    change(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_multimodal_gemma_is_refused(tmp_path):
    llama_folder(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    with pytest.raises(UserError, match=r"model_type is 'gemma3', but only .*'gemma3_text'"):
        converted(tmp_path / "hf", tmp_path / "run")
