"""What a workdir holds, and the only code that reads and writes it.

    run.json         the resolved config, the fingerprint of the data, the batches that are left out, and the versions
                     and devices that make a resumed run exact
    tokenizer.json   or the names of the classes
    checkpoints/     one folder a step: `params` (or LoRA's adapters) and `optimizer` in orbax's format, and `digests`,
                     what the checkpoint records of itself: its run, its step, its losses and a digest of each array
    events.out.*     TensorBoard
    .lock            held by the process that trains

Weights that were converted and not trained here (see `gpt.convert`) are a workdir without a fingerprint, and with
one checkpoint, of step 0, that has no optimizer.

All are plain formats: opening a workdir runs no code of its author.
"""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from gpt.checkpointing import integrity
from gpt.checkpointing.run import Run
from gpt.checkpointing.writing import RECORD, checksum, evaluated_on, make_record, make_writer
from gpt.models.layers import stack_layers, unstack_layers
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json
from gpt.sharding import path_name

STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint


class Damaged(UserError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The saved states of a run: the `keep` newest ones and the one with the lowest validation loss.

    On disk the layers are stacked, whether the model scans over them or not: so one can go on from the other.
    Nothing is created or cleaned up before the first save: a run may be going on meanwhile.

    A save goes on in the background: orbax writes the arrays into a folder with a temporary name, all of it is synced
    to the disk, the folder gets its name, and every number is read back and compared. Only then are older ones deleted.

    Args:
      say: prints a line: of a save that failed, or of a checkpoint that is damaged.
      run: checkpoints of other runs are refused, and losses on other data do not compete for the lowest.

    Attributes:
      failure: a sentence about the last save, if it failed.
    """

    def __init__(self, path: epath.Path, keep: int, say: Callable[[str], None], run: Run):
        self._path, self._keep, self._say, self._run = path, keep, say, run
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: int | None = None
        self._frozen: dict[str, int] = {}  # digests of the weights that adapters belong to
        self._verified: concurrent.futures.Future | None = None  # digests of what was written, as far as read here
        self.failure: str | None = None
        self._records: dict[int, dict[str, Any]] = {}  # what each checkpoint records of itself
        self._damaged: dict[int, Damaged] = {}  # those that have no such record
        self._unusable = [name for name in saved_names(path) if not STEP.fullmatch(name)]
        for step in sorted(int(name) for name in saved_names(path) if STEP.fullmatch(name)):
            try:
                self._records[step] = self._read_record(step)
            except Damaged as error:
                self._damaged[step] = error

    def last(self) -> int | None:
        """Newest step saved, or being saved, or None."""
        return max(self._records, default=None)

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation loss on the run's present data among the checkpoints, or None."""
        data, losses = evaluated_on(self._run), []
        for step, record in self._records.items():
            loss = record["validation_loss"]
            if loss is not None and math.isfinite(loss) and record["data"] == data:
                losses.append((loss, step))
        loss, step = min(losses, default=(math.inf, None))
        return None if step is None else (step, loss)

    def mean_loss(self, step: int) -> float | None:
        """The running mean of the training loss that a step was saved with."""
        return self._records[step]["mean_loss"]

    def digest(self, step: int) -> int:
        """One digest for all parameters (or adapters) of a checkpoint, as it records them: the same on any mesh."""
        arrays = self._records[step]["arrays"]
        return sum(arrays[name] for name in arrays if name.startswith("params/")) % 2**32

    def keep_frozen(self, frozen: Any) -> None:
        """From now on, `save` compares the weights that adapters belong to with these."""
        self._frozen = integrity.digests(frozen) if frozen else {}

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        validation_loss: float | None = None,
        mean_loss: float | None = None,
        frozen: Any = None,
    ) -> None:
        """Starts to save in the background; the arrays may be donated once this returns.

        Where that fails (a full disk), a line says so and `failure` is set; the checkpoints before stay as they are,
        and the next save is another try. With several processes it is an error.

        Args:
          frozen: the weights that adapters belong to. They are not saved, but compared with those of `keep_frozen`.

        Raises:
          UserError: devices that have to hold the same numbers hold different ones. Nothing is saved then.
        """
        self.wait()
        stacked = _stack({"params": params, "optimizer": optimizer})
        try:
            digests = integrity.digests(stacked)
            if frozen and integrity.digests(frozen) != self._frozen:
                raise integrity.ReplicasDiffer("the frozen weights are not what they were")
        except integrity.ReplicasDiffer as error:
            raise UserError(
                f"Step {step:,} is not saved, because {error}: the hardware, or the program on one process, is at "
                f"fault. Exclude it, and start again from the checkpoint before ({self._kept()})."
            ) from None
        record = make_record(self._run, step, digests, validation_loss, mean_loss)
        with self._may_fail(step):
            if not (self._path.parent / "run.json").exists():  # orbax would make the folder again, without a record
                raise FileNotFoundError(0, "the workdir is gone")
            if cluster.is_first():
                files.make_folder(self._path)
                self._remove_unfinished()
            writer = make_writer(self._path / str(step), lambda: record)
            args = {name: ocp.args.StandardSave(tree) for name, tree in stacked.items()}
            writer.save(self._path / str(step), args=ocp.args.Composite(**args))
            self._records[step], self._saving = record, step
            self._verified = self._background.submit(self._read_back, step, writer)

    def validation_loss(self, step: int) -> float | None:
        """The loss of a step, on whatever data it was evaluated; None if it was not."""
        return self._records[step]["validation_loss"]

    def evaluated(self, step: int, validation_loss: float) -> None:
        """Records the loss of a step that was saved before it was known, and deletes what that replaces."""
        self.wait()
        if step not in self._records:  # its save failed
            return
        before = self._records[step]
        record = make_record(self._run, step, before["arrays"], validation_loss, before["mean_loss"])
        try:
            if cluster.is_first():
                files.write(self._path / str(step) / RECORD, json.dumps(record))
        except UserError as error:
            if cluster.is_several():  # they would not agree on which checkpoint is the best
                raise
            self._say(f"note: {error} The checkpoint has no validation loss.")
        else:
            self._records[step] = record
            self._delete_old()

    def poll(self) -> None:
        """Looks whether the save in the background is over, and has failed."""
        if self._saving is None or not self._verified.done():
            return
        if self._verified.exception() or not cluster.is_several():  # several have to ask at the same step
            self.wait()

    def wait(self) -> None:
        """Waits for what is being saved, and deletes the checkpoints that it replaces."""
        if self._saving is None:
            return
        step = self._saving
        with self._may_fail(step):
            found = self._verified.result()
            if cluster.is_several():
                parts = multihost_utils.process_allgather(np.array(list(found.values()), np.uint32))
                found = dict(zip(found, parts.sum(axis=0, dtype=np.uint32), strict=True))
            self._compare(step, found)
            self._saving, self.failure = None, None
        if self._saving is None and self.failure is None:
            self._delete_old()

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        self.wait()
        self._background.shutdown()

    def _kept(self) -> str:
        last = self.last()
        return "there is no checkpoint yet" if last is None else f"that of step {last:,} is kept"

    def _read_back(self, step: int, writer: ocp.AsyncCheckpointer) -> dict[str, int]:
        """Waits for the save, reads this process's share of it from the disk, and returns the digests of that."""
        writer.wait_until_finished()
        writer.close()
        names = self._records[step]["arrays"]
        return _digests_of_files(self._path / str(step), names, jax.process_index(), jax.process_count())

    def _delete_old(self) -> None:
        """Deletes all but the newest checkpoints and the best one."""
        best = self.best()
        keep = {*sorted(self._records)[-self._keep :], best[0] if best else None}
        for step in sorted(self._records.keys() - keep):
            del self._records[step]
            if cluster.is_first():
                try:
                    folder = self._path / str(step)
                    # Under a temporary name first, so that one deleted in part is never taken for a checkpoint.
                    files.remove_tree(folder.rename(folder.with_name(folder.name + atomicity.TMP_DIR_SUFFIX)))
                except OSError as error:
                    self._say(f"Cannot delete the old checkpoint {folder}: {_reason(error)}.")

    def _remove_unfinished(self) -> None:
        """Deletes what saves left that a death or a full disk cut short."""
        for folder in self._path.iterdir():
            if folder.name.endswith(atomicity.TMP_DIR_SUFFIX):
                files.remove_tree(folder)

    @contextlib.contextmanager
    def _may_fail(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if cluster.is_several():  # the others wait within orbax, and there is no way to call them back
                raise UserError(f"Cannot save {self._path / str(step)}: {_reason(error)}") from error
            self._records.pop(step, None)
            if self._saving == step:  # it may have its name already, and is not whole
                with contextlib.suppress(OSError):
                    self._set_aside(step)
            self._saving = None
            self.failure = f"Cannot save {self._path / str(step)}: {_reason(error)}; {self._kept()}."
            self._say(f"{self.failure} The next save is another try.")

    def last_whole(self, restore: Callable[[int], Any]) -> tuple[int, Any] | None:
        """The newest step that can be restored, and what `restore(step)` gives; None where nothing was ever saved.

        Newer ones, which are damaged, are set aside: their folders get another name.

        Raises:
          UserError: all are damaged.
        """
        damaged = dict(self._damaged)
        for step in sorted(self._records, reverse=True):
            try:
                restored = restore(step)
            except Damaged as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                aside = cluster.share(f"set {bad} aside", lambda bad=bad: self._set_aside(bad))
                self._records.pop(bad, None)
                self._say(f"{error} It is set aside as {aside}.")
            self._damaged = {}
            return step, restored
        if damaged:
            reasons = " ".join(map(str, damaged.values()))
            raise UserError(f"No checkpoint in {self._path} is whole, and none was touched: {reasons}")
        if self._unusable:
            raise UserError(
                f"{self._path} holds no checkpoint that can be used, but {', '.join(self._unusable[:3])}. Give a "
                "checkpoint its name back, which is its step, or choose another --workdir."
            )
        return None

    def _set_aside(self, step: int) -> str:
        names = (self._path / f"{step}.damaged{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
        aside = (self._path / str(step)).rename(next(name for name in names if not name.exists()))
        files.sync(self._path)
        return aside.name

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The items named (`params`, `optimizer`) of a step.

        Args:
          abstract: for each item, its tree of jax.ShapeDtypeStruct with the shardings to restore to,
            which need not be those it was saved with.

        Raises:
          Damaged: the checkpoint is not what was saved.
          UserError: an array is missing by the config or has another shape, or the storage does not answer.
        """
        stacked = _stacked(abstract)
        restored, error = None, None
        try:
            for name, tree in stacked.items():
                self._check_shapes(step, name, _shapes(tree))
            handler = ocp.StandardCheckpointHandler()
            restored = {
                name: handler.restore(self._path / str(step) / name, args=ocp.args.StandardRestore(tree))
                for name, tree in stacked.items()
            }
        except Exception as raised:
            error = self._cannot_read(step, raised)
        # All go on or none: what comes next needs them all.
        if cluster.is_several() and not multihost_utils.process_allgather(np.array(error is None)).all():
            error = error or self._damage(step, "as another process sees it")
        if error:
            raise error
        self._compare(step, integrity.digests(restored))
        if jax.tree.structure(restored) == jax.tree.structure(abstract):
            return restored
        return jax.jit(unstack_layers, out_shardings=_shardings(abstract))(restored)

    def restore_each(self, step: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
        """The parameters of these names, like "blocks/mlp/up/kernel", one after the other, whole and on the host.

        No more than one of them is in memory for this.

        Raises:
          UserError: one is missing or has another shape, or the checkpoint is damaged.
        """
        handler = ocp.PyTreeCheckpointHandler()
        try:
            self._check_shapes(step, "params", shapes)
        except Exception as error:
            raise self._cannot_read(step, error) from error
        for name in shapes:
            leaf: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            item: Any = 0
            for key in reversed(name.split("/")):
                leaf, item = {key: leaf}, {key: item}
            args = ocp.args.PyTreeRestore(item, restore_args=leaf, partial_restore=True)
            try:
                restored = handler.restore(self._path / str(step) / "params", args=args)
            except Exception as error:
                raise self._cannot_read(step, error) from error
            (array,) = jax.tree.leaves(restored)
            self._compare(step, {f"params/{name}": integrity.on_host(array)})
            yield array

    def _read_record(self, step: int) -> dict[str, Any]:
        """What a checkpoint records of itself. Raises Damaged where that is missing, or of another run or step."""
        try:
            record = read_json(self._path / str(step) / RECORD)
            rest = {name: value for name, value in record.items() if name != "checksum"}
            if record["checksum"] != checksum(rest) or not {"arrays", "validation_loss", "mean_loss"} <= rest.keys():
                raise ValueError("not what was written")
            if record["step"] != step:
                raise ValueError(f"this is the checkpoint of step {record['step']}")
            if record["run"] != self._run.id:
                raise ValueError("this is a checkpoint of another run")
        except FileNotFoundError:
            raise self._damage(step, f"{RECORD} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damage(step, f"{RECORD}: {_reason(error)}") from None
        return record

    def _compare(self, step: int, found: dict[str, int]) -> None:
        saved = self._records[step]["arrays"]
        changed = [name for name, digest in found.items() if saved.get(name) != int(digest)]
        if changed:
            raise self._damage(step, f"{', '.join(changed[:3])}: not the numbers that were saved")

    def _damage(self, step: int, reason: str) -> Damaged:
        return Damaged(f"{self._path / str(step)} is damaged ({reason}).")

    def _cannot_read(self, step: int, error: Exception) -> Exception:
        """What to raise for an error while reading: of a damaged file, of storage that does not answer, or a bug."""
        ours = isinstance(error, UserError | RuntimeError | MemoryError)
        if ours and not isinstance(error, NotImplementedError):  # orbax's word for a kind that it does not know
            return error
        passing = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
        if isinstance(error, PermissionError | TimeoutError) or any(code in str(error) for code in passing):
            return UserError(f"Cannot read {self._path / str(step)}: {_reason(error)}")
        return self._damage(step, _reason(error))

    def check_fits(self, step: int, **abstract: Any) -> None:
        """Raises UserError unless the items of a step have the arrays of these trees, as `restore` takes them."""
        for name, tree in _stacked(abstract).items():
            try:
                self._check_shapes(step, name, _shapes(tree))
            except Exception as error:
                raise self._cannot_read(step, error) from error

    def _check_shapes(self, step: int, item: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError unless an item of a step has arrays of these names and shapes, and no others."""
        saved = ocp.PyTreeCheckpointHandler().metadata(self._path / str(step) / item)
        found = _shapes(saved.tree)
        if {f"{item}/{name}" for name in found} - self._records[step]["arrays"].keys():
            raise self._damage(step, f"{item}/_METADATA: not the arrays that were saved")
        for leaf in jax.tree.leaves(saved.tree, is_leaf=_is_array):
            # TensorStore takes the memory of a piece before it looks for one, and ends the process where there is none.
            pieces = leaf.storage.chunk_shape if leaf.storage else None
            if pieces and math.prod(pieces) > max(math.prod(leaf.shape), 1):
                raise ValueError(f"{leaf.name} is in pieces of {_shape(pieces)}, larger than itself")
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                there, here = (_shape(shapes.get(name)) for shapes in (found, expected))
                raise UserError(
                    f"{self._path / str(step)} does not fit the config: {name} is {there} there, and {here} by the "
                    "config."
                )

    def find(self, which: str) -> int:
        """The step that `which` names: "best" (or last, if nothing was evaluated), "last", or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self._records | self._damaged)
        if not steps:
            raise UserError(f"There is no checkpoint in {self._path} yet.")
        if which in ("best", "last"):
            best = self.best() if which == "best" else None
            step = best[0] if best else steps[-1]
        elif which.isdecimal() and int(which) in steps:
            step = int(which)
        else:
            raise UserError(f"--checkpoint={which}: choose best, last or one of {', '.join(map(str, steps))}.")
        damaged = self._damaged if which == "best" else self._damaged.keys() & {step}
        if damaged:  # where it is one of several, it may have been the best
            raise self._damaged[max(damaged)]
        return step


def _digests_of_files(folder: epath.Path, names: dict[str, Any], index: int, count: int) -> dict[str, int]:
    """For each array of a checkpoint, the digest of the part that process `index` of `count` has to read.

    The parts, every `count`-th piece of an array on the disk, add up to the whole.
    """
    found, number = dict.fromkeys(names, 0), 0
    for name in names:
        item, _, path = name.partition("/")
        base = f"{folder / item}/"
        base = {"driver": "file", "path": base} if files.is_local(folder) else base
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{path.replace('/', '.')}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        pieces = array.chunk_layout.read_chunk.shape or ()
        grid = (range(0, size, piece) for size, piece in zip(array.shape, pieces, strict=True))
        for origin in itertools.product(*grid):
            if number % count == index:
                part = tuple(slice(first, first + piece) for first, piece in zip(origin, pieces, strict=True))
                part = np.asarray(array[part].read().result()) if part else np.asarray(array.read().result())
                found[name] = (found[name] + integrity.on_host(part, origin, array.shape)) % 2**32
            number += 1
    return found


def saved_names(checkpoints: epath.Path) -> list[str]:
    """The names in a folder of checkpoints, but for what a save left that was cut short, and hidden files."""
    names = (entry.name for entry in checkpoints.iterdir()) if checkpoints.exists() else ()
    return sorted(name for name in names if not name.endswith(atomicity.TMP_DIR_SUFFIX) and name[0] != ".")


def _reason(error: Exception) -> str:
    """What went wrong, short: libraries wrap the system's word for it in a page of context."""
    text = getattr(error, "strerror", None) or str(error)
    system = re.search(r"\[os_error_code='(\d+)'|\[OS error (\d+):", text)  # of tensorstore
    return os.strerror(int(system[1] or system[2])) if system else " ".join(text.split())[:200]


def _is_array(x: Any) -> bool:
    """Whether this is an array or orbax's metadata of one, which may be no leaf to JAX."""
    return hasattr(x, "shape")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if _is_array(leaf)}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape)) or "a number"


def _stacked(tree: Any) -> Any:
    """The jax.ShapeDtypeStruct, with shardings, of what `stack_layers` makes of a tree."""

    def stack(layers):
        first = layers[0]
        sharding = jax.NamedSharding(first.sharding.mesh, jax.P(None, *first.sharding.spec))
        return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=sharding)

    return stack_layers(tree, stack)


def _stack(tree: Any) -> Any:
    """A copy of a tree on the devices, with the layers stacked."""
    return jax.jit(stack_layers, out_shardings=_shardings(_stacked(tree)))(tree)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
