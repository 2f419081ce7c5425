"""Batches by number: the global batch of a step is a pure function of (seed, step).

A batch does not depend on the number of processes, devices or threads. The step is therefore the only state of the
data, and a run may resume on another number of hosts. grain shuffles the examples and prefetches batches.
A run may leave out batches, for instance because they made the loss NaN. Their numbers then belong to the state too,
and step `s` takes the `s`-th of the other batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import jax
import numpy as np

from gpt.data.base import IGNORED, Source
from gpt.data.combined import Mixture
from gpt.runtime import cache, pool
from gpt.runtime.errors import UserError
from gpt.sharding import Layout

Batch = dict[str, np.ndarray]


def training_batches(
    source: Source | Mixture,
    batch_size: int,
    seed: int,
    positions: Sequence[int] | np.ndarray,
    start: int = 0,
    prefetch: int = 0,
    skipped: Sequence[int] = (),
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over this process's part of the batches of the steps `start`, `start + 1`, ….

    Args:
      batch_size: number of examples in a global batch.
      seed: seed of the shuffle; each epoch has another order.
      positions: positions in a global batch of the examples to return; no other examples are read.
      prefetch: number of batches that threads prepare ahead; 0: none.
      skipped: numbers of the global batches to leave out.
    """
    example, read = _endless(source, seed, batch_size), pool.thread_map(getattr(source, "threads", 1))

    def batch(step: int, _) -> Batch:
        first = batch_number(step, skipped) * batch_size
        return _stack(read(example, [first + int(position) for position in positions]))

    options = grain.ReadOptions(num_threads=min(prefetch, getattr(source, "threads", 1)), prefetch_buffer_size=prefetch)
    batches = iter(grain.MapDataset.range(1).repeat(None).map_with_index(batch).to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return batches


def _endless(source: Source | Mixture, seed: int, batch_size: int) -> Callable[[int], Batch]:
    """Returns the function from a place in the order of training to the example there."""
    if isinstance(source, Mixture):
        parts = [_endless(part, seed, batch_size) for part in source.parts.values()]

        def of_mixture(place: int) -> Batch:
            owner, number = source.locate(place, batch_size)
            return parts[owner](number)

        return of_mixture
    epoch_length, shuffled = len(source), _shuffled(source, seed)
    return lambda place: source.example(place // epoch_length, int(shuffled[place]))


def _shuffled(source: Source, seed: int) -> grain.MapDataset[int]:
    """Returns the indices of the examples in the order of training, epoch after epoch."""
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Returns the number of the global batch that a step takes; both count from 0, and `skipped` are left out."""
    for number in sorted(skipped):
        step += number <= step
    return step


def order_digest(source: Source | Mixture, seed: int) -> str:
    """Returns a digest of the first indices of two epochs, which reveals that a version of grain changed the order."""
    if isinstance(source, Mixture):
        parts = [order_digest(part, seed) for part in source.parts.values()]
        return cache.digest(parts, *map(source.first_owners, range(2)))
    shuffled, count = _shuffled(source, seed), min(len(source), 256)
    indices = [int(shuffled[start + i]) for start in (0, len(source)) for i in range(count)]
    return cache.digest(indices)


def evaluation_batches(source: Source, batch_size: int, positions: Sequence[int] | np.ndarray) -> Iterator[Batch]:
    """Returns an iterator over this process's part of the batches that hold every example once, in order.

    Examples whose targets are all `IGNORED` fill the last batch up to `batch_size`.
    """
    first, read = source.example(0, 0), pool.thread_map(getattr(source, "threads", 1))
    blank = {name: np.full_like(array, IGNORED if name == "targets" else 0) for name, array in first.items()}

    def example(index: int) -> Batch:
        return source.example(0, index) if index < len(source) else blank

    def batch(number: int) -> Batch:
        return _stack(read(example, [number * batch_size + int(position) for position in positions]))

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(grain.MapDataset.range(-(-len(source) // batch_size)).map(batch).to_iter_dataset(options))


def to_devices(batches: Iterator[Batch], layout: Layout, batch_size: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches as global arrays that are sharded over the batch axes of the mesh.

    Args:
      batches: this process's part of each batch, at the positions `layout.local_rows`.
      batch_size: number of examples in a global batch.
    """
    for batch in batches:
        shapes = {name: (batch_size, *array.shape[1:]) for name, array in batch.items()}
        yield jax.make_array_from_process_local_data(layout.batch, batch, shapes)


def _stack(rows: Iterable[Batch]) -> Batch:
    examples = list(rows)
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def check_batch(batch_size: int, layout: Layout, micro_batches: int = 1) -> None:
    """Raises UserError unless micro-batches and mesh divide the batch."""
    parts = layout.batch_shards * micro_batches
    if batch_size % parts:
        raise UserError(
            f"train.batch_size={batch_size} is not a multiple of {parts}: train.micro_batches={micro_batches} × "
            f"{layout.batch_shards} parts of the batch on the mesh (data × fsdp)."
        )
