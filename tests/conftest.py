"""Eight virtual CPU devices for every test, and a compilation cache that the tests share."""

import os
import tempfile
from pathlib import Path

# Before the first import of JAX. Processes that the tests start inherit all of it.
CACHE = Path(tempfile.gettempdir()) / f"gpt-test-cache-{os.getuid()}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # As `gpt.backend` sets it, so that a test and a process that it starts compute alike.
        "--xla_cpu_experimental_ynn_fusion_type=",
        # Most of the time goes into compiling tiny programs, which need not be fast.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # hundreds of tiny programs add up
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.pop("GPT_CACHE_DIR", None)

import dataclasses  # noqa: E402
import gc  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402

import browser as chromium  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from forked import warm  # noqa: E402

from gpt.config import Config, TrainConfig  # noqa: E402
from gpt.data import tokens  # noqa: E402
from gpt.models.gpt import GPTConfig  # noqa: E402
from gpt.runtime.cache import Cache  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Thousands of compiled programs would fill the memory of a process that runs many files, and slow it down."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def play(tmp_path_factory) -> Path:
    """A text file of 30,000 characters."""
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(tokens.shakespeare(Cache()).read_text()[:30_000])
    return path


@pytest.fixture
def tiny(play) -> Config:
    """A run of 20 steps that takes seconds, with dropout on, and an evaluation and a checkpoint on the way."""
    return Config(
        model=GPTConfig(num_layers=2, num_heads=8, embed_dim=32, block_size=16, vocab_multiple=8),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=TrainConfig(
            batch_size=16, steps=20, log_every=1, eval_every=10, checkpoint_every=5, sample_tokens=8, keep_checkpoints=9
        ),
    )


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory) -> Iterator[chromium.Browser]:
    started = chromium.start(tmp_path_factory.mktemp("chromium"))
    yield started
    started.driver.quit()


@pytest.fixture
def browser(_chromium) -> Iterator[chromium.Browser]:
    """A headless Chromium: `page = browser.open(path, width=400, dark=True)`, and `page` is Selenium's driver.

    A test fails if a page that it opens has an error in the console, or requests anything from the network.
    """
    _chromium.problems()
    yield _chromium
    assert not _chromium.problems()


@pytest.fixture(scope="session")
def command():
    """Runs `python -m gpt.NAME FLAGS…` as a user would, in a fork of a process that has imported everything.

    With `fresh`, the command imports everything itself, and does not find the packages that `missing` names.
    """

    def run(
        name: str, *flags: str, fresh: bool = False, missing: Sequence[str] = (), **options
    ) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT} | options
        start = ["-m", f"gpt.{name}"]
        if missing:
            hide = f"sys.modules.update(dict.fromkeys({missing!r}))"
            start = ["-c", f"import runpy, sys; {hide}; runpy.run_module('gpt.{name}', None, '__main__', True)"]
        if fresh or missing:
            return subprocess.run([sys.executable, *start, *flags], **options)
        start = [*warm(), *start]
        if "env" in options:
            options["env"] = options["env"] | {"GPT_TEST_SERVER": os.environ["GPT_TEST_SERVER"]}
        return subprocess.run([*start, *flags], **options)

    return run
