"""Counts lines of code per folder of gpt/ and of the core path, without blank lines, comments and docstrings.

python tests/count_lines.py
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "gpt"
CORE = ("main", "train", "step", "sharding", "optimizer", "config", "data/base", "data/pipeline")
CORE += ("models/base", "models/transformer", "models/attention", "models/layers", "models/mesh", "models/gpt")
MOST_IN_CORE = 1800
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count(path: Path) -> int:
    """Returns the number of lines of code of a Python file."""
    text, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def core_lines() -> int:
    """Returns the number of lines of code of the core path."""
    return sum(count(ROOT / f"{name}.py") for name in CORE)


def main() -> None:
    folders: Counter[str] = Counter()
    for path in sorted(ROOT.rglob("*.py")):
        folders[str(path.parent.relative_to(ROOT.parent))] += count(path)
    for folder, lines in [*folders.items(), ("total", folders.total()), ("core path", core_lines())]:
        print(f"{folder:20}{lines:6,}")


if __name__ == "__main__":
    main()
