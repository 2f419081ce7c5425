"""Reads a checkpoint: its record, the shapes of its arrays, the arrays, and the digests of what is on the disk.

Every array that is read is compared with its digest in the record, so a damaged checkpoint is reported and never used.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils

from gpt.checkpointing import integrity
from gpt.checkpointing.record import Damaged, Record, reason
from gpt.checkpointing.stacking import stack_layers, unstack_layers
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError
from gpt.sharding import path_name

# Errors of storage that does not answer, which says nothing about the checkpoint.
TRANSIENT = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. Its layers are stacked, whether or not the model that was saved scans over its layers.

    Attributes:
      folder: holds the items (`params`, `optimizer`, `ema`) in orbax's format, and the record.
    """

    folder: epath.Path
    record: Record

    def digest(self, item: str) -> int:
        """Returns one digest of all arrays of an item, which does not depend on the mesh; 0 if it is missing."""
        return sum(digest for name, digest in self.record.arrays.items() if name.startswith(f"{item}/")) % 2**32

    def check_fits(self, **abstract: Any) -> None:
        """Raises UserError unless the items have the arrays of these trees; see `restore`."""
        for item, tree in stacked_shapes(abstract).items():
            self._check_shapes(item, _shapes(tree))

    def restore(self, **abstract: Any) -> dict[str, Any]:
        """Returns the named items (`params`, `optimizer`, `ema`). Every process calls this.

        Args:
          abstract: for each item, a tree of jax.ShapeDtypeStruct with the shardings to restore to, which may differ
            from those of the save.

        Raises:
          Damaged: the checkpoint differs from what was saved.
          UserError: an array is missing or has another shape than in the tree, or the storage does not answer.
        """
        stacked = stacked_shapes(abstract)
        restored: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            self.check_fits(**abstract)
            handler = ocp.StandardCheckpointHandler()
            restored = {
                item: handler.restore(self.folder / item, args=ocp.args.StandardRestore(tree))
                for item, tree in stacked.items()
            }
        except Exception as error:
            failure = self._explain(error)  # a new exception, whose traceback keeps no arrays in memory
        # The operations that follow are collective, so either all processes continue or none does.
        if cluster.is_several() and not multihost_utils.process_allgather(np.array(failure is None)).all():
            failure = failure or Damaged(self.folder, "another process cannot read it")
        if failure:
            raise failure
        self.compare(integrity.digests(restored))
        if _shapes(stacked) == _shapes(abstract):
            return restored
        return jax.jit(unstack_layers, out_shardings=shardings(abstract))(restored)

    def restore_each(self, item: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yields the parameters of an item with these names on the host, one after the other.

        Yields:
          A name, and a part of the parameter after the index of its first row: one layer of a parameter in "blocks/",
          else the whole. After the last part, the parameter is compared with its digest.

        Raises:
          Damaged: the checkpoint differs from what was saved.
          UserError: a parameter is missing or has another shape, or the storage does not answer.
        """
        self._check_shapes(item, shapes)
        for name, shape in shapes.items():
            digest, rows = 0, 1 if name.startswith("blocks/") else shape[0]
            for start in range(0, shape[0], rows):
                try:
                    part = self._open(f"{item}/{name}")[start : start + rows].read().result()
                except Exception as error:
                    raise self._explain(error) from error
                digest += integrity.on_host(part, (start, *(0,) * (len(shape) - 1)), shape)
                yield name, start, part
            self.compare({f"{item}/{name}": digest % 2**32})

    def compare(self, digests: dict[str, int]) -> None:
        """Raises Damaged if a digest differs from the one in the record."""
        changed = [name for name, digest in digests.items() if self.record.arrays.get(name) != int(digest)]
        if changed:
            raise Damaged(self.folder, f"{', '.join(changed[:3])}: the values differ from those saved")

    def verify(self) -> None:
        """Reads all arrays. Raises Damaged if one differs from what was saved."""
        try:
            self.compare(self.digests_on_disk(0, 1))
        except Exception as error:
            raise self._explain(error) from None

    def digests_on_disk(self, index: int, count: int) -> dict[str, int]:
        """Reads the share of process `index` of `count`, which is every `count`-th chunk of the arrays on the disk.

        Returns:
          For each array the digest of this share. The digests of all shares add up to that of the whole array.
        """
        digests, number = dict.fromkeys(self.record.arrays, 0), itertools.count()
        for name in digests:
            array = self._open(name)
            for part in integrity.chunks(array.shape, array.chunk_layout.read_chunk.shape or ()):
                if next(number) % count == index:
                    values = np.asarray((array[part] if part else array).read().result())
                    digests[name] += integrity.on_host(values, [each.start for each in part], array.shape)
        return {name: digest % 2**32 for name, digest in digests.items()}

    def _open(self, name: str) -> tensorstore.TensorStore:
        """Returns an array, such as "params/blocks/mlp/up/kernel", that can be read in parts."""
        item, _, path = name.partition("/")
        folder = f"{self.folder / item}/"
        base = {"driver": "file", "path": folder} if files.is_local(self.folder) else folder
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{path.replace('/', '.')}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()

    def _check_shapes(self, item: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises an error unless an item has arrays of exactly these names and shapes."""
        if item == "ema" and not self.digest(item):
            raise UserError(f"{self.folder} has no moving average (optimizer.ema); start a new run by train.init_from.")
        try:
            saved = ocp.PyTreeCheckpointHandler().metadata(self.folder / item)
            shapes = _shapes(saved.tree)
            if {f"{item}/{name}" for name in shapes} - self.record.arrays.keys():
                raise ValueError(f"{item}/_METADATA: not the arrays that were saved")
            for leaf in jax.tree.leaves(saved.tree, is_leaf=_is_array):
                # TensorStore allocates a chunk before it reads it, and ends the process if there is too little memory.
                chunk = leaf.storage.chunk_shape if leaf.storage else None
                if chunk and math.prod(chunk) > max(math.prod(leaf.shape), 1):
                    raise ValueError(f"{leaf.name} has chunks of {_sizes(chunk)}, larger than the array")
        except Exception as error:
            raise self._explain(error) from error
        for name in sorted(shapes.keys() | expected.keys()):
            if shapes.get(name) != expected.get(name):
                sizes = f"{_sizes(shapes.get(name))} in the checkpoint, and {_sizes(expected.get(name))} by the config"
                raise UserError(f"{self.folder} does not fit the config: {name} is {sizes}.")

    def _explain(self, error: Exception) -> Exception:
        """Returns Damaged for an error of reading, UserError if the storage does not answer, and bugs unchanged."""
        is_known = isinstance(error, UserError | RuntimeError | MemoryError)
        if is_known and not isinstance(error, NotImplementedError):  # orbax raises it for unknown kinds of arrays
            return error
        if isinstance(error, PermissionError | TimeoutError) or any(code in str(error) for code in TRANSIENT):
            return UserError(f"Cannot read {self.folder}: {reason(error)}.")
        return Damaged(self.folder, reason(error))


def stacked_shapes(tree: Any) -> Any:
    """Returns a tree of arrays or jax.ShapeDtypeStruct as jax.ShapeDtypeStruct, with shardings and stacked layers."""

    def stack(layers):
        first = layers[0]
        sharding = jax.NamedSharding(first.sharding.mesh, jax.P(None, *first.sharding.spec))
        return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=sharding)

    return stack_layers(tree, stack)


def shardings(tree: Any) -> Any:
    """Returns the sharding of each array of a tree."""
    return jax.tree.map(lambda array: array.sharding, tree)


def _is_array(x: Any) -> bool:
    """Returns whether a value is an array, or orbax's metadata of one, which JAX may not take for a leaf."""
    return hasattr(x, "shape")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if _is_array(leaf)}


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape)) or "a scalar"
