"""Questions whose answers can be checked: arithmetic and sorting, after the demos of minGPT (Karpathy 2020).

Every question has a number. A fixed permutation of the numbers is cut in two: the first part is held out, and the
rest is trained on. Nothing is stored. The loss is on the answer alone, and a row is right if all of it is.
"""

import dataclasses
import hashlib
import json
import math
import re
from typing import Any, ClassVar

import numpy as np

from gpt.data.base import IGNORED, DataConfig, Dataset, ModelShape, Shown, Source
from gpt.data.tokenizers import CharTokenizer, Tokenizer, TokenizerConfig
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.fields import check_positive, harmless

END = "\n"
MOST_ROWS = 2**31  # in an epoch: as many as can be shuffled by number
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclasses.dataclass(frozen=True)
class QuestionConfig(DataConfig):
    """What the kinds of questions share."""

    validation_rows: int = 2000  # questions held out
    prefetch: int = harmless(4)  # batches prepared ahead

    # Of each kind: what is asked with, how many questions there are, and how long question and answer are.
    alphabet: ClassVar[str]
    num_questions: ClassVar[int]
    question_length: ClassVar[int]
    answer_length: ClassVar[int]

    def __post_init__(self):
        check_positive("data", self, "validation_rows")
        if self.prefetch < 0:
            raise UserError(f"data.prefetch={self.prefetch} must not be negative.")
        if not 2 * self.validation_rows <= self.num_questions:
            raise UserError(
                f"data.validation_rows={self.validation_rows} is more than half of the {self.num_questions} questions "
                "that there are."
            )

    def pose(self, number: int, other: int) -> tuple[str, str]:
        """The question of a number, in a form that `other` chooses where it has several, and the answer as written."""
        raise NotImplementedError

    def read(self, question: str) -> str | None:
        """A question as `pose` writes it, of one that a person wrote; None: it is none."""
        raise NotImplementedError

    def show(self, written: str) -> str:
        """An answer for a person."""
        return written

    @property
    def length(self) -> int:
        """Tokens that a row needs."""
        return self.question_length + self.answer_length

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def tokenizer(self, saved: dict) -> "QuestionTokenizer":
        return QuestionTokenizer(self.alphabet, self)

    def load(self, tokenizer, model, say=lambda line: None, status=lambda line: None) -> "Questions":
        own = self.tokenizer({})
        if tokenizer != TokenizerConfig() and (
            isinstance(tokenizer, TokenizerConfig) or tokenizer.to_json() != own.to_json()
        ):
            raise UserError(
                f"data.kind={self.kind} brings its own tokens: leave the keys under tokenizer as they are, and start "
                "from weights for the same kind of questions."
            )
        if model and model.length < self.length:
            raise UserError(
                f"model.block_size={model.length} is too short for these questions; set model.block_size={self.length}."
            )
        told = {name: value for name, value in dataclasses.asdict(self).items() if name != "prefetch"}
        return Questions(self, own, hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32])


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig(QuestionConfig):
    """a+b, a-b, a*b, also modulo a number. The answer's last digit comes first, as one computes it on paper."""

    kind: str = "arithmetic"  # see gpt/data/base.py
    digits: int = 3  # of a and b, each from 0 on
    operators: str = "+"  # one or several of +, - and *
    modulus: int = 0  # a, b and the answer are less than this; 0: there is none

    def __post_init__(self):
        check_positive("data", self, "digits")
        if self.digits > 18 or not 0 <= self.modulus < 10**18:
            raise UserError(f"data.digits={self.digits} and data.modulus={self.modulus} are for at most 18 digits.")
        if not self.operators or len(set(self.operators) & OPERATORS.keys()) < len(self.operators):
            raise UserError(f"data.operators={self.operators!r} has to name one or several of {' '.join(OPERATORS)}.")
        super().__post_init__()

    @property
    def _numbers(self) -> int:
        """How many there are for a and b each."""
        return self.modulus or 10**self.digits

    @property
    def _width(self) -> int:
        return len(str(self._numbers - 1))

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*"0123456789=-", *self.operators, END}))

    @property
    def num_questions(self) -> int:
        """Pairs for each operator, their order left aside: what is held out is not trained on the other way round."""
        return self._numbers * (self._numbers + 1) // 2 * len(self.operators)

    @property
    def question_length(self) -> int:
        return 2 * self._width + 2

    @property
    def answer_length(self) -> int:
        largest = self._numbers - 1
        lengths = {"+": len(str(2 * largest)), "-": self._width + 1, "*": len(str(largest**2))}
        return self._width if self.modulus else max(lengths[operator] for operator in self.operators)

    def pose(self, number: int, other: int) -> tuple[str, str]:
        pair, which = divmod(number, len(self.operators))
        b = (math.isqrt(8 * pair + 1) - 1) // 2
        a, operator = pair - b * (b + 1) // 2, self.operators[which]
        a, b = (b, a) if other % 2 else (a, b)
        answer = OPERATORS[operator](a, b)
        answer = answer % self.modulus if self.modulus else answer
        width = self._width
        return f"{a:0{width}d}{operator}{b:0{width}d}=", f"{answer:0{self.answer_length}d}"[::-1]

    def read(self, question: str) -> str | None:
        found = re.fullmatch(rf"\s*([0-9]+)\s*([{re.escape(self.operators)}])\s*([0-9]+)\s*=\s*", question)
        numbers = (int(found[1]), int(found[3])) if found else (self._numbers,)
        if max(numbers) >= self._numbers:
            return None
        return f"{numbers[0]:0{self._width}d}{found[2]}{numbers[1]:0{self._width}d}="

    def show(self, written: str) -> str:
        forwards = written[::-1]
        return str(int(forwards)) if re.fullmatch("-?[0-9]+", forwards) else forwards


@dataclasses.dataclass(frozen=True)
class SortConfig(QuestionConfig):
    """Digits to be put in order."""

    kind: str = "sort"  # see gpt/data/base.py
    size: int = 10  # digits to be sorted
    digits: int = 10  # different ones, from 0 on

    def __post_init__(self):
        check_positive("data", self, "size")
        if not 2 <= self.digits <= 10 or self.size > 500:
            raise UserError(
                f"data.digits={self.digits} has to lie between 2 and 10, and data.size={self.size} below 500."
            )
        super().__post_init__()

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*"0123456789"[: self.digits], "=", END}))

    @property
    def num_questions(self) -> int:
        return self.digits**self.size

    @property
    def question_length(self) -> int:
        return self.size + 1

    @property
    def answer_length(self) -> int:
        return self.size

    def pose(self, number: int, other: int) -> tuple[str, str]:
        found = []
        for _ in range(self.size):
            number, digit = divmod(number, self.digits)
            found.append(str(digit))
        return "".join(found) + "=", "".join(sorted(found))

    def read(self, question: str) -> str | None:
        digits = re.fullmatch(rf"([0-{self.digits - 1}]{{{self.size}}})=?", re.sub(r"[\s,]", "", question))
        return digits and digits[1] + "="


@dataclasses.dataclass(frozen=True)
class QuestionTokenizer(CharTokenizer):
    """The characters of questions: a prompt is a question as a person writes it, and the answer reads likewise."""

    name: ClassVar[str] = "questions"
    config: QuestionConfig

    @property
    def separator(self) -> int:
        return self.alphabet.index(END)

    def opening(self) -> np.ndarray:
        return self.encode("")

    def encode(self, text: str) -> np.ndarray:
        question = self.config.read(text)
        if question is None:
            example, _ = self.config.pose(_scattered(0, self.config.num_questions), 0)
            raise UserError(f"{text!r} is no question like {example}")
        return super().encode(question)

    def decode(self, ids: np.ndarray) -> str:
        """The answer once it is complete, and U+FFFD before."""
        written = super().decode(ids)
        return self.config.show(written) if len(written) >= self.config.answer_length else "\ufffd" * len(written)

    def piece(self, token: int) -> str:
        return self.alphabet[token]

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "alphabet": self.alphabet})


@dataclasses.dataclass(frozen=True)
class QuestionRows:
    """The questions of the scattered numbers `first` to `first + count`, each in a row of `length` tokens."""

    config: QuestionConfig
    first: int
    count: int
    length: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def pose(self, epoch: int, index: int) -> tuple[str, str]:
        """Question and answer; where a question has two forms, another is drawn in each epoch."""
        number = _scattered(self.first + index, self.config.num_questions)
        return self.config.pose(number, _mix(number + _mix(epoch + _mix(self.seed))) >> 20)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        question, answer = self.pose(epoch, index)
        places = _places(self.config.alphabet)
        tokens = [places[character] for character in question + answer + END]
        row = {"inputs": np.zeros(self.length, np.int32), "targets": np.full(self.length, IGNORED, np.int32)}
        row["inputs"][: len(tokens) - 1] = tokens[:-1]
        row["targets"][len(question) - 1 : len(tokens) - 1] = tokens[len(question) :]
        return row


@dataclasses.dataclass(frozen=True)
class Questions(Dataset):
    """All questions of a kind."""

    config: QuestionConfig
    tokenizer: Tokenizer
    fingerprint: str

    def _rows(self, split: str, length: int, seed: int = 0) -> QuestionRows:
        held_out = self.config.validation_rows
        end = min(self.config.num_questions, MOST_ROWS)
        first, last = {"train": (held_out, end), "val": (0, held_out), "all": (0, end)}[split]
        return QuestionRows(self.config, first, last - first, length, seed)

    def training(self, model: ModelShape, seed: int) -> Source:
        return self._rows("train", model.length, seed)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Source:
        if stride:
            raise UsageError(f"--stride={stride} is for texts; data.kind={self.config.kind} has no windows.")
        return self._rows(split, model.length)

    def describe(self) -> str:
        train, held_out = self._rows("train", 0), self._rows("val", 0)
        question, answer = held_out.pose(0, 0)
        example = f"{question}{self.config.show(answer)}"
        return f"{len(train):,} training and {len(held_out):,} held-out questions like {example}"

    def mistakes(self, source: QuestionRows, result: dict[str, Any]) -> Shown:
        lines = []
        for index, said in result["mistakes"]:
            question, answer = source.pose(0, index)
            start = len(question) - 1
            written = "".join(self.config.alphabet[i] for i in said[start : start + len(answer)])
            lines.append(f"mistake  {question}{self.config.show(written)}, right is {self.config.show(answer)}")
        return Shown("\n".join(lines))


def _places(alphabet: str) -> dict[str, int]:
    return {character: i for i, character in enumerate(alphabet)}


def _mix(x: int) -> int:
    """64 bits that look random (the finalizer of SplitMix64, 10.1145/2714064.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _scattered(number: int, size: int) -> int:
    """A fixed permutation of range(size), one number at a time.

    A Feistel network (10.1137/0217022) permutes the numbers of an even count of bits; what falls beyond `size` goes
    through it again.
    """
    half = (max(size - 1, 1).bit_length() + 1) // 2
    while True:
        left, right = number >> half, number & ((1 << half) - 1)
        for key in range(4):
            left, right = right, left ^ (_mix(right << 2 | key) >> 64 - half)
        number = left << half | right
        if number < size:
            return number
