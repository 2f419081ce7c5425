"""Batches by number: global batch `s` is a pure function of (seed, s).

It is the same for any number of processes, devices or workers, so the only state of the data is
the step, and a run may go on with another number of hosts. grain does the shuffling and the prefetching.
A run may leave out batches that did harm: then these numbers are part of that state, and step `s` takes the `s`-th
of the others.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from gpt.data.base import IGNORED, Source
from gpt.runtime.errors import UserError
from gpt.sharding import Layout


def training_batches(
    source: Source,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray,
    start: int = 0,
    prefetch: int = 0,
    skipped: Sequence[int] = (),
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """This process's rows of the batches of the steps `start`, `start + 1`, … without end.

    Args:
      batch_size: rows of a global batch.
      seed: of the shuffle; each epoch is shuffled anew.
      rows: the rows of a global batch that are wanted here; no others are read.
      prefetch: batches prepared ahead by threads; 0: none.
      skipped: numbers of global batches that are left out.
    """
    epoch_length, shuffled = len(source), _shuffled(source, seed)
    examples = shuffled.map_with_index(
        lambda position, index: source.example(int(position) // epoch_length, int(index))
    )

    def batch(step: int, _) -> dict[str, np.ndarray]:
        first = batch_number(step, skipped) * batch_size
        return _stack([examples[first + row] for row in rows])

    options = grain.ReadOptions(num_threads=min(prefetch, _threads(source)), prefetch_buffer_size=prefetch)
    batches = iter(grain.MapDataset.range(1).repeat(None).map_with_index(batch).to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return batches


def _shuffled(source: Source, seed: int) -> grain.MapDataset[int]:
    """The indices of examples in the order of training, epoch after epoch."""
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)


def order_digest(source: Source, seed: int) -> str:
    """A digest of where the order of training begins, in two epochs: another version of grain may have another."""
    shuffled, count = _shuffled(source, seed), min(len(source), 256)
    indices = [int(shuffled[start + i]) for start in (0, len(source)) for i in range(count)]
    return hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:16]


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Number of the global batch that a step takes, both counted from 0, where some are left out."""
    for number in sorted(skipped):
        step += number <= step
    return step


def evaluation_batches(
    source: Source, batch_size: int, rows: Sequence[int] | np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches that hold every row of the source once, in order.

    Rows whose targets are all `IGNORED` fill the last batch up to `batch_size`.
    """
    blank = {
        name: np.full_like(array, IGNORED if name == "targets" else 0) for name, array in source.example(0, 0).items()
    }

    def batch(number: int) -> dict[str, np.ndarray]:
        places = [number * batch_size + int(row) for row in rows]
        return _stack([source.example(0, place) if place < len(source) else blank for place in places])

    threads = _threads(source)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(grain.MapDataset.range(-(-len(source) // batch_size)).map(batch).to_iter_dataset(options))


def to_devices(
    batches: Iterator[dict[str, np.ndarray]], layout: Layout, rows: Sequence[int] | np.ndarray, batch_size: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches, of which each process has its `rows`, as global arrays sharded over the batch axes of the mesh."""
    place = {row: i for i, row in enumerate(rows)}  # of a global row among those that are here

    def to_global(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return array[[place[row] for row in range(*index[0].indices(batch_size))]]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), layout.batch, shard)

    for batch in batches:
        yield {name: to_global(array) for name, array in batch.items()}


def _threads(source: Source) -> int:
    return getattr(source, "threads", 1)


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def check_batch(batch_size: int, layout: Layout, micro_batches: int = 1) -> None:
    """Raises UserError unless the batch can be split over micro-batches and the mesh."""
    parts = layout.batch_shards * micro_batches
    if batch_size % parts:
        raise UserError(
            f"train.batch_size={batch_size} is not a multiple of {parts}: train.micro_batches={micro_batches} × "
            f"{layout.batch_shards} parts of the batch on the mesh (data × fsdp)."
        )
