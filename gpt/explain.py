"""Shows how a model reads a text: the loss of each token, what it expected there, and what each head looks at.

python -m gpt.explain --workdir=runs/char_tiny --prompt="O Romeo, Romeo" --out=explained.html

The page needs nothing but a browser. `gpt.inspection` gives the same as arrays, for a notebook.
"""

from pathlib import Path

from absl import flags

from gpt import cli
from gpt.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (lowest validation loss), last, or a step.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text to read.", required=True)
_OUT = flags.DEFINE_string("out", "explained.html", "The page to write; it must not exist.")


def main() -> int:
    from gpt import backend, inspection, loaded  # after the flags: mistakes in them need not wait for it
    from gpt.checkpoint import Workdir

    out = Path(_OUT.value)
    if out.exists():
        raise UserError(f"--out={out} exists already; name another file.")
    backend.start()
    workdir = Workdir(_WORKDIR.value)
    backend.divide_cpu(workdir.read().config, rows=1)
    run = loaded.load(workdir, _CHECKPOINT.value, batch_size=1)
    explanation = inspection.explain(run, _PROMPT.value)
    mean = float(explanation.losses_T[1:].mean())
    try:
        with out.open("x") as file:
            file.write(
                inspection.page(explanation, f"{workdir.path.name}, step {run.step:,}: {mean:.4f} nats per token")
            )
    except OSError as error:
        raise UserError(f"Cannot write --out={out}: {error.strerror}.") from None
    print(f"{len(explanation.pieces)} tokens, {mean:.4f} nats per token; wrote {out.absolute()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
