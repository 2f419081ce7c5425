"""The cache: entries that are whole or computed again, who may read them, and where the folder is."""

import os
import pwd
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from gpt.runtime import cache
from gpt.runtime.cache import VARIABLE, Cache
from gpt.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(cache, "_said", set())
    cache._temporary.cache_clear()
    yield
    cache._temporary.cache_clear()


class Computation:
    """An entry with a file, and how often it was computed."""

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
    """One of another user for instance."""
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
    """A value that is computed is not lost for it; a file that is needed has to be somewhere else."""

    def full(source, target):
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    kept = Cache(say=said.append)
    assert [kept.entry(name, lambda create: [1]).value for name in "ab"] == [[1], [1]]
    (line,) = said
    assert "cannot be written (No space left on device)" in line
    with pytest.raises(UserError, match=r"Cannot write .*key.*: No space left on device; set GPT_CACHE_DIR to another"):
        kept.entry("key", Computation())
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_computation_is_not_the_caches(tmp_path):
    def compute(create):
        raise FileNotFoundError(2, "no compiler")

    with pytest.raises(FileNotFoundError, match="no compiler"):
        Cache(str(tmp_path)).entry("key", compute)


# Where it is.


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def no_home(monkeypatch, tmp_path):
    """Of a user who is in no list of users, as in a container."""

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
    """Of a file system that is mounted to be read."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/nowhere")


@pytest.mark.parametrize("fault", [no_home, no_folder, no_permission, no_disk], ids=lambda fault: fault.__name__)
def test_the_last_resort_is_a_temporary_folder_and_a_line(tmp_path, temporary, monkeypatch, fault):
    fault(monkeypatch, tmp_path)
    said = []
    kept, again = Cache(say=said.append), Cache(say=said.append)
    assert kept.path == again.path == temporary / f"gpt-cache-{os.getuid()}"
    assert kept.path.stat().st_mode & 0o777 == 0o700
    (line,) = said
    assert str(kept.path) in line
    assert VARIABLE in line
    # The advice helps, and so does the key of the config.
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert Cache(say=pytest.fail).path == tmp_path / "chosen"
    assert Cache(str(tmp_path / "for texts"), say=pytest.fail).path == tmp_path / "for texts"


def test_nowhere_to_write(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"Cannot find a cache folder \(.*tmp/gpt-cache-.*\); set GPT_CACHE_DIR"):
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
    kept = Cache()
    assert kept.path not in (prepared, tmp_path / "outside")
    assert kept.path.parent == temporary
    assert kept.path.stat().st_mode & 0o777 == 0o700
    assert Cache().path == kept.path


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    """XDG has a relative path ignored; ours are those of a command line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert Cache().path == tmp_path / ".cache" / "gpt"
    assert Cache("~/mine").path == tmp_path / "mine"
    assert Cache("here").path == tmp_path / "here"
    with pytest.raises(UserError, match=r"Cannot write to the cache ~nobody-of-this-name/x .*set data\.cache_dir"):
        Cache("~nobody-of-this-name/x")
