"""Files of data: the rule, common to all kinds of data, by which a path names files and files are opened.

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

import errno
import importlib.util
import os
import re
import stat
from pathlib import Path
from typing import IO

from gpt.data.base import Say
from gpt.runtime.errors import UserError

HIDDEN = re.compile(r"\..*|.*~|__MACOSX|Thumbs\.db|desktop\.ini")
SHOWN = 3  # number of names to show of the files that are left out for one reason


def located(path: str, key: str, what: str = "file or folder") -> Path:
    """Returns the path of an existing file or folder. Raises UserError, naming the setting `key`, if it is missing."""
    if re.match(r"\w+://", path):
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

    def say(self, say: Say) -> None:
        """Prints what is left out, if anything is."""
        if left_out := str(self):
            say(f"note   left out of {self._key}={self._root}: {left_out}")


def named(paths: str, key: str, say: Say) -> list[Path]:
    """Returns the files that a setting names by files and folders, separated by commas.

    Raises:
      UserError: one does not exist or is not a regular file, or there are no files.
    """
    is_one = os.path.exists(os.path.expanduser(paths))  # a name may contain a comma
    files = []
    for part in [paths] if is_one else filter(None, map(str.strip, paths.split(","))):
        path = located(part, key)
        if not path.is_dir():
            check_regular(path)
            files.append(path)
            continue
        listing = Listing(path, key)
        inside = listing.files(path)
        if not inside:
            raise UserError(f"{key}: the folder {path} holds no files{f' (left out: {listing})' * bool(str(listing))}.")
        listing.say(say)
        files += inside
    if not files:
        raise UserError(f"{key}={paths!r} names no file.")
    return files


def _is_read_anyway(target: Path, base: Path) -> bool:
    """Returns whether the target of a link contains the base, or is a part of it that is not hidden."""
    inside = target.parts[len(base.parts) :] if target.is_relative_to(base) else ()
    return base.is_relative_to(target) or (bool(inside) and not any(map(HIDDEN.fullmatch, inside)))


def _type(mode: int) -> str:
    tests = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, test in tests.items() if test(mode)), "a device")
