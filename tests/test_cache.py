"""The cache: intact or recomputed entries, their permissions, compiled programs, and the location of the folder."""

import os
import pwd
import shutil
import tempfile
import threading
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache

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

    count = 0

    def __call__(self, create):
        self.count += 1
        create("txt").write(b"contents of a file " * 100)
        return {"name": "é", "numbers": [1, 0.1]}


def get(folder, compute, say=print):
    entry = Cache(str(folder), say).entry("key", compute)
    assert entry.value == {"name": "é", "numbers": [1, 0.1]}
    assert entry.files["txt"].read_bytes() == b"contents of a file " * 100


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


@pytest.mark.parametrize("suffix", ["entry", "txt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_computed_again(tmp_path, suffix, damage):
    compute = Computation()
    get(tmp_path, compute)
    get(tmp_path, compute)
    assert compute.count == 1
    DAMAGE[damage](tmp_path / f"key.{suffix}")
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

    def compute(create):
        out = create("txt")
        for _ in range(10):
            out.write(b"contents of a file " * 10)
            both.wait()
        return {"name": "é", "numbers": [1, 0.1]}

    threads = [threading.Thread(target=get, args=(tmp_path, compute)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    get(tmp_path, lambda create: pytest.fail("nobody stored it"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.entry", "key.txt"]


@pytest.mark.parametrize(
    ("umask", "source", "expected"), [(0o022, 0o644, 0o644), (0o022, 0o600, 0o600), (0o077, 0o644, 0o600)]
)
def test_nobody_reads_in_the_cache_what_is_closed_elsewhere(tmp_path, umask, source, expected):
    before = os.umask(umask)
    try:
        Cache(str(tmp_path / "cache")).entry("key", Computation(), source)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert modes == {"key.entry": expected, "key.txt": expected}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_full_disk(tmp_path, monkeypatch):
    """A computed value is returned although it cannot be stored. A file has to be stored, so the user gets an error."""

    def full(source, target):
        raise OSError(28, "No space left on device")

    lines = []
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    full_cache = Cache(say=lines.append)
    assert [full_cache.entry(name, lambda create: [1]).value for name in "ab"] == [[1], [1]]
    (line,) = lines
    assert "cannot be written (No space left on device)" in line
    with pytest.raises(UserError, match=r"Cannot write .*key.*: No space left on device; set GPT_CACHE_DIR to another"):
        full_cache.entry("key", Computation())
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_computation_is_not_the_caches(tmp_path):
    def compute(create):
        raise FileNotFoundError(2, "no compiler")

    with pytest.raises(FileNotFoundError, match="no compiler"):
        Cache(str(tmp_path)).entry("key", compute)


# Compiled programs.


def test_compiled_programs_are_whole_or_compiled_again(tmp_path, monkeypatch):
    """JAX's own cache never replaces an entry, and stores no more entries if one has no time of use."""
    monkeypatch.setattr(compilation_cache, "LRUCache", compilation_cache.LRUCache)
    before = {
        name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    try:
        cache.keep_compiled(tmp_path)
        compiled, _ = compilation_cache.get_file_cache(str(tmp_path))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert compiled.get("a") is None
    for damage in (b"", b"program" * 9, b"program" * 100 + bytes(32)):
        compiled.put("a", b"program" * 100)
        assert compiled.get("a") == b"program" * 100
        (tmp_path / "a-cache").write_bytes(damage)
        assert compiled.get("a") is None
    (tmp_path / "a-cache").write_bytes(b"half a prog")
    (tmp_path / "a-atime").unlink()
    compiled.put("b", b"another")
    assert compiled.get("b") == b"another"
    assert not (tmp_path / "a-cache").exists()


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
def test_the_last_resort_is_a_temporary_folder_and_a_line(tmp_path, temporary, monkeypatch, fault):
    fault(monkeypatch, tmp_path)
    lines = []
    first, second = Cache(say=lines.append), Cache(say=lines.append)
    assert first.path == second.path == temporary / f"gpt-cache-{os.getuid()}"
    assert first.path.stat().st_mode & 0o777 == 0o700
    (line,) = lines
    assert str(first.path) in line
    assert VARIABLE in line
    # The variable that the note names selects another folder, and so does the config key.
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert Cache(say=pytest.fail).path == tmp_path / "chosen"
    assert Cache(str(tmp_path / "for texts"), say=pytest.fail).path == tmp_path / "for texts"


def test_nowhere_to_write(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"Cannot write to the cache folder \(.*tmp/gpt-cache-.*\); set GPT_CACHE_DIR"):
        Cache()


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_temporary_folder_that_another_prepared_is_not_used(tmp_path, temporary, monkeypatch, trap):
    no_home(monkeypatch, tmp_path)
    prepared = temporary / f"gpt-cache-{os.getuid()}"
    (tmp_path / "outside").mkdir(mode=0o700)
    if trap == "link":
        prepared.symlink_to(tmp_path / "outside")
    elif trap == "open":
        prepared.mkdir()
        prepared.chmod(0o777)
    else:
        prepared.write_text("")
    path = Cache().path
    assert path not in (prepared, tmp_path / "outside")
    assert path.parent == temporary
    assert path.stat().st_mode & 0o777 == 0o700
    assert Cache().path == path


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
