"""What a workdir holds, and the only code that reads and writes it.

    run.json         the resolved config, the fingerprint of the data, the batches that are left out and the versions
                     of the libraries
    tokenizer.json
    checkpoints/     one folder a step: parameters and optimizer apart, with orbax's metadata
    events.out.*     TensorBoard

Weights that were converted and not trained here (see `gpt.convert`) are a workdir without a fingerprint, and with
one checkpoint, of step 0, that has no optimizer.

All are plain formats: opening a workdir runs no code of its author.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
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
    skipped: tuple[int, ...] = ()  # numbers of the batches that are left out: see `train.on_nonfinite`


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
            tokenizer = tokenizers.from_tree(read_json(self.path / "tokenizer.json"))
            skipped = tuple(map(int, record["skipped_batches"]))
            return Run(config_lib.from_tree(record["config"]), tokenizer, record["data_fingerprint"], skipped)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--workdir={self.path}: run.json or tokenizer.json is damaged ({error}).") from None
        except UserError as error:
            raise UserError(f"--workdir={self.path}: run.json: {error}") from None

    def checkpoints(self, keep: int = 1, read_only: bool = False) -> "Checkpoints":
        return Checkpoints(self.path / "checkpoints", keep, read_only)


class Checkpoints:
    """The saved states of a run: the `keep` newest ones and the one with the lowest validation loss.

    On disk the layers are stacked, whether the model scans over them or not: so one can go on from the other.
    With `read_only`, nothing is created or cleaned up: the run may be going on meanwhile.
    """

    def __init__(self, path: epath.Path, keep: int, read_only: bool):
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics["validation_loss"], n=1),
        ]
        self._path = path
        options = _options(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(path, item_names=("params", "optimizer"), options=options)
        except (OSError, ValueError) as error:  # of the metrics that it reads
            raise UserError(f"Cannot read {path}: {' '.join(str(error).split())[:300]}") from error

    def last(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation loss among the checkpoints, or None."""
        losses = [(self._manager.metrics(step)["validation_loss"], step) for step in self._manager.all_steps()]
        loss, step = min(losses, default=(math.inf, None))
        return (step, loss) if math.isfinite(loss) else None

    def mean_loss(self, step: int) -> float | None:
        """The running mean of the training loss that a step was saved with."""
        return self._manager.metrics(step)["mean_loss"]

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        validation_loss: float | None = None,
        mean_loss: float | None = None,
    ) -> None:
        """Starts to save in the background; the arrays may be donated once this returns."""
        items = {"params": params, "optimizer": optimizer}
        stacked = jax.jit(stack_layers, out_shardings=_shardings(_stacked(items)))(items)
        self._manager.save(
            step,
            args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in stacked.items()}),
            metrics={
                "validation_loss": math.inf if validation_loss is None else validation_loss,
                "mean_loss": mean_loss,
            },
            force=True,
        )

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The items named (`params`, `optimizer`) of a step.

        Args:
          abstract: for each item, its tree of jax.ShapeDtypeStruct with the shardings to restore to,
            which need not be those it was saved with.

        Raises:
          UserError: an array is missing or has another shape, or the checkpoint is damaged.
        """
        stacked = _stacked(abstract)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in stacked.items()}
        try:
            for name, tree in stacked.items():
                self._check_shapes(step, name, _shapes(tree))
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error
        items = {name: restored[name] for name in abstract}
        if jax.tree.structure(items) == jax.tree.structure(abstract):
            return items
        return jax.jit(unstack_layers, out_shardings=_shardings(abstract))(items)

    def restore_each(self, step: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
        """The parameters of these names, like "blocks/mlp/up/kernel", one after the other, whole and on the host.

        No more than one of them is in memory for this.

        Raises:
          UserError: one is missing or has another shape, or the checkpoint is damaged.
        """
        handler = ocp.PyTreeCheckpointHandler()
        try:
            self._check_shapes(step, "params", shapes)
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error
        for name in shapes:
            leaf: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            item: Any = 0
            for key in reversed(name.split("/")):
                leaf, item = {key: leaf}, {key: item}
            args = ocp.args.PyTreeRestore(item, restore_args=leaf, partial_restore=True)
            try:
                restored = handler.restore(self._path / str(step) / "params", args=args)
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(step, error) from error
            (array,) = jax.tree.leaves(restored)
            yield array

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(f"Cannot restore {self._path / str(step)}: {reason}")

    def _check_shapes(self, step: int, item: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError unless an item of a step has arrays of these names and shapes, and no others."""
        saved = ocp.PyTreeCheckpointHandler().metadata(self._path / str(step) / item)
        found = _shapes(saved.tree)
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
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"There is no checkpoint in {self._path} yet.")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.best()
            return best[0] if best else steps[-1]
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(f"--checkpoint={which}: choose best, last or one of {', '.join(map(str, steps))}.")

    def wait(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        self.wait()
        self._manager.close()


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
