"""Previews that a run shows at each evaluation: a generated text, or examples of mistakes."""

from collections.abc import Callable
from typing import Any

from gpt.config import Config
from gpt.data.base import Dataset, Shown
from gpt.data.text import Corpus
from gpt.inference import generation
from gpt.step import Program

# Called with the parameters, the step, the result of `step.evaluate`, and a function that may raise to end the preview.
Preview = Callable[[Any, int, dict[str, Any], Callable[[], object]], Shown]


def make(dataset: Dataset, program: Program, config: Config, source: Any) -> Preview:
    """Returns the preview for a kind of data: a text that continues `train.sample_prompt`, or mistakes.

    Args:
      source: validation examples, for mistakes.

    Raises:
      UserError: the tokenizer does not know a character of `train.sample_prompt`.
    """
    if not isinstance(dataset, Corpus):
        return lambda params, step, result, check: dataset.mistakes(source, result)
    tokenizer, settings = dataset.tokenizer, config.train
    prompt = generation.encode_prompt(tokenizer, settings.sample_prompt, "train.sample_prompt")
    sampling = generation.Sampling(temperature=0.8)
    generator = generation.Generator(program.model, program.layout, sampling, stop_tokens=tokenizer.stop_tokens)

    def preview(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
        if not settings.sample_tokens:
            return Shown()
        decoding = generator.start(params, [prompt], seed=step)
        *_, (sample,) = generation.continuations(
            decoding, tokenizer.decode, settings.sample_tokens, stop_tokens=tokenizer.stop_tokens, check=check
        )
        return Shown((settings.sample_prompt or "\n") + sample.text)

    return preview
