"""Writes text with a trained model: a prompt, its continuation, or a prompt loop on a terminal.

python -m gpt.sample --workdir=runs/char --prompt="O Romeo"
python -m gpt.sample --workdir=runs/char
echo "O Romeo" | python -m gpt.sample --workdir=runs/char
python -m gpt.sample --workdir=runs/char --prompt="O Romeo" --prompt="O Juliet" --num_samples=2 --logprobs
python -m gpt.sample --workdir=runs/image_gpt --prompt=class:3 --num_samples=16 --out=threes.png
python -m gpt.sample --workdir=runs/vit --prompt=cat.jpg

A model of pixels draws a picture; a classifier says what it takes each prompt for.

Control characters in a sample are shown escaped (\\x1b), in a file or a pipe as on a terminal. For the exact text use
--logprobs, whose JSON has it.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from gpt import cli, cluster
from gpt.errors import UsageError, UserError
from gpt.tokenizers import Labels

if TYPE_CHECKING:
    from gpt import loaded

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    None,
    "Text to continue; several are continued together. Without one, it is read from a pipe or a file on stdin, and a "
    "terminal gets a prompt loop. For a model that draws: class:NAME, half:FILE (an image, whose lower half is drawn "
    "anew), class:NAME,half:FILE, or nothing.",
)
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", None, "Tokens in a sample. Default: 500 of a text, all of an answer or a picture.", lower_bound=1
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Samples of one prompt, made together.", lower_bound=1, upper_bound=1 << 16
)  # generate.MAX_SAMPLES
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: always the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens only.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens with probability p together.")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides the logits of tokens that the text has already; 1: none, 1.2: usual."
)
_LOGPROBS = flags.DEFINE_bool(
    "logprobs", False, "Print a line of JSON for each sample, with its tokens and the model's log-probabilities."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Equal seeds give equal samples.", lower_bound=0, upper_bound=2**32 - 1
)  # JAX ignores the higher bits
_STOP = flags.DEFINE_string("stop", "", "End a sample before this text.")
_STOP_NEWLINES = flags.DEFINE_integer("stop_newlines", 0, "End a sample with its n-th line feed.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "samples.png", "File for the samples of a model that draws; it must not exist.")
flags.adopt_module_key_flags(cluster)


def main() -> int:
    from gpt import backend, generate, loaded  # after the flags: mistakes in them need not wait for it
    from gpt.checkpoint import Workdir

    backend.start()
    workdir = Workdir(_WORKDIR.value)
    saved = workdir.read()
    prompts = _PROMPT.value
    if prompts is None and not cluster.share("terminal", lambda: sys.stdin is not None and sys.stdin.isatty()):
        prompts = [cluster.share("piped prompt", cli.read_stdin)]
    backend.divide_cpu(saved.config, rows=len(prompts or [""]) * _NUM_SAMPLES.value)
    if isinstance(saved.tokenizer, Labels):
        return _classify(loaded.load(workdir, _CHECKPOINT.value), prompts or [])
    sampling = generate.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPETITION_PENALTY.value)
    run = loaded.load(workdir, _CHECKPOINT.value)
    sampling.check(run.tokenizer.vocab_size)
    stop_tokens = run.tokenizer.stop_tokens
    generator = generate.Generator(
        run.program.model, run.program.layout, sampling, stop_tokens=stop_tokens, logprobs=_LOGPROBS.value
    )

    def show(text: str, end: str = "\n") -> None:
        if cluster.is_first():
            print(text, end=end, flush=True)

    def draw(png: bytes) -> None:
        if not cluster.is_first():
            return
        try:
            with open(_OUT.value, "xb") as file:
                file.write(png)
        except OSError as error:
            raise UserError(f"Cannot write --out={_OUT.value}: {error.strerror}.") from None
        print(_OUT.value)

    def write(prompts: list[str], first: int = 0) -> None:
        """Prints the samples of the prompts, numbered from `first`; a single one as it comes."""
        tokens = [generate.encode_prompt(run.tokenizer, prompt, "--prompt") for prompt in prompts]
        longest, seen = max(map(len, tokens)), run.model_config.block_size
        if longest > seen and cluster.is_first():
            print(f"note: the prompt has {longest} tokens; the model sees the last {seen}.", file=sys.stderr)
        steps = generate.continuations(
            generator.start(run.params, tokens, _NUM_SAMPLES.value, _SEED.value, first),
            run.tokenizer.decode,
            _NUM_TOKENS.value or run.tokenizer.sample_length(tokens),
            stop_tokens=stop_tokens,
            stop_text=_STOP.value,
            stop_newlines=_STOP_NEWLINES.value,
        )
        if run.tokenizer.picture(tokens):
            *_, finished = steps
            prompted = [prompt for prompt in tokens for _ in range(_NUM_SAMPLES.value)]
            samples = [np.append(prompt, made.tokens) for prompt, made in zip(prompted, finished, strict=True)]
            draw(run.tokenizer.picture(samples))
            return
        labelled = [(prompt, sample) for prompt in prompts for sample in range(1, _NUM_SAMPLES.value + 1)]
        if len(labelled) == 1 and not _LOGPROBS.value:
            shown = 0
            show(prompts[0], end="")
            for (sample,) in steps:
                settled = sample.settled(_STOP.value)
                show(settled[shown:], end="")
                shown = max(shown, len(settled))
            show(sample.text[shown:])
            return
        *_, finished = steps
        for i, ((prompt, number), sample) in enumerate(zip(labelled, finished, strict=True)):
            if _LOGPROBS.value:
                pieces = [run.tokenizer.piece(token) for token in sample.tokens]
                logprobs = [round(float(x), 4) for x in sample.logprobs]
                line = {"prompt": prompt, "sample": number, "text": sample.text}
                show(json.dumps(line | {"tokens": sample.tokens.tolist(), "pieces": pieces, "logprobs": logprobs}))
                continue
            titles = [f"prompt {i // _NUM_SAMPLES.value + 1} of {len(prompts)}"] * (len(prompts) > 1)
            titles += [f"sample {number} of {_NUM_SAMPLES.value}"] * (_NUM_SAMPLES.value > 1)
            show(f"--- {', '.join(titles)}\n{prompt}{sample.text}")

    if prompts is not None:
        write(prompts)
    else:
        show(f"{run.workdir.path}, step {run.step:,}. An empty line or Ctrl-D ends.")
        _loop(write)
    return 0


def _classify(run: "loaded.Loaded", prompts: list[str]) -> int:
    """Prints for each prompt the likeliest class and its probability."""
    import jax

    if not any(prompts):
        raise UsageError(f"--workdir={run.workdir.path} holds a classifier: name what it is to see by --prompt.")
    inputs = np.stack([run.run.config.data.inputs(prompt, run.model_config) for prompt in prompts])
    with run.program.layout.for_decoding(len(inputs)).use():
        classify = jax.jit(
            lambda *x: jax.nn.softmax(run.program.model.apply(*x)), out_shardings=run.program.layout.replicated
        )
        probabilities = jax.device_get(classify({"params": run.params}, inputs))
    if cluster.is_first():
        for prompt, found in zip(prompts, probabilities, strict=True):
            print(f"{prompt}: {run.tokenizer.names[found.argmax()]}, {found.max():.1%}")
    return 0


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
            if cluster.is_first():
                print(f"error: {error}")
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


if __name__ == "__main__":
    cli.run(main, prints_result=True)
