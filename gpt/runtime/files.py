"""Files and folders that stay valid after a power failure.

A file system may write a file's name long before its content, and both long after the call returned. What a run needs
to resume is therefore written in one order: the content, the folders that contain it, the rename that makes it valid,
and the folder of the new name. Only then is anything older deleted. In a bucket (gs://, s3://), an object is durable
once it is written.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from gpt.runtime.errors import UserError

PARTIAL = ".partial"  # suffix of a file that is being written


def is_local(path: Any) -> bool:
    """Returns whether a path is on a file system rather than in a bucket."""
    return "://" not in str(path)


def sync(path: Any) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk. Raises OSError if that fails."""
    if not is_local(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not support this for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def publish(partial: Any, final: Any) -> None:
    """Renames a complete file or folder to its final name after all of its content is on the disk."""
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
    if os.path.isfile(partial):
        sync(partial)
    os.rename(partial, final)
    sync(os.path.dirname(final))


def write(path: epath.Path, text: str) -> None:
    """Replaces the content of a file. After a power failure, the content is the old one or the new one.

    Raises:
      UserError: the file cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        if path.exists() and path.read_text() == text:
            return
        partial.unlink(missing_ok=True)
        with open(partial, "x") if is_local(path) else partial.open("w") as file:  # "x" does not follow a link
            file.write(text)
        if is_local(path):
            publish(partial, path)
        else:
            partial.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot write {path}: {getattr(error, 'strerror', None) or error}.") from None


def make_folder(path: epath.Path) -> list[str]:
    """Creates a folder and its missing parents; returns the created local folders, from the top."""
    folders = (path, *path.parents) if is_local(path) else ()
    missing = [str(folder) for folder in folders if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(os.path.dirname(folder))
    return missing


def remove_tree(path: epath.Path) -> None:
    """Deletes a folder. Does not follow links."""
    shutil.rmtree(path) if is_local(path) else path.rmtree()


def refuse_special(folder: epath.Path, links: bool) -> None:
    """Raises UserError if a workdir contains anything except files and folders: a pipe, a socket, a device, or a link.

    A workdir may come from an untrusted source. A pipe may block a reader, and training writes and deletes files: a
    link could make it change files elsewhere.

    Args:
      links: whether links to files and folders are permitted.
    """
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            try:
                mode = os.stat(path, follow_symlinks=links).st_mode
            except OSError:  # another process deleted it meanwhile, or it is a link to nothing
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, a socket or a device"
                raise UserError(
                    f"--workdir={folder}: {os.path.relpath(path, folder)} is {kind}; a workdir may "
                    "contain only files and folders. Replace it, or choose another --workdir."
                )


LARGEST_JSON = 1 << 26  # bytes: a hundred times a real vocabulary; parsing takes about 1 GB of memory


def read_bounded(path: Any) -> bytes:
    """Returns the content of a file. Raises OSError if it cannot be read, ValueError if it exceeds LARGEST_JSON."""
    if is_local(path) and path.exists() and not path.is_file():  # a pipe would block
        raise ValueError(f"{path.name} is not a file")
    with path.open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path.name} has more than {LARGEST_JSON >> 20} MiB")
    return data


def read_json(path: Any) -> Any:
    """Returns the value in a JSON file that may come from an untrusted source.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not JSON, is larger than LARGEST_JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_bounded(path))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


@contextlib.contextmanager
def new_file(flag: str, path: str) -> Iterator[IO[bytes]]:
    """Opens a new file for writing. The file is deleted again if it is empty at the end of the context.

    Args:
      flag: name of the flag that the messages name.
      path: value of the flag.

    Raises:
      UserError: the file exists already, or cannot be written.
    """
    target = Path(path).expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise UserError(f"--{flag}={path} exists already; name another file.")
    try:
        with target.open("xb") as file:
            yield file
    except OSError as error:
        raise UserError(f"Cannot write --{flag}={path}: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            if not target.stat().st_size:
                target.unlink()
