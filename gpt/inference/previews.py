"""Previews that a run shows at each evaluation: a generated text, generated images, or examples of mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpt.config import Config
from gpt.data.base import Dataset, Shown
from gpt.data.pixels import PixelExamples, Pixels
from gpt.data.text import Corpus
from gpt.inference import generation, pictures
from gpt.step import Program

# Called with the parameters, the step, the result of `step.evaluate`, and a function that may raise to end the preview.
Preview = Callable[[Any, int, dict[str, Any], Callable[[], object]], Shown]

ROWS, COLUMNS = 4, 10  # of a grid of images


def make(dataset: Dataset, program: Program, config: Config, source: Any) -> Preview:
    """Returns the preview for a kind of data.

    Args:
      source: validation examples, for mistakes and for images to complete.

    Raises:
      UserError: the tokenizer does not know a character of `train.sample_prompt`.
    """
    if isinstance(dataset, Corpus):
        return _sampled_text(dataset, program, config)
    if isinstance(dataset, Pixels):
        return _sampled_images(dataset, program, config, source)
    return lambda params, step, result, check: dataset.mistakes(source, result)


def _sampled_text(dataset: Corpus, program: Program, config: Config) -> Preview:
    """Returns a preview that continues `train.sample_prompt`."""
    tokenizer, settings = dataset.tokenizer, config.train
    prompt = generation.encode_prompt(tokenizer, settings.sample_prompt, "train.sample_prompt")
    sampling = generation.Sampling(temperature=0.8)
    generator = generation.Generator(program.model, program.layout, sampling, stop_tokens=tokenizer.stop_tokens)

    def preview(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
        if not settings.sample_tokens:
            return Shown()
        decoding = generator.start(params, [prompt], seed=step)
        *_, (sample,) = generation.continuations(decoding, tokenizer.decode, settings.sample_tokens, check=check)
        return Shown((settings.sample_prompt or "\n") + sample.text)

    return preview


def _sampled_images(dataset: Pixels, program: Program, config: Config, source: PixelExamples) -> Preview:
    """Returns a preview that generates images of each class, and the lower halves of validation images."""
    palette = dataset.tokenizer
    generator = generation.Generator(program.model, program.layout, generation.Sampling())
    classes = np.arange(COLUMNS) % max(1, len(palette.names))
    class_prompts = [palette.any_class + 1 + classes[i : i + 1] for i in range(len(classes))]
    examples = [source.example(0, i * len(source) // ROWS) for i in range(ROWS)]
    images = [np.append(example["inputs"][:1], example["targets"]) for example in examples]
    halves = [np.append(image[:1], palette.half(image[1:])) for image in images]

    def draw(
        params: Any, step: int, prompts: list[np.ndarray], number: int, check: Callable[[], object], first: int = 0
    ) -> list[np.ndarray]:
        """Returns `number` images for each prompt; the prompts are numbered from `first`."""
        decoding = generator.start(params, prompts, number, seed=step, first_prompt=first)
        *_, samples = generation.continuations(decoding, palette.decode, palette.sample_length(prompts), check=check)
        return pictures.join(prompts, samples)

    def preview(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
        if not config.train.sample_tokens:
            return Shown()
        by_class = draw(params, step, class_prompts, ROWS, check)
        by_row = [by_class[i] for row in range(ROWS) for i in range(row, len(by_class), ROWS)]
        number = COLUMNS - 2
        completions = draw(params, step, halves, number, check, first=len(class_prompts))
        completed = [
            shown
            for i, (image, half) in enumerate(zip(images, halves, strict=True))
            for shown in (image, half, *completions[i * number : (i + 1) * number])
        ]
        grids = {"samples": by_row, "completions": completed}
        return Shown(pictures={name: pictures.grid(palette, tokens, COLUMNS) for name, tokens in grids.items()})

    return preview
