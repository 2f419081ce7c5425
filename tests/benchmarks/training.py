"""Speed of a training step and of a forward pass, side by side with PyTorch.

python tests/benchmarks/training.py   (needs torch and transformers, beside what the project needs)

The contestants are this project, as `gpt.main` runs it on a CPU; a GPT in plain PyTorch, as its best-known teaching
code writes it (one packed projection, scaled_dot_product_attention, fused AdamW), eager and compiled; and
transformers' GPT-2. All train the same model on the same shapes in float32: forward and backward pass, clipping,
AdamW. Each is a process of its own with all cores. They take turns, some steps each, so that a machine whose speed
drifts is the same to all; ratios are taken turn by turn, and their median, least and greatest are printed. `of peak`
is the model's arithmetic (6 FLOPs for each weight and token, and the attention's) over the time, as a share of the
fastest product of two 2,048-square matrices, measured in the same turns. `memory` is the peak resident size.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# Layers, heads, width, vocabulary, tokens in a row, rows.
SIZES = {
    "4/4/128": (4, 4, 128, 65, 64, 12),
    "6/6/384": (6, 6, 384, 65, 256, 16),
    "8/8/512": (8, 8, 512, 65, 128, 16),
    "124M": (12, 12, 768, 50257, 256, 2),
}
PEERS = ("eager", "compiled", "transformers")
Work = Callable[[], None]


def ours(size: str, dropout: float, forward: bool) -> Work:
    import jax
    import numpy as np

    from gpt import config, sharding, step
    from gpt.models.gpt import GPTConfig
    from gpt.runtime import backend

    layers, heads, width, vocab, length, rows = SIZES[size]
    rates = dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), dropout)
    shape = {"num_layers": layers, "num_heads": heads, "embed_dim": width}
    model = GPTConfig(vocab_size=vocab, block_size=length, **shape, **rates)
    settings = config.Config(model=model, train=config.TrainConfig(batch_size=rows))
    backend.set_xla_options()
    backend.divide_cpu(settings.work(rows))
    built = step.build(settings, vocab, sharding.make_layout(settings.mesh), 1000)
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length + 1), np.int32)
    with built.layout.use():
        state = built.init()
        batch = jax.device_put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, built.layout.batch)

    def step() -> None:
        nonlocal state
        with built.layout.use():
            if forward:
                float(built.eval_step(state.params, batch)["loss"])
            else:
                state, measured = built.train_step(state, batch)
                float(measured["loss"])

    return step


def peer(name: str, size: str, dropout: float, forward: bool) -> Work:
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, heads, width, vocab, length, rows = SIZES[size]
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
            x = self.dropout(self.tokens(indices) + self.positions(torch.arange(indices.shape[1])))
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    if name == "transformers":
        import transformers

        rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
        shape = {"vocab_size": vocab, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **rates, attn_implementation="sdpa"))
    else:
        model = Model()
    run = torch.compile(model) if name == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, vocab, (rows, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of() -> torch.Tensor:
        logits = run(inputs)
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step() -> None:
        if forward:
            with torch.no_grad():
                loss_of().item()
            return
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    model.train(not forward)
    return step


def product(library: str) -> Work:
    """A product of two matrices: 2·2048³ FLOPs."""
    if library == "torch":
        import torch

        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        return lambda: (a @ b)[0, 0].item()
    import jax

    a, b = jax.random.normal(jax.random.key(0), (2, 2048, 2048))
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: multiply(a, b).block_until_ready()


def serve(arguments: argparse.Namespace) -> None:
    """The process of one contestant: seconds of as many calls as each line asks for."""
    if arguments.contestant.startswith("product"):
        work = product(arguments.contestant.removeprefix("product_"))
    elif arguments.contestant == "ours":
        work = ours(arguments.size, arguments.dropout, arguments.forward)
    else:
        work = peer(arguments.contestant, arguments.size, arguments.dropout, arguments.forward)
    began = time.perf_counter()
    for _ in range(2):  # compiled, and at home in the caches
        work()
    answer = {"seconds": time.perf_counter() - began}
    while True:
        print(json.dumps(answer | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        began = time.perf_counter()
        for _ in range(int(line)):
            work()
        answer = {"seconds": time.perf_counter() - began}


class Contestant:
    def __init__(self, name: str, *flags: str):
        self.name, self.memory = name, 0.0
        command = [sys.executable, __file__, f"--contestant={name}", *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

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
        self.memory = answer["memory"]
        return answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def flops(size: str, forward: bool) -> float:
    layers, _, width, vocab, length, rows = SIZES[size]
    weights = 12 * layers * width**2 + vocab * width
    return rows * length * (6 * weights + 12 * layers * width * length) / (3 if forward else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
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
    products = [Contestant(f"product_{library}") for library in ("jax", "torch")]
    for size, dropout in itertools.product(arguments.sizes, arguments.dropouts):
        flags = [f"--size={size}", f"--dropout={dropout}", *(["--forward"] if arguments.forward else [])]
        contestants = [Contestant(name, *flags) for name in ("ours", *arguments.peers)]
        calls = {c.name: max(1, round(arguments.turn / c.seconds(1))) for c in contestants}
        turns = []
        for _ in range(arguments.turns):
            peak = 2 * 2048**3 / min(c.seconds(3) for c in products)
            turns.append({c.name: c.seconds(calls[c.name]) for c in contestants} | {"peak": peak})
        for contestant in contestants:
            name = contestant.name
            seconds = statistics.median(turn[name] for turn in turns)
            ratios = sorted(turn[name] / turn["ours"] for turn in turns)
            share = statistics.median(flops(size, arguments.forward) / turn[name] / turn["peak"] for turn in turns)
            spread = f"{statistics.median(ratios):6.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(
                f"{size:8} {dropout:7}  {name:12} {seconds * 1e3:9.1f}  {'' if name == 'ours' else spread:26} "
                f"{share:6.0%}  {contestant.memory / 1e6:5.0f} MB  {os.getloadavg()[0]:5.1f}",
                flush=True,
            )
            contestant.close()
    for contestant in products:
        contestant.close()


if __name__ == "__main__":
    main()
