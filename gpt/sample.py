"""Generates text with a trained model: continuations of prompts, or a prompt loop on a terminal.

    python -m gpt.sample --workdir=runs/char --prompt="O Romeo"
    python -m gpt.sample --workdir=runs/char
    echo "O Romeo" | python -m gpt.sample --workdir=runs/char
    python -m gpt.sample --workdir=runs/char --prompt="O Romeo" --prompt="O Juliet" --num_samples=2 --logprobs
    python -m gpt.sample --workdir=runs/smollm2 --chat --system="Answer briefly."
    python -m gpt.sample --workdir=runs/image_gpt --prompt=class:3 --num_samples=16 --out=threes.png
    python -m gpt.sample --workdir=runs/vit --prompt=cat.jpg

A model of pixels generates images; a classifier prints the class of each image.

Control characters in a sample are printed escaped (\\x1b), also to a file or a pipe. With --logprobs, the JSON has the
exact text.
"""

import sys

from absl import flags

import gpt
from gpt.runtime import cli, cluster

_WORKDIR = cli.define_workdir_flag()
_CHECKPOINT = cli.define_checkpoint_flag()
_JOB = cli.define_cluster_flags()
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    None,
    "Text to continue. Several prompts are continued together. Without this flag, the prompt is read from stdin if "
    "stdin is a pipe or a file; on a terminal, a prompt loop starts. A classifier takes an image file, and a model of "
    "pixels class:NAME, half:FILE (an image whose lower half is generated), class:NAME,half:FILE, or an empty prompt.",
)
flags.DEFINE_integer(
    "num_tokens", None, "Tokens in a sample. Default: 500 for a text, all of an answer or an image.", lower_bound=1
)
flags.DEFINE_integer("num_samples", 1, "Number of samples for each prompt.", lower_bound=1, upper_bound=1 << 16)
flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: always the most probable token.")
flags.DEFINE_integer("top_k", None, "Sample from the k most probable tokens only.")
flags.DEFINE_float("top_p", None, "Sample from the most probable tokens whose probabilities sum to p.")
flags.DEFINE_float(
    "repetition_penalty",
    1.0,
    "Reduces the logits of tokens that are already in the text; 1: no penalty, 1.2: a usual value.",
)
flags.DEFINE_bool(
    "logprobs", False, "Print a line of JSON for each sample, with its tokens and their log-probabilities."
)
flags.DEFINE_integer("seed", 0, "Equal seeds give equal samples.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string("stop", "", "End a sample before this text.")
flags.DEFINE_integer("stop_newlines", 0, "End a sample with its n-th line feed; 0: do not.", lower_bound=0)
flags.DEFINE_bool("chat", False, "Answer --prompt, or what is typed, as the messages of a user in a conversation.")
flags.DEFINE_string("system", "", "With --chat: the system message of the conversation.")
flags.DEFINE_string("out", "samples.png", "New file for the images of a model of pixels.")


def main() -> None:
    gpt.start(_JOB())
    from gpt.inference import sampling
    from gpt.inference.generation import Sampling

    prompts = _PROMPT.value
    if prompts is None and not cluster.share("terminal", lambda: sys.stdin is not None and sys.stdin.isatty()):
        prompts = [cluster.share("piped prompt", cli.read_stdin)]
    options = sampling.Options(Sampling(**cli.values(Sampling)), **cli.values(sampling.Options))
    # One row, so that a CPU is one device: each of several would read all parameters for every token.
    sampling.run(gpt.load_model(_WORKDIR.value, _CHECKPOINT.value, rows=1), prompts, options)


if __name__ == "__main__":
    cli.run(main, prints_result=True)
