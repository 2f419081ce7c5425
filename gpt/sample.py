"""Writes text with a trained model: a prompt, its continuation, or a prompt loop on a terminal.

python -m gpt.sample --workdir=runs/char --prompt="O Romeo"
python -m gpt.sample --workdir=runs/char
"""

import itertools
import sys
from collections.abc import Callable

from absl import flags

from gpt import cli, cluster
from gpt.checkpoint import Workdir
from gpt.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue. Without it, a terminal gets a prompt loop.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 500, "Tokens in a sample.", lower_bound=1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of one prompt, made together.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: always the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens only.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens with probability p together.")
_SEED = flags.DEFINE_integer("seed", 0, "Equal seeds give equal samples.", lower_bound=0)
_STOP = flags.DEFINE_string("stop", "", "End a sample before this text.")
_STOP_NEWLINES = flags.DEFINE_integer("stop_newlines", 0, "End a sample with its n-th line feed.", lower_bound=0)
flags.adopt_module_key_flags(cluster)


def main() -> int:
    from gpt import generate, loaded  # after the flags: mistakes in them need not wait for it

    cluster.start()
    sampling = generate.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    run = loaded.load(Workdir(_WORKDIR.value), _CHECKPOINT.value)
    sampling.check(run.tokenizer.vocab_size)
    generator = generate.Generator(run.program.model, run.program.layout, sampling)

    def show(text: str, end: str = "\n") -> None:
        if cluster.is_first():
            print(text, end=end, flush=True)

    def write(prompt: str, seed: int) -> None:
        """Prints the samples of a prompt; a single one as it comes."""
        tokens = generate.encode_prompt(run.tokenizer, prompt, "--prompt")
        if len(tokens) > run.model_config.block_size and cluster.is_first():
            kept = run.model_config.block_size
            print(f"note: the prompt has {len(tokens)} tokens; the model sees the last {kept}.", file=sys.stderr)
        samples = generate.continuations(
            generator(run.params, tokens, _NUM_SAMPLES.value, seed),
            run.tokenizer.decode,
            _NUM_SAMPLES.value,
            _NUM_TOKENS.value,
            _STOP.value,
            _STOP_NEWLINES.value,
        )
        if _NUM_SAMPLES.value == 1:
            shown = ""
            show(prompt, end="")
            for (sample,) in samples:
                # A character may still lack bytes, and the beginning of the stop text may turn out to be one.
                safe = sample[: max(len(shown), len(sample.rstrip("\ufffd")) - len(_STOP.value))]
                show(safe[len(shown) :], end="")
                shown = safe
            show(sample[len(shown) :])
        else:
            *_, finished = samples
            for i, sample in enumerate(finished, 1):
                show(f"--- sample {i} of {len(finished)}\n{prompt}{sample}")

    if _PROMPT.value is not None:
        write(_PROMPT.value, _SEED.value)
    elif not cluster.share("terminal", sys.stdin.isatty):
        write("", _SEED.value)
    else:
        show(f"{run.workdir.path}, step {run.step:,}. An empty line or Ctrl-D ends.")
        _loop(write)
    return 0


def _loop(write: Callable[[str, int], None]) -> None:
    """Reads prompts with line editing and history (arrow keys), and writes their continuations."""
    import readline  # noqa: F401  gives input() its history

    for seed in itertools.count(_SEED.value):  # the same prompt again gives another sample
        prompt = cluster.share(f"prompt {seed}", _read_prompt)
        if not prompt:
            return
        try:
            write(prompt, seed)
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
    cli.run(main)
