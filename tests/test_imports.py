"""The floors of the house: imports point downwards, without a circle, and only commands define flags."""

import ast
from pathlib import Path

import count_lines
import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A module may import from the floors below its own, and from its own folder.
FLOORS = (
    ("gpt.runtime",),
    ("gpt.models", "gpt.sharding"),
    ("gpt.muon",),
    ("gpt.optimizer",),
    ("gpt.data",),
    ("gpt.losses", "gpt.statistics"),
    ("gpt.config",),
    ("gpt.config_files",),
    ("gpt.step",),
    ("gpt.checkpointing", "gpt.parameters"),
    ("gpt.inference",),
    ("gpt.interop", "gpt.planning"),
    ("gpt.reporting",),
    ("gpt.train",),
    ("gpt",),
    (
        "gpt.main",
        "gpt.tokenize",
        "gpt.evaluate",
        "gpt.sample",
        "gpt.convert",
        "gpt.plan",
        "gpt.explain",
        "gpt.plot",
        "gpt.runs",
    ),
)
PLACES = {place: floor for floor, places in enumerate(FLOORS) for place in places}
FILES = sorted((ROOT / "gpt").rglob("*.py"))
COMMANDS = FLOORS[-1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Returns the modules of gpt that a file imports anywhere: in functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "gpt"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not followed here"
            if node.module and node.module.split(".")[0] == "gpt":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in NAMES else node.module)
    return found - {module_name(path)}


ARROWS = {module_name(path): imported(path) for path in FILES}


def place(module: str) -> str:
    """Returns the folder or file of `FLOORS` that a module belongs to."""
    return module if module in PLACES else ".".join(module.split(".")[:2])


def test_every_module_has_a_floor():
    assert {place(module) for module in NAMES} == PLACES.keys()


@pytest.mark.parametrize("module", sorted(NAMES))
def test_imports_point_downwards(module):
    for other in ARROWS[module]:
        if place(other) != place(module):
            assert PLACES[place(other)] < PLACES[place(module)], f"{module} imports {other}, on a floor above or beside"


def test_there_is_no_circle():
    done, waiting = set(), []

    def visit(module: str) -> None:
        assert module not in waiting, f"circle: {' -> '.join([*waiting[waiting.index(module) :], module])}"
        if module not in done:
            waiting.append(module)
            for other in sorted(ARROWS[module]):
                visit(other)
            waiting.pop()
            done.add(module)

    for module in sorted(NAMES):
        visit(module)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_commands_define_flags(path):
    """The functions of `gpt.runtime.cli` do so too, when a command calls them."""
    tree = ast.parse(path.read_text())
    in_functions = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith(("DEFINE_", "adopt_module_key_flags")):
            is_shared = module_name(path) == "gpt.runtime.cli" and id(node) in in_functions
            assert module_name(path) in COMMANDS or is_shared, f"{path}:{node.lineno}"


def test_the_whole_is_small():
    assert sum(map(count_lines.count, FILES)) <= 12_700


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_short(command):
    assert count_lines.count(ROOT / f"{command.replace('.', '/')}.py") <= 60
