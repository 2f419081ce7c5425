"""Writes a checkpoint: orbax's arrays and a record of what they are, complete on the disk before it has its name."""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers
from orbax.checkpoint.path import atomicity

from gpt.checkpointing import integrity
from gpt.checkpointing.run import Run
from gpt.config import flatten, is_harmless
from gpt.runtime import files

# Orbax has every replica write a slice of an array, and compiles a program for each slice: hundreds of them when a small
# model is first saved. Below this size, in bytes of a slice, one replica writes the whole array.
MIN_SLICE = 1 << 20
type_handlers.register_type_handler(
    jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE), override=True
)

RECORD = "digests/metadata"  # of a checkpoint; where orbax's own handler of JSON would write it
CHUNK = 1 << 26  # bytes of a piece of a converted array on disk: what a device that needs a part has to read at most


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

    def __init__(self, **options):
        super().__init__(**options)
        self.digests: dict[str, int] = {}  # of what was written

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            array = value.make()
            self.digests[f"params/{info.name.replace('.', '/')}"] = integrity.on_host(array)
            for written in await super().serialize([array], [info], [arg]):
                written.result()
        return []

    def memory_size(self, values):
        sizes = [math.prod(value.shape) * value.dtype.itemsize for value in values]
        return [(size, size) for size in sizes]


def write_params(folder: epath.Path, run: Run, params: Any) -> None:
    """Writes a checkpoint of step 0 that has parameters alone: a tree of `Deferred`, with stacked layers."""
    handler = _DeferredHandler(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry(
        (Deferred, handler),
        (jax.Array, type_handlers.ArrayHandler()),  # there are none, but without it orbax warns
    )
    files.make_folder(folder.parent)
    item = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    writer = make_writer(folder, lambda: make_record(run, 0, handler.digests), params=item)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), params)
    writer.save(folder, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params, save_args=save_args)))
    writer.wait_until_finished()
    writer.close()


def make_writer(folder: epath.Path, record: Callable[[], dict[str, Any]], **handlers: Any) -> ocp.AsyncCheckpointer:
    """What writes one checkpoint: its items, its record, and then its name."""
    partial = folder.with_name(folder.name + atomicity.TMP_DIR_SUFFIX)

    def add_record() -> None:
        (partial / RECORD).parent.mkdir()
        (partial / RECORD).write_text(json.dumps(record()))

    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler("params", "optimizer", **handlers),
        async_options=ocp.options.AsyncOptions(post_finalization_callback=add_record),
        temporary_path_class=_DurableFolder if files.is_local(folder) else None,
    )


class _DurableFolder(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a checkpoint, of which nothing is lost in a power cut once it has its name."""

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        files.publish(self.get(), self.get_final())


def make_record(
    run: Run,
    step: int,
    digests: dict[str, int],
    validation_loss: float | None = None,
    mean_loss: float | None = None,
) -> dict[str, Any]:
    """What a checkpoint records of itself."""
    record = {"run": run.id, "step": step, "data": evaluated_on(run), "arrays": digests}
    record |= {"validation_loss": validation_loss, "mean_loss": mean_loss}
    return record | {"checksum": checksum(record)}


def evaluated_on(run: Run) -> str:
    """Names what validation losses are measured on: those on other data, or on it in another form, do not compare."""
    options = flatten(dataclasses.asdict(run.config.data), "data.")
    form = {key: value for key, value in options.items() if not is_harmless(key)}
    return hashlib.sha256(json.dumps([run.fingerprint, form], sort_keys=True).encode()).hexdigest()[:32]


def checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
