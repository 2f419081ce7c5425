"""What a workdir holds, and the only code that reads and writes it.

    run.json         the resolved config, the fingerprint of the data, the batches that are left out and the versions
                     of the libraries
    tokenizer.json   or the names of the classes
    checkpoints/     one folder a step: parameters (or LoRA's adapters) and optimizer apart, with orbax's metadata and
                     a digest of each array
    events.out.*     TensorBoard
    .lock            held by the process that trains

Weights that were converted and not trained here (see `gpt.convert`) are a workdir without a fingerprint, and with
one checkpoint, of step 0, that has no optimizer.

All are plain formats: opening a workdir runs no code of its author.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers, type_handlers

from gpt import cluster, tokenizers
from gpt import config as config_lib
from gpt.errors import UserError, read_json
from gpt.models.layers import stack_layers, unstack_layers
from gpt.sharding import path_name

CHUNK = 1 << 26  # bytes of a piece of a converted array on disk: what a device that needs a part has to read at most

# A change of these leaves the course of a run the same, or is the very reason to start it again:
# a run may go on longer, on another mesh, log more often, find its text in another place, or
# compute the same function another way.
HARMLESS = (
    "train.steps",
    "train.epochs",
    "train.tokens",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.on_nonfinite",  # it makes a difference only where the run would have ended
    "train.max_skipped",
    "train.spike_factor",
    "data.path",  # the text itself is compared by its fingerprint
    "data.validation_path",
    "data.cache_dir",
    "data.prefetch",
    "tokenizer.path",  # the vocabulary itself is in the workdir
    "mesh.rules",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.model",
    "mesh.zero1",
    "model.attention",
    "model.query_chunk",
    "model.key_chunk",
    "model.remat",
    "model.scan_layers",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's record of what is trained in it."""

    config: config_lib.Config
    tokenizer: tokenizers.Tokenizer
    fingerprint: str | None  # of the data; None for weights that were converted, whose data is not known
    base: "Base | None" = None  # of a run that trains adapters
    skipped: tuple[int, ...] = ()  # numbers of the batches that are left out: see `train.on_nonfinite`


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint whose weights a run's adapters belong to.

    Attributes:
      path: of its workdir.
      digest: of the weights.
    """

    path: str
    step: int
    digest: int


class Workdir:
    """A folder with a run in it, or one to be: on a disk that all hosts share, or in a bucket (gs://, s3://)."""

    def __init__(self, path: str | os.PathLike):
        path = epath.Path(path)
        self.path = path if "://" in str(path) else path.expanduser().absolute()

    @property
    def has_run(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def has_begun(self) -> bool:
        """Whether there is a run with anything to lose: one that saved."""
        return self.has_run and any((self.path / "checkpoints").glob("[0-9]*"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it until the end of the context.

        Process 0 holds the lock, and its death, however sudden, releases it. In a bucket there are no locks, nor on
        some network disks: there it is up to the user that no two runs write to one workdir.

        Raises:
          UserError: the folder cannot be made or written to, holds something else, or another run is at work in it.
        """
        with contextlib.ExitStack() as held:
            cluster.share("workdir", lambda: self._occupy(held))
            yield

    def _occupy(self, held: contextlib.ExitStack) -> None:
        self.create()
        if "://" in str(self.path):
            return
        file = held.enter_context((self.path / ".lock").open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (self.path / ".lock").read_text() or "another process"
            raise UserError(
                f"--workdir={self.path} is in use by {holder}; wait for it, end it, or choose another --workdir."
            ) from None
        except OSError:  # a disk without locks
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def create(self) -> None:
        """Makes the folder. Raises UserError where that is not permitted, or it holds something else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"
            probe.unlink(missing_ok=True)  # in a stranger's workdir it may be a link to anywhere
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"Cannot write to --workdir={self.path}: {error.strerror or error}.") from None
        except ImportError as error:  # of what buckets need
            raise UserError(f"--workdir={self.path}: {error}") from None
        if not self.has_run and (self.path / "checkpoints").exists():
            raise UserError(f"--workdir={self.path} has checkpoints but no run.json; choose another folder.")

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
        if others := _differences(self.read(), run, "≠"):
            raise UserError(f"Process 0 and this one are to train different runs: {'; '.join(others)}.")

    def _write(self, run: Run) -> None:
        libraries = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
        record = {
            "config": dataclasses.asdict(run.config),
            "data_fingerprint": run.fingerprint,
            "base": run.base and dataclasses.asdict(run.base),
            "skipped_batches": run.skipped,
            "versions": {name: importlib.metadata.version(name) for name in libraries},
        }
        # The record last, in one move: a folder with a run.json is complete.
        _replace(self.path / "tokenizer.json", run.tokenizer.to_json())
        _replace(self.path / "run.json", json.dumps(record, indent=1))

    def read(self) -> Run:
        """The run that is recorded here. Raises UserError where there is none or it is damaged."""
        if not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: there is no such folder.")
        if not self.has_run:
            raise UserError(f"--workdir={self.path} holds no run: there is no run.json in it.")
        try:
            record = read_json(self.path / "run.json")
            config = config_lib.from_tree(record["config"])
            return Run(
                config,
                config.data.tokenizer(read_json(self.path / "tokenizer.json")),
                record["data_fingerprint"],
                Base(**record["base"]) if record["base"] else None,
                tuple(map(int, record["skipped_batches"])),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--workdir={self.path}: run.json or tokenizer.json is damaged ({error}).") from None
        except UserError as error:
            raise UserError(f"--workdir={self.path}: run.json: {error}") from None

    def checkpoints(self, keep: int = 1, say: Callable[[str], None] = print) -> "Checkpoints":
        return Checkpoints(self.path / "checkpoints", keep, say)


class Damaged(UserError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The saved states of a run: the `keep` newest ones and the one with the lowest validation loss.

    On disk the layers are stacked, whether the model scans over them or not: so one can go on from the other.
    Nothing is created or cleaned up before the first save: a run may be going on meanwhile.

    Args:
      say: prints a line: of a save that failed, or of a checkpoint that is damaged.

    Attributes:
      failure: a sentence about the last save, if it failed.
    """

    def __init__(self, path: epath.Path, keep: int, say: Callable[[str], None]):
        self._path, self._keep, self._say = path, keep, say
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self.failure: str | None = None
        self._losses: dict[int, float] = {}  # of validation; inf where there was none
        self._means: dict[int, float | None] = {}  # of the training loss
        self._damaged: dict[int, Damaged] = {}  # those whose loss cannot be read
        for step in ocp.utils.checkpoint_steps(path) if path.exists() else ():
            try:
                metrics = read_json(path / str(step) / "metrics" / "metrics")
                noted = self._digests(step)
                if noted and noted["metrics"] != _digest_json(metrics):
                    raise ValueError("not the numbers that were saved")
                self._losses[step], self._means[step] = float(metrics["validation_loss"]), metrics.get("mean_loss")
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._damaged[step] = self._damage(step, f"metrics: {_reason(error)}")

    def last(self) -> int | None:
        """Newest step saved, or being saved, or None."""
        return max(self._losses, default=None)

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation loss among the checkpoints, or None."""
        loss, step = min(((loss, step) for step, loss in self._losses.items()), default=(math.inf, None))
        return (step, loss) if math.isfinite(loss) else None

    def mean_loss(self, step: int) -> float | None:
        """The running mean of the training loss that a step was saved with."""
        return self._means[step]

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        validation_loss: float | None = None,
        mean_loss: float | None = None,
    ) -> None:
        """Starts to save in the background; the arrays may be donated once this returns.

        Where that fails (a full disk), a line says so and `failure` is set; the checkpoints before stay as they are,
        and the next save is another try. With several processes it is an error.
        """
        self.wait()
        items = {"params": params, "optimizer": optimizer}
        replicated = jax.NamedSharding(jax.tree.leaves(items)[0].sharding.mesh, jax.P())
        stacked, digests = jax.jit(_stack_and_digest, out_shardings=(_shardings(_stacked(items)), replicated))(items)
        args = {name: ocp.args.StandardSave(tree) for name, tree in stacked.items()}
        digests = {name: int(digest) for name, digest in jax.device_get(digests).items()}
        validation_loss = math.inf if validation_loss is None else validation_loss
        metrics = {"validation_loss": validation_loss, "mean_loss": mean_loss}
        digests["metrics"] = _digest_json(metrics)
        with self._may_fail(step):
            if not (self._path.parent / "run.json").exists():  # orbax would make the folder again, without a record
                raise FileNotFoundError(0, "the workdir is gone")
            self._manager = self._manager or self._open()
            self._losses[step], self._means[step], self._saving = validation_loss, mean_loss, step
            self._manager.save(
                step,
                args=ocp.args.Composite(**args, digests=ocp.args.JsonSave(digests)),
                metrics=metrics,
                force=True,
            )

    def poll(self) -> None:
        """Looks whether the save in the background is over, and has failed."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for what is being saved."""
        if self._saving is not None:
            step = self._saving
            with self._may_fail(step):
                self._manager.wait_until_finished()
                self._saving, self.failure = None, None

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        self.wait()
        if self._manager:
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        policies = [
            checkpoint_managers.LatestN(self._keep),
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics["validation_loss"], n=1),
        ]
        options = _options(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # of saves that a death or a full disk cut short
        )
        return ocp.CheckpointManager(self._path, item_names=("params", "optimizer", "digests"), options=options)

    @contextlib.contextmanager
    def _may_fail(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if cluster.is_several():  # the others wait within orbax, and there is no way to call them back
                raise UserError(f"Cannot save {self._path / str(step)}: {_reason(error)}") from error
            self._losses.pop(step, None)
            kept = self.last()
            kept = "there is no checkpoint yet" if kept is None else f"that of step {kept:,} is kept"
            self.failure = f"Cannot save {self._path / str(step)}: {_reason(error)}; {kept}."
            self._say(f"{self.failure} The next save is another try.")
            # A new manager begins with what is on disk, less what the failure left behind.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._saving = None

    def last_whole(self, restore: Callable[[int], Any]) -> tuple[int, Any] | None:
        """The newest step that can be restored, and what `restore(step)` gives; None where nothing was ever saved.

        Newer ones, which are damaged, are set aside: their folders get another name.

        Raises:
          UserError: all are damaged.
        """
        damaged = dict(self._damaged)
        for step in sorted(self._losses, reverse=True):
            try:
                restored = restore(step)
            except Damaged as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                aside = cluster.share(f"set {bad} aside", lambda bad=bad: self._set_aside(bad))
                self._losses.pop(bad, None)
                self._say(f"{error} It is set aside as {aside}.")
            self._damaged = {}
            return step, restored
        if damaged:
            reasons = " ".join(map(str, damaged.values()))
            raise UserError(f"No checkpoint in {self._path} is whole, and none was touched: {reasons}")
        return None

    def _set_aside(self, step: int) -> str:
        folder = self._path / str(step)
        names = (self._path / f"{step}.damaged{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
        return folder.rename(next(name for name in names if not name.exists())).name

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
            digests = self._digests(step)
            for name, tree in stacked.items():
                self._check_shapes(step, name, _shapes(tree), digests)
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
        replicated = jax.NamedSharding(jax.tree.leaves(restored)[0].sharding.mesh, jax.P())
        self._compare(step, jax.device_get(jax.jit(_digest_all, out_shardings=replicated)(restored)), digests)
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
            digests = self._digests(step)
            self._check_shapes(step, "params", shapes, digests)
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
            self._compare(step, {f"params/{name}": jax.jit(_digest)(array)}, digests)
            yield array

    def _digests(self, step: int) -> dict[str, int] | None:
        """What was noted when the step was saved; None for weights that were converted."""
        path = self._path / str(step) / "digests"
        return ocp.JsonCheckpointHandler().restore(path) if path.exists() else None

    def _compare(self, step: int, found: dict[str, Any], saved: dict[str, int] | None) -> None:
        changed = [name for name, digest in found.items() if saved and saved.get(name) != int(digest)]
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

    def _check_shapes(
        self, step: int, item: str, expected: dict[str, tuple[int, ...]], digests: dict[str, int] | None
    ) -> None:
        """Raises UserError unless an item of a step has arrays of these names and shapes, and no others."""
        saved = ocp.PyTreeCheckpointHandler().metadata(self._path / str(step) / item)
        found = _shapes(saved.tree)
        if digests and {f"{item}/{name}" for name in found} - digests.keys():
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
        steps = sorted(self._losses | self._damaged)
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


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A float32 array that is made when it is written, so that a model need not be in memory to be saved."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)


class _DeferredHandler(type_handlers.NumpyHandler):
    """Writes Deferred arrays one after the other. Orbax by itself holds all that it writes, twice."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []

    def memory_size(self, values):
        sizes = [math.prod(value.shape) * value.dtype.itemsize for value in values]
        return [(size, size) for size in sizes]


def write_params(workdir: Workdir, params: Any) -> None:
    """Saves step 0 of a workdir that has no checkpoint yet: a tree of `Deferred`, with stacked layers."""
    registry = type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # there are none, but without it orbax warns
    )
    handlers = {"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)}
    options = _options(enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir.path / "checkpoints", item_handlers=handlers, options=options) as manager:
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), params)
        args = ocp.args.Composite(params=ocp.args.PyTreeSave(params, save_args=save_args))
        manager.save(0, args=args, metrics={"validation_loss": math.inf}, force=True)


def _options(**more: Any) -> ocp.CheckpointManagerOptions:
    # Without best_fn, metrics are not saved.
    return ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["validation_loss"], best_mode="min", **more)


def _stack_and_digest(items: Any) -> tuple[Any, dict[str, jax.Array]]:
    stacked = stack_layers(items)
    return stacked, _digest_all(stacked)


def _digest_all(tree: Any) -> dict[str, jax.Array]:
    return {path_name(path): _digest(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def digest(tree: Any) -> jax.Array:
    """uint32 that tells the arrays of a tree from others: the same on any mesh, and for layers stacked or not."""
    return sum(map(_digest, jax.tree.leaves(stack_layers(tree))))


def _digest(x: jax.Array) -> jax.Array:
    """A number of 32 bits for the elements of an array and their places: the same for every sharding of it.

    The elements' bits, scattered by the finalizer of MurmurHash3 (A. Appleby), are added up as integers. A change of
    one element always changes the sum; of several, all but once in 2³² times. No storage has to be trusted for it.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) * 0x9E3779B9 % 2**32)
        bits ^= jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def _digest_json(values: dict[str, float]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _reason(error: Exception) -> str:
    """What went wrong, short: libraries wrap the system's word for it in a page of context."""
    text = getattr(error, "strerror", None) or str(error)
    system = re.search(r"\[OS error \d+: \w+ ([^\]]+)\]", text)
    return system[1] if system else " ".join(text.split())[:200]


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


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def refuse_changes(old: Run, new: Run, workdir: epath.Path, allow: bool) -> dict[str, tuple[Any, Any]]:
    """The differences between a workdir's run and the one wanted, if they may be.

    Raises:
      UserError: the data, or a key that is not `HARMLESS`, has changed and `allow` is false.
    """
    serious = _differences(old, new, "→", besides=HARMLESS)
    if serious and not allow:
        raise UserError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(serious)}. Choose another "
            "--workdir, or go on with the changes by --allow_config_change."
        )
    return config_lib.differences(old.config, new.config)


def _differences(a: Run, b: Run, sign: str, besides: tuple[str, ...] = ()) -> list[str]:
    """In words, with the sign between the values: where configs and data of two runs differ."""
    changes = config_lib.differences(a.config, b.config)
    said = [f"{key} {was!r} {sign} {now!r}" for key, (was, now) in changes.items() if key not in besides]
    if a.fingerprint != b.fingerprint:
        said.append(f"fingerprint of the data {a.fingerprint} {sign} {b.fingerprint}")
    return said


def _replace(path: epath.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # in a stranger's workdir it may be a link to anywhere
    partial.write_text(text)
    partial.replace(path)
