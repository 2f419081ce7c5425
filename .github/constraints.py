"""Writes the installed versions of all direct and indirect dependencies of `gpt-spmd[test]` to constraints.txt.

python .github/constraints.py
"""

import importlib.metadata
import platform
import re
from pathlib import Path

from packaging.requirements import Requirement


def closure(root: str) -> dict[str, str]:
    """Returns the version of each installed package that a requirement needs, by name, without the package itself."""
    versions: dict[str, str] = {}
    todo, seen = [Requirement(root)], set()
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        try:
            package = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or an extra that is not installed
        versions[name] = package.version
        for text in package.requires or []:
            needed = Requirement(text)
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    del versions[re.sub(r"[-_.]+", "-", Requirement(root).name).lower()]
    return versions


def main() -> None:
    versions = closure("gpt-spmd[test]")
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = [f"# Versions with which the tests passed: {system}. Written by .github/constraints.py."]
    lines += [f"{name}=={version}" for name, version in sorted(versions.items())]
    Path(__file__).with_name("constraints.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
