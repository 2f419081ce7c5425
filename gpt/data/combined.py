"""Sources that are built from other sources: mixtures to train on, and sets and samples to evaluate on."""

import bisect
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from gpt.data.base import IGNORED, Source
from gpt.runtime.errors import UserError

BLOCK = 10_000  # examples in which the sources of a mixture have exactly their shares

Stages = tuple[tuple[int, dict[str, float]], ...]


def parse_weights(text: str) -> Stages:
    """Returns (first step, {source: weight}) for each stage of data.weights, like "a=0.7,b=0.3;2000:a=0.2,b=0.8".

    Raises:
      UserError: the text has another form.
    """
    stages: list[tuple[int, dict[str, float]]] = []
    try:
        for stage in text.split(";") if text else []:
            first, _, pairs = stage.rpartition(":")
            names, weights = zip(*(pair.split("=") for pair in pairs.split(",")), strict=True)
            stages.append((int(first or 0), dict(zip(map(str.strip, names), map(float, weights), strict=True))))
            is_later = stages[-1][0] > stages[-2][0] if len(stages) > 1 else not stages[0][0]
            least, total = min(stages[-1][1].values()), sum(stages[-1][1].values())
            if len(stages[-1][1]) < len(names) or not (is_later and least >= 0 and 0 < total < math.inf):
                raise ValueError
    except ValueError:
        raise UserError(
            f"data.weights={text!r} has to be like a=0.7,b=0.3 for the sources a and b, or like "
            "a=0.7,b=0.3;2000:a=0.2,b=0.8 to change the weights from step 2000 on."
        ) from None
    return tuple(stages)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Examples of several sources in fixed proportions, as a function of the place in the training order.

    Each block of `BLOCK` examples has the same number of examples of each source, in an order that depends on the
    seed. A source begins again when it is exhausted, with another order; no source ends the training.

    Attributes:
      parts: the sources by name.
      stages: the weights of the sources from a step on; a source without a weight has 0.
      seed: seed of the order within a block.
    """

    parts: dict[str, Source]
    stages: Stages
    seed: int

    def __len__(self) -> int:
        """Returns how many examples an epoch has: as many as all sources together."""
        return sum(map(len, self.parts.values()))

    @functools.cached_property
    def threads(self) -> int:
        """The largest number of examples that are worth reading at once."""
        return max(getattr(part, "threads", 1) for part in self.parts.values())

    @functools.cached_property
    def shares(self) -> list[np.ndarray]:
        """For each stage, the examples of each source in a block: its weight, rounded, but at least one."""
        found = []
        for _, weights in self.stages:
            quotas = np.array([weights.get(name, 0.0) for name in self.parts])
            quotas *= BLOCK / quotas.sum()
            counts = np.where(quotas > 0, np.maximum(1, np.floor(quotas)), 0).astype(int)
            for _ in range(BLOCK - counts.sum()):  # the largest remainders are rounded up
                counts[np.argmax(quotas - counts)] += 1
            while counts.sum() > BLOCK:
                counts[np.argmax(counts)] -= 1
            found.append(counts)
        return found

    def drawn(self, place: int, batch_size: int) -> np.ndarray:
        """Returns how many examples of each source come before a place in the training order."""
        starts = [step * batch_size for step, _ in self.stages]
        total = np.zeros(len(self.parts), int)
        for stage, (start, end) in enumerate(zip(starts, [*starts[1:], place], strict=True)):
            blocks, rest = divmod(max(0, min(end, place) - start), BLOCK)
            owners, _ = self._block(stage, blocks)
            total += blocks * self.shares[stage] + np.bincount(owners[:rest], minlength=len(total))
        return total

    def locate(self, place: int, batch_size: int) -> tuple[int, int]:
        """Returns which source the example at a place is of, and how many examples of this source come before it."""
        starts = [step * batch_size for step, _ in self.stages]
        stage = bisect.bisect_right(starts, place) - 1
        number, position = divmod(place - starts[stage], BLOCK)
        owners, ranks = self._block(stage, number)
        owner = int(owners[position])
        before = self._drawn_before(stage, batch_size)[owner] + number * self.shares[stage][owner]
        return owner, int(before + ranks[position])

    @functools.lru_cache(maxsize=64)  # noqa: B019  a run has one mixture
    def _drawn_before(self, stage: int, batch_size: int) -> np.ndarray:
        return self.drawn(self.stages[stage][0] * batch_size, batch_size)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _block(self, stage: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each example of a block, and how many examples of that source precede it there."""
        shares = self.shares[stage]
        owners = np.random.default_rng((self.seed, stage, number)).permutation(
            np.repeat(np.arange(len(shares)), shares)
        )
        order, ranks = np.argsort(owners, kind="stable"), np.empty(BLOCK, int)
        ranks[order] = np.arange(BLOCK) - np.repeat(np.cumsum(shares) - shares, shares)
        return owners, ranks

    def first_owners(self, stage: int) -> list[int]:
        """Returns the numbers of the sources of the first examples of a stage, if there is such a stage."""
        return self._block(stage, 0)[0][:256].tolist() if stage < len(self.stages) else []


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """Examples of several sets, one set after the other, for an evaluation that reports each set.

    Attributes:
      byte_lengths: the bytes that each token stands for.
    """

    sets: dict[str, Source]
    byte_lengths: np.ndarray

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.sets.values())))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def threads(self) -> int:
        """The largest number of examples that are worth reading at once."""
        return max(getattr(part, "threads", 1) for part in self.sets.values())

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns an example of one of the sets."""
        number = bisect.bisect_right(self._ends, index)
        return [*self.sets.values()][number].example(epoch, index - (self._ends[number - 1] if number else 0))

    def group(self, index: int) -> str:
        """Returns the name of the set that an example belongs to."""
        return [*self.sets][bisect.bisect_right(self._ends, index)]

    @functools.cached_property
    def num_bytes(self) -> dict[str, int]:
        """The number of bytes of the text that the targets of each set stand for."""

        def total(source: Source) -> int:
            targets = (source.example(0, i)["targets"] for i in range(len(source)))
            return sum(int(self.byte_lengths[each[each != IGNORED]].sum()) for each in targets)

        return {name: total(source) for name, source in self.sets.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Some of the examples of a source, spread evenly over it, which depend on the seed alone."""

    source: Source
    count: int
    seed: int

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The indices of the examples in the source: a random one from each of `count` sections of equal length."""
        places = np.arange(self.count) + np.random.default_rng(self.seed).random(self.count)
        return (places * (len(self.source) / self.count)).astype(np.int64)

    def __len__(self) -> int:
        return self.count

    @property
    def threads(self) -> int:
        """The largest number of examples that are worth reading at once."""
        return getattr(self.source, "threads", 1)

    def place(self, index: int) -> int:
        """Returns the index of an example in the source."""
        return int(self.indices[index])

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns an example of the source."""
        return self.source.example(epoch, self.place(index))


def bounded(source: Any, count: int, seed: int) -> Any:
    """Returns a source of at most about `count` of the examples; of sets, each has the same share as far as it can."""
    if not isinstance(source, Sets):
        return source if len(source) <= count else Sample(source, count, seed)
    chosen, left = {}, count
    by_size = sorted(source.sets.items(), key=lambda item: len(item[1]))
    for i, (name, part) in enumerate(by_size):
        chosen[name] = bounded(part, max(1, left // (len(by_size) - i)), seed)
        left -= len(chosen[name])
    return dataclasses.replace(source, sets={name: chosen[name] for name in source.sets})
