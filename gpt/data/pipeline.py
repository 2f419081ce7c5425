"""Batches by number: global batch `s` is a pure function of (seed, s).

It is the same for any number of processes, devices or workers, so the only state of the data is
the step, and a run may go on with another number of hosts. grain does the shuffling and the prefetching.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from gpt import sharding
from gpt.errors import UserError


class Source(Protocol):
    """Rows to train or evaluate on: a pure function of (epoch, index), unaware of JAX."""

    def __len__(self) -> int:
        """Rows in an epoch."""

    def row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One row: arrays that have the same shapes for every index."""


def training_batches(
    source: Source, batch_size: int, seed: int, rows: range, start: int = 0, prefetch: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches `start`, `start + 1`, … without end.

    Args:
      batch_size: rows of a global batch.
      seed: of the shuffle; each epoch is shuffled anew.
      rows: the rows of a global batch that are wanted here.
      prefetch: batches prepared ahead by a thread; 0: none.
    """
    epoch_length = len(source)
    dataset = grain.MapDataset.range(epoch_length).seed(seed).shuffle().repeat(None)
    dataset = dataset.map_with_index(lambda position, index: source.row(position // epoch_length, int(index)))
    parts, part = batch_size // len(rows), rows.start // len(rows)
    dataset = dataset.batch(len(rows), drop_remainder=True)[part::parts]
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    batches = iter(dataset.to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return batches


def evaluation_batches(
    source: Source, batch_size: int, rows: range, padding: dict[str, int]
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches that hold every row of the source once, in order.

    Args:
      padding: for each array of a row, the value that fills the last batch up to `batch_size`.
    """
    for first in range(0, len(source), batch_size):
        wanted = [source.row(0, i) for i in range(first + rows.start, min(first + rows.stop, len(source)))]
        blank = {name: np.full_like(array, padding[name]) for name, array in source.row(0, 0).items()}
        wanted += [blank] * (len(rows) - len(wanted))
        yield {name: np.stack([row[name] for row in wanted]) for name in blank}


def to_devices(batches: Iterator[dict[str, np.ndarray]], mesh: jax.sharding.Mesh) -> Iterator[dict[str, Any]]:
    """The batches as global arrays, sharded over the batch axes of the mesh."""
    target = sharding.batch_sharding(mesh)
    for batch in batches:
        yield {name: jax.make_array_from_process_local_data(target, array) for name, array in batch.items()}


def check_batch(batch_size: int, mesh: jax.sharding.Mesh, micro_batches: int = 1) -> None:
    """Raises UserError unless the batch can be split over micro-batches and the mesh."""
    parts = sharding.batch_shards(mesh) * micro_batches
    if batch_size % parts:
        raise UserError(
            f"train.batch_size={batch_size} is not a multiple of {parts}: train.micro_batches={micro_batches} × "
            f"{sharding.batch_shards(mesh)} parts of the batch on the mesh (data × fsdp)."
        )
