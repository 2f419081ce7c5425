"""Caches on disk: results that later starts of a program reuse, and programs that XLA compiled.

The environment variable GPT_CACHE_DIR names the cache folder. If it is not set, the cache is the folder `gpt` in the
user's cache folder (XDG_CACHE_HOME, or ~/.cache). If that folder cannot be written to, the cache is a private temporary
folder, and a note reports this.

An entry is a JSON value with optional files in a folder, stored with their SHA-256. An entry that is missing,
unreadable, truncated or damaged is computed again. File permissions of an entry allow no more than the umask and those
of its sources.

JAX stores compiled programs in the folder `xla` of the cache, so that only the first start of a program compiles.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gpt.runtime import progress
from gpt.runtime.errors import UserError
from gpt.runtime.files import PARTIAL

VARIABLE = "GPT_CACHE_DIR"
MAX_COMPILED_SIZE = 4 << 30  # bytes of compiled programs; JAX deletes the least recently used ones

_shown: set[str] = set()  # notes that the user has seen: each note is shown once


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of the cache.

    Attributes:
      value: a JSON value.
      files: paths of the entry's files, by name.
    """

    value: Any
    files: dict[str, Path]


class Cache:
    """A cache folder.

    Attributes:
      path: the folder.
      setting: name of the config key or environment variable that selects another folder.
    """

    def __init__(self, configured: str = ""):
        """Finds or creates the folder.

        Args:
          configured: value of the config key data.cache_dir; "" selects the default folder.

        Raises:
          UserError: the folder that the user selected, or every default folder, cannot be written to.
        """
        self.setting = "data.cache_dir" if configured else VARIABLE
        selected = configured or os.environ.get(VARIABLE, "")
        own = [lambda: Path(selected).expanduser().absolute()]
        problems = []
        for find in own if selected else (_user_folder, _temporary_folder):
            try:
                self.path = _writable(find)
                break
            except OSError as error:
                problems.append(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
        else:
            raise UserError(
                f"Cannot write to the cache {selected or 'folder'} ({'; '.join(problems)}); "
                f"set {self.setting} to another folder."
            )
        if problems:
            self._say(f"note   the cache is in {self.path} ({problems[0]}); set {VARIABLE} to choose another folder")

    def entry(self, name: str, compute: Callable[[Path], Any], mode: int = 0o666) -> Entry:
        """Returns the entry of a name: the stored entry if it is intact, otherwise a computed one, which is stored.

        An entry without files is returned even if it cannot be stored.

        Args:
          name: file name of the entry; has to change with everything that the entry depends on.
          compute: returns the value. Its argument is the folder for files of the entry, which it creates if there are
            any, with `create`. The folder may have files of a computation that was interrupted.
          mode: permissions of the sources, which limit those of the entry.

        Raises:
          UserError: a file cannot be stored.
        """
        if entry := self._find(name):
            return entry
        folder, files, stored = self.path / name, {}, {}
        try:
            value = json.loads(json.dumps(compute(folder)))  # the same value that `_find` returns later
            for path in _files(folder):
                with path.open("rb") as file:
                    stored[path.name] = [_sha256(file), identity(os.fstat(file.fileno()))]
                files[path.name] = path
        except OSError as error:
            if not str(error.filename).startswith(str(self.path)):  # the error is from reading the sources
                raise
            raise UserError(f"Cannot write {folder}: {error.strerror}; set {self.setting} to another folder.") from None
        self._store(name, value, stored, mode)
        return Entry(value, files)

    def _find(self, name: str) -> Entry | None:
        """Returns the stored entry, or None if it is missing or damaged; then its files are deleted."""
        folder = self.path / name
        try:
            with self._path(name).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                digest, _, text = file.read().partition(b"\n")
        except OSError:
            return None  # never stored, or its computation was interrupted
        try:
            if hashlib.sha256(text).hexdigest().encode() != digest:
                raise OSError("damaged")
            saved, files = json.loads(text), {}
            for file_name, (sha256, known) in saved["files"].items():
                with (folder / file_name).open("rb") as file:
                    found = identity(os.fstat(file.fileno()))
                    # An unchanged file is not read: a large file on a shared disk would take minutes at each start.
                    if found != known and _sha256(file) != sha256:
                        raise OSError("damaged")
                files[file_name] = [sha256, found]
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        if files != saved["files"]:
            self._store(name, saved["value"], files, mode)
        return Entry(saved["value"], {file_name: folder / file_name for file_name in files})

    def _store(self, name: str, value: Any, files: dict[str, list], mode: int) -> None:
        text = json.dumps({"value": value, "files": files}).encode()
        try:
            with create(self._path(name), mode) as file:
                file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        except OSError as error:
            self._say(f"note   the cache {self.path} cannot be written ({error.strerror}): the next start takes longer")

    def _path(self, name: str) -> Path:
        return self.path / f"{name}.entry"

    def _say(self, line: str) -> None:
        if line not in _shown:
            _shown.add(line)
            progress.say(line)


@contextlib.contextmanager
def create(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Opens a new file for writing, which gets its name, in place of an earlier file, once its content is on the disk.

    Args:
      mode: permissions of the sources, which limit those of the file, as the umask does.

    Raises:
      OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    opener = lambda path, flags: os.open(path, flags, mode & 0o666 | 0o600)  # noqa: E731  `tempfile` ignores the umask
    try:
        with open(partial, "xb", opener=opener) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def keep_compiled(folder: Path) -> None:
    """Makes JAX store compiled programs in a folder."""
    import jax

    for entry in folder.glob("*-cache"):  # a process that dies while it stores an entry writes no time of use
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)  # JAX replaces no entry, and stores no others beside one without a time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_COMPILED_SIZE)


def digest(*parts: Any) -> str:
    """Returns a name of 32 hexadecimal digits for JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def code(paths: Iterable[str | Path]) -> str:
    """Returns a SHA-256 of source files, to be part of an entry's name: other code has other entries."""
    return hashlib.sha256(b"\0".join(Path(path).read_bytes() for path in paths)).hexdigest()


def identity(status: os.stat_result) -> list[int]:
    """Returns numbers that change with each change of a file, even if its size and modification time are restored."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _sha256(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """Returns the complete files in a folder, which may be missing."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.is_file() and path.suffix != PARTIAL]


def _writable(find: Callable[[], Path]) -> Path:
    """Returns the folder that `find` returns, created if needed. Raises OSError if it cannot be written to."""
    try:
        folder = find()
    except RuntimeError as error:  # `Path.home` and `expanduser` raise it if there is no home folder
        raise OSError(errno.ENOENT, str(error).rstrip(".")) from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _user_folder() -> Path:
    """Returns the folder in the user's cache folder. Raises RuntimeError if the user has no home folder."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "gpt"  # the XDG standard ignores relative paths


@functools.cache
def _temporary_folder() -> Path:
    """Returns a private temporary folder, which is deleted when the process ends normally."""
    folder = Path(tempfile.mkdtemp(prefix="gpt-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
