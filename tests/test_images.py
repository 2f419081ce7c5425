"""Tests of images: the digits, folders, augmentation, and messages about errors."""

import dataclasses
import os
import re
import subprocess
import warnings

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from PIL import Image

from gpt import train
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, OptimizerConfig, TrainConfig
from gpt.data import images, pipeline
from gpt.data.images import ImagesConfig
from gpt.data.pixels import Palette, PixelsConfig
from gpt.data.tokenizers import Labels, TokenizerConfig
from gpt.models.vit import ViTConfig
from gpt.runtime.errors import UsageError, UserError

MODEL = ViTConfig(num_layers=1, num_heads=2, embed_dim=16, image_size=8, patch_size=4, channels=3)
DIGITS = dataclasses.replace(MODEL, channels=1)


def draw(path, color, size=(20, 12), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Writes six red and six blue images of several formats."""
    for i in range(6):
        draw(tmp_path / "photos" / "red" / f"{i}.png", (200 + i, 0, 0))
        draw(tmp_path / "photos" / "blue" / "more" / f"{i}.JPG", (0, 0, 200 + i), format="JPEG")
    (tmp_path / "photos" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden").mkdir()
    return tmp_path / "photos"


def load(path="", labels=None, model=MODEL, **options):
    return ImagesConfig(path=str(path), **options).load(labels, model)


def test_digits():
    digits = load()
    assert digits.describe() == "1,438 training and 359 validation images, 10 classes"
    assert digits.tokenizer == Labels(tuple("0123456789"))
    examples = digits.evaluation("all", DIGITS)
    found = [examples.example(0, i) for i in range(len(examples))]
    assert {(example["inputs"].shape, example["inputs"].dtype.name) for example in found} == {((8, 8, 1), "uint8")}
    pixels = np.stack([example["inputs"] for example in found])
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.bincount([example["targets"] for example in found]).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    # Each of them is in one split, which is the same for every seed and in every run.
    sides = [
        {digits.evaluation(part, DIGITS).example(0, i)["inputs"].tobytes() for i in range(n)}
        for part, n in (("train", 1438), ("val", 359))
    ]
    assert not sides[0] & sides[1]
    assert load().fingerprint == digits.fingerprint != load(validation_fraction=0.1).fingerprint
    shares = np.bincount(digits.classes[digits.num_train :]) / np.bincount(digits.classes[: digits.num_train])
    assert shares.min() > 0.15
    assert shares.max() < 0.4


def test_a_folder(folder):
    found = load(folder, validation_fraction=0.25)
    assert found.describe() == "9 training and 3 validation images, 2 classes"
    assert found.tokenizer.names == ("blue", "red")
    for source in (found.training(MODEL, 0), found.evaluation("val", MODEL)):
        for i in range(len(source)):
            example = source.example(0, i)
            assert (example["inputs"].shape, example["inputs"].dtype) == ((8, 8, 3), np.uint8)
            assert example["inputs"][..., 0 if example["targets"] == 1 else 2].min() > 190  # JPEG is not exact
    grey = found.evaluation("all", dataclasses.replace(MODEL, channels=1)).example(0, 0)
    assert grey["inputs"].shape == (8, 8, 1)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folders_for_both_splits(tmp_path, name):
    for part, count in (("train", 3), (name, 2)):
        for color in ("red", "blue", "green")[: 3 if part == "train" else 2]:
            for i in range(count):
                draw(tmp_path / part / color / f"{i}.png", color)
    found = load(tmp_path)
    assert found.describe() == "9 training and 4 validation images, 3 classes"
    assert found.tokenizer.names == ("blue", "green", "red")
    assert {int(found.evaluation("val", MODEL).example(0, i)["targets"]) for i in range(4)} == {0, 2}


def test_the_fingerprint_tells_other_images_apart(folder):
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    draw(folder / "red" / "0.png", (1, 2, 3), size=(40, 30))
    after = load(folder).fingerprint
    (folder / "red" / "1.png").rename(folder / "red" / "9.png")
    assert len({before, after, load(folder).fingerprint}) == 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_every_sort_of_image(tmp_path, mode):
    draw(tmp_path / "x.tif", (255, 255, 255), mode=mode)
    np.testing.assert_array_equal(ImagesConfig().inputs(str(tmp_path / "x.tif"), MODEL), np.full((8, 8, 3), 255))


def test_the_square_in_the_middle_upright(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    pixels[0, 8] = 0
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(ImagesConfig().inputs(str(tmp_path / "wide.png"), MODEL), pixels[:, 8:16])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate the image by 90° clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(pixels[:, 8:16], -1)
    np.testing.assert_array_equal(ImagesConfig().inputs(str(tmp_path / "turned.png"), MODEL), expected)


@pytest.mark.parametrize("options", [{"crop": 0.3}, {"shift": 2}, {"flip": True}], ids=str)
def test_augmentation_is_a_function_of_seed_epoch_and_index(options):
    examples = load(**options).training(DIGITS, seed=3)
    again, other = load(**options).training(DIGITS, seed=3), load(**options).training(DIGITS, seed=4)
    places = [(epoch, index) for epoch in range(2) for index in range(20)]
    found = {place: examples.example(*place)["inputs"] for place in places}
    for place in reversed(places):
        np.testing.assert_array_equal(again.example(*place)["inputs"], found[place])
    assert np.mean([(found[0, i] != found[1, i]).any() for i in range(20)]) > 0.2
    assert np.mean([(other.example(*place)["inputs"] != found[place]).any() for place in places]) > 0.2
    plain = load().training(DIGITS, seed=3)
    np.testing.assert_array_equal(
        plain.example(0, 1)["inputs"], load(**options).evaluation("train", DIGITS).example(0, 1)["inputs"]
    )


def test_what_augmentation_does():
    plain = load().training(DIGITS, 0)
    shifted, flipped = load(shift=1).training(DIGITS, 0), load(flip=True).training(DIGITS, 0)
    moves, mirrored = set(), []
    for i in range(60):
        whole, moved = plain.example(0, i)["inputs"], shifted.example(0, i)["inputs"]
        padded = np.pad(whole, ((1, 1), (1, 1), (0, 0)))
        moves |= {(y, x) for y in range(3) for x in range(3) if (padded[y : y + 8, x : x + 8] == moved).all()}
        mirror = flipped.example(0, i)["inputs"]
        assert (mirror == whole).all() or (mirror == whole[:, ::-1]).all()
        mirrored.append((mirror != whole).any())
    assert len(moves) == 9
    assert 15 < sum(mirrored) < 45


def test_a_crop_has_the_area_that_was_asked_for():
    row, column = np.mgrid[:100, :200].astype(np.float32)
    ramp = np.stack([column / 200 * 255, row / 100 * 255, 0 * row], -1).astype(np.uint8)
    source = images.Images(np.array([ramp]), np.zeros(1, np.int32), 32, 3, ImagesConfig(crop=0.5), 0)
    areas = []
    for epoch in range(40):
        pixels = source.example(epoch, 0)["inputs"].astype(float)
        width, height = np.ptp(pixels[..., 0]) / 255, np.ptp(pixels[..., 1]) / 255
        areas.append(width * height)
    assert 0.35 < min(areas) < 0.55  # the ends of a ramp are blurred, and crops end at the border
    assert max(areas) > 0.75


def test_batches_are_the_same_for_every_number_of_threads_and_processes(folder):
    def batches(positions, threads, start=0):
        source = load(folder, threads=threads, crop=0.5, flip=True).training(MODEL, 0)
        found = pipeline.training_batches(source, 4, 0, positions, start, prefetch=3)
        return [next(found)["inputs"] for _ in range(6)]

    whole = batches(range(4), 1)
    np.testing.assert_array_equal(whole, batches(range(4), 3))
    np.testing.assert_array_equal(np.array(whole)[:, [1, 3]], batches([1, 3], 2))
    np.testing.assert_array_equal(whole[2:], batches(range(4), 2, start=2)[:4])
    one, four = (load(folder, threads=threads).evaluation("all", MODEL) for threads in (1, 4))
    for x, y in zip(*(pipeline.evaluation_batches(each, 8, range(8)) for each in (one, four)), strict=True):
        np.testing.assert_array_equal(x["inputs"], y["inputs"])
        np.testing.assert_array_equal(x["targets"], y["targets"])


def broken(folder):
    whole = (folder / "red" / "3.png").read_bytes()
    (folder / "red" / "3.png").write_bytes(whole[: len(whole) // 2])


def another_file(folder):
    (folder / "red" / "3.png").write_text("This is no image.")


def empty_class(folder):
    (folder / "green").mkdir()


def one_class(folder):
    (folder / "red").rename(folder / "blue" / "red")


def no_class(folder):
    for name in ("red", "blue"):
        (folder / name).rename(folder.parent / name)


def no_validation(folder):
    (folder / "red").rename(folder / "train")


def stranger(folder):
    draw(folder / "train" / "red" / "0.png", "red")
    draw(folder / "train" / "blue" / "0.png", "blue")
    draw(folder / "val" / "red" / "0.png", "red")
    draw(folder / "val" / "pink" / "0.png", "pink")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken, r"red/3\.png cannot be read as an image \(.*\); repair or remove it\."),
        (another_file, r"red/3\.png cannot be read as an image \(cannot identify image file\); repair or remove it"),
        (empty_class, r"photos/green holds no images \(\.bmp, "),
        (one_class, r"photos needs a folder of images for each of at least two classes, and has only one, blue\."),
        (no_class, r"photos needs a folder of images for each of at least two classes, and has none\."),
        (no_validation, r"photos has a folder train, but no folder val with images for validation\."),
        (stranger, r"val/pink is none of the 2 classes that the model was trained on\."),
        (lambda folder: folder.rename(folder.parent / "away"), r"data\.path: there is no folder .*photos\."),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_damage_of_a_folder_is_reported_in_one_sentence(folder, damage, message):
    def read():
        return list(pipeline.evaluation_batches(load(folder).evaluation("all", MODEL), 4, range(4)))

    read()
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


def test_files_that_are_left_out_of_a_folder_are_reported(folder, tmp_path, capsys):
    """The rule is that for texts, and a folder is not an image, whatever its name is."""
    draw(tmp_path / "elsewhere" / "0.png", (0, 0, 255))
    draw(folder / "red" / "._3.png", (0, 0, 255))
    draw(folder / "red" / ".ipynb_checkpoints" / "3-checkpoint.png", (0, 0, 255))
    draw(folder / "red" / "more.png" / "0.png", (200, 0, 0))
    draw(folder / "loose.png", (0, 0, 255))
    (folder / "red" / "_SUCCESS").write_bytes(b"")
    (folder / "red" / "empty.png").write_bytes(b"")
    (folder / "red" / "gone.png").symlink_to("nowhere.png")
    (folder / "blue" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "crimson").symlink_to("red")
    os.mkfifo(folder / "blue" / "pipe.png")
    found = ImagesConfig(path=str(folder)).load(None, MODEL)
    assert found.tokenizer.names == ("blue", "red")
    assert [path.name for path in found.evaluation("all", MODEL).images if path.parent.name in ("linked", "more.png")]
    assert len(found.evaluation("all", MODEL)) == 14
    (line,) = capsys.readouterr().out.splitlines()
    for part in (
        "hidden: .hidden, red/._3.png, red/.ipynb_checkpoints",
        "outside the folders of classes: loose.png",
        "empty: red/_SUCCESS, red/empty.png",
        "broken links: red/gone.png",
        "links to folders that are read anyway: crimson",
        "pipes: blue/pipe.png",
        "of another type: red/notes.txt",
    ):
        assert part in line
    assert PixelsConfig(path=str(folder)).load(TokenizerConfig(), None).describe().startswith("11 train")
    assert capsys.readouterr().out.splitlines() == [line]


def test_folders_beside_the_two_splits_are_reported(tmp_path, capsys):
    for part in ("train", "val", "test"):
        for color in ("red", "blue"):
            draw(tmp_path / part / color / "0.png", color)
    ImagesConfig(path=str(tmp_path)).load(None, MODEL)
    assert capsys.readouterr().out.splitlines() == [
        f"note   left out of data.path={tmp_path}: beside train and val: test"
    ]


def no_image(path):
    path.write_text("no image")


def with_postscript(path):
    """Writes PostScript, which Pillow would pass to Ghostscript."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def of_many_pixels(path):
    Image.new("1", (20_000, 10_000)).save(path, "PNG")


def a_pipe(path):
    os.mkfifo(path)


def a_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_image, "cannot be read as an image \\(cannot identify image file\\)"),
        (with_postscript, "cannot be read as an image \\(cannot identify image file\\)"),
        (of_many_pixels, "cannot be read as an image \\(200,000,000 pixels are more than 100,000,000\\)"),
        (a_pipe, "is a pipe and not a regular file"),
        (a_device, "is a device and not a regular file"),
        (lambda path: path.mkdir(), "is a folder and not a regular file"),
        (lambda path: None, "there is no file .*cat\\.png"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_files_that_are_no_images_are_refused_and_start_nothing(tmp_path, monkeypatch, make, message):
    path, kind = tmp_path / "cat.png", PixelsConfig(image_size=8)
    make(path)
    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a program was started"))
    palette = Palette(((0,), (255,)), kind.image_size, ("cat",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (lambda: ImagesConfig().inputs(str(path), MODEL), lambda: palette.encode(f"half:{path}")):
            with pytest.raises(UserError, match=message) as error:
                read()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a", "https://example.org/a.png", "x" * 300])
def test_a_path_that_leads_nowhere_is_a_sentence(path):
    for read in (lambda: load(path), lambda: ImagesConfig().inputs(path, MODEL)):
        with pytest.raises(UserError, match=r"(data\.path|--prompt): "):
            read()


def test_a_large_jpeg_is_read_at_a_lower_resolution(tmp_path):
    """The limit applies to the decoded image."""
    Image.new("L", (13_000, 9_000), 200).save(tmp_path / "large.jpg")
    # The scale is 1/8, the smallest that libjpeg offers, and not below twice the requested size.
    assert images.decode(tmp_path / "large.jpg", 1, 500).size == (1625, 1125)
    with pytest.raises(UserError, match="117,000,000 pixels are more than"):
        images.decode(tmp_path / "large.jpg", 1)


@pytest.mark.parametrize("format_", images.FORMATS)
def test_damaged_images_of_every_format_are_a_sentence(tmp_path, format_):
    """This holds for all errors that decoders raise."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path, rng = tmp_path / "x.png", np.random.default_rng(1)
    Image.fromarray(pixels).save(path, format_)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(200, len(whole)), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(8, len(whole))])
        try:
            ImagesConfig().inputs(str(path), MODEL)
        except UserError as error:
            assert re.search(r"x\.png cannot be read as an image \(.+\); repair or remove it", str(error))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0 has to be greater than 0 and less than 1\.$"),
        ({"crop": 0.0}, r"data\.crop=0\.0 has to be greater than 0 and at most 1"),
        ({"shift": -1}, r"data\.shift=-1 must not be negative"),
        ({"threads": 0}, r"data\.threads=0 has to be greater than 0"),
        ({"resize": -1}, r"data\.resize=-1 must not be negative"),
        ({"resample": "nearest"}, r"data\.resample='nearest' is not known; choose one of bilinear, bicubic, lanczos"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        ImagesConfig(**options)


def test_a_resize_below_the_images_of_the_model_is_refused(folder):
    load(folder, resize=8).evaluation("val", MODEL)
    for read in (lambda data: data.training(MODEL, 0), lambda data: data.config.inputs(str(folder), MODEL)):
        with pytest.raises(UserError, match=r"data\.resize=7 has to be at least 8, the size of the model's images"):
            read(load(folder, resize=7))


def test_too_few_images_for_two_sides(folder):
    with pytest.raises(UserError, match=r"data\.validation_fraction=0\.01 of 12 images leaves a split empty"):
        load(folder, validation_fraction=0.01)


def test_classes_of_a_model_stay_what_they_are(folder):
    labels = Labels(("red", "green", "blue"))
    found = load(folder, labels).evaluation("all", MODEL)
    assert {int(found.example(0, i)["targets"]) for i in range(12)} == {0, 2}
    with pytest.raises(UserError, match=r"photos/red is none of the 2 classes that the model was trained on"):
        load(folder, Labels(("blue", "green")))


def test_a_stride_is_refused():
    with pytest.raises(UsageError, match=r"--stride=4 is for texts; this data has no windows"):
        load().evaluation("val", DIGITS, stride=4)


@pytest.fixture
def run(folder) -> Config:
    return Config(
        model=MODEL,
        data=ImagesConfig(path=str(folder), validation_fraction=0.25, flip=True),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(batch_size=8, steps=12, log_every=4, eval_every=6, checkpoint_every=6),
    )


def test_a_run_on_a_folder_learns_and_is_evaluated_and_sampled(run, folder, tmp_path, command, capsys):
    workdir = Workdir(tmp_path / "run")
    assert train.train(run, workdir) == 0
    assert "accuracy 100.00%" in capsys.readouterr().out  # to tell red from blue is easy
    shown = command("evaluate", f"--workdir={workdir.path}", "--json")
    assert re.search(r'"images": 3, "loss": [\d.e-]+, "accuracy": 1.0', shown.stdout), shown.stderr
    files = [str(folder / "red" / "0.png"), str(folder / "blue" / "more" / "0.JPG")]
    shown = command("sample", f"--workdir={workdir.path}", *(f"--prompt={file}" for file in files))
    pattern = rf"{files[0]}: red, [\d.]+%\n{files[1]}: blue, [\d.]+%\n"
    assert re.fullmatch(pattern, shown.stdout), shown.stderr
    shown = command("sample", f"--workdir={workdir.path}", f"--prompt={folder / 'red' / 'notes.txt'}")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert re.fullmatch(
        r"error: .*notes\.txt cannot be read as an image \(.*\); repair or remove it.*\n",
        shown.stderr.splitlines(True)[-1],
    )


def test_a_broken_image_ends_a_run_with_a_sentence(run, folder, tmp_path):
    broken(folder)
    broken_everywhere = dataclasses.replace(run, data=dataclasses.replace(run.data, validation_fraction=0.1))
    with pytest.raises(UserError, match=r"red/3\.png cannot be read as an image"):
        train.train(broken_everywhere, Workdir(tmp_path / "run"))
