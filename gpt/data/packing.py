"""Windows of whole documents: several short ones in each window, none of them cut."""

import dataclasses
import functools
from typing import Any

import numpy as np

from gpt.data.base import IGNORED


@dataclasses.dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Windows that hold whole documents, which do not attend to each other. Longer documents are cut.

    The documents are placed from the longest to the shortest, each into the window in which it leaves the least room
    ("best-fit decreasing"; Fewer Truncations Improve Language Modeling, arXiv 2404.10830). The rest of a window is
    inputs 0 and targets `IGNORED`.

    Attributes:
      tokens: the tokens of the documents.
      block_size: number of inputs in a window.
      ends: the end of each document.
      has_first: whether a document begins with its own first token, and not with the separator of the one before.
      counts: for each token whether it counts in the loss as a target; None: all tokens count.
    """

    tokens: Any
    block_size: int
    ends: np.ndarray
    has_first: bool
    counts: Any = None

    @functools.cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """The first input and the number of inputs of each document, or of each part of a longer document."""
        starts = np.concatenate([[0], self.ends[:-1]]) - (0 if self.has_first else 1)
        starts = np.maximum(starts, 0)
        lengths = self.ends - 1 - starts
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        parts = -(-lengths // self.block_size)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        starts, lengths = np.repeat(starts, parts) + number * self.block_size, np.repeat(lengths, parts)
        return starts, np.minimum(self.block_size, lengths - number * self.block_size)

    @functools.cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """The pieces in the order of their windows, and the place among them at which each window ends."""
        _, lengths = self._pieces
        order = np.argsort(-lengths, kind="stable")
        with_room: list[list[int]] = [[] for _ in range(self.block_size + 1)]  # windows by the room that they have
        rooms, window_of, count = 0, np.empty(len(lengths), np.int64), 0  # `rooms`: the rooms that occur, as bits
        for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                window = with_room[room].pop()
                if not with_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, window, count = self.block_size, count, count + 1
            window_of[piece] = window
            if room > length:
                with_room[room - length].append(window)
                rooms |= 1 << (room - length)
        return np.argsort(window_of, kind="stable"), np.cumsum(np.bincount(window_of, minlength=count))

    def __len__(self) -> int:
        return len(self._windows[1])

    @functools.cached_property
    def summary(self) -> str:
        """How full the windows are, and how many documents are cut."""
        _, lengths = self._pieces
        inputs = np.diff(self.ends, prepend=0 if self.has_first else 1) - self.has_first
        cut = int(np.sum(inputs > self.block_size))
        full = lengths.sum() / (len(self) * self.block_size)
        return f"windows of whole documents are {full:.1%} full, {cut:,} of {len(self.ends):,} documents are cut"

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns "inputs", "targets" and "starts", [block_size], as `gpt.data.text.TrainingWindows` does."""
        order, ends = self._windows
        starts, lengths = self._pieces
        inputs, targets = np.zeros(self.block_size, np.int32), np.full(self.block_size, IGNORED, np.int32)
        begins, at = np.zeros(self.block_size, np.int32), 0
        for piece in order[ends[index - 1] if index else 0 : ends[index]]:
            first, length = int(starts[piece]), int(lengths[piece])
            tokens, place = self.tokens[first : first + length + 1], slice(at, at + length)
            inputs[place], targets[place], begins[place] = tokens[:-1], tokens[1:], at
            if self.counts is not None:
                targets[place][~self.counts[first + 1 : first + length + 1]] = IGNORED
            at += length
        begins[at:] = at
        return {"inputs": inputs, "targets": targets, "starts": begins}
