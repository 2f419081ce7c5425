"""Questions with answers that can be checked, arithmetic and sorting, after the demos of minGPT (Karpathy 2020).

Every question has a number. A fixed permutation scatters the numbers; the first numbers are held out for validation,
and the others are for training. Examples are computed from their numbers and not stored. Only the answer counts in the
loss.
"""

import dataclasses
import json
import math
import re
from typing import Any, ClassVar

import numpy as np

from gpt.data.base import IGNORED, DataConfig, Dataset, ModelShape, Shown
from gpt.data.tokenizers import CharTokenizer, TokenizerConfig
from gpt.runtime import cache
from gpt.runtime.errors import UserError
from gpt.runtime.fields import option

END = "\n"
MOST_EXAMPLES = 2**31  # in an epoch: the largest number of examples that grain can shuffle
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclasses.dataclass(frozen=True)
class QuestionConfig(DataConfig):
    """The options and the interface that all kinds of questions share.

    All questions of a config have the same length, and so have all answers.
    """

    validation_rows: int = option(2000, "number of questions that are held out for validation", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 * self.validation_rows <= self.num_questions:
            raise UserError(
                f"data.validation_rows={self.validation_rows} is more than half of the {self.num_questions} questions; "
                "set it to a smaller number."
            )

    @property
    def alphabet(self) -> str:
        """The sorted characters of questions and answers, which are the tokens."""
        raise NotImplementedError

    @property
    def num_questions(self) -> int:
        """The number of different questions."""
        raise NotImplementedError

    def pose(self, number: int, form: int) -> tuple[str, str]:
        """Returns a question and its answer as the model reads and writes them.

        Args:
          number: the number of the question, less than `num_questions`.
          form: selects one of the forms of the question if it has several.
        """
        raise NotImplementedError

    def read(self, question: str) -> str | None:
        """Converts a question as a person types it to the form of `pose`. Returns None if it is not a question."""
        raise NotImplementedError

    def show(self, answer: str) -> str:
        """Converts an answer in the form of `pose` to the form that a person reads."""
        return answer

    @property
    def answer_length(self) -> int:
        """The number of tokens of an answer."""
        return len(self.pose(0, 0)[1])

    @property
    def length(self) -> int:
        """The number of tokens of a question and its answer, which the context length has to hold."""
        return sum(map(len, self.pose(0, 0)))

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def tokenizer(self, saved: dict[str, Any]) -> "QuestionTokenizer":
        return QuestionTokenizer(self.alphabet, self)

    def load(self, tokenizer, model) -> "Questions":
        own = self.tokenizer({})
        is_config = isinstance(tokenizer, TokenizerConfig)
        if tokenizer != TokenizerConfig() if is_config else tokenizer.to_json() != own.to_json():
            raise UserError(
                f"data.kind={self.kind} has its own tokens: leave the keys under tokenizer at their defaults, and "
                "start from weights for the same kind of questions."
            )
        if model and model.length < self.length:
            raise UserError(
                f"model.block_size={model.length} is too short for these questions; set model.block_size={self.length}."
            )
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "prefetch"}
        return Questions(self, own, cache.digest(options))


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig(QuestionConfig):
    """Options of sums, differences and products, also modulo a number.

    The last digit of an answer comes first, as in written arithmetic.
    """

    kind: str = "arithmetic"
    digits: int = option(3, "number of digits of the operands", least=1, most=18)
    operators: str = option("+", "one or several of +, - and *")
    modulus: int = option(0, "the operands are less than it, and the answer is modulo it; 0: none", least=0)

    def __post_init__(self) -> None:
        if not self.operators or len(set(self.operators) & OPERATORS.keys()) < len(self.operators):
            raise UserError(f"data.operators={self.operators!r} has to name one or several of {' '.join(OPERATORS)}.")
        super().__post_init__()

    @property
    def _numbers(self) -> int:
        """The number of different operands."""
        return self.modulus or 10**self.digits

    @property
    def _width(self) -> int:
        return len(str(self._numbers - 1))

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*"0123456789=-", *self.operators, END}))

    @property
    def num_questions(self) -> int:
        """The number of unordered pairs of operands for each operator.

        The two orders of a pair are forms of one question, so that none is held out in one order and trained in the
        other.
        """
        return self._numbers * (self._numbers + 1) // 2 * len(self.operators)

    @property
    def answer_length(self) -> int:
        largest = self._numbers - 1
        lengths = {"+": len(str(2 * largest)), "-": self._width + 1, "*": len(str(largest**2))}
        return self._width if self.modulus else max(lengths[operator] for operator in self.operators)

    def pose(self, number: int, form: int) -> tuple[str, str]:
        pair, which = divmod(number, len(self.operators))
        b = (math.isqrt(8 * pair + 1) - 1) // 2
        a, operator = pair - b * (b + 1) // 2, self.operators[which]
        a, b = (b, a) if form % 2 else (a, b)
        answer = OPERATORS[operator](a, b)
        answer = answer % self.modulus if self.modulus else answer
        width = self._width
        return f"{a:0{width}d}{operator}{b:0{width}d}=", f"{answer:0{self.answer_length}d}"[::-1]

    def read(self, question: str) -> str | None:
        match = re.fullmatch(rf"\s*([0-9]+)\s*([{re.escape(self.operators)}])\s*([0-9]+)\s*=\s*", question)
        if not match:
            return None
        a, b = int(match[1]), int(match[3])
        return f"{a:0{self._width}d}{match[2]}{b:0{self._width}d}=" if max(a, b) < self._numbers else None

    def show(self, answer: str) -> str:
        forwards = answer[::-1]
        return str(int(forwards)) if re.fullmatch("-?[0-9]+", forwards) else forwards


@dataclasses.dataclass(frozen=True)
class SortConfig(QuestionConfig):
    """Options of sequences of digits that are to be sorted."""

    kind: str = "sort"
    size: int = option(10, "number of digits in a sequence", least=1, most=500)
    digits: int = option(10, "number of different digits", least=2, most=10)

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*"0123456789"[: self.digits], "=", END}))

    @property
    def num_questions(self) -> int:
        return self.digits**self.size

    def pose(self, number: int, form: int) -> tuple[str, str]:
        digits = []
        for _ in range(self.size):
            number, digit = divmod(number, self.digits)
            digits.append(str(digit))
        return "".join(digits) + "=", "".join(sorted(digits))

    def read(self, question: str) -> str | None:
        digits = re.fullmatch(rf"([0-{self.digits - 1}]{{{self.size}}})=?", re.sub(r"[\s,]", "", question))
        return digits[1] + "=" if digits else None


@dataclasses.dataclass(frozen=True)
class QuestionTokenizer(CharTokenizer):
    """A tokenizer of the characters of questions, whose prompts and samples are in the form that a person reads."""

    name: ClassVar[str] = "questions"
    config: QuestionConfig

    @property
    def separator(self) -> int:
        return self.alphabet.index(END)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "alphabet": self.alphabet})

    def opening(self) -> np.ndarray:
        return self.encode("")

    def encode(self, text: str) -> np.ndarray:
        question = self.config.read(text)
        if question is None:
            example, _ = self.config.pose(_scattered(0, self.config.num_questions), 0)
            raise UserError(f"{text!r} is not a question like {example}")
        return super().encode(question)

    def decode(self, ids: np.ndarray) -> str:
        """Returns an answer if it is complete, else U+FFFD for each token."""
        written = super().decode(ids)
        return self.config.show(written) if len(written) >= self.config.answer_length else "\ufffd" * len(written)

    def piece(self, token: int) -> str:
        return self.alphabet[token]


@dataclasses.dataclass(frozen=True)
class QuestionExamples:
    """The questions with the scattered numbers from `first` to `first + count`, as examples of `length` tokens."""

    config: QuestionConfig
    first: int
    count: int
    length: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def pose(self, epoch: int, index: int) -> tuple[str, str]:
        """Returns question and answer; of a question with several forms, each epoch draws one."""
        number = _scattered(self.first + index, self.config.num_questions)
        return self.config.pose(number, _mix(number + _mix(epoch + _mix(self.seed))) >> 20)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns "inputs" and "targets" [length], int32, which are 0 and `IGNORED` after the answer."""
        question, answer = self.pose(epoch, index)
        tokens = [self.config.alphabet.index(character) for character in question + answer + END]
        inputs, targets = np.zeros(self.length, np.int32), np.full(self.length, IGNORED, np.int32)
        inputs[: len(tokens) - 1] = tokens[:-1]
        targets[len(question) - 1 : len(tokens) - 1] = tokens[len(question) :]
        return {"inputs": inputs, "targets": targets}


@dataclasses.dataclass(frozen=True)
class Questions(Dataset):
    """All questions of a config."""

    config: QuestionConfig
    tokenizer: QuestionTokenizer
    fingerprint: str

    def examples(self, split: str, model: ModelShape, seed: int | None = None) -> QuestionExamples:
        held_out = self.config.validation_rows
        end = min(self.config.num_questions, MOST_EXAMPLES)
        first, last = {"train": (held_out, end), "val": (0, held_out), "all": (0, end)}[split]
        return QuestionExamples(self.config, first, last - first, model.length, seed or 0)

    def describe(self) -> str:
        held_out, end = self.config.validation_rows, min(self.config.num_questions, MOST_EXAMPLES)
        question, answer = QuestionExamples(self.config, 0, held_out, 0, 0).pose(0, 0)
        example = f"{question}{self.config.show(answer)}"
        return f"{end - held_out:,} training and {held_out:,} held-out questions like {example}"

    def mistakes(self, source: Any, result: dict[str, Any]) -> Shown:
        """Returns lines with questions, wrong answers and right answers."""
        lines = []
        for index, predictions in result["mistakes"]:
            question, answer = source.pose(0, index)
            start = len(question) - 1
            written = "".join(self.config.alphabet[i] for i in predictions[start : start + len(answer)])
            lines.append(f"mistake  {question}{self.config.show(written)}, right is {self.config.show(answer)}")
        return Shown("\n".join(lines))


def _mix(x: int) -> int:
    """Returns a hash of 64 bits, by the finalizer of SplitMix64 (10.1145/2714064.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _scattered(number: int, size: int) -> int:
    """Returns the image of a number under a fixed permutation of range(size).

    A Feistel network (10.1137/0217022) permutes the numbers with an even number of bits. It is applied again to a
    result that is not less than `size`.
    """
    half = (max(size - 1, 1).bit_length() + 1) // 2
    while True:
        left, right = number >> half, number & ((1 << half) - 1)
        for key in range(4):
            left, right = right, left ^ (_mix(right << 2 | key) >> 64 - half)
        number = left << half | right
        if number < size:
            return number
