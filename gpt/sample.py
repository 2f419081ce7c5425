"""Writes text with a trained model: a prompt, its continuation, or a prompt loop on a terminal.

python -m gpt.sample --workdir=runs/char --prompt="O Romeo"
python -m gpt.sample --workdir=runs/char
echo "O Romeo" | python -m gpt.sample --workdir=runs/char
python -m gpt.sample --workdir=runs/char --prompt="O Romeo" --prompt="O Juliet" --num_samples=2 --logprobs
python -m gpt.sample --workdir=runs/image_gpt --prompt=class:3 --num_samples=16 --out=threes.png
python -m gpt.sample --workdir=runs/vit --prompt=cat.jpg

A model of pixels draws a picture; a classifier prints the class of each image.

Control characters in a sample are shown escaped (\\x1b), in a file or a pipe as on a terminal. For the exact text use
--logprobs, whose JSON has it.
"""

import sys

from absl import flags

import gpt
from gpt.runtime import cli, cluster

_WORKDIR = cli.define_workdir_flag()
_CHECKPOINT = cli.define_checkpoint_flag()
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
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.", lower_bound=1, upper_bound=1 << 16)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: always the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens only.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens with probability p together.")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides the logits of tokens that the text has already; 1: none, 1.2: usual."
)
_LOGPROBS = flags.DEFINE_bool(
    "logprobs", False, "Print a line of JSON for each sample, with its tokens and the model's log-probabilities."
)
_SEED = flags.DEFINE_integer("seed", 0, "Equal seeds give equal samples.", lower_bound=0, upper_bound=2**32 - 1)
_STOP = flags.DEFINE_string("stop", "", "End a sample before this text.")
_STOP_NEWLINES = flags.DEFINE_integer("stop_newlines", 0, "End a sample with its n-th line feed.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "samples.png", "File for the samples of a model that draws; it must not exist.")
_JOB = cli.define_cluster_flags()


def main() -> None:
    gpt.start(_JOB())
    from gpt.inference import sampling
    from gpt.inference.generation import Sampling

    prompts = _PROMPT.value
    if prompts is None and not cluster.share("terminal", lambda: sys.stdin is not None and sys.stdin.isatty()):
        prompts = [cluster.share("piped prompt", cli.read_stdin)]
    drawn = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPETITION_PENALTY.value)
    shown = {"logprobs": _LOGPROBS.value, "stop_text": _STOP.value, "stop_newlines": _STOP_NEWLINES.value}
    options = sampling.Options(drawn, _NUM_TOKENS.value, _NUM_SAMPLES.value, seed=_SEED.value, out=_OUT.value, **shown)
    rows = len(prompts or [""]) * _NUM_SAMPLES.value
    sampling.run(gpt.load_model(_WORKDIR.value, _CHECKPOINT.value, rows=rows), prompts, options)


if __name__ == "__main__":
    cli.run(main, prints_result=True)
