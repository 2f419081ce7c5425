"""The loss that the character model reaches on tinyshakespeare in nanoGPT's small setting; slow."""

import json
import os

import guides
import pytest

TINYSHAKESPEARE = guides.tinyshakespeare()


@pytest.mark.slow
@pytest.mark.skipif(not TINYSHAKESPEARE, reason="tinyshakespeare.txt is missing; see configs/README.md")
def test_nanogpts_small_setting_reaches_its_loss(command, tmp_path):
    """4 layers, 4 heads, 128 wide, block 64, 2,000 steps of 12 rows, no dropout: 1.88 on the whole validation split."""
    flags = (
        "--config=configs/char_tiny.py",
        f"--config.data.path={TINYSHAKESPEARE[0]}",
        "--config.train.batch_size=12",
        "--config.train.steps=2000",
        f"--workdir={tmp_path}",
    )
    one_device = {"timeout": 1200, "env": os.environ | {"XLA_FLAGS": ""}}
    assert command("main", *flags, **one_device).returncode == 0
    report = json.loads(command("evaluate", f"--workdir={tmp_path}", "--json", **one_device).stdout)
    assert report["tokens"] == 111_539
    assert report["loss"] <= 1.88
