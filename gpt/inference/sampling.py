"""The output of `gpt.sample`: generated texts and images, a prompt loop, and the classes of images."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator

import numpy as np

from gpt.data import chat
from gpt.data.pixels import Palette
from gpt.data.tokenizers import Labels, Tokenizer
from gpt.inference import generation, pictures
from gpt.inference.generation import Continuation
from gpt.inference.model import TrainedModel
from gpt.runtime import cluster
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.files import new_file
from gpt.runtime.progress import say


@dataclasses.dataclass(frozen=True)
class Options:
    """What to generate, and how to print it.

    Attributes:
      num_tokens: greatest number of tokens in a sample; None: 500 for a text, all of an answer or an image.
      num_samples: number of samples for each prompt.
      logprobs: print a line of JSON for each sample.
      stop: one of the `stop_texts` of `generation.continuations`.
      stop_newlines: see `generation.continuations`.
      out: file for the picture of generated images.
      chat: the prompts are the messages of a user in one conversation, by the tokenizer's chat template.
      system: the first message of the conversation, with the role "system"; "": none.
    """

    sampling: generation.Sampling
    num_tokens: int | None = None
    num_samples: int = 1
    logprobs: bool = False
    seed: int = 0
    stop: str = ""
    stop_newlines: int = 0
    out: str = "samples.png"
    chat: bool = False
    system: str = ""


def run(model: TrainedModel, prompts: list[str] | None, options: Options) -> None:
    """Prints what the model generates for the prompts; None: for prompts that are typed on a terminal.

    Raises:
      UserError: a prompt or an option does not suit the model, or the picture cannot be written.
    """
    if isinstance(model.tokenizer, Labels):
        return _classify(model, model.tokenizer, prompts or [])
    if options.system and not options.chat:
        raise UsageError(f"--system={options.system} is for --chat.")
    write = _writer(model, options)
    if prompts is not None:
        return write(prompts, 0)
    _show(f"{model.workdir.path}, step {model.step:,}. An empty line or Ctrl-D exits.")
    return _loop(write)


def _show(text: str, end: str = "\n") -> None:
    if cluster.is_first():
        print(text, end=end, flush=True)


def _classify(model: TrainedModel, labels: Labels, prompts: list[str]) -> None:
    """Prints the most probable class of each image file, and its probability."""
    if not any(prompts):
        raise UsageError(f"--workdir={model.workdir.path} holds a classifier; name an image file with --prompt.")
    for prompt, probabilities in zip(prompts, model.classify(prompts), strict=True):
        _show(f"{prompt}: {labels.names[probabilities.argmax()]}, {probabilities.max():.1%}")


def _writer(model: TrainedModel, options: Options) -> Callable[[list[str], int], None]:
    """Returns a function that prints samples of prompts, or answers to them if `options.chat`.

    The second argument of the function is the number of the first prompt.
    """
    generator, tokenizer = model.generator(options.sampling, options.logprobs), model.text_tokenizer

    def generate(
        tokens: list[np.ndarray], decode: Callable[[np.ndarray], str], first: int
    ) -> Iterator[list[Continuation]]:
        longest, context = max(map(len, tokens)), model.model_config.length
        if longest > context:
            say(f"note: the prompt has {longest} tokens; the model sees the last {context}.")
        return generation.continuations(
            generator.start(model.params, tokens, options.num_samples, options.seed, first),
            decode,
            options.num_tokens or tokenizer.sample_length(tokens),
            stop_texts=[options.stop],
            stop_newlines=options.stop_newlines,
        )

    def write(prompts: list[str], first: int) -> None:
        tokens = [generation.encode_prompt(tokenizer, prompt, "--prompt") for prompt in prompts]
        segments = generate(tokens, tokenizer.decode, first)
        if len(prompts) * options.num_samples == 1 and not options.logprobs and not isinstance(tokenizer, Palette):
            _stream(prompts[0], segments, options.stop)
            return None
        *_, samples = segments
        if isinstance(tokenizer, Palette):
            return _draw(tokenizer, pictures.join(tokens, samples), options.out)
        return _print_all(tokenizer, prompts, samples, options)

    conversation = [{"role": "system", "content": options.system}] if options.system else []
    start = len(conversation)

    def answer(prompts: list[str], first: int) -> None:
        for number, prompt in enumerate(prompts, first):
            messages = [*conversation, {"role": "user", "content": prompt}]
            tokens = chat.encode(tokenizer, messages)
            while len(tokens) > model.model_config.length and len(messages) > start + 2:
                del messages[start : start + 2]
                tokens = chat.encode(tokenizer, messages)
            if len(messages) <= len(conversation):
                say("note: the conversation exceeds the context length; the model does not see its oldest messages.")
            text = _stream("", generate([tokens], tokenizer.decode_answer, number), options.stop)
            conversation[:] = [*messages, {"role": "assistant", "content": text}]

    if not options.chat:
        return write
    if options.num_samples > 1 or options.logprobs:
        raise UsageError("--chat prints one answer to each message; leave out --num_samples and --logprobs.")
    chat.check(tokenizer)
    return answer


def _stream(prompt: str, segments: Iterator[list[Continuation]], stop_text: str) -> str:
    """Prints one sample while it is generated, and returns its text."""
    shown = 0
    _show(prompt, end="")
    for (sample,) in segments:
        text = sample.stable_text(stop_text)
        _show(text[shown:], end="")
        shown = max(shown, len(text))
    _show(sample.text[shown:])
    return sample.text


def _draw(palette: Palette, samples: list[np.ndarray], out: str) -> None:
    """Writes a picture of all samples to a file."""
    if cluster.is_first():
        with new_file("out", out) as file:
            file.write(pictures.png(pictures.grid(palette, samples)))
        print(out)


def _print_all(tokenizer: Tokenizer, prompts: list[str], samples: list[Continuation], options: Options) -> None:
    """Prints samples one after the other, with titles or as JSON."""
    for i, sample in enumerate(samples):
        prompt, number = prompts[i // options.num_samples], i % options.num_samples + 1
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
    """Reads prompts with line editing and history (arrow keys), and prints their continuations."""
    import readline  # noqa: F401  gives input() its history

    for number in itertools.count():  # a repeated prompt gives another sample
        prompt = cluster.share(f"prompt {number}", _read_prompt)
        if not prompt:
            return
        try:
            write([prompt], number)
        except UserError as error:  # an unknown character does not end the loop
            _show(f"error: {error}")
        except KeyboardInterrupt:
            if cluster.is_several():  # the processes may have stopped at different tokens
                raise
            print()


def _read_prompt() -> str:
    try:
        return input("prompt> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
