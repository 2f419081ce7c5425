"""Writes, renames and deletes checkpoints so that a folder named after a step is complete, also after a power cut."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import type_handlers
from orbax.checkpoint.path import atomicity

from gpt.checkpointing import integrity
from gpt.checkpointing.record import RECORD, UNFINISHED, Record
from gpt.checkpointing.run import Run, validation_data
from gpt.runtime import files

CHUNK = 1 << 26  # bytes in a chunk of a converted array: a device that needs a part of the array reads whole chunks

# By default, every replica writes a slice of each array, and JAX compiles a program for each slice: hundreds for a
# small model. If the slices have fewer bytes than this, one replica writes the whole array.
MIN_SLICE = 1 << 20
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)  # orbax warns of the replacement
type_handlers.register_type_handler(
    jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE), override=True
)
logging.set_verbosity(_verbosity)


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A float32 array that is computed in parts when it is written, so that a model need not fit in memory.

    Attributes:
      name: the array's path, like "blocks/mlp/up/kernel". Those in the blocks have the layers as their first axis.
      parts: yields arrays of any float type that fill the whole together, each with the indices of its first element.
    """

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _DeferredHandler(type_handlers.NumpyHandler):
    """Writes Deferred arrays one after the other and chunk by chunk; orbax's handler would hold all of them in memory.

    Attributes:
      digests: digest of each array written so far.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.digests: dict[str, int] = {}

    async def serialize(self, values, infos, args=None):
        for one in zip(values, infos, args, strict=True):
            for future in await super().serialize(*([each] for each in one)):
                future.result()
        return []

    async def _open_and_write(self, value, tspec, ts_context):
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        digest = 0
        for first, part in value.parts():
            for index in integrity.chunks(part.shape, array.chunk_layout.write_chunk.shape):
                origin = tuple(start + inner.start for start, inner in zip(first, index, strict=True))
                chunk = np.ascontiguousarray(part[index], value.dtype)
                place = tuple(slice(start, start + size) for start, size in zip(origin, chunk.shape, strict=True))
                writing = array[place].write(chunk)
                digest += integrity.on_host(chunk, origin, value.shape)
                await writing
        self.digests[f"params/{value.name}"] = digest % 2**32


def write_params(folder: epath.Path, run: Run, params: list[Deferred]) -> None:
    """Writes a checkpoint of step 0 that has parameters, with stacked layers, and no optimizer state."""
    handler = _DeferredHandler(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry(
        (Deferred, handler),
        (jax.Array, type_handlers.ArrayHandler()),  # not used, but orbax warns if it is missing
    )
    files.make_folder(folder.parent)
    item = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    writer = make_writer(folder, lambda: Record(run.id, 0, validation_data(run), handler.digests), params=item)
    tree = unflatten_dict({value.name: value for value in params}, sep="/")
    by_layer, whole = (ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=axes) for axes in ((0,), ()))
    save_args = jax.tree.map(lambda value: by_layer if value.name.startswith("blocks/") else whole, tree)
    writer.save(folder, args=ocp.args.Composite(params=ocp.args.PyTreeSave(tree, save_args=save_args)))
    writer.wait_until_finished()
    writer.close()


def make_writer(folder: epath.Path, record: Callable[[], Record], **handlers: Any) -> ocp.AsyncCheckpointer:
    """Returns a writer of one checkpoint: of its items, then its record, and then the name of its folder."""
    partial = _partial(folder)

    def add_record() -> None:
        (partial / RECORD).parent.mkdir()
        (partial / RECORD).write_text(record().to_json())

    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler("params", "optimizer", "ema", **handlers),
        async_options=ocp.options.AsyncOptions(post_finalization_callback=add_record),
        temporary_path_class=_DurableFolder if files.is_local(folder) else None,
    )


class _DurableFolder(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a checkpoint, synced to the disk before it is renamed to the final name."""

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        files.publish(self.get(), self.get_final())


def remove_unfinished(checkpoints: epath.Path) -> None:
    """Deletes the remains of saves that were killed or found the disk full."""
    for folder in checkpoints.iterdir():
        if folder.name.endswith(UNFINISHED):
            files.remove_tree(folder)


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint; on a disk under a temporary name, so that a partly deleted one is never taken for one."""
    # In a bucket, a new name would be a copy of everything, and s3fs cannot rename a folder.
    files.remove_tree(folder.rename(_partial(folder)) if files.is_local(folder) else folder)


def set_aside(folder: epath.Path) -> str:
    """Renames the folder of a damaged checkpoint; returns the new name."""
    names = (f"{folder.name}.damaged{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    aside = folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))
    files.sync(folder.parent)
    return aside.name


def _partial(folder: epath.Path) -> epath.Path:
    return folder.with_name(folder.name + UNFINISHED)
