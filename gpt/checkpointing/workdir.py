"""TODO."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from gpt.checkpointing.checkpoints import Checkpoints, saved_names
from gpt.checkpointing.run import Base, Run, describe_differences
from gpt.config import from_tree
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json


class Workdir:
    """A folder with a run in it, or one to be: on a disk that all hosts share, or in a bucket (gs://, s3://).

    Raises:
      UserError: the path has characters that a checkpoint cannot be written or found under.
    """

    def __init__(self, path: str | os.PathLike):
        _check_path(path)
        path = epath.Path(path)
        self.path: epath.Path = path.expanduser().absolute() if files.is_local(path) else path
        _check_path(self.path)

    @property
    def has_run(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def has_begun(self) -> bool:
        """Whether there is a run with anything to lose: one that saved, usable or not."""
        return self.has_run and bool(saved_names(self.path / "checkpoints"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it until the end of the context.

        Process 0 holds the lock, and its death, however sudden, releases it. In a bucket there are no locks, nor on
        some network disks: there it is up to the user that no two runs write to one workdir. A folder in which no run
        was recorded is removed again.

        Raises:
          UserError: the folder cannot be made or written to, holds something else, or another run is at work in it.
        """
        with contextlib.ExitStack() as held:
            cluster.share("workdir", lambda: self._occupy(held))
            yield

    def _occupy(self, held: contextlib.ExitStack) -> None:
        made = self.create()
        if not files.is_local(self.path):
            return
        file = held.enter_context(self._open_lock())
        held.callback(self._leave_no_trace, made)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read() or "another process"
            raise UserError(
                f"--workdir={self.path} is in use by {holder}; wait for it, end it, or choose another --workdir."
            ) from None
        except OSError:  # a disk without locks
            return
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    def _open_lock(self) -> Any:
        path = self.path / ".lock"
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "r+")
        if os.fstat(file.fileno()).st_nlink > 1:
            file.close()
            raise UserError(f"{path} is another file as well (a hard link), which would be overwritten; delete it.")
        return file

    def _leave_no_trace(self, made: list[str]) -> None:
        """Removes the lock and the folders made for it where nothing else was written."""
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in reversed(made):
                    os.rmdir(folder)

    def create(self) -> list[str]:
        """Makes the folder; returns those that did not exist before.

        Raises:
          UserError: that is not permitted, the folder holds something else, or leads to another place by a link.
        """
        try:
            made = files.make_folder(self.path)
            if files.is_local(self.path):
                files.refuse_links(self.path)
            probe = self.path / f".write-test-{secrets.token_hex(4)}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"Cannot write to --workdir={self.path}: {error.strerror or error}.") from None
        except ImportError as error:  # of what buckets need
            raise UserError(f"--workdir={self.path}: {error}") from None
        if not self.has_run and (self.path / "checkpoints").exists():
            raise UserError(f"--workdir={self.path} has checkpoints but no run.json; choose another folder.")
        return made

    def record(self, run: Run) -> None:
        """Writes what `read` reads, once for all processes.

        Raises:
          UserError: this process does not see what process 0 wrote, or has another config or other data.
        """
        cluster.share(f"record {len(run.skipped)}", lambda: self._write(run))
        if cluster.is_first():
            return
        if not self.has_run:
            raise UserError(
                f"--workdir={self.path}: run.json, by process 0, is not there; all hosts need the same disk."
            )
        recorded = self.read()
        others = describe_differences(recorded, run, "≠")
        for name in ("id", "base", "skipped"):  # a disk may show a file of before for a while
            if getattr(recorded, name) != getattr(run, name):
                others.append(f"{name} {getattr(recorded, name)} ≠ {getattr(run, name)}")
        if others:
            raise UserError(f"Process 0 and this one are to train different runs: {'; '.join(others)}.")

    def _write(self, run: Run) -> None:
        record = {
            "id": run.id,
            "config": dataclasses.asdict(run.config),
            "data_fingerprint": run.fingerprint,
            "base": run.base and dataclasses.asdict(run.base),
            "skipped_batches": run.skipped,
            "environment": run.environment,
        }
        # The record last: a folder with a run.json is complete.
        files.write(self.path / "tokenizer.json", run.tokenizer.to_json())
        files.write(self.path / "run.json", json.dumps(record, indent=1))

    def read(self) -> Run:
        """The run that is recorded here. Raises UserError where there is none or it is damaged."""
        if not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: there is no such folder.")
        if not self.has_run:
            raise UserError(f"--workdir={self.path} holds no run: there is no run.json in it.")
        if files.is_local(self.path):
            files.refuse_pipes(self.path)
        try:
            record = read_json(self.path / "run.json")
            config = from_tree(record["config"])
            return Run(
                config,
                config.data.tokenizer(read_json(self.path / "tokenizer.json")),
                record["data_fingerprint"],
                Base(**record["base"]) if record["base"] else None,
                tuple(map(int, record["skipped_batches"])),
                {str(name): str(value) for name, value in record["environment"].items()},
                str(record["id"]),
            )
        except FileNotFoundError as error:
            raise UserError(f"--workdir={self.path}: {error.filename} is missing.") from None
        except OSError as error:
            raise UserError(f"--workdir={self.path}: cannot read run.json or tokenizer.json: {error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--workdir={self.path}: run.json or tokenizer.json is damaged ({error}).") from None
        except UserError as error:
            raise UserError(f"--workdir={self.path}: run.json: {error}") from None

    def checkpoints(self, keep: int = 1, say: Callable[[str], None] = print, run: Run | None = None) -> "Checkpoints":
        """The checkpoints of the run that is recorded here, or of `run`, which is about to be."""
        return Checkpoints(self.path / "checkpoints", keep, say, run or self.read())


def _check_path(path: Any) -> None:
    """Raises UserError for a path that orbax, which searches its folders by patterns, or tensorstore misreads."""
    if not files.is_local(path):
        if not re.match("(gs|s3)://.", str(path)):
            raise UserError(f"--workdir={path}: a workdir is a folder, or a place in a bucket: gs://… or s3://….")
    elif odd := re.search(r"[][*?\\]", str(path)):
        raise UserError(f"--workdir={path}: the character {odd[0]} cannot be in the path of a workdir; rename it.")
    elif sys.getfilesystemencoding() != "utf-8" and not str(path).isascii():
        raise UserError(f"--workdir={path}: letters beyond ASCII need a locale with UTF-8; set PYTHONUTF8=1.")
    elif not str(path).isprintable():  # bytes that are not UTF-8 among them
        raise UserError(f"--workdir={str(path)!r}: a path of a workdir can have only characters that can be shown.")
