"""The settings that a program makes for its machine."""

import dataclasses
import os
import re

import pytest

from gpt import backend
from gpt.config import Config, TrainConfig
from gpt.models.gpt import GPTConfig
from gpt.sharding import MeshConfig

CONFIG = Config()
GB = 1e9


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [(128, 1, 1), (128, 2, 2), (128, 6, 4), (12, 6, 6), (12, 8, 6), (7, 2, 1), (0, 6, 6), (1, 4, 1), (128, 64, 8)],
)
def test_the_devices_of_a_cpu_divide_the_rows(rows, cores, expected):
    assert backend.cpu_devices(CONFIG, rows, cores, 64 * GB) == expected


def test_the_devices_of_a_cpu_leave_memory():
    config = dataclasses.replace(CONFIG, model=GPTConfig(vocab_size=50257, num_layers=12, num_heads=12, embed_dim=768))
    assert backend.cpu_devices(config, 128, 8, 16 * GB) == 2  # of 2 GB each
    assert backend.cpu_devices(config, 128, 8, 64 * GB) == 8
    assert backend.cpu_devices(config, 128, 8, 2 * GB) == 1


@pytest.mark.parametrize(
    ("mesh", "rows", "expected"),
    [
        (MeshConfig("dp", data=1), 128, 1),
        (MeshConfig("fsdp_tp", model=2), 128, 8),
        (MeshConfig("fsdp_tp", model=2), 2, 4),
        (MeshConfig("fsdp_tp", fsdp=1, model=3, data=1), 128, 3),
        (MeshConfig("fsdp", fsdp=16), 128, 16),
        (MeshConfig("fsdp_tp", data=4, model=4), 128, 16),
        (MeshConfig("fsdp", fsdp=16), 100, 1),
    ],
)
def test_a_cpu_has_the_devices_that_the_mesh_wants(mesh, rows, expected):
    assert backend.cpu_devices(dataclasses.replace(CONFIG, mesh=mesh), rows, 8, 64 * GB) == expected


def test_a_program_uses_all_cores_and_keeps_what_it_compiled(command, play, tmp_path):
    """As a user starts it: without the settings of the tests."""
    train = TrainConfig(batch_size=4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    flags = [
        "--config=configs/char_tiny.py",
        f"--config.train.batch_size={train.batch_size}",
        "--config.model.num_layers=1",
        "--config.train.steps=2",
        "--config.train.sample_tokens=0",
        f"--config.data.path={play}",
    ]
    done = command("main", *flags, f"--workdir={tmp_path / 'run'}", env=environment)
    assert done.returncode == 0, done.stderr
    count = backend.cpu_devices(CONFIG, train.batch_size, len(os.sched_getaffinity(0)), 64 * GB)
    assert re.search(rf"mesh   data={count} .* over {count} × cpu", done.stdout)
    assert any((tmp_path / "cache" / "gpt" / "xla").iterdir())
