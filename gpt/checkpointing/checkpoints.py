"""The checkpoints of a run: which there are, which is the best, saving the next one, and restoring the newest."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from gpt.checkpointing import integrity, writing
from gpt.checkpointing.reading import Checkpoint, shardings, stacked_shapes
from gpt.checkpointing.record import RECORD, STEP, Damaged, Record, lowest, reason, saved_names
from gpt.checkpointing.run import Run, validation_data
from gpt.checkpointing.stacking import stack_layers
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError, nearest
from gpt.runtime.progress import say


class Checkpoints:
    """The saved states of a run: the `keep` newest ones and the one with the lowest validation loss.

    A save continues in the background: orbax writes the arrays into a folder with a temporary name, all files are
    synced to the disk, the folder is renamed to its step, and every array is read back and compared with its digest.
    Only then are older checkpoints deleted. Nothing is created or deleted before the first save, so that the
    checkpoints of a run can be read while it trains.

    Args:
      path: folder of the checkpoints; need not exist.
      keep: how many of the newest checkpoints to keep.
      run: the run that the checkpoints have to belong to. Only losses on its data compete for the lowest.

    Attributes:
      failure: a sentence about the last save if it failed, else None.
    """

    def __init__(self, path: epath.Path, keep: int, run: Run):
        self._path, self._keep = path, keep
        self._run_id, self._data = run.id, validation_data(run)
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, concurrent.futures.Future] | None = None  # a step, and the digests read back from disk
        self._frozen: dict[str, int] = {}  # digests of the frozen weights that LoRA's adapters belong to
        self.failure: str | None = None
        self._saved: dict[int, Checkpoint] = {}
        self._damaged: dict[int, Damaged] = {}  # checkpoints without a valid record
        names = saved_names(path)
        self._misnamed = [name for name in names if not STEP.fullmatch(name)]
        for step in sorted(int(name) for name in names if STEP.fullmatch(name)):
            try:
                self._saved[step] = Checkpoint(self._folder(step), Record.open(self._folder(step), self._run_id))
            except Damaged as error:
                self._damaged[step] = error

    def __getitem__(self, step: int) -> Checkpoint:
        """Returns the checkpoint of a step. Raises Damaged if its record is damaged."""
        if step in self._damaged:
            raise self._damaged[step]
        return self._saved[step]

    def last(self) -> int | None:
        """Returns the newest step that is saved or being saved, or None."""
        return max(self._saved, default=None)

    def best(self) -> tuple[int, float] | None:
        """Returns step and loss of the checkpoint with the lowest validation loss on the run's data, or None."""
        return lowest((saved.record for saved in self._saved.values()), self._data)

    def find(self, which: str) -> int:
        """Returns a step by its name: "best" (the last one if nothing was evaluated), "last", or a number.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        steps = sorted(self._saved | self._damaged)
        if not steps:
            raise UserError(f"There is no checkpoint in {self._path} yet.")
        named = {str(step): step for step in steps} | {"best": (self.best() or steps[-1:])[0], "last": steps[-1]}
        if which not in named:
            known = f"best, last or one of {', '.join(map(str, steps))}{nearest(which, named.keys())}"
            raise UserError(f"--checkpoint={which}: choose {known}")
        # Any damaged checkpoint may have been the best one.
        if damaged := self._damaged if which == "best" else self._damaged.keys() & {named[which]}:
            raise self._damaged[max(damaged)]
        return named[which]

    def last_whole(self, restore: Callable[[int], Any]) -> tuple[int, Any] | None:
        """Returns the newest step that can be restored and the result of `restore(step)`; None if nothing was saved.

        Damaged checkpoints are renamed, but only after another one was restored.

        Raises:
          UserError: all checkpoints are damaged, or have names that are not steps.
        """
        damaged = {step: str(error) for step, error in self._damaged.items()}
        for step in sorted(self._saved, reverse=True):
            try:
                restored = restore(step)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, problem in damaged.items():
                name = cluster.share(f"set {bad} aside", functools.partial(writing.set_aside, self._folder(bad)))
                self._saved.pop(bad, None)
                say(f"{problem} It was renamed to {name}.")
            self._damaged = {}
            return step, restored
        if damaged:
            raise UserError(
                f"All checkpoints in {self._path} are damaged, and none was changed: {' '.join(damaged.values())} "
                "Copy one back from a backup, or choose another --workdir."
            )
        if self._misnamed:
            raise UserError(
                f"{self._path} has no checkpoint with a valid name, only {', '.join(self._misnamed[:3])}. Rename a "
                "checkpoint to the number of its step, or choose another --workdir."
            )
        return None

    def keep_frozen(self, frozen: Any) -> None:
        """Notes the frozen weights of LoRA, if any, which each `save` then compares with those it is given."""
        self._frozen = integrity.digests(frozen) if frozen else {}

    def save(
        self,
        step: int,
        items: dict[str, Any],
        validation_loss: float | None = None,
        mean_loss: float | None = None,
        frozen: Any = None,
    ) -> None:
        """Starts to save in the background; the arrays may be donated after this call. Every process calls this.

        If a save fails (because of a full disk, for instance), older checkpoints stay, `failure` is set, a line is
        printed, and training can continue. A job of several processes ends with an error instead.

        Args:
          items: trees of arrays by name, see `gpt.step.TrainState.items`.
          frozen: frozen weights of LoRA; they are not saved, but compared with those of `keep_frozen`.

        Raises:
          UserError: devices that have to hold the same values differ, or frozen weights changed; nothing is saved.
        """
        self.wait()
        stacked = jax.jit(stack_layers, out_shardings=shardings(stacked_shapes(items)))(items)
        try:
            digests = integrity.digests(stacked)
            if frozen and integrity.digests(frozen) != self._frozen:
                raise integrity.ReplicasDiffer("the frozen weights changed in memory")
        except integrity.ReplicasDiffer as error:
            raise UserError(
                f"Step {step:,} was not saved because {error}. A device is faulty, or a process runs another program: "
                f"exclude it, and resume with the same command ({self._newest()})."
            ) from None
        record = Record(self._run_id, step, self._data, digests, validation_loss, mean_loss)
        saved = Checkpoint(self._folder(step), record)
        with self._failure_noted(step):
            if not (self._path.parent / "run.json").exists():  # orbax would create the workdir again, without run.json
                raise FileNotFoundError(0, "the workdir was removed")
            if cluster.is_first():
                files.make_folder(self._path)
                writing.remove_unfinished(self._path)
            writer = writing.make_writer(saved.folder, lambda: record)
            args = {item: ocp.args.StandardSave(tree) for item, tree in stacked.items()}
            writer.save(saved.folder, args=ocp.args.Composite(**args))
            self._saved[step] = saved
            self._saving = step, self._background.submit(_finish, writer, saved)

    def evaluated(self, step: int, validation_loss: float) -> None:
        """Records the validation loss of a saved step, and deletes checkpoints that need not be kept any more."""
        self.wait()
        if step not in self._saved:  # its save failed
            return
        saved = self._saved[step]
        record = dataclasses.replace(saved.record, data=self._data, validation_loss=validation_loss)
        try:
            if cluster.is_first():
                files.write(saved.folder / RECORD, record.to_json())
        except UserError as error:
            if cluster.is_several():  # the processes would not agree on the best checkpoint
                raise
            say(f"note: {error} The checkpoint of step {step:,} has no validation loss.")
        else:
            self._saved[step] = dataclasses.replace(saved, record=record)
            self._delete_old()

    def poll(self) -> None:
        """Notes the failure or the end of the save in the background, if it has ended."""
        # Several processes have to call `wait` at the same step, so only a failure, which ends the job, is noted now.
        if self._saving and self._saving[1].done() and (self._saving[1].exception() or not cluster.is_several()):
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background, verifies it, and deletes the checkpoints that it replaces."""
        if self._saving is None:
            return
        step, verified = self._saving
        with self._failure_noted(step):
            digests = verified.result()
            if cluster.is_several():
                shares = multihost_utils.process_allgather(np.array(list(digests.values()), np.uint32))
                digests = dict(zip(digests, shares.sum(axis=0, dtype=np.uint32), strict=True))
            self._saved[step].compare(digests)
            self._saving = self.failure = None
        if self.failure is None:
            self._delete_old()

    def close(self) -> None:
        """Waits for the save in the background and ends its thread."""
        self.wait()
        self._background.shutdown()

    def _folder(self, step: int) -> epath.Path:
        return self._path / str(step)

    def _newest(self) -> str:
        last = self.last()
        return "there is no checkpoint yet" if last is None else f"the checkpoint of step {last:,} is kept"

    def _delete_old(self) -> None:
        best = self.best()
        keep = {*sorted(self._saved)[-self._keep :], best[0] if best else None}
        for step in sorted(self._saved.keys() - keep):
            folder = self._saved.pop(step).folder
            if cluster.is_first():
                try:
                    writing.delete(folder)
                except OSError as error:
                    say(f"Cannot delete the old checkpoint {folder}: {reason(error)}.")

    @contextlib.contextmanager
    def _failure_noted(self, step: int) -> Iterator[None]:
        """Turns an error into `failure`, and forgets the checkpoint of the step."""
        try:
            yield
        except Exception as error:
            problem = f"Cannot save {self._folder(step)}: {reason(error)}"
            if cluster.is_several():  # the other processes wait within orbax and cannot be called back
                raise UserError(f"{problem}.") from error
            self._saved.pop(step, None)
            if self._saving:  # the folder may have its final name already, with wrong content
                with contextlib.suppress(OSError):
                    writing.set_aside(self._folder(step))
            self._saving = None
            self.failure = f"{problem}; {self._newest()}."
            say(f"{self.failure} Training continues and tries again at the next save.")


def _finish(writer: ocp.AsyncCheckpointer, saved: Checkpoint) -> dict[str, int]:
    """Waits for a save, then returns the digests of this process's share of it, read back from the disk."""
    writer.wait_until_finished()
    writer.close()
    return saved.digests_on_disk(jax.process_index(), jax.process_count())
