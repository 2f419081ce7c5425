"""README.md and the guides: every link, file, flag and config key exists, and in the slow tier every command runs."""

import ast
import json
import re
import subprocess
import sys

import count_lines
import guides
import pytest
from guides import GUIDES, ROOT

from gpt import config_files
from gpt.config import known_keys

COMMANDS = sorted(
    path.stem for path in (ROOT / "gpt").glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
# Prints the names of the flags of each command, which share names, and so cannot be imported together.
LIST_FLAGS = """
import importlib, json, sys
from absl import flags
names = {}
for command in sys.argv[1:]:
    before = set(flags.FLAGS)
    importlib.import_module(f"gpt.{command}")
    from gpt.runtime import cli  # its flags stay
    names[command] = [f for f in flags.FLAGS if f not in before]
    for name in names[command]:
        delattr(flags.FLAGS, name)
print(json.dumps(names))
"""


def text_of(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


def slug(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def flags_of() -> dict[str, list[str]]:
    """The flags of each command."""
    result = subprocess.run(
        [sys.executable, "-c", LIST_FLAGS, *COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def test_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 180
    assert {"plot", "main", "tokenize", "evaluate", "sample", "plan", "convert", "explain", "runs"} == set(COMMANDS)
    assert all(f"gpt.{command}" in text_of("README.md") for command in COMMANDS)


def test_readme_names_all_configs_and_guides():
    readme = text_of("README.md")
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert f"configs/{path.name}" in readme
    for guide in set(GUIDES) - {"README.md"}:
        assert f"]({guide})" in readme, guide


def test_the_core_is_short():
    assert count_lines.core_lines() <= count_lines.MOST_IN_CORE


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    text = re.sub(r"^```.*?^```", "", text_of(guide), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / guide).parent / name if name else ROOT / guide
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("guide", GUIDES)
def test_files_exist(guide):
    """Paths from the root of the repository in code spans and blocks, and names of tests."""
    if guide == ".github/CHANGELOG.md":  # names files of the past
        return
    for name in re.findall(r"(?<![\w./])((?:gpt|configs|launch|tests|\.github)/[\w./-]*\w\.\w+)", text_of(guide)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", text_of(guide)):
        assert (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_have_these_flags(guide, flags_of):
    """The commands of blocks and code spans: modules, flags, and keys and values of configs."""
    text = text_of(guide)
    commands = [command for block in guides.blocks(text) for command in block.commands]
    for command in [*commands, *guides.inline_commands(text)]:
        for program, arguments in guides.programs(command):
            names = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
            if not program.startswith("gpt."):
                script = text_of(program)
                assert all(f'"--{name}"' in script for name in names), command
                continue
            known = flags_of[program.removeprefix("gpt.")]
            for name in names:
                if name.startswith("config."):
                    key = name.removeprefix("config.")
                    assert key in known_keys() or key.isupper(), f"{command}: {name}"
                else:
                    assert name.removeprefix("no") in known or name in (*known, "help"), f"{command}: --{name}"
            check_config(arguments)


def check_config(arguments: list[str]) -> None:
    """Checks that a config file takes its argument and the changes of a command, if these are no placeholders."""
    place = guides.flag(arguments, "config")
    if place is None or re.search(r"\b[A-Z]{2,}\b|…", " ".join(arguments)) or "finetune.py:" in place:
        return
    changes = [word.removeprefix("--config.").partition("=") for word in arguments if word.startswith("--config.")]
    config_files.read(str(ROOT / place), [(key, value if equals else None) for key, equals, value in changes])


@pytest.mark.parametrize("guide", GUIDES)
def test_keys_and_python_are_valid(guide):
    text = text_of(guide)
    for key in re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", text):
        assert key in known_keys(), key
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        ast.parse(block)


def test_each_command_either_runs_or_has_a_reason():
    """Only commands of this project run: `python -m gpt.…`, scripts of launch/ and tests/, and echo in a pipeline."""
    for guide in GUIDES:
        for block in guides.blocks(text_of(guide)):
            for command in (part for line in block.commands for part in guides.simple_commands(line)):
                runs = re.match(
                    r"(\w+=\S+ )*(python -m gpt\.|python tests/|launch/|echo .*\| python -m gpt\.)", command
                )
                assert runs or guides.reason_not_to_run(command), f"{guide}: {command}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if list(guides.blocks(text_of(guide)))])
def test_commands_run(guide, tmp_path, play):
    """Each command succeeds, and each block prints what the guide states."""
    sandbox = guides.Sandbox(tmp_path, play.read_text())
    for block in guides.blocks(text_of(guide)):
        output, complete = "", True
        for command in (part for line in block.commands for part in guides.simple_commands(line)):
            lacks_text = "tinyshakespeare.txt" in command and not guides.tinyshakespeare()
            if guides.reason_not_to_run(command) or lacks_text:
                complete = complete and not lacks_text
                continue
            output += sandbox.run(command, block.full)
        for expected in block.expected if complete else ():
            assert re.search(expected, output), f"{guide}:{block.line}: {expected}\n{output[-3000:]}"


@pytest.mark.slow
def test_python_of_readme_runs(tmp_path, play):
    """The Python block of README.md, with two steps and without the plan, which needs the TPU's compiler."""
    sandbox = guides.Sandbox(tmp_path, play.read_text())
    (block,) = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.M | re.S)
    short = block.replace('"train.steps": 200', f'"train.steps": 2, "data.path": "{guides.TEXT}"')
    assert short != block
    (tmp_path / "door.py").write_text("\n".join(line for line in short.splitlines() if "plan_step" not in line))
    result = subprocess.run(
        [sys.executable, "door.py"], cwd=tmp_path, env=sandbox.environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert "'loss'" in result.stdout


def test_every_test_in_the_table_of_faults_exists():
    rows = [line for line in text_of("gpt/checkpointing/README.md").splitlines() if "`test_" in line]
    assert len(rows) > 50
    for row in rows:
        for file, fragments in re.findall(r"`(test_\w+\.py)`: ((?:`\w+`(?: \([^)]*\))?(?:, |; )?)+)", row):
            names = re.findall(r"^def (test_\w+)", text_of(f"tests/{file}"), re.M)
            for fragment in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", fragments)):
                assert any(fragment in name for name in names), f"{file}: {fragment}"
