"""Phrases that .github/CONTRIBUTING.md rules out, in guides, scripts, docstrings, comments and strings."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("gpt", "configs", "launch", ".github")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".html")
FILES = [ROOT / "README.md", ROOT / "tests" / "README.md"]
FILES += sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)

# Phrase -> what to write instead.
PHRASES = {
    r"\bbinds\b(?! to\b)": "is the bottleneck, or memory-bound, compute-bound",
    r"\blaid\b": "placed, mapped, sharded",
    r"\bstrangers?\b": "another user, untrusted",
    r"\bsaid\b": "reported, predicted, printed",
    r"\bmistaken\b": "wrong, incorrect",
    r"\bthat (?:is|are) over\b(?! \d)": "finished",
    r"\b(?:is|are|was|were) not there\b": "does not exist, is missing, is not present",
    r"\bby (?:itself|themselves)\b": "automatically, alone, separately",
    r"\bthe predecessor\b": "name the project or the earlier version",
    r"\bgo(?:es)? on (?:with|where)\b": "continues, resumes",
    r"\bwhat lies where\b": "the shardings, the placement",
    r"\bas (?:it is|they are)(?=[.,;:)]|$)": "unchanged",
    r"\bof (?:its|their|his) own\b": "separate, own",
    r"\bto be had\b": "available",
    r"\bmade of\b": "consists of, is built from",
    r"\bin words\b": "as text",
    r"\btold\b": "specified, stated, passed",
    r"\b(?:ask|asks|asked) of\b": "requires",
    r"\ball tokens at once\b": "all tokens in one pass",
    r"\bfor ever\b": "without end, indefinitely",
    r"\bby halves\b": "partially",
    r"\blearnt by heart\b": "memorized, overfits",
    r"\bhas to bear\b|\bbears\b": "supports, tolerates",
    r"\bwhat binds\b": "what the bottleneck is",
}
# First words of a function's docstring, which starts with a verb.
NO_VERBS = {
    "A",
    "An",
    "The",
    "What",
    "Where",
    "Whether",
    "Which",
    "How",
    "Of",
    "All",
    "Each",
    "Every",
    "One",
    "As",
    "In",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the texts of a file with their first lines: of Python the comments and strings, of others everything."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, content
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    comment: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:  # the lines of a comment are one text
            first = first if comment else token.start[0]
            comment.append(token.string.lstrip("# "))
        elif token.type != tokenize.NL:
            if comment:
                yield first, "\n".join(comment)
                comment = []
            if token.type in kinds:
                yield token.start[0], token.string


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_phrase_is_ruled_out(path):
    found = []
    for line, text in texts(path):
        one_line = re.sub(r"\s", " ", text)  # a phrase may span two lines
        for phrase, instead in PHRASES.items():
            for match in re.finditer(phrase, one_line, re.I):
                at = line + text.count("\n", 0, match.start())
                found.append(f"{path.relative_to(ROOT)}:{at}: {match[0]!r}; write: {instead}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "gpt").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_of_functions_start_with_a_verb(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        first = (ast.get_docstring(node) or "").partition(" ")[0]
        if not is_property and first in NO_VERBS:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {first!r}")
    assert not found, "\n".join(found)
