"""ViT weights in and out: numbers against a ViT in NumPy and against transformers', and folders refused.

The tests that need transformers and torch (`pip install -e ".[parity]"`) are skipped without.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.data.images import ImagesConfig
from gpt.interop import huggingface
from gpt.runtime.errors import UserError

pytest.importorskip("PIL")

from PIL import Image, ImageOps

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


def write_folder(folder, config=SMALL, tensors=None, processor=None):
    """A folder as transformers saves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    pixels = {"image_mean": [0.4] * config["num_channels"], "image_std": [0.3, 0.25, 0.2][: config["num_channels"]]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels if processor is None else processor))
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
    huggingface.from_hf(folder, Workdir(path), 128)
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
    run = loading.load(converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run"), "best")
    assert run.tokenizer.names == NAMES
    assert run.run.config.data == ImagesConfig(stretch=True, resample="bilinear")
    std = [0.3, 0.25, 0.2][: config["num_channels"]]
    pixels = ((images / 255 - 0.4) / std).transpose(0, 3, 1, 2)
    expected = np.stack([vit_logits(tensors, config, image) for image in pixels])
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(run, images), expected, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, GREY], ids=["colour", "grey"])
def test_there_and_back_to_the_bit(config, tmp_path):
    tensors = weights(config)
    workdir = converted(write_folder(tmp_path / "hf", config, tensors), tmp_path / "run")
    huggingface.to_hf(workdir, "best", tmp_path / "back")
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
    "a list of sizes": ({"image_size": [12, 12]}, None, r"image_size is \[12, 12\], which is not a whole number"),
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


# The pixels that a model sees.

SIDE = SMALL["image_size"]
SQUARE = {"height": SIDE, "width": SIDE}
CROP = {"size": 16, "do_center_crop": True, "crop_size": SIDE}


def seen(workdir, file):
    """[size, size, channels] numbers that the patches are made of, and what 1/255 of a pixel is among them."""
    config = workdir.read().config
    mean, std = config.model.pixel_scale()
    return (config.data.inputs(str(file), config.model) / 255 - mean) / std, 1 / 255 / std


def processed(tmp_path, processor, image, config=SMALL):
    """What a model of a folder with such a preprocessor_config.json sees of an image."""
    image.save(tmp_path / "image.png")
    return seen(
        converted(write_folder(tmp_path / "hf", config, processor=processor), tmp_path / "run"), tmp_path / "image.png"
    )[0]


def image_of(pixels):
    return Image.fromarray(np.asarray(pixels, np.uint8))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, 51 / 255 * 2 - 1),
        ({"do_normalize": None}, 51 / 255),
        ({"do_normalize": False, "image_mean": None, "image_std": [7]}, 51 / 255),
        ({"image_mean": [1, 1, 1], "image_std": 1}, 51 / 255 - 1),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.1, 0.2, 0.4]}, [1, 0, -0.25]),
        ({"image_processor_type": "ViTImageProcessorFast", "do_convert_rgb": True}, 51 / 255 * 2 - 1),
        ({"image_processor_type": "CLIPImageProcessor", "size": SIDE, "crop_size": SQUARE},
         (0.2 - np.array([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711]),
    ],
    ids=str,
)  # fmt: skip
def test_a_pixel_is_scaled_as_the_folder_says(processor, expected, tmp_path):
    pixels = processed(tmp_path, processor, image_of(np.full((SIDE, SIDE, 3), 51)))
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), rtol=1e-6, atol=1e-6)


HALVES = np.repeat([0, 255], 2 * SIDE)  # black on the left, white on the right
RAW = {"do_normalize": False}


@pytest.mark.parametrize(
    ("processor", "row"),
    [
        # Both sides scaled to 12: 6 black columns and 6 white ones. The triangle of the bilinear filter, 8 columns
        # wide, lies to 1/8 (of 4 + 3 + 3 + 2 + 2 + 1 + 1 = 16, the two ends) on the other half.
        ({}, [0] * 5 + [255 / 8, 255 * 7 / 8] + [255] * 5),
        ({"size": SIDE}, [0] * 5 + [255 / 8, 255 * 7 / 8] + [255] * 5),
        ({"size": SQUARE, "resample": 2}, [0] * 5 + [255 / 8, 255 * 7 / 8] + [255] * 5),
        # Scaled to 16 columns, of which the middle 12 stay.
        (CROP | {"resample": 2}, None),
        # The shorter side is 12 already: the middle, without any scaling.
        ({"size": {"shortest_edge": SIDE}, "do_center_crop": True, "crop_size": SIDE}, [0] * 6 + [255] * 6),
        ({"size": SIDE, "default_to_square": False, "do_center_crop": True, "crop_size": SQUARE}, [0] * 6 + [255] * 6),
    ],
    ids=str,
)  # fmt: skip
def test_an_image_is_scaled_and_cut_as_the_folder_says(processor, row, tmp_path):
    wide = image_of(np.broadcast_to(HALVES[None, :, None], (SIDE, 4 * SIDE, 3)))
    pixels = processed(tmp_path, RAW | processor, wide)
    if row is None:
        row = np.asarray(wide.resize((16, 16), Image.Resampling.BILINEAR))[0, 2:14, 0]
    np.testing.assert_allclose(pixels * 255, np.broadcast_to(np.reshape(row, (1, SIDE, 1)), pixels.shape), atol=1)


@pytest.mark.parametrize(("on_white", "expected"), [(False, 51), (True, 51 * 0.6 + 255 * 0.4), (None, 51)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_or_put_on_white_as_the_folder_says(mode, on_white, expected, tmp_path):
    image = Image.new(mode, (SIDE, SIDE), (*[51] * (len(mode) - 1), 153))
    pixels = processed(tmp_path, RAW | {"do_convert_rgb": on_white}, image)
    np.testing.assert_allclose(pixels * 255, expected, atol=0.6)


def test_a_nested_image_processor_counts_before_the_other_file(tmp_path):
    folder = write_folder(tmp_path / "hf", processor={"do_resize": False})
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"do_normalize": False}}))
    assert converted(folder, tmp_path / "run").read().config.model.pixel_mean == "0.0"


REFUSED_PROCESSORS = {
    "no resizing": ({"do_resize": False}, "do_resize is False, but only true can be converted"),
    "padding": ({"do_pad": True}, "do_pad is True, but only false or null can"),
    "a text for a flag": ({"do_normalize": "no"}, "do_normalize is 'no', but only true or false or null can"),
    "no filter": ({"resample": None}, r"resample is None, but only 1"),
    "the nearest pixel": ({"resample": 0}, r"resample is 0, but only 1 or 2 or 3 can"),
    "another size": ({"size": 224}, "size is 224, but only 12 × 12, the model's image_size, can"),
    "no square": ({"size": {"height": 12, "width": 16}}, "size is {'height': 12, 'width': 16}, but only 12 × 12"),
    "one side": ({"size": {"shortest_edge": 12}}, "size is {'shortest_edge': 12}, but only 12 × 12"),
    "the longer side": ({"size": {"longest_edge": 12}}, "size is {'longest_edge': 12}, but only"),
    "two sides": (
        CROP | {"size": {"shortest_edge": 12, "longest_edge": 24}},
        "size is .*longest_edge.*, but only a square",
    ),
    "a margin": (CROP | {"size": 8}, "size is 8, but only a square or shortest_edge of at least crop_size=12"),
    "another crop": (CROP | {"crop_size": 14}, "crop_size is 14, but only 12, the model's image_size"),
    "a crop without size": ({"do_center_crop": True}, "crop_size is None, but only 12"),
    "another scale": ({"rescale_factor": 0.5}, "rescale_factor is 0.5, but only 0.0039"),
    "no scale": ({"do_rescale": False}, "do_rescale is False, but only true"),
    "one mean for three": (
        {"image_mean": [0.5]},
        r"image_mean is \[0\.5\], but only a number above -1e\+06 for each of 3 channels can",
    ),
    "no deviation": (
        {"image_std": [0.5, 0, 0.5]},
        r"image_std is .*, but only a number above 0 for each of 3 channels can",
    ),
    "not finite": ({"image_mean": float("nan")}, "image_mean is nan, but only a number"),
    "a text for a mean": ({"image_mean": "0.5"}, "image_mean is '0.5', but only a number"),
    "another processor": (
        {"image_processor_type": "ConvNextImageProcessor"},
        "image_processor_type is 'ConvNextImageProcessor', but only those of ViT, DeiT, CLIP can be converted",
    ),
    "another extractor": (
        {"feature_extractor_type": "LevitFeatureExtractor"},
        "feature_extractor_type is 'LevitFeatureExtractor', but",
    ),
    "usual crop of another size": ({"feature_extractor_type": "DeiTFeatureExtractor"}, "crop_size is 224, but only 12"),
}


@pytest.mark.parametrize("case", REFUSED_PROCESSORS)
def test_pixels_that_would_differ_are_refused_by_key(case, tmp_path):
    processor, message = REFUSED_PROCESSORS[case]
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: {message}") as error:
        converted(write_folder(tmp_path / "hf", processor=processor), tmp_path / "run")
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_colours_for_a_grey_model_are_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", GREY, processor={"do_convert_rgb": True})
    with pytest.raises(UserError, match="do_convert_rgb is True, but only false with num_channels=1 can be converted"):
        converted(folder, tmp_path / "run")


OURS = {
    "as trained by default": ImagesConfig(),
    "cut from larger": ImagesConfig(resize=17, resample="lanczos"),
    "stretched": ImagesConfig(stretch=True, resample="bilinear"),
    "stretched and cut": ImagesConfig(resize=15, stretch=True),
    "on white": ImagesConfig(on_white=True),
}


@pytest.mark.parametrize("case", OURS)
def test_how_images_are_scaled_comes_back_from_a_written_folder(case, tmp_path):
    workdir = converted(write_folder(tmp_path / "hf"), tmp_path / "run")
    run = workdir.read()
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=OURS[case]))
    workdir.record(run)
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    assert converted(tmp_path / "back", tmp_path / "again").read() == run


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
    run = loading.load(workdir, "best")
    assert run.tokenizer.names == NAMES
    np.testing.assert_allclose(logits_of(run, images), expected, atol=1e-4)

    huggingface.to_hf(workdir, "best", tmp_path / "back")
    again, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(pixels).logits.numpy(), expected)
    assert again.config.id2label[4] == "zebra"


SMOOTH = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def smooth(*size):
    return Image.fromarray(SMOOTH).resize(size, Image.Resampling.BICUBIC)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(40, 22).save(path, exif=exif)


# Files that transformers' `load_image` makes RGB of.
FILES = {
    "wide.png": lambda path: smooth(97, 40).save(path),
    "high.png": lambda path: smooth(31, 60).save(path),
    "small.png": lambda path: smooth(7, 5).save(path),
    "thin.png": lambda path: smooth(300, 2).save(path),
    "photo.jpg": lambda path: smooth(300, 200).save(path, quality=90),
    "cmyk.jpg": lambda path: smooth(50, 40).convert("CMYK").save(path),
    "grey.png": lambda path: smooth(30, 40).convert("L").save(path),
    "palette.png": lambda path: smooth(30, 40).quantize(20).save(path, transparency=3),
    "alpha.png": lambda path: Image.merge("RGBA", [*smooth(40, 30).split(), smooth(40, 30).getchannel(1)]).save(path),
    "grey_alpha.png": lambda path: Image.merge("LA", smooth(40, 30).split()[:2]).save(path),
    "one_colour.png": lambda path: (
        smooth(9, 9).resize((90, 90), 0).save(path, transparency=smooth(9, 9).getpixel((4, 4)))
    ),
    "16bit.png": lambda path: Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) % 400).save(path),
    "turned.jpg": turned,
}
VIT, DEIT, CLIP = ({"image_processor_type": f"{name}ImageProcessor"} for name in ("ViT", "DeiT", "CLIP"))
PROCESSORS = [
    VIT | {"size": SIDE},
    VIT | {"size": SQUARE, "resample": 3, "do_normalize": False},
    VIT | {"size": SQUARE, "resample": 1, "do_convert_rgb": True},
    VIT | {"size": {"shortest_edge": 15}, "do_center_crop": True, "crop_size": SIDE},
    VIT | CROP | {"do_normalize": False},
    DEIT | {"size": 17, "crop_size": SIDE, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    CLIP | {"size": 16, "crop_size": SQUARE},
    CLIP | {"size": SIDE, "crop_size": SIDE, "resample": 2},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE, "do_center_crop": None},
]


def check_pixels(transformers, folder, workdir, tmp_path, backends=("pil", "torchvision")):
    """Compares a model's pixels with those of its folder in transformers, to 1/255 of a pixel."""
    for backend in backends:
        if backend == "torchvision":
            pytest.importorskip("torchvision")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
        assert processor.backend == backend
        for name, save in FILES.items():
            save(tmp_path / name)
            image = ImageOps.exif_transpose(Image.open(tmp_path / name))
            if not processor.do_convert_rgb:
                image = transformers.image_utils.load_image(image)
            theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
            ours, level = seen(workdir, tmp_path / name)
            assert ours.shape == theirs.shape
            apart = np.abs(ours - theirs) / level
            # Backends round intermediate sums of the widest filter in different ways.
            most = 2.01 if (backend, processor.resample) == ("torchvision", 1) else 1.01
            assert apart.max() <= most, (name, backend, apart.max())


@pytest.mark.parametrize("processor", PROCESSORS, ids=str)
def test_pixels_equal_those_of_the_folders_own_image_processor(processor, transformers, tmp_path):
    folder = write_folder(tmp_path / "hf", processor=processor)
    check_pixels(transformers, folder, converted(folder, tmp_path / "run"), tmp_path)


@pytest.mark.parametrize("case", OURS)
def test_transformers_makes_the_pixels_of_a_written_folder(case, transformers, tmp_path):
    workdir = converted(write_folder(tmp_path / "hf"), tmp_path / "run")
    run = workdir.read()
    workdir.record(dataclasses.replace(run, config=dataclasses.replace(run.config, data=OURS[case])))
    huggingface.to_hf(workdir, "best", tmp_path / "back")
    check_pixels(transformers, tmp_path / "back", workdir, tmp_path)
