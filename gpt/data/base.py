"""The kinds of data, and the interface between a kind of data and the rest of the program.

A kind of data is a module in this folder with a subclass of `DataConfig` that loads a `Dataset`, and an entry in
`KINDS`. `config.data.kind` selects it. README.md in this folder explains how to write one.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from gpt.data import tokenizers
from gpt.data.tokenizers import Labels, Tokenizer, TokenizerConfig
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.fields import Options, option

KINDS = {
    "text": "gpt.data.text:TextConfig",
    "images": "gpt.data.images:ImagesConfig",
    "pixels": "gpt.data.pixels:PixelsConfig",
    "arithmetic": "gpt.data.arithmetic:ArithmeticConfig",
    "sort": "gpt.data.arithmetic:SortConfig",
}

IGNORED = -1  # a target that does not count in the loss


class Source(Protocol):
    """Examples to train or evaluate on, as a pure function of (epoch, index) that does not use JAX.

    A source may have an attribute `threads`, the number of examples that are worth reading at once (1 by default), and
    a method `group`, which returns the name of the group of an index: an evaluation reports the loss of each group.
    """

    def __len__(self) -> int:
        """Returns the number of examples in an epoch."""

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns an example: "inputs", "targets" and others, whose shapes are the same for every index."""


class ModelShape(Protocol):
    """The properties of a model that data depends on: see `gpt.models.base.ModelConfig`."""

    @property
    def length(self) -> int: ...

    @property
    def num_targets(self) -> int: ...

    @property
    def length_key(self) -> str: ...

    def example_shapes(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Shown:
    """Output for a person: text, and {tag on TensorBoard: picture} with pictures as uint8 [H, W, C]."""

    text: str = ""
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Dataset:
    """Loaded data, which gives out sources of examples.

    Attributes:
      tokenizer: defines the meaning of the targets; its `vocab_size` is the number of logits. It is saved in the
        workdir. For classes it is a `gpt.data.tokenizers.Labels`.
      fingerprint: a digest that changes with the examples.
    """

    tokenizer: Tokenizer | Labels
    fingerprint: str

    def examples(self, split: str, model: ModelShape, seed: int | None = None) -> Source:
        """Returns the examples of a split: "train", "val" or "all".

        They are shaped as `model.example_shapes`; targets that do not count are `IGNORED`. A text, which has several
        sources and windows with a stride, has other functions in the place of the two below instead.

        Args:
          seed: seed of augmentation and other random choices in training; None: without augmentation.
        """
        raise NotImplementedError

    def training(self, model: ModelShape, seed: int) -> Any:
        """Returns the training examples: a `Source`, or a `gpt.data.combined.Mixture` of several."""
        return self.examples("train", model, seed)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Source:
        """Returns every example of a split once, without augmentation.

        Args:
          split: "train", "val" or "all".
          stride: tokens between the beginnings of two windows over a text.

        Raises:
          UsageError: the kind of data has no windows, or the stride leaves gaps.
          UserError: the split has nothing to evaluate.
        """
        if stride:
            raise UsageError(f"--stride={stride} is for texts; this data has no windows.")
        return self.examples(split, model)

    def describe(self) -> str:
        """Returns the size of the data as a short phrase for the log."""
        raise NotImplementedError

    def report(self, source: Source, result: dict[str, Any]) -> dict[str, float]:
        """Returns the measures to print for a result of `gpt.step.evaluate`.

        The first entry is the number of examples, tokens or images. During training the progress line shows
        `accuracy` and `exact_match` where they are present.
        """
        return {"examples": result["examples"]} | {name: result[name] for name in ("loss", "accuracy", "exact_match")}

    def mistakes(self, source: Source, result: dict[str, Any]) -> Shown:
        """Returns a view of the examples in `result["mistakes"]`, which are pairs (index, wrong predictions)."""
        return Shown()


@dataclasses.dataclass(frozen=True)
class DataConfig(Options):
    """Options of a kind of data: the base class of a frozen dataclass for each kind, which adds its own fields.

    Attributes:
      kind: the name in `KINDS`.
      gives: the type of the inputs, "tokens" or "images", as `ModelConfig.reads`.
    """

    section: ClassVar[str] = "data"

    kind: str = option(dataclasses.MISSING, "kind of data, which decides about the other keys", choices=KINDS)
    prefetch: int = option(4, "batches to prepare ahead of the training step; 0: none", harmless=True, least=0)

    gives: ClassVar[str] = "tokens"

    @property
    def vocab_size(self) -> int:
        """The number of different targets if it is known before the data is read, else 0."""
        return 0

    def load(
        self,
        tokenizer: Tokenizer | Labels | TokenizerConfig,
        model: ModelShape | None,
    ) -> Dataset:
        """Loads the data, from the cache where possible.

        Args:
          tokenizer: the tokenizer of a workdir, or `config.tokenizer` to create one for a text.
          model: the model that will read the examples; None: examples of any length are accepted.

        Raises:
          UserError: the data does not exist, or does not fit the tokenizer or the model.
        """
        raise NotImplementedError

    def tokenizer(self, saved: dict[str, Any]) -> Tokenizer | Labels:
        """Returns the tokenizer that a workdir's tokenizer.json describes.

        Raises:
          ValueError, KeyError, TypeError, AttributeError: `saved` does not describe a tokenizer.
        """
        return tokenizers.from_tree(saved)

    def inputs(self, prompt: str, model: ModelShape) -> np.ndarray:
        """Returns the input of a classifier for a prompt, such as a file name. Raises UserError if there is none."""
        raise UserError(f"data.kind={self.kind} has no input that --prompt can name; use gpt.evaluate.")

    def opened(self, path: str | None = None) -> Self:
        """Returns the config with which a command opens a workdir, whose author may be anybody.

        Args:
          path: other data to read; None: the data of the run.

        Raises:
          UserError: this kind of data cannot be read from a path.
        """
        if path is not None:
            raise UserError(f"--data={path}: data.kind={self.kind} reads no files; leave out --data.")
        return self

    def resumed(self, recorded: "DataConfig", step: int) -> Self:
        """Returns the config of a run that goes on after a step with other options than it `recorded`."""
        return self

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of the arrays that an example has besides inputs and targets; their shape is that of the inputs."""
        return ()
