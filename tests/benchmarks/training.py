"""Speed of a training step and of a forward pass, side by side with PyTorch.

python tests/benchmarks/training.py   (needs torch and transformers, beside what the project needs)

The contestants are this project, as `gpt.main` runs it; a GPT in plain PyTorch, as its best-known teaching code writes
it (one packed projection, scaled_dot_product_attention, fused AdamW), eager and compiled; and transformers' GPT-2. All
train the same model on the same shapes: forward and backward pass, clipping, AdamW. On a CPU they compute in float32,
on a GPU in bfloat16, with float32 parameters and flash attention. Each is a process of its own with all cores. They
take turns, some steps each, so that a machine whose speed drifts is the same to all; ratios are taken turn by turn, and
their median, least and greatest are printed. `of peak` is the model's arithmetic (6 FLOPs for each weight and token,
and the attention's) over the time, as a share of the fastest product of two 2,048-square matrices, measured in the same
turns. `memory` is the peak resident size, on a GPU that of the device's memory. `accelerator.py` uses the same
contestants for the sizes of ACCELERATOR_SIZES.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    vocab: int
    length: int  # tokens in a row
    rows: int  # of a step
    micro_batches: int = 1
    remat: str = "none"  # ours: what the backward pass recomputes
    scan: bool = False  # ours: a loop over one compiled block; the compiled PyTorch model compiles one block


SIZES = {
    "4/4/128": Size(4, 4, 128, 65, 64, 12),
    "6/6/384": Size(6, 6, 384, 65, 256, 16),
    "8/8/512": Size(8, 8, 512, 65, 128, 16),
    "124M": Size(12, 12, 768, 50257, 256, 2),
}
# For one GPU of 80 GB, which holds the training states of both contestants at the same time. GPT-2's vocabulary is
# padded to a multiple of 128 for both.
ACCELERATOR_SIZES = {
    "gpt2-124m": Size(12, 12, 768, 50304, 1024, 32),
    "gpt2-350m": Size(24, 16, 1024, 50304, 1024, 16),
    "gpt2-1558m": Size(48, 25, 1600, 50304, 1024, 8, micro_batches=4, remat="dots", scan=True),
    "tiny": Size(2, 4, 64, 256, 64, 16, micro_batches=2),
}
PEERS = ("eager", "compiled", "transformers")
Work = Callable[[bool], None]  # makes a step, or starts it; waits for its result if the argument is true


def size_of(name: str) -> Size:
    return (SIZES | ACCELERATOR_SIZES)[name]


def settings(name: str, dropout: float = 0.0) -> Any:
    """Returns the project's config of a size."""
    from gpt import config
    from gpt.models.gpt import GPTConfig

    size = size_of(name)
    rates = dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), dropout)
    shape = {"num_layers": size.layers, "num_heads": size.heads, "embed_dim": size.width, "block_size": size.length}
    how = {"attention": "auto", "remat": size.remat, "scan_layers": size.scan}
    model = GPTConfig(vocab_size=size.vocab, **shape, **how, **rates)
    return config.Config(model=model, train=config.TrainConfig(batch_size=size.rows, micro_batches=size.micro_batches))


def ours(name: str, dropout: float, forward: bool) -> tuple[Work, Callable[[], dict[str, Any]]]:
    """Returns the work, and a function that returns the memory that it took and what else is known of it."""
    import jax
    import numpy as np

    from gpt import sharding, step
    from gpt.runtime import backend

    size, config = size_of(name), settings(name, dropout)
    backend.set_xla_options()
    backend.divide_cpu(config.work(size.rows // size.micro_batches))
    on_cpu = jax.default_backend() == "cpu"
    layout = sharding.make_layout(config.mesh, jax.devices() if on_cpu else jax.devices()[:1])
    built = step.build(config, size.vocab, layout, 1000)
    tokens = np.random.default_rng(0).integers(0, size.vocab, (size.rows, size.length + 1), np.int32)
    with built.layout.use():
        state = built.init()
        batch = jax.device_put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, built.layout.batch)
        run = (
            built.eval_step.lower(state.params, batch) if forward else built.train_step.lower(state, batch)
        ).compile()

    def step(wait: bool) -> None:
        nonlocal state
        if forward:
            measured = run(state.params, batch)
        else:
            state, measured = run(state, batch)
        if wait or on_cpu:
            float(measured["loss"])

    def facts() -> dict[str, Any]:
        used = run.memory_analysis()
        sizes = {name: getattr(used, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
        known = {"analysis": sizes, "attention": built.model.config.attention}
        if on_cpu:
            return known | resident()
        return known | {"memory": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}

    return step, facts


def resident() -> dict[str, Any]:
    return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def peer(name: str, size_name: str, dropout: float, forward: bool) -> tuple[Work, Callable[[], dict[str, Any]]]:
    """Returns the work of a contestant in PyTorch, and a function that returns the memory that it took."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = size_of(size_name)
    layers, heads, width, vocab, length, rows = size[:6]
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
            rate = dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention, self.dropout = Attention(), nn.Dropout(dropout)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            x = x + self.dropout(self.attention(self.norm_1(x)))
            hidden = F.gelu(self.up(self.norm_2(x)), approximate="tanh")
            return x + self.dropout(self.down(hidden))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
            self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))

        def forward(self, indices):
            x = self.dropout(self.tokens(indices) + self.positions(torch.arange(indices.shape[1], device=device)))
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    if name == "transformers":
        import transformers

        rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
        shape = {"vocab_size": vocab, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
        with device:
            options = transformers.GPT2Config(**shape, **rates, attn_implementation="sdpa")
            model = transformers.GPT2LMHeadModel(options)
    else:
        with device:
            model = Model()

    def loss_of(inputs, targets):
        logits = model(inputs)
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    run = loss_of
    if name == "compiled" and size.scan:
        for block in model.blocks:  # all blocks share one compiled program
            block.compile()
    elif name == "compiled":
        run = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, vocab, (rows, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def kernels() -> contextlib.AbstractContextManager:
        """bfloat16, and FlashAttention rather than another implementation, on a GPU."""
        stack = contextlib.ExitStack()
        if on_gpu:
            stack.enter_context(torch.autocast("cuda", torch.bfloat16))
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        return stack

    def step(wait: bool) -> None:
        if forward:
            with torch.no_grad(), kernels():
                total = run(inputs, targets)
        else:
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for part in zip(inputs.chunk(size.micro_batches), targets.chunk(size.micro_batches), strict=True):
                with kernels():
                    loss = run(*part) / size.micro_batches
                loss.backward()
                total = total + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if wait:
            total.item()

    def facts() -> dict[str, Any]:
        return {"memory": torch.cuda.max_memory_allocated()} if on_gpu else resident()

    model.train(not forward)
    return step, facts


def product(library: str) -> Work:
    """A product of two matrices: 2·2048³ FLOPs."""
    if library == "torch":
        import torch

        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        return lambda wait: (a @ b)[0, 0].item()
    import jax

    a, b = jax.random.normal(jax.random.key(0), (2, 2048, 2048))
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda wait: multiply(a, b).block_until_ready()


def serve(arguments: argparse.Namespace) -> None:
    """The process of one contestant: seconds of as many calls as each line asks for."""
    options = arguments.size, arguments.dropout, arguments.forward
    if arguments.contestant.startswith("product"):
        work, facts = product(arguments.contestant.removeprefix("product_")), resident
    elif arguments.contestant == "ours":
        work, facts = ours(*options)
    else:
        work, facts = peer(arguments.contestant, *options)
    calls = 2  # compiled, and at home in the caches
    while True:
        began = time.perf_counter()
        for i in range(calls):
            work(i == calls - 1)
        print(json.dumps({"seconds": time.perf_counter() - began} | facts()), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        calls = int(line)


class Contestant:
    """A contestant's process. `facts` are the memory that it took so far and what else is known of it."""

    def __init__(self, name: str, *flags: str):
        self.name, self.facts = name, {}
        command = [sys.executable, __file__, f"--contestant={name}", *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> "Contestant":
        """Waits until everything is compiled and has run."""
        self._read()
        return self

    def seconds(self, calls: int) -> float:
        """Of one call, in the mean over some."""
        print(calls, file=self._process.stdin, flush=True)
        return self._read() / calls

    def _read(self) -> float:
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):
            line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        answer = json.loads(line)
        seconds = answer.pop("seconds")
        self.facts = answer
        return seconds

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def alternate(contestants: Sequence[Contestant], turns: int, seconds: float) -> Iterator[dict[str, float]]:
    """Yields the seconds of a step of each contestant, by name, turn by turn.

    Args:
      seconds: time that a turn of one contestant takes.
    """
    calls = {c.name: max(1, round(seconds / c.seconds(1))) for c in contestants}
    for _ in range(turns):
        yield {c.name: c.seconds(calls[c.name]) for c in contestants}


def ratios_to_ours(turns: Sequence[dict[str, float]], name: str) -> tuple[float, float, float]:
    """Returns the median, least and greatest ratio of a contestant's seconds to ours in the same turn."""
    ratios = sorted(turn[name] / turn["ours"] for turn in turns)
    return statistics.median(ratios), ratios[0], ratios[-1]


def flops(name: str, forward: bool = False) -> float:
    layers, _, width, vocab, length, rows = size_of(name)[:6]
    weights = 12 * layers * width**2 + vocab * width
    return rows * length * (6 * weights + 12 * layers * width * length) / (3 if forward else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES | ACCELERATOR_SIZES)
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds that a turn of one contestant takes")
    parser.add_argument("--forward", action="store_true", help="the forward pass and the loss alone")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        serve(arguments)
        return
    import importlib.metadata as metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    what = "forward passes" if arguments.forward else "training steps"
    print(f"{what}, {versions}, {os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}")
    print("model    dropout  with          ms a step        ours is faster by   of peak   memory   load")
    products = [Contestant(f"product_{library}").wait_until_ready() for library in ("jax", "torch")]
    for size, dropout in itertools.product(arguments.sizes, arguments.dropouts):
        flags = [f"--size={size}", f"--dropout={dropout}", *(["--forward"] if arguments.forward else [])]
        contestants = [Contestant(name, *flags).wait_until_ready() for name in ("ours", *arguments.peers)]
        turns = []
        for turn in alternate(contestants, arguments.turns, arguments.turn):
            peak = 2 * 2048**3 / min(c.seconds(3) for c in products)
            turns.append(turn | {"peak": peak})
        for contestant in contestants:
            name = contestant.name
            seconds = statistics.median(turn[name] for turn in turns)
            ratio, least, greatest = ratios_to_ours(turns, name)
            share = statistics.median(flops(size, arguments.forward) / turn[name] / turn["peak"] for turn in turns)
            spread = f"{ratio:6.2f} × ({least:.2f} to {greatest:.2f})"
            print(
                f"{size:8} {dropout:7}  {name:12} {seconds * 1e3:9.1f}  {'' if name == 'ours' else spread:26} "
                f"{share:6.0%}  {contestant.facts['memory'] / 1e6:5.0f} MB  {os.getloadavg()[0]:5.1f}",
                flush=True,
            )
            contestant.close()
    for contestant in products:
        contestant.close()


if __name__ == "__main__":
    main()
