"""What `gpt.sample` prints: continuations of prompts, a text as it is written, a prompt loop, classes of images."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable

import numpy as np

from gpt.data.pixels import Palette
from gpt.data.tokenizers import Labels
from gpt.inference import generation, pictures
from gpt.inference.model import TrainedModel
from gpt.runtime import cluster
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.files import new_file


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample, and how to show it.

    Attributes:
      num_tokens: length of a sample; None: 500 of a text, all of an answer or a picture.
      num_samples: samples of each prompt.
      logprobs: print a line of JSON for each sample.
      stop_text, stop_newlines: see `generation.continuations`.
      out: file for the samples of a model that draws.
    """

    sampling: generation.Sampling
    num_tokens: int | None = None
    num_samples: int = 1
    logprobs: bool = False
    seed: int = 0
    stop_text: str = ""
    stop_newlines: int = 0
    out: str = "samples.png"


def run(model: TrainedModel, prompts: list[str] | None, options: Options) -> None:
    """Prints what the model makes of the prompts, or of those that a person types if there are none.

    Raises:
      UserError: a prompt or an option does not suit the model, or the picture cannot be written.
    """
    if isinstance(model.tokenizer, Labels):
        return _classify(model, prompts or [])
    write = _writer(model, options)
    if prompts is not None:
        return write(prompts, 0)
    _show(f"{model.workdir.path}, step {model.step:,}. An empty line or Ctrl-D ends.")
    return _loop(write)


def _show(text: str, end: str = "\n") -> None:
    if cluster.is_first():
        print(text, end=end, flush=True)


def _classify(model: TrainedModel, prompts: list[str]) -> None:
    """Prints the likeliest class of each prompt, and its probability."""
    if not any(prompts):
        raise UsageError(f"--workdir={model.workdir.path} holds a classifier: name an image file by --prompt.")
    for prompt, found in zip(prompts, model.classify(prompts), strict=True):
        _show(f"{prompt}: {model.tokenizer.names[found.argmax()]}, {found.max():.1%}")


def _writer(model: TrainedModel, options: Options) -> Callable[[list[str], int], None]:
    """Returns a function that prints the samples of prompts, numbered from its second argument."""
    generator, tokenizer = model.generator(options.sampling, options.logprobs), model.tokenizer

    def write(prompts: list[str], first: int) -> None:
        tokens = [generation.encode_prompt(tokenizer, prompt, "--prompt") for prompt in prompts]
        longest, context = max(map(len, tokens)), model.model_config.block_size
        if longest > context and cluster.is_first():
            print(f"note: the prompt has {longest} tokens; the model sees the last {context}.", file=sys.stderr)
        steps = generation.continuations(
            generator.start(model.params, tokens, options.num_samples, options.seed, first),
            tokenizer.decode,
            options.num_tokens or tokenizer.sample_length(tokens),
            stop_tokens=tokenizer.stop_tokens,
            stop_text=options.stop_text,
            stop_newlines=options.stop_newlines,
        )
        if len(prompts) * options.num_samples == 1 and not options.logprobs and not isinstance(tokenizer, Palette):
            return _stream(prompts[0], steps, options.stop_text)
        *_, finished = steps
        if isinstance(tokenizer, Palette):
            return _draw(tokenizer, tokens, finished, options)
        return _print_all(tokenizer, prompts, finished, options)

    return write


def _stream(prompt: str, steps, stop_text: str) -> None:
    """Prints one sample as it is written."""
    shown = 0
    _show(prompt, end="")
    for (sample,) in steps:
        settled = sample.settled(stop_text)
        _show(settled[shown:], end="")
        shown = max(shown, len(settled))
    _show(sample.text[shown:])


def _draw(
    palette: Palette, tokens: list[np.ndarray], finished: list[generation.Continuation], options: Options
) -> None:
    """Writes a picture of all samples."""
    prompted = [prompt for prompt in tokens for _ in range(options.num_samples)]
    samples = [np.append(prompt, made.tokens) for prompt, made in zip(prompted, finished, strict=True)]
    if cluster.is_first():
        with new_file("out", options.out) as file:
            file.write(pictures.png(pictures.grid(palette, samples)))
        print(options.out)


def _print_all(tokenizer, prompts: list[str], finished: list[generation.Continuation], options: Options) -> None:
    """Prints samples one after the other, with titles or as JSON."""
    labelled = [(prompt, number) for prompt in prompts for number in range(1, options.num_samples + 1)]
    for i, ((prompt, number), sample) in enumerate(zip(labelled, finished, strict=True)):
        if options.logprobs:
            pieces = [tokenizer.piece(token) for token in sample.tokens]
            logprobs = [round(float(x), 4) for x in sample.logprobs]
            line = {"prompt": prompt, "sample": number, "text": sample.text}
            _show(json.dumps(line | {"tokens": sample.tokens.tolist(), "pieces": pieces, "logprobs": logprobs}))
            continue
        titles = [f"prompt {i // options.num_samples + 1} of {len(prompts)}"] * (len(prompts) > 1)
        titles += [f"sample {number} of {options.num_samples}"] * (options.num_samples > 1)
        _show(f"--- {', '.join(titles)}\n{prompt}{sample.text}")


def _loop(write: Callable[[list[str], int], None]) -> None:
    """Reads prompts with line editing and history (arrow keys), and writes their continuations."""
    import readline  # noqa: F401  gives input() its history

    for number in itertools.count():  # so that the same prompt again gives another sample
        prompt = cluster.share(f"prompt {number}", _read_prompt)
        if not prompt:
            return
        try:
            write([prompt], number)
        except UserError as error:  # an unknown character need not end the conversation
            _show(f"error: {error}")
        except KeyboardInterrupt:
            if cluster.is_several():  # they may not all have stopped at the same token
                raise
            print()


def _read_prompt() -> str:
    try:
        return input("prompt> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
