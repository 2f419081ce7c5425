"""Time of a training step of configs/perceiver_ar.py against a GPT of one block more over the same context.

Both take turns in one process on the same random rows, so that what else the machine does is shared; beside it stands
the ratio of the FLOPs that the two count.

python tests/benchmarks/latents.py [--turns=5]
"""

import argparse
import dataclasses
import json
import runpy
import time
from pathlib import Path

import jax
import numpy as np

from gpt import sharding, step
from gpt.config import from_tree
from gpt.models.gpt import GPTConfig
from gpt.runtime import backend

VOCAB = 80


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    backend.set_xla_options()
    config = from_tree(
        runpy.run_path(str(Path(__file__).parent.parent.parent / "configs/perceiver_ar.py"))["get_config"]()
    )
    backend.divide_cpu(config.work(config.train.batch_size))
    latents = config.model
    shared = {field.name: getattr(latents, field.name) for field in dataclasses.fields(GPTConfig)}
    whole = GPTConfig(**shared | {"family": "gpt", "num_layers": latents.num_layers + 1})
    layout = sharding.make_layout(config.mesh)
    rows = np.random.default_rng(0).integers(0, VOCAB, (config.train.batch_size, latents.length + 1), dtype=np.int32)
    contestants, flops = {}, {}
    for name, model in (("latents", latents), ("whole", whole)):
        built = step.build(dataclasses.replace(config, model=model), VOCAB, layout, config.train.steps)
        batch = {"inputs": rows[:, :-1], "targets": rows[:, -model.num_targets :]}
        contestants[name] = built, built.init(), jax.device_put(batch, layout.batch)
        flops[name] = built.model.config.flops_per_token()
    seconds = {name: [] for name in contestants}
    for _ in range(turns + 1):
        for name, (built, state, batch) in contestants.items():
            began = time.perf_counter()
            with layout.use():
                state, measured = built.train_step(state, batch)
            measured["loss"].block_until_ready()
            seconds[name].append(time.perf_counter() - began)
            contestants[name] = built, state, batch
    best = {name: min(times[1:]) for name, times in seconds.items()}  # the first turn compiles
    ratios = {"time": best["whole"] / best["latents"], "flops": flops["whole"] / flops["latents"]}
    print(json.dumps({"seconds": best, "ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()
