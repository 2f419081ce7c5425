"""The wheel in an environment outside the repository: config files, console scripts, and the processes they start."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("--config.model.num_layers=1", "--config.model.embed_dim=16", "--config.train.sample_tokens=0")
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a console script of a wheel, in an environment that shares only the dependencies with that of the tests."""
    folder = tmp_path_factory.mktemp("install")
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source"]
    built = subprocess.run(wheel, capture_output=True, text=True)
    if built.returncode and "No matching distribution" in built.stderr:
        pytest.skip("pip cannot download setuptools, which builds the wheel")
    assert built.returncode == 0, built.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "venv" / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", *folder.glob("*.whl")]
    subprocess.run([*pip, "--python", python, *install], check=True)
    (folder / "empty").mkdir()

    def run(script: str, *flags: str, cwd: Path = folder / "empty") -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python.with_name(script), *flags]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_a_wheel_trains_in_an_empty_folder(installed, play):
    steps = ("--config.train.steps=2", "--config.train.eval_every=0", f"--config.data.path={play}")
    result = installed("gpt-train", "--config=configs/char_tiny.py", *SMALL, *steps)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "site-packages" in installed("python", "-c", "import gpt; print(gpt.__file__)").stdout
    listed = installed("gpt-runs")
    assert re.search("^char_tiny +finished +2/2 ", listed.stdout, re.M), listed
    missing = installed("gpt-train", "--config=configs/char_tny.py")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "did you mean configs/char_tiny.py?" in missing.stderr


def test_a_config_in_the_folder_comes_first(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "char_tiny.py").write_text("raise ValueError('mine')")
    result = installed("gpt-train", "--config=configs/char_tiny.py", cwd=tmp_path)
    assert result.stderr == "error: --config=configs/char_tiny.py: line 1: ValueError: mine.\n"


def test_a_console_script_starts_processes(installed, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 120_000)
    result = installed(
        "gpt-tokenize",
        "--data=text.txt",
        "--tokenizer=byte",
        "--out=shards",
        "--shard_mb=1",
        "--workers=2",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "3 parts" in result.stdout


def test_each_command_has_a_script_with_the_same_help(installed):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    scripts = re.findall(r"^(gpt-\w+) = ", settings["options.entry_points"]["console_scripts"], re.M)
    commands = [path.stem for path in (ROOT / "gpt").glob("*.py") if "cli.run(main" in path.read_text()]
    assert sorted(scripts) == sorted(f"gpt-{'train' if name == 'main' else name}" for name in commands)
    for script in scripts:
        module = "gpt." + script.removeprefix("gpt-").replace("train", "main")
        as_script, as_module = installed(script, "--help"), installed("python", "-m", module, "--help")
        assert as_script.returncode == 0, as_script.stderr
        assert as_script.stdout == as_module.stdout


def test_all_folders_of_code_are_packages():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "gpt").rglob("*.py")}
    assert set(settings["options"]["packages"].split()) == folders | {"gpt.configs"}
