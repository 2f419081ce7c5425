"""What is not the step: imports, --help, the input pipeline alone, and how long a run waits for it.

python tests/benchmarks/overheads.py --data=tinyshakespeare.txt [--config=configs/char.py] [--steps=30]

`import jax` stands beside the imports, for it is a part of most of them. The pipeline makes batches of the config's
shape on this process's threads, with nothing else to do; what the steps of a run take from it stands beside it.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def seconds(*command: str) -> float:
    """The fastest of five, and so without the first reading of files."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def pipeline(tree, batches: int = 200) -> float:
    """Tokens a second."""
    from gpt import config
    from gpt.data.pipeline import training_batches

    settings = config.from_tree(tree)
    rows = settings.train.batch_size
    data = settings.data.load(settings.tokenizer, settings.model)
    source = data.training(settings.model, seed=0)
    found = training_batches(source, rows, 0, range(rows), prefetch=settings.data.prefetch)
    for _ in range(20):
        next(found)
    began = time.perf_counter()
    tokens = sum(next(found)["inputs"].size for _ in range(batches))
    return tokens / (time.perf_counter() - began)


def run(file: str, data: str, steps: int) -> tuple[float, float]:
    """Tokens a second of a run, and the share of time in which the devices waited for input."""
    from gpt.runtime import tensorboard

    flags = {"data.path": data, "train.steps": steps, "train.log_every": 1, "train.eval_every": 0}
    flags |= {"train.sample_tokens": 0, "train.checkpoint_every": steps}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpt.main", f"--config={file}", f"--workdir={folder}/run"]
        command += [f"--config.{key}={value}" for key, value in flags.items()]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        scalars = tensorboard.read_scalars(Path(folder) / "run", ("progress/tokens_per_second", "progress/input_wait"))
    rates, waits = (values[2:] for _, values in scalars.values())  # the first of them compile
    return statistics.median(rates), statistics.mean(waits or [0.0])  # a wait of 0 is not written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text")
    parser.add_argument("--config", default=str(ROOT / "configs" / "char.py"))
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    data = str(Path(arguments.data).absolute())
    for name, command in {
        "python -c 'import jax'": ("-c", "import jax"),
        "python -c 'import gpt.main'": ("-c", "import gpt.main"),
        "python -m gpt.main --help": ("-m", "gpt.main", "--help"),
        "python -m gpt.sample --help": ("-m", "gpt.sample", "--help"),
    }.items():
        print(f"{name:32}{seconds(*command):8.2f} s", flush=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    spec = importlib.util.spec_from_file_location("chosen", arguments.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config()
    tree.data.path = data
    alone = pipeline(tree)
    print(f"{'the pipeline alone':32}{alone:12,.0f} tokens/s")
    rate, waits = run(arguments.config, data, arguments.steps)
    print(f"{'a run of ' + Path(arguments.config).name:32}{rate:12,.0f} tokens/s, {alone / rate:,.0f} × less")
    print(f"{'of its time waiting for input':32}{waits:12.2%}")


if __name__ == "__main__":
    main()
