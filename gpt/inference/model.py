"""A trained model as notebooks and commands use it: `gpt.load_model` returns one."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt import step
from gpt.checkpointing.loading import Loaded
from gpt.data.base import Shown
from gpt.inference import explanation, generation
from gpt.runtime.errors import UserError


class TrainedModel(Loaded):
    """A model of a checkpoint, restored on the devices of this machine; see `Loaded` for its attributes."""

    def generate(
        self,
        prompt: str = "",
        *,
        num_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_text: str = "",
    ) -> str:
        """Returns the text that the model writes after a prompt, without the prompt.

        Args:
          num_tokens: length of the text in tokens, at most; None: 500, or all of an answer.
          temperature, top_k, top_p, repetition_penalty: see `generation.Sampling`.
          seed: equal seeds give equal texts.
          stop_text: the text ends before this.

        Raises:
          UserError: the prompt has characters that the tokenizer does not know, a value is out of range, or the model
            classifies images.
        """
        if not hasattr(self.tokenizer, "encode"):
            raise UserError(f"{self.workdir.path} holds a classifier, which generates no text; use classify().")
        tokens = generation.encode_prompt(self.tokenizer, prompt, "prompt")
        generator = self.generator(generation.Sampling(temperature, top_k, top_p, repetition_penalty))
        *_, (sample,) = generation.continuations(
            generator.start(self.params, [tokens], seed=seed),
            self.tokenizer.decode,
            num_tokens or self.tokenizer.sample_length([tokens]),
            stop_tokens=self.tokenizer.stop_tokens,
            stop_text=stop_text,
        )
        return sample.text

    def generator(self, sampling: generation.Sampling, logprobs: bool = False) -> generation.Generator:
        """Returns a generator of tokens, compiled when it is first used. Raises UserError for values out of range."""
        sampling.check(self.tokenizer.vocab_size)
        layout, stop_tokens = self.program.layout, self.tokenizer.stop_tokens
        return generation.Generator(self.program.model, layout, sampling, stop_tokens=stop_tokens, logprobs=logprobs)

    def classify(self, files: Sequence[str]) -> np.ndarray:
        """Returns the probability of each class for image files: float32, [files, classes].

        Raises:
          UserError: a file is no image, or the model is no classifier.
        """
        inputs = np.stack([self.run.config.data.inputs(file, self.model_config) for file in files])
        with self.program.layout.for_decoding(len(inputs)).use():
            classify = jax.jit(
                lambda *x: jax.nn.softmax(self.program.model.apply(*x)), out_shardings=self.program.layout.replicated
            )
            return jax.device_get(classify({"params": self.params}, inputs))

    def evaluate(self, split: str = "val", data: str | None = None, stride: int | None = None) -> dict[str, float]:
        """Returns the loss and other measures over a whole split, by name; the first is the number of examples.

        Args:
          split: "train", "val" or "all".
          data: other data in place of the run's, as in `data.path`.
          stride: tokens from one window over a text to the next; None: the length of a window.

        Raises:
          UserError: the data is missing, has changed since the training, or is too short.
        """
        return self.evaluate_with_mistakes(split, data, stride)[0]

    def evaluate_with_mistakes(
        self, split: str = "val", data: str | None = None, stride: int | None = None
    ) -> tuple[dict[str, float], Shown]:
        """Returns what `evaluate` returns, and some examples with a wrong prediction."""
        dataset = self.dataset(data)
        source = dataset.evaluation(split, self.model_config, stride)
        result: dict[str, Any] = step.evaluate(self.program, self.params, source, self.batch_size)
        return dataset.report(source, result), dataset.mistakes(source, result)

    def explain(self, text: str) -> explanation.Explanation:
        """Returns how the model reads a text: losses, expected tokens and attention weights of each token.

        Raises:
          UserError: the model reads no text, or the text is too short or too long.
        """
        return explanation.explain(self, text)
