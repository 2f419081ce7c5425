"""Writes an HTML page that shows how a model reads a text: loss, predictions and attention weights of each token.

    python -m gpt.explain --workdir=runs/char_tiny --prompt="O Romeo, Romeo" --out=explained.html

The page needs no network. In a notebook, `gpt.load_model(WORKDIR).explain(TEXT)` returns the same as arrays.
"""

from absl import flags

import gpt
from gpt.runtime import cli
from gpt.runtime.files import new_file

_WORKDIR = cli.define_workdir_flag()
_CHECKPOINT = cli.define_checkpoint_flag()
_PROMPT = flags.DEFINE_string("prompt", None, "The text to read.", required=True)
_OUT = flags.DEFINE_string("out", "explained.html", "New file for the page.")


def main() -> int:
    with new_file("out", _OUT.value) as file:
        model = gpt.load_model(_WORKDIR.value, _CHECKPOINT.value, batch_size=1, rows=1)
        explanation = model.explain(_PROMPT.value)
        summary = f"{explanation.losses_T[1:].mean():.4f} nats per token"
        file.write(explanation.page(f"{model.workdir.path.name}, step {model.step:,}: {summary}").encode())
    print(f"{len(explanation.pieces)} tokens, {summary}; wrote {file.name}")
    return 0


if __name__ == "__main__":
    cli.run(main)
