"""Files of data: which ones a path names, and how they are opened. One rule for every kind of data.

Of a folder, all files are read in the order of their names, also those in subfolders and behind links. Left out are

- hidden files and folders, and those of systems and editors: `.git`, `._3.png`, `__MACOSX`, `Thumbs.db`, `notes.txt~`,
- empty files, such as `_SUCCESS`,
- links to nothing, and links to folders that are read anyway,
- pipes, sockets and devices,
- files of other types, where the kind of data reads only some.

A line says what was left out. What cannot be read is an error, and so is a file that is named and not in a folder.
"""

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gpt.runtime.errors import UserError

HIDDEN = re.compile(r"\..*|.*~|__MACOSX|Thumbs\.db|desktop\.ini")
SHOWN = 3  # names of what was left out for one reason


def located(path: str, key: str, what: str = "file or folder") -> Path:
    """The path of a file or folder that exists. Raises UserError where there is none; `key` names the setting."""
    if re.match(r"\w+://", path):
        raise UserError(f"{key}: {path} is an address on the network; download it first and name the file or folder.")
    try:
        found = Path(path).expanduser()
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        is_link = " (but a link to nothing)" if found.is_symlink() else ""
        raise UserError(f"{key}: there is no {what} {found}{is_link}.") from None
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a user who does not exist
        raise UserError(f"{key}: cannot look for {path[:100]!r}: {error}.") from None
    return found


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file to be read.

    Raises:
      UserError: it is not a regular file.
      OSError: it cannot be opened.
    """
    check_regular(path)
    return path.open("rb")


def check_regular(path: Path) -> None:
    """Raises UserError unless it is a regular file: a pipe would keep the program waiting, a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_type(mode)} and not a regular file; copy its contents to a file and name that.")


class Listing:
    """The contents of a folder of data, and what is left out of them."""

    def __init__(self, root: Path, key: str):
        """Lists nothing yet; `key` is the setting that names the folder."""
        self._root, self._key = root, key
        self._seen: set[tuple[int, int]] = set()
        self._left_out: dict[str, list[Path]] = {}

    def files(self, folder: Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
        """The files in a folder and its subfolders, those with certain suffixes if any are given."""
        found, waiting = [], [folder]
        while waiting:
            path = waiting.pop()
            if path == folder or path.is_dir():
                waiting += reversed(self.children(path, folder))
            elif suffixes and path.suffix.lower() not in suffixes:
                self.leave_out("of another type", path)
            else:
                found.append(path)
        return found

    def children(self, folder: Path, base: Path | None = None) -> list[Path]:
        """The files and folders in a folder, in the order of their names.

        Args:
          base: the folder that is read as a whole; None: this one.
        """
        try:
            return [path for path in sorted(folder.iterdir()) if self._is_data(path, base or folder)]
        except OSError as error:
            raise UserError(f"{self._key}: cannot read {error.filename}: {error.strerror}.") from None

    def leave_out(self, reason: str, path: Path) -> None:
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
            self.leave_out("links to nothing", path)
            return False
        if stat.S_ISDIR(found.st_mode):
            place = found.st_dev, found.st_ino
            if place in self._seen or (path.is_symlink() and _is_read_anyway(path.resolve(), base.resolve())):
                self.leave_out("links to folders that are read anyway", path)
                return False
            self._seen.add(place)
        elif not stat.S_ISREG(found.st_mode):
            self.leave_out(_type(found.st_mode).partition(" ")[2] + "s", path)
            return False
        elif not found.st_size:
            self.leave_out("empty", path)
            return False
        return True

    def __str__(self) -> str:
        """What is left out, or ""."""
        parts = []
        for reason, paths in self._left_out.items():
            names = ", ".join(str(path.relative_to(self._root)) for path in paths[:SHOWN])
            more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
            parts.append(f"{reason}: {names}{more}")
        return "; ".join(parts)

    def say(self, say: Callable[[str], object]) -> None:
        """Tells the user what is left out, if anything is."""
        if left_out := str(self):
            say(f"note   left out of {self._key}={self._root}: {left_out}")


def named(paths: str, key: str, say: Callable[[str], object]) -> list[Path]:
    """The files that a setting names: files and folders, joined by commas.

    Raises:
      UserError: one does not exist or is no regular file, or there are none.
    """
    is_one = os.path.exists(os.path.expanduser(paths))  # with a comma in its name
    found = []
    for part in [paths] if is_one else filter(None, map(str.strip, paths.split(","))):
        path = located(part, key)
        if not path.is_dir():
            check_regular(path)
            found.append(path)
            continue
        listing = Listing(path, key)
        inside = listing.files(path)
        if not inside:
            raise UserError(f"{key}: the folder {path} holds no files{f' (left out: {listing})' * bool(str(listing))}.")
        listing.say(say)
        found += inside
    if not found:
        raise UserError(f"{key}={paths!r} names no file.")
    return found


def _is_read_anyway(target: Path, base: Path) -> bool:
    """Whether a link leads around in a circle, or to a part of the base that is not hidden."""
    inside = target.parts[len(base.parts) :] if target.is_relative_to(base) else ()
    return base.is_relative_to(target) or (bool(inside) and not any(map(HIDDEN.fullmatch, inside)))


def _type(mode: int) -> str:
    tests = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, test in tests.items() if test(mode)), "a device")
