"""The kinds of data, and what the rest of the program asks of one.

A kind is a file here with a configuration, a subclass of `DataConfig`, that loads a `Dataset`; and its line in `KINDS`.
`config.data.kind` chooses it. README.md beside this file tells how to write one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from gpt.data import tokenizers
from gpt.runtime.errors import UserError

KINDS = {
    "text": "gpt.data.text:TextConfig",
    "images": "gpt.data.images:ImagesConfig",
    "pixels": "gpt.data.pixels:PixelsConfig",
    "arithmetic": "gpt.data.arithmetic:ArithmeticConfig",
    "sort": "gpt.data.arithmetic:SortConfig",
}

IGNORED = -1  # a target that does not count in the loss

Say = Callable[[str], object]


class Source(Protocol):
    """Rows to train or evaluate on: a pure function of (epoch, index), unaware of JAX.

    It may have an attribute `threads`: how many batches are worth reading at once; without, it is one.
    """

    def __len__(self) -> int:
        """Rows in an epoch."""

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One row: arrays that have the same shapes for every index."""


class ModelShape(Protocol):
    """What data needs to know of a model: see `gpt.models.base.ModelConfig`."""

    @property
    def length(self) -> int: ...

    @property
    def num_targets(self) -> int: ...

    @property
    def length_key(self) -> str: ...

    def example_shapes(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a person is shown: text, and pictures (uint8 of [H, W, C]) by their name on TensorBoard."""

    text: str = ""
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Dataset:
    """Data, ready to be read.

    Attributes:
      tokenizer: what targets stand for; its `vocab_size` is the width of the logits. It stays in the workdir. For
        classes, `gpt.tokenizers.Labels`.
      fingerprint: changes with the rows, whatever they depend on.
    """

    tokenizer: tokenizers.Tokenizer
    fingerprint: str

    def training(self, model: ModelShape, seed: int) -> Source:
        """Rows to train on, of the shapes of `model.example_shapes`; targets that do not count are `IGNORED`."""
        raise NotImplementedError

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Source:
        """Every row of "train", "val" or "all" once, where training has them again and again, changed or shuffled.

        Args:
          stride: of windows over a text.

        Raises:
          UserError: there are no windows, or too little to evaluate.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """How much of what there is, in a few words."""
        raise NotImplementedError

    def report(self, source: Source, result: dict[str, Any]) -> dict[str, float]:
        """What to tell of a result of `gpt.program.evaluate`, and before it how many rows (tokens, images, …) it is of.

        Where it has `accuracy` or `exact_match`, the line of an evaluation shows them.
        """
        return {"examples": result["examples"]} | {name: result[name] for name in ("loss", "accuracy", "exact_match")}

    def mistakes(self, source: Source, result: dict[str, Any]) -> Shown:
        """Some examples with a wrong prediction: `result["mistakes"]`, pairs of an index and its predictions."""
        return Shown()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Options of the data: the base of a frozen dataclass for each kind, with `kind`, `prefetch` and its own fields.

    Attributes:
      gives: what the inputs are, as `ModelConfig.reads`.
      vocab_size: width of the logits, where that is known before the data is read; else 0.
    """

    kind: str
    prefetch: int

    gives: ClassVar[str] = "tokens"

    @property
    def vocab_size(self) -> int:
        """Number of different targets where it is known before the data is read; else 0."""
        return 0

    def load(
        self,
        tokenizer: tokenizers.Tokenizer | tokenizers.TokenizerConfig,
        model: ModelShape | None,
        say: Say = lambda line: None,
        status: Say = lambda line: None,
    ) -> Dataset:
        """The data, read now or found in the cache.

        Args:
          tokenizer: one that exists (of a workdir), or `config.tokenizer`: what a text's is to be made by.
          model: that the rows are for; None: rows of any length will do.
          say: called with a line for the user where there is something to say.
          status: called with lines that each replace the one before, while something takes long.

        Raises:
          UserError: the data is not there, or does not fit.
        """
        raise NotImplementedError

    def tokenizer(self, saved: dict) -> tokenizers.Tokenizer:
        """That of a workdir, of what its tokenizer.json holds. Raises ValueError and the like where that is none."""
        return tokenizers.from_tree(saved)

    def inputs(self, prompt: str, model: ModelShape) -> np.ndarray:
        """What a classifier reads of a prompt, a file for instance. Raises UserError where that is not possible."""
        raise UserError(f"data.kind={self.kind} has nothing that can be classified by --prompt; see gpt.evaluate.")

    def opened(self, path: str | None = None) -> Self:
        """As a command opens it for a workdir of whatever author: other data if `path` names some."""
        if path is not None:
            raise UserError(f"--data={path}: data.kind={self.kind} takes no data from elsewhere.")
        return self

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what a row has beside inputs and targets, of the shape of the inputs: ("starts",), or nothing."""
        return ()
