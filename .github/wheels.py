"""Prints for which platforms and versions of Python there are wheels of every dependency that contains compiled code.

    python .github/wheels.py "jaxlib>=0.10.2" "numpy>=2.0" tensorstore

pip resolves each package for the platform without downloading or installing it. Wheels of pure Python fit everywhere.
"""

import subprocess
import sys
import tempfile

LINUX = ("manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
LINUX += ("manylinux_2_12", "manylinux_2_5")
PLATFORMS = {
    "Linux x86-64": tuple(f"{tag}_x86_64" for tag in LINUX),
    "Linux arm64": tuple(f"{tag}_aarch64" for tag in LINUX),
    "macOS arm64": ("macosx_14_0_arm64",),
    "Windows x86-64": ("win_amd64",),
}
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def have_wheels(packages: list[str], platforms: tuple[str, ...], version: str) -> bool:
    """Returns whether pip finds wheels of all packages for one of the platform tags and a version of Python."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", f"--target={folder}", f"--python-version={version}", *packages]
        command += [f"--platform={platform}" for platform in platforms]
        return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    packages = sys.argv[1:]
    print("| platform |", " | ".join(VERSIONS), "|")
    print("|---|" + "---|" * len(VERSIONS))
    for name, tags in PLATFORMS.items():
        cells = []
        for version in VERSIONS:
            missing = []
            if not have_wheels(packages, tags, version):
                missing = [package for package in packages if not have_wheels([package], tags, version)]
            cells.append("not " + ", ".join(missing) if missing else "all")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
