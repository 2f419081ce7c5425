"""The cache: a folder for results that can be computed again, so that the next start does not have to.

The environment variable GPT_CACHE_DIR names the folder. Without it, the cache is the folder `gpt` in the user's cache
folder (XDG_CACHE_HOME, or ~/.cache). If that cannot be written to, it is a private folder among the temporary files,
and a line says so.

An entry is a value that JSON can hold, with or without files beside it, stored with their SHA-256. An entry that is
missing, unreadable, cut off or does not fit its digest is computed again. Nobody can read an entry who is kept out by
the umask or who cannot read its sources.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from gpt.runtime.errors import UserError

VARIABLE = "GPT_CACHE_DIR"

Say = Callable[[str], object]
_said = set()  # lines for the user, each of which is shown once


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of the cache: its value, and the paths of its files by their suffix."""

    value: Any
    files: dict[str, Path]


class Cache:
    """A cache folder.

    Attributes:
      path: the folder.
      setting: name of the setting that moves it elsewhere.
    """

    def __init__(self, configured: str = "", say: Say = lambda line: None):
        """Finds or makes the folder.

        Args:
          configured: the value of `data.cache_dir`; "": the folder that all caches share.
          say: called with a line for the user where the cache is elsewhere than expected, or cannot be written.

        Raises:
          UserError: the folder that the user named cannot be written to, or there is none that can.
        """
        self._say_any, self.setting = say, "data.cache_dir" if configured else VARIABLE
        if named := configured or os.environ.get(VARIABLE):
            self.path, problem = _writable(lambda: Path(named).expanduser().absolute())
            if problem:
                message = f"Cannot write to the cache {named} ({problem}); set {self.setting} to another folder."
                raise UserError(message)
            return
        self.path, problem = _writable(_of_user)
        if problem:
            reason = f"{self.path}: {problem}" if self.path else problem
            self.path, problem = _writable(_temporary)
            if problem:
                raise UserError(
                    f"Cannot find a cache folder ({reason}; {self.path or 'TMPDIR'}: {problem}); set {VARIABLE} to one."
                )
            self._say(f"note   the cache is in {self.path} ({reason}); set {VARIABLE} to choose another folder")

    def entry(self, name: str, compute: Callable[[Callable[[str], IO[bytes]]], Any], mode: int = 0o666) -> Entry:
        """The entry of this name: from the cache if it is whole there, else computed and stored.

        An entry without files is returned even if it cannot be stored.

        Args:
          name: has to change with everything that the entry depends on.
          compute: returns the value; its argument opens a file of the entry, by suffix, to be written.
          mode: permissions of the sources, which the entry does not exceed.

        Raises:
          UserError: a file cannot be stored.
        """
        if found := self._find(name):
            return found
        files, stored = {}, {}
        with contextlib.ExitStack() as partial:

            def create(suffix: str) -> IO[bytes]:
                files[suffix] = self._create(name, mode, partial)
                return files[suffix]

            try:
                value = json.loads(json.dumps(compute(create)))  # the same whether it is new or was stored
                for suffix, file in files.items():
                    file.flush()
                    os.fsync(file.fileno())  # contents have to be on the disk before what vouches for them
                    sha256 = _sha256(file)
                    os.replace(file.name, self._path(name, suffix))
                    stored[suffix] = sha256, identity(os.fstat(file.fileno()))
            except OSError as error:
                if not files:  # it is not the cache's
                    raise
                raise UserError(
                    f"Cannot write {self._path(name)}: {error.strerror}; set {self.setting} to another folder."
                ) from None
        self._store(name, value, stored, mode)
        return Entry(value, {suffix: self._path(name, suffix) for suffix in files})

    def _find(self, name: str) -> Entry | None:
        """The entry, if it is whole."""
        try:
            with self._path(name).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                digest, _, text = file.read().partition(b"\n")
            if hashlib.sha256(text).hexdigest().encode() != digest:
                return None
            saved = json.loads(text)
            files, moved = saved["files"], False
            for suffix, (sha256, known) in files.items():
                with self._path(name, suffix).open("rb") as file:
                    found = identity(os.fstat(file.fileno()))
                    # Reading all of a large file at each start would take minutes, on a disk that hosts share.
                    if found != known:
                        if _sha256(file) != sha256:
                            return None
                        files[suffix], moved = (sha256, found), True
        except OSError:
            return None
        if moved:
            self._store(name, saved["value"], files, mode)
        return Entry(saved["value"], {suffix: self._path(name, suffix) for suffix in files})

    def _store(self, name: str, value: Any, files: dict, mode: int) -> None:
        text = json.dumps({"value": value, "files": files}).encode()
        try:
            with contextlib.ExitStack() as partial:
                file = self._create(name, mode, partial)
                file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
                file.flush()
                os.replace(file.name, self._path(name))
        except OSError as error:
            self._say(f"note   the cache {self.path} cannot be written ({error.strerror}): the next start takes longer")

    def _create(self, name: str, mode: int, partial: contextlib.ExitStack) -> IO[bytes]:
        """A file under another name, which no reader knows; it is removed unless it is moved to its place."""
        path = self.path / f"{name}.{secrets.token_hex(8)}.partial"
        partial.callback(path.unlink, missing_ok=True)
        # The umask applies; `tempfile` would ignore it.
        opener = lambda path, flags: os.open(path, flags, mode & 0o666 | 0o600)  # noqa: E731
        return partial.enter_context(open(path, "x+b", opener=opener))

    def _path(self, name: str, suffix: str = "entry") -> Path:
        return self.path / f"{name}.{suffix}"

    def _say(self, line: str) -> None:
        if line not in _said:
            _said.add(line)
            self._say_any(line)


def digest(*parts: Any) -> str:
    """A name for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def code(paths: Iterable[str | Path]) -> str:
    """A digest of source files: what other code computed is not to be found."""
    return hashlib.sha256(b"\0".join(Path(path).read_bytes() for path in paths)).hexdigest()


def identity(found: os.stat_result) -> list[int]:
    """What changes with each change of a file, even where its size and modification time are restored."""
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _writable(find: Callable[[], Path]) -> tuple[Path | None, str]:
    """The folder that `find` returns, made if need be, and why it cannot be written to, or ""."""
    folder = None
    try:
        folder = find()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder, "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        return folder, error.strerror
    except RuntimeError as error:  # of `Path.home` and `expanduser`
        return folder, str(error).rstrip(".")


def _of_user() -> Path:
    """The folder in the user's cache folder. Raises RuntimeError where the user has none."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "gpt"  # XDG has relative paths ignored


@functools.cache
def _temporary() -> Path:
    """A folder among the temporary files that nobody else can have prepared."""
    path = Path(tempfile.gettempdir()) / f"gpt-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return path
    return Path(tempfile.mkdtemp(prefix="gpt-cache-"))
