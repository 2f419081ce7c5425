"""Speed of decoding, side by side with Hugging Face transformers and with no cache.

python tests/benchmarks/decoding.py   (needs torch and transformers, beside what the project needs)

Random weights, greedy, the same prompts and numbers of new tokens for all; float32 on a CPU, bfloat16 on a GPU. The
contestants take turns, and the best run of each counts, after one to warm up (compile). `uncached` runs the model on
all tokens for each new one, as text was made before there was a cache.
"""

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import gpt
from gpt import sharding
from gpt.inference.generation import Generator, Sampling
from gpt.interop import huggingface
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime import backend

MODELS = {
    # 10.8 million parameters, nanoGPT's for characters.
    "small": GPTConfig(vocab_size=65, block_size=1024, num_layers=6, num_heads=6, embed_dim=384),
    "124M": GPTConfig(vocab_size=50257, block_size=1024, num_layers=12, num_heads=12, embed_dim=768),
    # 9 heads of queries, 3 of keys and values.
    "smollm2": gpt.read_config("configs/llama.py:smollm2-135m", {"model.block_size": 1024}).model,
}
Run = Callable[[np.ndarray, int], Iterator[int]]


def module(config: GPTConfig) -> GPT:
    return GPT(dataclasses.replace(config, scan_layers=False).resolve(config.vocab_size, jax.default_backend()))


def ours(config: GPTConfig) -> Run:
    layout = sharding.make_layout(sharding.MeshConfig(), jax.devices()[:1])
    model = module(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
    generator = Generator(model, layout, Sampling(temperature=0))

    def run(prompts: np.ndarray, num_tokens: int) -> Iterator[int]:
        decoding, made = generator.start(params, list(prompts)), 0
        while made < num_tokens:
            made += decoding.advance(num_tokens - made).tokens_BxN.shape[1]
            yield made

    return run


def uncached(config: GPTConfig) -> Run:
    model = module(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])

    @jax.jit
    def step(window_BxT, length):
        logits_BxTxV = model.apply({"params": params}, window_BxT)
        token_B = jax.lax.dynamic_index_in_dim(logits_BxTxV, length - 1, 1, keepdims=False).argmax(-1)
        return jax.lax.dynamic_update_slice(window_BxT, token_B[:, None].astype(jnp.int32), (0, length)), length + 1

    def run(prompts: np.ndarray, num_tokens: int) -> Iterator[int]:
        total = prompts.shape[1] + num_tokens
        window = jnp.zeros((len(prompts), total), jnp.int32).at[:, : prompts.shape[1]].set(prompts)
        length = jnp.int32(prompts.shape[1])
        for made in range(1, num_tokens + 1):
            window, length = step(window, length)
            length.block_until_ready()
            yield made

    return run


def hugging_face(config: GPTConfig) -> Callable[[np.ndarray, int], tuple[float, float]]:
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    known = [kind for kind in huggingface.ARCHITECTURES.values() if kind.config_class is GPTConfig]
    architecture = min(known, key=lambda kind: len(kind.differences(config)))
    keys = architecture.write_config(config) | {"bos_token_id": 0, "eos_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys)).eval()
    model = model.to("cuda", torch.bfloat16) if on_gpu else model

    def seconds(prompts: np.ndarray, num_tokens: int) -> tuple[float, float]:
        inputs = torch.from_numpy(prompts.astype(np.int64)).to(model.device)
        how = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "attention_mask": torch.ones_like(inputs)}

        def generate(count: int) -> float:
            began = time.perf_counter()
            with torch.inference_mode():
                made = model.generate(inputs, max_new_tokens=count, min_new_tokens=count, **how).cpu()
            assert made.shape[1] == prompts.shape[1] + count
            return time.perf_counter() - began

        # The time of a single token: a streamer, which would tell it on the way, is for one row only.
        return generate(1), generate(num_tokens)

    return seconds


def timed(run: Run) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """Seconds to the first token, and to the last."""

    def seconds(prompts: np.ndarray, num_tokens: int) -> tuple[float, float]:
        began, first = time.perf_counter(), None
        for _ in run(prompts, num_tokens):
            first = first or time.perf_counter() - began
        return first, time.perf_counter() - began

    return seconds


def compare(
    config: GPTConfig, prompts: np.ndarray, num_tokens: int, repeats: int, peers: dict[str, Callable]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the seconds to the first token, and the tokens per second, of ours and of the peers, by name."""
    contestants = {"ours": timed(ours(config))} | {name: make(config) for name, make in peers.items()}
    measured = {who: [] for who in contestants}
    for repeat in range(repeats + 1):
        for who, seconds in contestants.items():
            taken = seconds(prompts, num_tokens)
            if repeat:
                measured[who].append(taken)
    firsts = {who: min(first for first, _ in runs) for who, runs in measured.items()}
    return firsts, {who: num_tokens * len(prompts) / min(total for _, total in runs) for who, runs in measured.items()}


def main() -> None:
    backend.set_xla_options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=512, help="new tokens in each row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--uncached_tokens", type=int, help="new tokens without a cache, where 512 take too long")
    parser.add_argument("--without", nargs="*", default=[], choices=["transformers", "uncached"])
    parser.add_argument("--torch_threads", type=int, help="default: torch's own choice, the cores")
    args = parser.parse_args()
    import torch
    import transformers

    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}; {os.cpu_count()} CPU cores, torch threads {torch.get_num_threads()}")
    print(f"prompts of {args.prompt} tokens, {args.tokens} new ones in each row, best of {args.repeats}")
    print("model    rows  with          first token    tokens/s   ours is   load")
    for name, rows in itertools.product(args.models, args.rows):
        config = MODELS[name]
        cache = module(config).config.init_cache(jnp.zeros(rows, jnp.int32), args.prompt + args.tokens)
        print(f"{name:8} {rows:4}  cache {sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / 1e6:,.1f} MB")
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, args.prompt), np.int32)
        peers = {"transformers": hugging_face} if "transformers" not in args.without else {}
        firsts, speeds = compare(config, prompts, args.tokens, args.repeats, peers)
        if "uncached" not in args.without:
            count = args.uncached_tokens or args.tokens
            seconds = timed(uncached(config))
            # All steps cost the same, so that a part of them tells the speed; the window is that of all.
            run = np.zeros((rows, args.prompt + args.tokens - count), np.int32)
            seconds(run, 1 if count == args.tokens else count)
            firsts["uncached"], total = seconds(run, count)
            speeds["uncached"] = count * rows / total
        for who, speed in speeds.items():
            ratio = "" if who == "ours" else f"{speeds['ours'] / speed:7.2f} ×"
            load = os.getloadavg()[0]
            print(
                f"{name:8} {rows:4}  {who:12} {firsts[who] * 1e3:9.1f} ms  {speed:10.1f}  {ratio:9}  {load:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
