"""Tests of images as tokens of a palette, and of pictures of them."""

import collections
import importlib.util
import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from gpt.config import Config
from gpt.data.pixels import Palette, PixelExamples, PixelsConfig, fit_palette, nearest
from gpt.data.tokenizers import TokenizerConfig
from gpt.inference import generation, pictures, previews
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime.errors import UserError

pytest.importorskip("sklearn")

GREYS = Palette(
    ((0,), (100,), (255,)), 4, ("cat", "dog")
)  # tokens: 0 to 2 for colours, 3 for any class, 4 and 5 for the classes
HUES = Palette(((0, 0, 0), (250, 10, 10), (10, 250, 10)), 2, ())


@pytest.fixture(scope="module")
def digits():
    return PixelsConfig().load(TokenizerConfig(), None)


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_few_colours_are_all_kept_and_examples_are_the_images(digits):
    """The digits have 17 greys, so that bits per dimension are exact."""
    assert len(digits.tokenizer.colors) == 17
    assert "17 colours" in digits.describe()
    assert digits.tokenizer.vocab_size == digits.config.vocab_size == 28
    examples, images = digits.evaluation("all", None), digits.folders.source("all", 8, 1)
    assert len(examples) == len(images) == 1797
    for index in (0, 500, 1796):
        example, image = examples.example(0, index), images.example(0, index)
        np.testing.assert_array_equal(digits.tokenizer.pixels(example["targets"]), image["inputs"])
        assert example["inputs"][0] == 17 + 1 + image["targets"]
        np.testing.assert_array_equal(example["inputs"][1:], example["targets"][:-1])
        assert example["inputs"].dtype == example["targets"].dtype == np.int32


def test_some_classes_are_hidden_in_training_and_none_in_evaluation(digits):
    images = digits.folders.source("train", 8, 1)
    examples = PixelExamples(**vars(images) | {"seed": 1}, palette=digits.tokenizer, class_dropout=0.3)
    firsts = np.array([[examples.example(epoch, index)["inputs"][0] for index in range(300)] for epoch in range(2)])
    assert abs((firsts == digits.tokenizer.any_class).mean() - 0.3) < 0.06
    assert (firsts[0] != firsts[1]).any()
    assert firsts[0].tolist() == [examples.example(0, index)["inputs"][0] for index in range(300)]
    assert all(
        digits.evaluation("val", None).example(0, i)["inputs"][0] != digits.tokenizer.any_class for i in range(300)
    )


def test_a_palette_finds_clusters_and_serves_frequent_colours_better():
    rng = np.random.default_rng(0)
    centres = np.array([[30, 30, 30], [200, 40, 60], [90, 220, 120], [20, 60, 230]])
    pixels = (centres[rng.integers(0, 4, 4000)] + rng.normal(0, 4, (4000, 3))).round().clip(0, 255).astype(np.uint8)
    found = fit_palette(pixels, 4)
    assert found.dtype == np.uint8
    assert sorted(nearest(found, centres)) == [0, 1, 2, 3]
    assert np.abs(found - centres[nearest(found, centres)].astype(int)).max() <= 2
    skewed = np.concatenate([pixels, np.repeat(np.arange(10, 60, 5, dtype=np.uint8), 9000)[:, None].repeat(3, axis=1)])
    greys = collections.Counter(int(np.ptp(color)) < 8 for color in fit_palette(skewed, 12).astype(int))
    assert greys[True] > greys[False]


@pytest.mark.parametrize(("seed", "error"), [(0, 2198.4), (1, 2236.6), (2, 2217.6)])
def test_a_palette_has_its_size_is_deterministic_and_is_near_the_pixels(seed, error):
    """The errors are those of a k-means with k-means++ written in NumPy, which scikit-learn's replaced."""
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 9, (3000, 3)), 0)
    pixels = np.clip(walk % 256, 0, 255).astype(np.uint8)
    found = fit_palette(pixels, 16)
    assert found.shape == (16, 3)
    assert np.square(pixels - found[nearest(pixels, found)].astype(float)).sum(-1).mean() <= error
    np.testing.assert_array_equal(fit_palette(pixels, 16), found)


def test_a_palette_without_scikit_learn_is_a_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels = np.arange(20, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(fit_palette(pixels, 20), pixels)
    with pytest.raises(
        UserError, match=r'data\.palette_size=19 colours needs scikit-learn: pip install -e "\.\[images\]"'
    ):
        fit_palette(pixels, 19)


def test_nearest_colours_are_those_of_the_plain_definition():
    rng = np.random.default_rng(1)
    points, colors = rng.integers(0, 256, (200, 3)), rng.integers(0, 256, (16, 3))
    distances = np.abs(points[:, None] - colors[None]) ** 2
    np.testing.assert_array_equal(nearest(points, colors), distances.sum(-1).argmin(-1))


@pytest.mark.parametrize("palette", [GREYS, HUES])
def test_a_palette_is_read_back_from_its_json(palette):
    assert PixelsConfig().tokenizer(json.loads(palette.to_json())) == palette


@pytest.mark.parametrize(
    "change",
    [
        {"colors": [[300]]},
        {"colors": []},
        {"colors": [[1, 2]]},
        {"colors": [[1], [1, 2, 3]]},
        {"colors": [[1.5]]},
        {"size": 0},
        {"names": [1]},
        {"name": "char"},
    ],
    ids=str,
)
def test_a_damaged_palette_is_refused(change):
    with pytest.raises((ValueError, TypeError)):
        Palette.from_dict(json.loads(GREYS.to_json()) | change)


def test_prompts_name_a_class_and_a_half_to_be_completed(tmp_path):
    image = np.array([[255, 90, 3, 0], [110, 0, 0, 240], [255] * 4, [255] * 4], np.uint8)
    file = tmp_path / "a, half.png"
    Image.fromarray(image).save(file)
    upper = [2, 1, 0, 0, 1, 0, 0, 2]
    assert GREYS.encode("").tolist() == GREYS.encode("\n").tolist() == [3]
    assert GREYS.encode("class:dog").tolist() == [5]
    assert GREYS.encode(f"half:{file}").tolist() == [3, *upper]
    assert GREYS.encode(f"class:cat,half:{file}").tolist() == [4, *upper]


@pytest.mark.parametrize(
    "prompt", ["a dog", "class:cow", "half:", "class:dog,half:", "half:no/such/file.png", "dog,half:x"]
)
def test_other_prompts_are_refused_with_what_there_is(prompt):
    with pytest.raises(UserError, match=r"class:NAME, half:FILE|cat, dog|there is no file no/such"):
        GREYS.encode(prompt)


def test_a_picture_shows_every_sample_pixel_by_pixel():
    samples = [np.array([3, 0, 1, 2, 1] + [2] * 12), np.array([4, 2, 2]), np.array([5, 1, 4] + [1] * 14)]
    picture = opened(pictures.png(pictures.grid(GREYS, samples, columns=2)))
    scale = 64 // 4
    border = scale // 4
    side = 64 + border
    assert picture.shape == (2 * side + border, 2 * side + border)
    for i, sample in enumerate(samples):
        top, left = border + i // 2 * side, border + i % 2 * side
        cells = picture[top : top + 64 : scale, left : left + 64 : scale].ravel()
        drawn = [
            {0: 0, 1: 100, 2: 255}.get(token, 0) for token in sample[1:]
        ]  # other tokens and missing pixels are black
        assert cells.tolist() == drawn + [0] * (16 - len(drawn))
    assert opened(pictures.png(pictures.grid(HUES, [np.array([3, 0, 1, 2, 0])]))).shape[-1] == 3


def test_a_block_of_another_size_than_the_image_is_refused():
    with pytest.raises(UserError, match=r"model.block_size=128 has to be 64"):
        PixelsConfig().load(TokenizerConfig(), GPTConfig())


@pytest.mark.parametrize(("key", "value"), [("resize", 16), ("stretch", True), ("on_white", True)])
def test_images_of_tokens_are_cut_in_one_way(key, value):
    """A prompt half:FILE is read without the config, so that its options must not differ."""
    with pytest.raises(UserError, match=rf"data\.{key}={value} is not known; choose one of"):
        PixelsConfig(**{key: value})


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """Returns a workdir after two steps of a tiny model."""
    workdir = tmp_path_factory.mktemp("pixels") / "run"
    flags = ["num_layers=1", "num_heads=2", "embed_dim=16"]
    done = command(
        "main",
        "--config=configs/image_gpt.py",
        f"--workdir={workdir}",
        *(f"--config.model.{flag}" for flag in flags),
        "--config.train.steps=2",
        "--config.train.batch_size=16",
    )
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_shows_pictures_and_samples_and_completions_are_drawn(command, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    for tag in ("validation/samples", "validation/completions"):
        (shown,) = events.Images(tag)
        assert opened(shown.encoded_image_string).shape == (shown.height, shown.width) == (4 * 66 + 2, 10 * 66 + 2)

    half = tmp_path / "half.png"
    image = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(image).save(half)
    out = tmp_path / "drawn.png"
    flags = (
        f"--workdir={trained}",
        "--prompt=class:3",
        f"--prompt=class:3,half:{half}",
        "--num_samples=2",
        f"--out={out}",
    )
    done = command("sample", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(out))
    drawn = Image.open(out)
    assert drawn.size == (2 * 66 + 2, 2 * 66 + 2)
    palette = json.loads((trained / "tokenizer.json").read_text())["colors"]
    begun = np.asarray(drawn)[2 + 66 + 4 : 2 + 66 + 64 : 8, 2:66:8]
    expected = np.array(palette)[np.abs(np.array(palette)[:, 0] - image[..., None].astype(int)).argmin(-1)][..., 0]
    np.testing.assert_array_equal(begun[:4], expected[:4])

    again = command("sample", *flags)
    assert (again.returncode, again.stdout) == (1, "")
    assert str(out) in again.stderr
    assert "Traceback" not in again.stderr


def test_the_parts_of_a_preview_share_no_random_numbers(digits, monkeypatch):
    streams = []

    class Blank:
        """Generates samples that have only token 0."""

        def __init__(self, generator, params, prompts, key_B):
            streams.extend(map(tuple, key_B))
            self.finished_B, self.stop_tokens = np.zeros(len(prompts), bool), ()

        def advance(self, most):
            return generation.Segment(np.zeros((len(self.finished_B), most), int))

    monkeypatch.setattr(generation, "Decoding", Blank)
    config = Config(data=digits.config, model=GPTConfig(block_size=64))
    program = types.SimpleNamespace(model=GPT(config.model.resolve(28, "cpu")), layout=None)
    show = previews.make(digits, program, config, digits.evaluation("val", None))
    assert show(None, 7, {}, lambda: None).pictures.keys() == {"samples", "completions"}
    assert len(set(streams)) == len(streams) == 10 * 4 + 4 * 8


def test_evaluation_reports_bits_per_dimension(command, trained):
    done = command("evaluate", f"--workdir={trained}", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == 359
    assert report["bits_per_dimension"] == pytest.approx(report["loss"] / np.log(2))
