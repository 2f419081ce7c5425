"""The cache: intact or recomputed entries, their permissions, compiled programs, and the location of the folder."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from gpt.runtime import cache
from gpt.runtime.cache import VARIABLE, Cache
from gpt.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _forget_notes(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(cache, "_shown", set())
    cache._temporary_folder.cache_clear()
    yield
    cache._temporary_folder.cache_clear()


class Computation:
    """Computes an entry with a file, and counts how often."""

    count, mode = 0, 0o666

    def __call__(self, folder):
        self.count += 1
        with cache.create(folder / "a.txt", self.mode) as file:
            file.write(b"contents of a file " * 100)
        return {"name": "é", "numbers": [1, 0.1]}


def get(folder, compute):
    entry = Cache(str(folder)).entry("key", compute)
    assert entry.value == {"name": "é", "numbers": [1, 0.1]}
    assert entry.files["a.txt"].read_bytes() == b"contents of a file " * 100


def kept(folder) -> list[str]:
    """Returns the files in a cache, and not the folders for the files of its entries."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_in_secret(path):
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def folder_instead(path):
    path.unlink()
    path.symlink_to(path.parent)


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "flipped": flip,
    "flipped in secret": flip_in_secret,
    "binary": lambda path: path.write_bytes(b"\xff\n\0" * 50),
    "removed": Path.unlink,
    "of another type": folder_instead,
}


@pytest.mark.parametrize("name", ["key.entry", "key/a.txt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_computed_again(tmp_path, name, damage):
    compute = Computation()
    get(tmp_path, compute)
    get(tmp_path, compute)
    assert compute.count == 1
    DAMAGE[damage](tmp_path / name)
    get(tmp_path, compute)
    get(tmp_path, compute)
    assert compute.count == 2


def test_a_file_that_may_not_be_read_is_computed_again(tmp_path, monkeypatch):
    """For example, a file of another user."""
    compute, original = Computation(), Path.open
    get(tmp_path, compute)

    def refuse(path, *arguments, **options):
        if compute.count == 1 and path.suffix == ".txt":
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    get(tmp_path, compute)
    assert compute.count == 2


def test_a_copy_of_a_cache_serves_as_well(tmp_path, monkeypatch):
    compute = Computation()
    get(tmp_path / "a", compute)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    get(tmp_path / "b", compute)
    assert compute.count == 1
    monkeypatch.setattr(cache, "_sha256", lambda file: pytest.fail("it was read as a whole again"))
    get(tmp_path / "b", compute)


def test_those_who_compute_at_once_do_not_disturb_each_other(tmp_path):
    both = threading.Barrier(4)

    def compute(folder):
        with cache.create(folder / "a.txt") as out:
            for _ in range(10):
                out.write(b"contents of a file " * 10)
                both.wait()
        return {"name": "é", "numbers": [1, 0.1]}

    threads = [threading.Thread(target=get, args=(tmp_path, compute)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    get(tmp_path, lambda folder: pytest.fail("nobody stored it"))
    assert kept(tmp_path) == ["key.entry", "key/a.txt"]


@pytest.mark.parametrize(
    ("umask", "source", "expected"), [(0o022, 0o644, 0o644), (0o022, 0o600, 0o600), (0o077, 0o644, 0o600)]
)
def test_nobody_reads_in_the_cache_what_is_closed_elsewhere(tmp_path, umask, source, expected):
    before = os.umask(umask)
    compute = Computation()
    compute.mode = source
    try:
        Cache(str(tmp_path / "cache")).entry("key", compute, source)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "cache" / name).stat().st_mode & 0o777 for name in kept(tmp_path / "cache")}
    assert modes == {"key.entry": expected, "key/a.txt": expected}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """A computed value is returned although it cannot be stored. A file has to be stored, so the user gets an error."""

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    full_cache = Cache()
    assert [full_cache.entry(name, lambda folder: [1]).value for name in "ab"] == [[1], [1]]
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be written (No space left on device)" in line
    with pytest.raises(UserError, match=r"Cannot write .*key.*: No space left on device; set GPT_CACHE_DIR to another"):
        full_cache.entry("key", Computation())
    assert kept(tmp_path) == []


def test_a_disk_that_is_full_while_a_file_is_written(tmp_path):
    """The error of the system then names no file."""

    def compute(folder):
        with cache.create(folder / "a.txt"):
            raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"Cannot write .*key.*: No space left on device; set data\.cache_dir to another"
    ):
        Cache(str(tmp_path)).entry("key", compute)
    assert kept(tmp_path) == []


def test_an_error_of_the_computation_is_not_the_caches(tmp_path):
    def compute(folder):
        raise FileNotFoundError(2, "no compiler")

    with pytest.raises(FileNotFoundError, match="no compiler"):
        Cache(str(tmp_path)).entry("key", compute)


# Compiled programs.


def test_compiled_programs_are_whole_or_compiled_again(tmp_path):
    """A process can die while it stores a program; JAX itself compiles again what it cannot read."""
    environment = {"GPT_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    script = """if True:
        import jax, os
        from pathlib import Path
        from gpt.runtime import cache
        cache.keep_compiled(Path(os.environ["GPT_CACHE_DIR"]) / "xla")
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        print(jax.jit(lambda x: x * 2)(21))
    """

    def stored():
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
        return {path.name: path.read_bytes() for path in (tmp_path / "xla").glob("*-cache")}, done.stderr

    whole, _ = stored()
    assert whole
    for path in (tmp_path / "xla").glob("*-atime"):
        path.unlink()
    for name, content in whole.items():
        (tmp_path / "xla" / name).write_bytes(content[: len(content) // 2])
    again, stderr = stored()
    assert (again, stderr) == (whole, "")
    for name, content in whole.items():
        (tmp_path / "xla" / name).write_bytes(content[: len(content) // 2])
    assert "Error reading persistent compilation cache entry" in stored()[1]


# The folder of the cache.


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Returns the folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def no_home(monkeypatch, tmp_path):
    """Removes the home folder, like that of a container's user who has no entry in the list of users."""

    def missing(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", missing)


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))


def no_permission(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and original(path, mode))


def no_disk(monkeypatch, tmp_path):
    """Puts the cache on a read-only file system."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/nowhere")


@pytest.mark.parametrize("fault", [no_home, no_folder, no_permission, no_disk], ids=lambda fault: fault.__name__)
def test_the_last_resort_is_a_temporary_folder_and_a_line(tmp_path, temporary, monkeypatch, fault, capsys):
    fault(monkeypatch, tmp_path)
    first, second = Cache(), Cache()
    assert first.path == second.path
    assert first.path.parent == temporary
    assert first.path.stat().st_mode & 0o777 == 0o700
    (line,) = capsys.readouterr().out.splitlines()
    assert str(first.path) in line
    assert VARIABLE in line
    # The variable that the note names selects another folder, and so does the config key.
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert Cache().path == tmp_path / "chosen"
    assert Cache(str(tmp_path / "for texts")).path == tmp_path / "for texts"
    assert capsys.readouterr().out == ""


def test_nowhere_to_write(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"Cannot write to the cache folder \(.*tmp/gpt-cache-.*\); set GPT_CACHE_DIR"):
        Cache()


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    """The XDG standard ignores a relative path. Our own settings take one, relative to the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert Cache().path == tmp_path / ".cache" / "gpt"
    assert Cache("~/mine").path == tmp_path / "mine"
    assert Cache("here").path == tmp_path / "here"
    with pytest.raises(UserError, match=r"Cannot write to the cache ~nobody-of-this-name/x .*set data\.cache_dir"):
        Cache("~nobody-of-this-name/x")
