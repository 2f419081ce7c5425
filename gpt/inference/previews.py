"""What a run shows of its model at each evaluation: a sampled text, sampled images, or examples of mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpt.config import Config
from gpt.data.base import Dataset, Shown
from gpt.data.pixels import PixelExamples, Pixels
from gpt.data.text import Corpus
from gpt.inference import generation, pictures
from gpt.step import Program

# (parameters, step, result of `evaluate`, a function that may raise to end the preview) -> what to show
Preview = Callable[[Any, int, dict[str, Any], Callable[[], object]], Shown]

ROWS, COLUMNS = 4, 10  # of a grid of images


def make(dataset: Dataset, program: Program, config: Config, source: Any) -> Preview:
    """Returns the preview for a kind of data.

    Args:
      source: the validation examples, of which mistakes and images to complete are taken.

    Raises:
      UserError: `train.sample_prompt` has characters that the tokenizer does not know.
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
        *_, (sample,) = generation.continuations(
            decoding, tokenizer.decode, settings.sample_tokens, stop_tokens=tokenizer.stop_tokens, check=check
        )
        return Shown((settings.sample_prompt or "\n") + sample.text)

    return preview


def _sampled_images(dataset: Pixels, program: Program, config: Config, source: PixelExamples) -> Preview:
    """Returns a preview that draws images of each class, and completes the lower halves of validation images."""
    palette = dataset.tokenizer
    generator = generation.Generator(program.model, program.layout, generation.Sampling())
    classes = np.arange(COLUMNS) % max(1, len(palette.names))
    class_prompts = [palette.any_class + 1 + classes[i : i + 1] for i in range(len(classes))]
    examples = [source.example(0, i * len(source) // ROWS) for i in range(ROWS)]
    wholes = [np.append(example["inputs"][:1], example["targets"]) for example in examples]
    halves = [np.append(whole[:1], palette.half(whole[1:])) for whole in wholes]

    def draw(
        params: Any, step: int, prompts: list[np.ndarray], number: int, check: Callable[[], object], first: int = 0
    ) -> list[np.ndarray]:
        decoding = generator.start(params, prompts, number, seed=step, first_prompt=first)
        *_, made = generation.continuations(decoding, palette.decode, palette.sample_length(prompts), check=check)
        prompted = [prompt for prompt in prompts for _ in range(number)]
        return [np.append(prompt, found.tokens) for prompt, found in zip(prompted, made, strict=True)]

    def preview(params: Any, step: int, result: dict[str, Any], check: Callable[[], object]) -> Shown:
        if not config.train.sample_tokens:
            return Shown()
        drawn = draw(params, step, class_prompts, ROWS, check)
        by_row = [drawn[i] for row in range(ROWS) for i in range(row, len(drawn), ROWS)]
        number = COLUMNS - 2
        ends = draw(params, step, halves, number, check, first=len(class_prompts))
        completed = [
            image
            for i, (whole, half) in enumerate(zip(wholes, halves, strict=True))
            for image in (whole, half, *ends[i * number : (i + 1) * number])
        ]
        grids = {"samples": by_row, "completions": completed}
        return Shown(pictures={name: pictures.grid(palette, images, COLUMNS) for name, images in grids.items()})

    return preview
