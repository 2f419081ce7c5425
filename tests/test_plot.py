"""Plots of losses: what is on their axes, which runs are one line, and what is refused."""

import dataclasses

import numpy as np
import pytest

from gpt.checkpointing.run import Run
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.data.pixels import Palette, PixelsConfig
from gpt.data.tokenizers import CharTokenizer
from gpt.inference import plots
from gpt.models.gpt import GPTConfig
from gpt.runtime.errors import UserError
from gpt.runtime.loggers import Session
from gpt.runtime.tensorboard import TensorBoard

pytest.importorskip("matplotlib")

CONFIG = Config(model=GPTConfig(num_layers=1, num_heads=1, embed_dim=8, block_size=16))
LETTERS = CharTokenizer("abc")
TOKENS = CONFIG.train.batch_size * 16


@pytest.fixture
def trained(tmp_path):
    """A function that returns the workdir of a run with losses at steps 10, 20 and 30, and an evaluation after 35."""

    def make(name, offset=0.0, rates=(2.0, 2.0, 4.0), config=CONFIG, tokenizer=LETTERS, **changes):
        folder = Workdir(tmp_path / name)
        folder.create()
        folder.record(Run(dataclasses.replace(config, **changes), tokenizer, "digest"))
        events = TensorBoard(Session(folder.path))
        for step, rate in zip((10, 20, 30), rates, strict=False):
            events.scalars(step, {"train/loss": offset + 3 - step / 10, "progress/steps_per_second": rate})
        if rates:
            events.scalars(35, {"validation/loss": offset + 1})
        events.close(True)
        return folder

    return make


def drawn(folders, **options):
    return plots.read_losses(folders, [folder.read() for folder in folders], plots.Options(**options))


@pytest.mark.parametrize(
    ("x", "scale"),
    [
        ("step", 1),
        ("tokens", TOKENS),
        ("flops", TOKENS * dataclasses.replace(CONFIG.model, vocab_size=3).flops_per_token()),
    ],
)
def test_losses_over_steps_tokens_and_flops(trained, x, scale):
    (curves,) = drawn([trained("run")], x=x).values()
    np.testing.assert_allclose(curves["training"][0], scale * np.array([10, 20, 30]))
    np.testing.assert_allclose(curves["training"][1], [[2, 1, 0]])
    np.testing.assert_allclose(curves["validation"][0], [scale * 35])


def test_time_is_that_of_the_steps_and_not_of_pauses(trained):
    """All events are written within a second; by the rates, the steps between them take 5 s, 5 s and 2.5 s."""
    (curves,) = drawn([trained("run")], x="time").values()
    np.testing.assert_allclose(curves["training"][0], [5, 10, 12.5])
    np.testing.assert_allclose(curves["validation"][0], [12.5 + 5 / 4])


def test_runs_that_differ_only_in_the_seed_are_one_line(trained):
    folders = [trained(f"run-{seed}", offset, seed=seed) for seed, offset in ((1, 0), (2, 0.5), (3, 1))]
    folders.append(trained("wide", model=dataclasses.replace(CONFIG.model, embed_dim=16)))
    curves = drawn(folders)
    assert list(curves) == ["run-1 and others, mean of 3 seeds", "wide"]
    np.testing.assert_allclose(
        curves["run-1 and others, mean of 3 seeds"]["training"][1], [[2, 1, 0], [2.5, 1.5, 0.5], [3, 2, 1]]
    )
    assert list(drawn(folders, band=False)) == ["run-1", "run-2", "run-3", "wide"]


def test_a_group_ends_where_its_shortest_run_ends(trained):
    folders = [trained("run-1", seed=1), trained("run-2", rates=(1.0,), seed=2)]
    (curves,) = drawn(folders).values()
    np.testing.assert_allclose(curves["training"][0], [10])


def test_axes_and_legend_have_names(trained, tmp_path):
    """An SVG file of matplotlib has every text in a comment."""
    folders = [trained("a" * 100), trained("short", model=dataclasses.replace(CONFIG.model, embed_dim=16))]
    options = plots.Options(x="time", log="xy", dark=True)
    path = plots.draw_losses(folders, str(tmp_path / "loss.svg"), options)
    with open(path) as file:
        text = file.read()
    names = (
        "loss (nats per character)",
        "seconds of training steps",
        "short, training",
        f"{'a' * 23}…{'a' * 24}, validation",
    )
    for expected in names:
        assert f"<!-- {expected} -->" in text


def test_refusals(trained, tmp_path):
    letters, empty = trained("letters"), trained("empty", rates=())
    pixels = dataclasses.replace(CONFIG, data=PixelsConfig(), model=dataclasses.replace(CONFIG.model, block_size=4))
    images = trained("images", config=pixels, tokenizer=Palette(((0,), (255,)), 2, ("a",)))
    out = tmp_path / "loss.png"
    for folders, says in (
        ([letters, images], "per character .*letters.* and per pixel .*images.* are not comparable"),
        ([letters, empty], "empty has no losses on TensorBoard yet"),
    ):
        with pytest.raises(UserError, match=says):
            plots.draw_losses(folders, str(out), plots.Options())
        assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        plots.draw_losses([letters], str(out), plots.Options())
    assert out.read_text() == "mine"
