"""Files of data: the rule, common to all kinds of data, by which a path names files and files are opened.

A path names a file, a folder, or files by a pattern like `shards/*.bin`, on a disk or in a bucket (`gs://`, `s3://`).
A folder stands for all files in it and its subfolders, in the order of their names; links are followed. These are left
out:

- hidden files and folders, and those of systems and editors: `.git`, `._3.png`, `__MACOSX`, `Thumbs.db`, `notes.txt~`,
- empty files, such as `_SUCCESS`,
- broken links, and links to folders that are read anyway,
- pipes, sockets and devices,
- files of other types, if the kind of data reads only some types.

A line names the files that are left out. A file that cannot be read is an error, and so is an empty or special file
that a path names itself.
"""

import dataclasses
import errno
import fnmatch
import functools
import glob
import gzip
import importlib.util
import io
import itertools
import os
import re
import stat
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from gpt.data import storage
from gpt.runtime import cache
from gpt.runtime.errors import UserError, one_line
from gpt.runtime.progress import say

HIDDEN = re.compile(r"\..*|.*~|__MACOSX|Thumbs\.db|desktop\.ini")
SHOWN = 3  # number of names to show of the files that are left out for one reason
COMPRESSIONS = (".gz", ".zst")
READ_ERRORS = (OSError, EOFError, zlib.error)  # of damaged archives as well


@dataclasses.dataclass(frozen=True)
class File:
    """A file of data.

    Attributes:
      place: its path, or its address in a bucket.
      size: number of bytes.
      modified: the time in nanoseconds of its last modification, or what a bucket names its version.
      mode: its permissions.
      identity: values that change with each change of a file on a disk, even if its size and time are restored.
    """

    place: str
    size: int
    modified: int | str
    mode: int = 0o666
    identity: tuple[Any, ...] = ()

    @classmethod
    def of(cls, path: Path) -> "File":
        """Returns the file of a path. Raises OSError if there is none."""
        found = path.stat()
        identity = str(path.resolve()), *cache.identity(found)
        return cls(str(path), found.st_size, found.st_mtime_ns, found.st_mode, identity)

    def __str__(self) -> str:
        return self.place

    @functools.cached_property
    def path(self) -> PurePosixPath:
        """The place as a path, to take apart."""
        return PurePosixPath(self.place)

    @property
    def compression(self) -> str:
        """The suffix that names a compression, or ""."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """The suffix that names the format, such as ".jsonl" of "a.jsonl.gz"."""
        return PurePosixPath(self.path.stem if self.compression else self.path.name).suffix.lower()

    @property
    def version(self) -> tuple[Any, ...]:
        """Values that change with each change of the file."""
        return self.identity or (self.place, self.size, self.modified)

    def sibling(self, suffix: str) -> "File | None":
        """Returns the file beside it that has another suffix, or None if there is none."""
        place = f"{self.place.removesuffix(self.path.suffix)}{suffix}"
        if storage.is_address(place):
            return next((File(*found) for found in storage.files(place, "data.path") if found[0] == place), None)
        return File.of(Path(place)) if Path(place).is_file() else None

    def first_bytes(self, count: int) -> bytes:
        """Returns the first bytes of the file, or all if it has fewer. Raises UserError if they cannot be read."""
        return self.read(0, min(count, self.size))

    def open(self) -> IO[bytes]:
        """Opens the file to read its content, uncompressed.

        Raises:
          UserError: it is not a regular file, or a package is missing.
          OSError: it cannot be opened.
        """
        file = storage.open_file(self.place) if storage.is_address(self.place) else open_regular(Path(self.place))
        if self.compression == ".gz":
            return cast(IO[bytes], gzip.open(file))
        if self.compression == ".zst":
            try:
                import pyarrow
            except ImportError:
                raise UserError(f'{self} needs the package pyarrow: pip install -e ".[parquet]".') from None
            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        return file

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes of the file. Raises UserError if they cannot be read, or if there are fewer."""
        try:
            if storage.is_address(self.place):
                data = storage.read(self.place, start, stop)
            else:
                with open_regular(Path(self.place)) as file:
                    file.seek(start)
                    data = file.read(stop - start)
        except OSError as error:
            raise cannot_read(self, error) from None
        if len(data) != stop - start:
            raise UserError(f"{self} changed while it was read: it has fewer than {stop:,} bytes.")
        return data


def cannot_read(file: object, error: Exception) -> UserError:
    """Returns the error for a file that cannot be read."""
    return UserError(f"Cannot read {file}: {getattr(error, 'strerror', None) or one_line(error)}.")


def located(path: str, key: str, what: str = "file or folder") -> Path:
    """Returns the path of an existing file or folder. Raises UserError, naming the setting `key`, if it is missing."""
    if storage.is_address(path):
        raise UserError(f"{key}: {path} is an address on the network; download it first and name the file or folder.")
    try:
        found = Path(path).expanduser()
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        hint = " (but a broken link)" if found.is_symlink() else ""
        raise UserError(f"{key}: there is no {what} {found}{hint}.") from None
    except (OSError, RuntimeError, ValueError) as error:  # the name is too long, or names an unknown user
        raise UserError(f"{key}: cannot look for {path[:100]!r}: {error}.") from None
    return found


def of_package(name: str, advice: str) -> Path:
    """Returns the folder of a package without importing it. Raises UserError with `advice` if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(advice)
    return Path(spec.submodule_search_locations[0])


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file to read it.

    Raises:
      UserError: the path is not a regular file.
      OSError: the file cannot be opened.
    """
    check_regular(path)
    return path.open("rb")


def check_regular(path: Path) -> None:
    """Raises UserError unless a path is a regular file: reading a pipe would block, and a device may have no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_type(mode)} and not a regular file; copy its contents to a file and name that.")


class Listing:
    """The contents of a folder of data, and a record of the files that are left out."""

    def __init__(self, root: Path, key: str):
        """Initializes an empty listing of the folder `root`, which the setting `key` names."""
        self._root, self._key = root, key
        self._seen: set[tuple[int, int]] = set()
        self._left_out: dict[str, list[Path]] = {}

    def files(self, folder: Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
        """Returns the files in a folder and its subfolders; if suffixes are given, only files with one of them."""
        files, waiting = [], [folder]
        while waiting:
            path = waiting.pop()
            if path == folder or path.is_dir():
                waiting += reversed(self.children(path, folder))
            elif suffixes and path.suffix.lower() not in suffixes:
                self.leave_out("of another type", path)
            else:
                files.append(path)
        return files

    def children(self, folder: Path, base: Path | None = None) -> list[Path]:
        """Returns the files and folders in a folder, in the order of their names.

        Args:
          base: the folder that is read as a whole; None: `folder`.

        Raises:
          UserError: the folder cannot be read.
        """
        try:
            return [path for path in sorted(folder.iterdir()) if self._is_data(path, base or folder)]
        except OSError as error:
            raise UserError(f"{self._key}: cannot read {error.filename}: {error.strerror}.") from None

    def leave_out(self, reason: str, path: Path) -> None:
        """Records that a file or folder is left out."""
        self._left_out.setdefault(reason, []).append(path)

    def _is_data(self, path: Path, base: Path) -> bool:
        if HIDDEN.fullmatch(path.name):
            self.leave_out("hidden", path)
            return False
        try:
            found = path.stat()
        except OSError as error:
            if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            self.leave_out("broken links", path)
            return False
        if stat.S_ISDIR(found.st_mode):
            inode = found.st_dev, found.st_ino
            if inode in self._seen or (path.is_symlink() and _is_read_anyway(path.resolve(), base.resolve())):
                self.leave_out("links to folders that are read anyway", path)
                return False
            self._seen.add(inode)
        elif not stat.S_ISREG(found.st_mode):
            self.leave_out(_type(found.st_mode).partition(" ")[2] + "s", path)
            return False
        elif not found.st_size:
            self.leave_out("empty", path)
            return False
        return True

    def __str__(self) -> str:
        """Returns the reasons and names of what is left out, or ""."""
        parts = []
        for reason, paths in self._left_out.items():
            names = ", ".join(str(path.relative_to(self._root)) for path in paths[:SHOWN])
            more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
            parts.append(f"{reason}: {names}{more}")
        return "; ".join(parts)

    def say(self) -> None:
        """Prints what is left out, if anything is."""
        if left_out := str(self):
            say(f"note   left out of {self._key}={self._root}: {left_out}")


def named(paths: str, key: str) -> list[tuple[File, PurePosixPath]]:
    """Returns the files that a setting names by files, folders and patterns, separated by commas.

    Returns:
      Each file, with its path below the folder or pattern that names it.

    Raises:
      UserError: one does not exist or is not a regular file, or there are no files.
    """
    is_one = os.path.exists(os.path.expanduser(paths))  # a name may contain a comma
    files = [
        file
        for part in ([paths] if is_one else filter(None, map(str.strip, paths.split(","))))
        for file in (_in_bucket if storage.is_address(part) else _on_disk)(part, key)
    ]
    if not files:
        raise UserError(f"{key}={paths!r} names no file.")
    return files


def _on_disk(path: str, key: str) -> list[tuple[File, PurePosixPath]]:
    pattern = os.path.expanduser(path)
    if glob.has_magic(path) and not os.path.exists(pattern):
        places = [Path(place) for place in sorted(glob.glob(pattern, recursive=True))]
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
        if not places:
            raise UserError(f"{key}: no file matches {path}.")
    else:
        places = [located(path, key)]
        base = places[0] if places[0].is_dir() else places[0].parent
    files: list[Path] = []
    for place in places:
        if not place.is_dir():
            check_regular(place)
            files.append(place)
            continue
        listing = Listing(place, key)
        inside = listing.files(place)
        if not inside and len(places) == 1:
            left_out = f" (left out: {listing})" if str(listing) else ""
            raise UserError(f"{key}: the folder {place} holds no files{left_out}.")
        listing.say()
        files += inside
    return [(File.of(file), PurePosixPath(file.relative_to(base))) for file in files]


def _in_bucket(address: str, key: str) -> list[tuple[File, PurePosixPath]]:
    parts, is_pattern = PurePosixPath(address).parts, glob.has_magic(address)
    fixed = str(PurePosixPath(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
    base = fixed.replace(":/", "://", 1)
    found = [File(place, size, version) for place, size, version in storage.files(base, key)]
    if is_pattern:
        found = [file for file in found if fnmatch.fnmatchcase(file.place, address)]
        found = [file for file in found if "**" in address or len(file.path.parts) == len(parts)]
    elif [file.place for file in found] == [base]:
        fixed = fixed.rpartition("/")[0]
    hidden = [file for file in found if any(map(HIDDEN.fullmatch, file.path.relative_to(fixed).parts))]
    files = [file for file in found if file.size and file not in hidden]
    if not files:
        raise UserError(f"{key}: there are no files at {address}.")
    if len(files) < len(found):
        say(f"note   left out of {key}={address}: {len(found) - len(files):,} hidden or empty files")
    return [(file, file.path.relative_to(fixed)) for file in files]


def _is_read_anyway(target: Path, base: Path) -> bool:
    """Returns whether the target of a link contains the base, or is a part of it that is not hidden."""
    inside = target.parts[len(base.parts) :] if target.is_relative_to(base) else ()
    return base.is_relative_to(target) or (bool(inside) and not any(map(HIDDEN.fullmatch, inside)))


def _type(mode: int) -> str:
    tests = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, test in tests.items() if test(mode)), "a device")
