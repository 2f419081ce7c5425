"""The console scripts, which setup.cfg names: each does what `python -m gpt.NAME` does."""

import functools
import runpy

train, evaluate, sample, plan, tokenize, convert, explain, plot, runs = (
    functools.partial(runpy.run_module, f"gpt.{name}", run_name="__main__", alter_sys=True)
    for name in ("main", "evaluate", "sample", "plan", "tokenize", "convert", "explain", "plot", "runs")
)
