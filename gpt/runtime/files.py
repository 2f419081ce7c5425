"""Files and folders that survive a power cut.

A file system may write a file's name long before its content, and both long after the call returned. What a run needs
to resume is therefore written in one order: content to the disk, folders to the disk, the rename that makes it valid,
the folder of the new name to the disk, and only then is anything older deleted. In a bucket (gs://, s3://) an object is
durable once it is written.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from gpt.runtime.errors import UserError

PARTIAL = ".partial"  # ends the name of a file that is being written


def is_local(path: Any) -> bool:
    """Whether a path is on a file system rather than in a bucket."""
    return "://" not in str(path)


def sync(path: Any) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk. Raises OSError where that fails."""
    if not is_local(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def publish(partial: Any, final: Any) -> None:
    """Gives a complete file or folder its final name, once all of its content is on the disk."""
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
    if os.path.isfile(partial):
        sync(partial)
    os.rename(partial, final)
    sync(os.path.dirname(final))


def write(path: epath.Path, text: str) -> None:
    """Replaces the content of a file: after a power cut it is the old or the new one.

    Raises:
      UserError: the file system does not allow it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        if path.exists() and path.read_text() == text:
            return
        partial.unlink(missing_ok=True)
        with open(partial, "x") if is_local(path) else partial.open("w") as file:  # "x" follows no link
            file.write(text)
        if is_local(path):
            publish(partial, path)
        else:
            partial.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot write {path}: {getattr(error, 'strerror', None) or error}.") from None


def make_folder(path: epath.Path) -> list[str]:
    """Makes a folder and those above it; returns the ones that did not exist, from the top."""
    if not is_local(path):
        path.mkdir(parents=True, exist_ok=True)
        return []
    missing = [str(folder) for folder in (path, *path.parents) if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(os.path.dirname(folder))
    return missing


def remove_tree(path: epath.Path) -> None:
    """Deletes a folder, never what a link in its place leads to."""
    shutil.rmtree(path) if is_local(path) else path.rmtree()


def refuse_links(folder: epath.Path) -> None:
    """Raises UserError if anything in a folder is neither a file nor a folder: a link, a pipe, a socket, a device.

    A workdir may come from anybody, and training writes and deletes in it: nothing in it may lead to another place.
    """
    _refuse(folder, os.lstat, "a workdir that is written to may hold only files and folders")


def refuse_pipes(folder: epath.Path) -> None:
    """Raises UserError if a folder holds what reading could wait for: a pipe, a socket, a device, or a link to one."""
    _refuse(folder, os.stat, "a workdir may hold only files and folders")


def _refuse(folder: epath.Path, status: Callable[[str], os.stat_result], rule: str) -> None:
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            try:
                mode = status(path).st_mode
            except OSError:  # deleted since it was listed, by another run perhaps, or a link to nothing
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "a pipe, a socket or a device"
                raise UserError(
                    f"--workdir={folder}: {os.path.relpath(path, folder)} is {what}; {rule}. Replace it, or choose "
                    "another --workdir."
                )


LARGEST_JSON = 1 << 26  # bytes: a hundred times a real vocabulary, and still parsed in a gigabyte or so


def read_json(path: Any) -> Any:
    """What a JSON file of any author holds.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or would fill the memory or the stack.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path.name} has more than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


@contextlib.contextmanager
def new_file(flag: str, path: str) -> Iterator[IO[bytes]]:
    """Opens a file that a flag names and that must not exist; without content, it is removed again.

    Raises:
      UserError: the file exists, or cannot be written.
    """
    place = Path(path).expanduser().absolute()
    if place.exists() or place.is_symlink():
        raise UserError(f"--{flag}={path} exists already; name another file.")
    try:
        with place.open("xb") as file:
            yield file
    except OSError as error:
        raise UserError(f"Cannot write --{flag}={path}: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            if not place.stat().st_size:
                place.unlink()
