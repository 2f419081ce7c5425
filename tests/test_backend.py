"""Settings of JAX and XLA for the machine, and what the runtime needs of the operating system."""

import dataclasses
import os
import re
import runpy
from pathlib import Path

import jax
import pytest

from gpt.config import Config, from_tree
from gpt.models.gpt import GPTConfig
from gpt.runtime import backend
from gpt.sharding import MeshConfig

ROOT = Path(__file__).parent.parent
CONFIG = Config(model=GPTConfig(num_layers=1, num_heads=2, embed_dim=64))
GB = 1e9


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [(128, 1, 1), (128, 2, 2), (128, 6, 4), (12, 6, 6), (12, 8, 6), (7, 2, 1), (0, 6, 6), (1, 4, 1), (128, 64, 8)],
)
def test_the_devices_of_a_cpu_divide_the_rows(rows, cores, expected):
    assert backend.cpu_devices(CONFIG.work(rows), cores, 64 * GB) == expected


@pytest.mark.parametrize(("rows", "expected"), [(16, 1), (128, 2), (1024, 8)])
def test_the_devices_of_a_cpu_have_enough_tokens_for_their_parameters(rows, expected):
    """The default model has 29 million parameters with the largest vocabulary, and an example has 128 tokens."""
    assert backend.cpu_devices(Config().work(rows), 8, 64 * GB) == expected


def test_the_devices_of_a_cpu_leave_memory():
    model = GPTConfig(vocab_size=50257, block_size=1024, num_layers=12, num_heads=12, embed_dim=768)
    config = dataclasses.replace(CONFIG, model=model)
    assert backend.cpu_devices(config.work(256), 8, 16 * GB) == 2  # 2 GB for each device
    assert backend.cpu_devices(config.work(256), 8, 64 * GB) == 8
    assert backend.cpu_devices(config.work(256), 8, 2 * GB) == 1


@pytest.mark.parametrize(
    ("mesh", "rows", "expected"),
    [
        (MeshConfig("dp", data=1), 128, 1),
        (MeshConfig("fsdp_tp", model=2), 128, 8),
        (MeshConfig("fsdp_tp", model=2), 98, 4),
        (MeshConfig("fsdp_tp", fsdp=1, model=3, data=1), 128, 3),
        (MeshConfig("fsdp", fsdp=16), 128, 16),
        (MeshConfig("fsdp_tp", data=4, model=4), 128, 16),
        (MeshConfig("fsdp", fsdp=16), 100, 1),
    ],
)
def test_a_cpu_has_the_devices_that_the_mesh_wants(mesh, rows, expected):
    assert backend.cpu_devices(dataclasses.replace(CONFIG, mesh=mesh).work(rows), 8, 64 * GB) == expected


def test_the_devices_of_a_cpu_stay_once_jax_has_created_them(monkeypatch):
    """A notebook calls several functions that divide the CPU. JAX would refuse the second call."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("JAX is in use"))
    assert jax.devices()
    backend.divide_cpu(CONFIG.work(128))


def test_help_lists_the_flags_that_commands_share(command):
    shown = command("main", "--help").stdout
    for flag in ("config", "workdir", "coordinator", "num_processes", "process_id", "profile"):
        assert f"\n  --{flag} " in shown


def test_a_program_uses_all_cores_and_keeps_what_it_compiled(command, play, tmp_path):
    """The program runs as a user starts it, without the settings of the tests."""
    config = from_tree(runpy.run_path(str(ROOT / "configs" / "char_tiny.py"))["get_config"]())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "GPT_CACHE_DIR": str(tmp_path / "cache")}
    flags = [
        "--config=configs/char_tiny.py",
        "--config.train.steps=2",
        "--config.train.sample_tokens=0",
        f"--config.data.path={play}",
    ]
    done = command("main", *flags, f"--workdir={tmp_path / 'run'}", env=environment)
    assert done.returncode == 0, done.stderr
    count = backend.cpu_devices(config.work(config.train.batch_size), len(os.sched_getaffinity(0)), 64 * GB)
    assert re.search(rf"mesh   data={count} .* over {count} × cpu", done.stdout)
    assert any((tmp_path / "cache" / "xla").glob("*-cache"))
    assert any((tmp_path / "cache").glob("tokens-*/*.npy"))
