"""ViT weights in and out: numbers against a ViT in NumPy and against transformers', and folders refused.

The tests that need transformers and torch (`pip install -e ".[parity]"`) are skipped without.
"""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt import convert, loaded
from gpt.checkpoint import Workdir
from gpt.data.images import ImagesConfig
from gpt.errors import UserError

pytest.importorskip("PIL")

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "id2label": {"0": "cat", "1": "dog", "2": "horse", "3": "yak", "4": "zebra"},
}
GREY = SMALL | {
    "num_channels": 1,
    "patch_size": 3,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu_new",
}
NAMES = tuple(SMALL["id2label"].values())


def weights(config, seed=0):
    """Random tensors of a ViT, with norms and biases that are not those of the initialisation."""
    d, inner, side = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches = (config["image_size"] // side) ** 2
    shapes = {
        "vit.embeddings.cls_token": (1, 1, d),
        "vit.embeddings.position_embeddings": (1, patches + 1, d),
        "vit.embeddings.patch_embeddings.projection.weight": (d, config["num_channels"], side, side),
        "vit.embeddings.patch_embeddings.projection.bias": (d,),
        "classifier.weight": (5, d),
        "classifier.bias": (5,),
    }
    sizes = {f"attention.attention.{name}": (d, d) for name in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (d, d), "intermediate.dense": (inner, d), "output.dense": (d, inner)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in sizes.items():
            shapes[f"vit.encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"vit.encoder.layer.{i}.{name}.bias"] = shape[:1]
    norms = [
        f"encoder.layer.{i}.layernorm_{side}"
        for i in range(config["num_hidden_layers"])
        for side in ("before", "after")
    ]
    shapes |= {f"vit.{name}.{part}": (d,) for name in [*norms, "layernorm"] for part in ("weight", "bias")}
    rng = np.random.default_rng(seed)
    found = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {name: 1 + found[name] for name in shapes if "layernorm" in name and name.endswith("weight")}


def write_folder(folder, config=SMALL, tensors=None):
    """A folder as transformers saves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    pixels = {"image_mean": [0.4] * config["num_channels"], "image_std": [0.3, 0.25, 0.2][: config["num_channels"]]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def erf(x):
    return np.vectorize(math.erf)(x)


def vit_logits(w, config, pixels):
    """[classes] logits of one image, [channels, rows, columns], as the paper and its code have it, in float64."""
    w = {name.removeprefix("vit."): array.astype(np.float64) for name, array in w.items()}
    side, heads, d = config["patch_size"], config["num_attention_heads"], config["hidden_size"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        if config["hidden_act"] == "gelu":
            return x * (1 + erf(x / math.sqrt(2))) / 2
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    projection = w["embeddings.patch_embeddings.projection.weight"].reshape(d, -1)
    tokens = [w["embeddings.cls_token"][0, 0]]
    for row in range(0, config["image_size"], side):
        for column in range(0, config["image_size"], side):
            square = pixels[:, row : row + side, column : column + side].reshape(-1)
            tokens.append(projection @ square + w["embeddings.patch_embeddings.projection.bias"])
    x = np.array(tokens) + w["embeddings.position_embeddings"][0]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        before = norm(x, f"{layer}.layernorm_before")
        q, k, v = (linear(before, f"{layer}.attention.attention.{name}") for name in ("query", "key", "value"))
        mixed = []
        for one_q, one_k, one_v in zip(*(np.split(part, heads, axis=-1) for part in (q, k, v)), strict=True):
            scores = np.exp(one_q @ one_k.T / math.sqrt(one_q.shape[-1]))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ one_v)
        x = x + linear(np.concatenate(mixed, -1), f"{layer}.attention.output.dense")
        hidden = gelu(linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense"))
        x = x + linear(hidden, f"{layer}.output.dense")
    return linear(norm(x, "layernorm")[0], "classifier")


def converted(folder, path):
    convert.from_hf(folder, Workdir(path), 128)
    return Workdir(path)


def logits_of(run, images):
    with run.program.layout.for_decoding(len(images)).use():
        return np.asarray(jax.jit(run.program.model.apply)({"params": run.params}, images))


def images_of(config, count=3):
    shape = count, config["image_size"], config["image_size"], config["num_channels"]
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("config", [SMALL, GREY], ids=["colour", "grey"])
def test_logits_equal_those_of_a_vit_in_numpy(config, tmp_path):
    tensors, images = weights(config), images_of(config)
    run = loaded.load(converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run"), "best")
    assert run.tokenizer.names == NAMES
    assert run.run.config.data == ImagesConfig()
    std = [0.3, 0.25, 0.2][: config["num_channels"]]
    pixels = ((images / 255 - 0.4) / std).transpose(0, 3, 1, 2)
    expected = np.stack([vit_logits(tensors, config, image) for image in pixels])
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(run, images), expected, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, GREY], ids=["colour", "grey"])
def test_there_and_back_to_the_bit(config, tmp_path):
    tensors = weights(config)
    workdir = converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run")
    convert.to_hf(workdir, "best", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    assert converted(tmp_path / "back", tmp_path / "again").read() == workdir.read()
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config


HEAD = "classifier.weight"
REFUSED = {
    "no head": ({}, lambda t: {n: a for n, a in t.items() if n != HEAD}, r"hf: classifier\.weight: missing"),
    "a pooler": ({}, lambda t: t | {"vit.pooler.dense.bias": t["classifier.bias"]}, r"pooler.* not part of a ViT"),
    "a wrong shape": ({}, lambda t: t | {HEAD: t[HEAD][:4]}, r"classifier\.weight is 4 × 24, but has to be 5 × 24"),
    "no biases": ({"qkv_bias": False}, None, r"qkv_bias is False, but only True can be converted"),
    "a list of sizes": ({"image_size": [12, 12]}, None, r"image_size is \[12, 12\], and not a number"),
    "another activation": ({"hidden_act": "tanh"}, None, r"hidden_act is 'tanh', but only"),
    "a class without a name": ({"id2label": {"0": "cat", "2": "dog"}}, None, r"id2label does not name the classes"),
    "patches that do not fit": ({"patch_size": 5}, None, r"patch_size=5 does not divide model\.image_size=12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_of_something_else_are_refused(case, tmp_path):
    change, change_tensors, message = REFUSED[case]
    folder = write_folder(tmp_path / "hf", SMALL | change, (change_tensors or dict)(weights(SMALL)))
    with pytest.raises(UserError, match=message):
        converted(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("config", [SMALL, GREY], ids=["colour", "grey"])
def test_logits_equal_those_of_transformers_and_it_loads_what_is_written(config, transformers, tmp_path):
    import torch

    torch.manual_seed(0)
    theirs = transformers.ViTConfig(**config, initializer_range=0.2)
    theirs.num_labels = 5
    theirs.id2label = {int(i): name for i, name in config["id2label"].items()}
    model = transformers.ViTForImageClassification(theirs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # they begin as 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "hf")
    images = images_of(config)
    pixels = torch.tensor((images / 255 - 0.5) / 0.5, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    workdir = converted(tmp_path / "hf", tmp_path / "run")
    run = loaded.load(workdir, "best")
    assert run.tokenizer.names == NAMES
    np.testing.assert_allclose(logits_of(run, images), expected, atol=1e-4)

    convert.to_hf(workdir, "best", tmp_path / "back")
    again, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(pixels).logits.numpy(), expected)
    assert again.config.id2label[4] == "zebra"
