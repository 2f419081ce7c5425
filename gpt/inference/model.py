"""A trained model, as notebooks and commands use it; `gpt.load_model` returns one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gpt import step
from gpt.checkpointing.loading import Loaded
from gpt.data import chat
from gpt.data.base import Shown
from gpt.data.tokenizers import Labels, Tokenizer
from gpt.inference import explanation, generation
from gpt.runtime.errors import UserError
from gpt.runtime.progress import task


class TrainedModel(Loaded):
    """The model of a checkpoint, restored on the devices of this machine. `Loaded` describes the attributes."""

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the model is a classifier, which has none."""
        if isinstance(self.tokenizer, Labels):
            raise UserError(f"{self.workdir.path} holds a classifier, which generates no text; use classify().")
        return self.tokenizer

    def generate(self, prompt: str = "", **options: Any) -> str:
        """Returns the text that the model generates after a prompt, without the prompt.

        Args:
          options: those of `complete`.

        Raises:
          UserError: the tokenizer does not know a character of the prompt, a value is out of range, or the model is a
            classifier.
        """
        tokenizer = self.text_tokenizer
        return self.complete(generation.encode_prompt(tokenizer, prompt, "prompt"), tokenizer.decode, **options)

    def chat(self, messages: chat.Messages, **options: Any) -> str:
        """Returns the model's answer to a conversation, without special tokens.

        Args:
          messages: {"role": "system", "user" or "assistant", "content": …} of each message.
          options: those of `complete`.

        Raises:
          UserError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        tokenizer = self.text_tokenizer
        return self.complete(chat.encode(tokenizer, messages), tokenizer.decode_answer, **options)

    def complete(
        self,
        prompt: np.ndarray,
        decode: Callable[[np.ndarray], str],
        *,
        num_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_text: str = "",
    ) -> str:
        """Returns the text that the model generates after the tokens of a prompt.

        Args:
          decode: converts tokens to text.
          num_tokens: greatest number of tokens; None: 500 for a text, or as many as an answer can have.
          temperature, top_k, top_p, repetition_penalty: see `generation.Sampling`.
          seed: equal seeds give equal texts.
          stop_text: the text ends before the first occurrence of this text; "": never.
        """
        tokenizer = self.text_tokenizer
        generator = self.generator(generation.Sampling(temperature, top_k, top_p, repetition_penalty))
        *_, (sample,) = generation.continuations(
            generator.start(self.params, [prompt], seed=seed),
            decode,
            num_tokens or tokenizer.sample_length([prompt]),
            stop_texts=[stop_text],
        )
        return sample.text

    def generator(self, sampling: generation.Sampling, logprobs: bool = False) -> generation.Generator:
        """Returns a generator of tokens, which compiles at its first use.

        Raises:
          UserError: a value of `sampling` is out of range, or the model is a classifier.
        """
        sampling.check(self.text_tokenizer.vocab_size)
        layout, stop_tokens = self.program.layout, self.text_tokenizer.stop_tokens
        return generation.Generator(self.program.model, layout, sampling, stop_tokens=stop_tokens, logprobs=logprobs)

    def classify(self, files: Sequence[str]) -> np.ndarray:
        """Returns the probability of each class for each image file, float32 [files, classes].

        Raises:
          UserError: a file is not an image, or the model is not a classifier.
        """
        inputs = np.stack([self.run.config.data.inputs(file, self.model_config) for file in files])
        with self.program.layout.for_decoding(len(inputs)).use(), task("classifying"):
            apply = jax.jit(self.program.model.apply, out_shardings=self.program.layout.replicated)
            logits = jax.device_get(apply({"params": self.params}, inputs))
        return np.asarray(jax.nn.softmax(logits))

    def evaluate(self, split: str = "val", data: str | None = None, stride: int | None = None) -> dict[str, float]:
        """Returns measures over a whole split, by name.

        The first is the number of tokens or examples, the second the loss in nats per token or example.

        Args:
          split: "train", "val" or "all".
          data: other data to evaluate on, as in `data.path`; None: the data of the run.
          stride: number of tokens by which the window moves over a text; None: `model.block_size`.

        Raises:
          UserError: the data is missing, has changed since training, or is too short.
        """
        return self.evaluate_with_mistakes(split, data, stride)[0]

    def evaluate_with_mistakes(
        self, split: str = "val", data: str | None = None, stride: int | None = None
    ) -> tuple[dict[str, float], Shown]:
        """Returns the measures of `evaluate`, and some examples with a wrong prediction."""
        with task("reading the data"):
            dataset = self.dataset(data)
        source = dataset.evaluation(split, self.model_config, stride)
        result: dict[str, Any] = step.evaluate(self.program, self.params, source, self.batch_size)
        return dataset.report(source, result), dataset.mistakes(source, result)

    def benchmark(self, tasks: Sequence[str], folder: str | None = None, limit: int | None = None) -> tuple[dict, str]:
        """Returns the results of tasks of the lm-evaluation-harness, and its tables of these results.

        Args:
          tasks, folder, limit: see `gpt.inference.benchmarks.run`.

        Raises:
          UserError: the package lm-eval is not installed, or as `gpt.inference.benchmarks.run` raises it.
        """
        try:
            from gpt.inference import benchmarks
        except ImportError:
            raise UserError('Tasks need the package lm-eval: pip install "gpt-spmd[eval]".') from None
        return benchmarks.run(self, tasks, folder, limit)

    def explain(self, text: str) -> explanation.Explanation:
        """Returns how the model reads a text: loss, predictions and attention weights of each token.

        Raises:
          UserError: the model's family is not "gpt", the text has unknown characters, or it is too short or too long.
        """
        with task("reading the text"):
            return explanation.explain(self, text)
