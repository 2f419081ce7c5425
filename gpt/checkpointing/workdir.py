"""The workdir of a run.

    run.json         the resolved config, the fingerprint of the data, the batches that are left out, the base of LoRA's
                     adapters, the versions and devices that an exact resume depends on, and what `gpt.runs` shows
    tokenizer.json   the tokenizer, or the names of the classes
    checkpoints/     one folder for each saved step: the items `params` (all parameters, or LoRA's adapters), their
                     moving average `ema` if the run has one, and `optimizer`, in orbax's format, and the checkpoint's
                     own record (`gpt.checkpointing.record.Record`)
    events.out.*     TensorBoard's events
    .lock            held by the process that trains

Converted weights (see `gpt.convert`) are a workdir without a fingerprint, with one checkpoint, of step 0, that has no
optimizer state. All of these are plain data formats: opening a workdir runs no code that its author wrote.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator

from etils import epath

from gpt.checkpointing.checkpoints import Checkpoints
from gpt.checkpointing.record import saved_names
from gpt.checkpointing.run import Base, Run, describe_differences
from gpt.config import from_tree
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError, nearest


class Workdir:
    """The folder of a run, or of one to come: on a disk that all hosts share, or in a bucket (gs://, s3://).

    Raises:
      UserError: the path has characters with which checkpoints cannot be written or found.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = _checked(path)

    @property
    def has_run(self) -> bool:
        """Whether a run is recorded here."""
        return (self.path / "run.json").exists()

    @property
    def has_begun(self) -> bool:
        """Whether a run is recorded here that has saved a checkpoint, usable or not."""
        return self.has_run and bool(saved_names(self.path / "checkpoints"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and refuses other runs in it until the end of the context.

        Process 0 holds the lock, and the operating system releases it when that process ends in any way. A folder that
        was created is removed again if no run was recorded in it. In a bucket and on some network disks there
        are no locks, so users must not start two runs in one workdir there.

        Raises:
          UserError: the folder cannot be created or written to, holds something else, or is in use by another run.
        """
        with contextlib.ExitStack() as stack:
            cluster.share("workdir", lambda: self._occupy(stack))
            yield

    def _occupy(self, stack: contextlib.ExitStack) -> None:
        """Creates the folder and takes the lock; the stack releases it."""
        created = self.create()
        if not files.is_local(self.path):
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = stack.enter_context(os.fdopen(os.open(self.path / ".lock", flags, 0o644), "r+"))
        if os.fstat(file.fileno()).st_nlink > 1:
            raise UserError(f"{self.path}/.lock is a hard link to a file that the lock would overwrite; delete it.")
        stack.callback(self._remove_if_unused, created)
        for _ in range(10):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)  # `gpt.runs` takes each lock for a moment, to see whether it is held
            except OSError:  # a disk without locks
                return
        else:
            holder = file.read() or "another process"
            raise UserError(
                f"--workdir={self.path} is in use by {holder}; wait for it, end it, or choose another --workdir."
            )
        with contextlib.suppress(OSError):  # on a full disk the lock works without a name in the file
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    def _remove_if_unused(self, created: list[str]) -> None:
        """Removes the lock file and the created folders if nothing else was written."""
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in reversed(created):
                    os.rmdir(folder)

    def create(self) -> list[str]:
        """Creates the folder; returns the folders that did not exist before.

        Raises:
          UserError: the folder cannot be created or written to, holds something else, or has links in it.
        """
        try:
            created = files.make_folder(self.path)
            if files.is_local(self.path):
                files.refuse_special(self.path, links=False)
            probe = self.path / f".write-test-{secrets.token_hex(4)}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"Cannot write to --workdir={self.path}: {error.strerror or error}.") from None
        except ImportError as error:  # of the packages for buckets
            raise UserError(f"--workdir={self.path}: {error}") from None
        if not self.has_run and (self.path / "checkpoints").exists():
            raise UserError(f"--workdir={self.path} has checkpoints but no run.json; choose another folder.")
        return created

    def record(self, run: Run) -> None:
        """Writes the record of a run, on process 0; every process calls this.

        Raises:
          UserError: this process does not see what process 0 wrote, or has another config or other data.
        """
        cluster.share(f"record {len(run.skipped)}", lambda: self._write(run))
        if cluster.is_first():
            return
        if not self.has_run:
            raise UserError(f"--workdir={self.path}: the run.json of process 0 is missing; all hosts need one disk.")
        recorded = self.read()
        others = describe_differences(recorded, run, "≠")
        for name in ("id", "base", "skipped"):  # a network disk may show an older file for a while
            if getattr(recorded, name) != getattr(run, name):
                others.append(f"{name} {getattr(recorded, name)} ≠ {getattr(run, name)}")
        if others:
            raise UserError(f"Process 0 has a different run: {'; '.join(others)}. Start all with the same flags.")

    def _write(self, run: Run) -> None:
        config = run.config
        record = {
            "id": run.id,
            "description": f"{config.model.family}, {config.model.summary()}, {config.data.kind}",
            "total_steps": run.total_steps,
            "tokens_per_step": config.train.batch_size * config.model.length,
            "config": dataclasses.asdict(config),
            "data_fingerprint": run.fingerprint,
            "base": run.base and dataclasses.asdict(run.base),
            "skipped_batches": run.skipped,
            "evaluated_examples": run.evaluated,
            "environment": run.environment,
        }
        # run.json is written last, because a folder with a run.json counts as complete.
        files.write(self.path / "tokenizer.json", run.tokenizer.to_json())
        files.write(self.path / "run.json", json.dumps(record, indent=1))

    def read(self) -> Run:
        """Returns the record of the run. Raises UserError if there is none or it is damaged."""
        if not self.path.is_dir():
            runs = self.path.parent.glob("*/run.json") if files.is_local(self.path) else ()
            near = nearest(self.path.name, {run.parent.name: run.parent for run in runs})
            raise UserError(f"--workdir={self.path}: there is no such folder{near}")
        if not self.has_run:
            raise UserError(f"--workdir={self.path} holds no run: run.json is missing.")
        if files.is_local(self.path):
            files.refuse_special(self.path, links=True)
        try:
            record = files.read_json(self.path / "run.json")
            config = from_tree(record["config"])
            return Run(
                config,
                config.data.tokenizer(files.read_json(self.path / "tokenizer.json")),
                record["data_fingerprint"],
                Base(**record["base"]) if record["base"] else None,
                tuple(map(int, record["skipped_batches"])),
                int(record["evaluated_examples"]),
                int(record["total_steps"]),
                {str(name): str(value) for name, value in record["environment"].items()},
                str(record["id"]),
            )
        except OSError as error:
            raise UserError(f"--workdir={self.path}: cannot read run.json or tokenizer.json: {error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--workdir={self.path}: run.json or tokenizer.json is damaged ({error}).") from None
        except UserError as error:
            raise UserError(f"--workdir={self.path}: run.json: {error}") from None

    def checkpoints(self, keep: int = 1, run: Run | None = None) -> Checkpoints:
        """Returns the checkpoints of `run`, or of the run that is recorded here; see `Checkpoints`."""
        return Checkpoints(self.path / "checkpoints", keep, run or self.read())


def _checked(path: str | os.PathLike) -> epath.Path:
    """Returns the absolute path. Raises UserError if tensorstore or orbax, which searches by patterns, misreads it."""
    if not files.is_local(path):
        if not re.match("(gs|s3)://.", str(path)):
            raise UserError(f"--workdir={path}: use a local folder or a path in a bucket, gs://… or s3://….")
        return epath.Path(path)
    absolute = epath.Path(path).expanduser().absolute()
    text = str(absolute)
    if special := re.search(r"[][*?\\]", text):
        raise UserError(f"--workdir={path}: {text} contains the character {special[0]}; rename the folder.")
    if sys.getfilesystemencoding() != "utf-8" and not text.isascii():
        raise UserError(f"--workdir={path}: characters beyond ASCII need a locale with UTF-8; set PYTHONUTF8=1.")
    if not text.isprintable():  # bytes that are not UTF-8 among them
        raise UserError(f"--workdir={text!r}: the path has characters that cannot be printed; rename the folder.")
    return absolute
