"""Speed of encoding a corpus with GPT-2's BPE, beside the batch call of Hugging Face's `tokenizers` that it rests on.

    python tests/benchmarks/tokenizing.py [MEGABYTES]

The text is passages of Shakespeare's plays in random order, as many as it takes. All encode each part of it in turn,
so that a machine that slows down does so for all. Ours ends in an array of tokens; the library in objects of its own,
which is in its favour.
"""

import os
import random
import sys
import time

from gpt.data import bpe, tokens
from gpt.runtime.cache import Cache

PART = 2_000_000  # characters


def corpus(megabytes: float) -> list[str]:
    """Parts of `PART` characters or somewhat more."""
    scenes = tokens.shakespeare(Cache()).read_text().split("\n\n")
    rng, parts, size = random.Random(0), [], 0
    while size < megabytes * 1e6:
        part, length = [], 0
        while length < PART:
            part.append(rng.choice(scenes))
            length += len(part[-1]) + 2
        parts.append("\n\n".join(part))
        size += len(parts[-1].encode())
    return parts


def main(megabytes: float) -> None:
    tokenizer, parts = bpe.gpt2(), corpus(megabytes)
    size = sum(len(part.encode()) for part in parts) / 1e6
    ways = {
        "gpt.tokenizers": lambda part: sum(map(len, tokenizer.encode_stream([part]))),
        "encode_batch": lambda part: sum(
            map(len, tokenizer._model.encode_batch(bpe._PARTS.findall(part), add_special_tokens=False))
        ),
        "encode_batch_fast": lambda part: sum(
            map(len, tokenizer._model.encode_batch_fast(bpe._PARTS.findall(part), add_special_tokens=False))
        ),
    }
    seconds, counts = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for i, part in enumerate(parts):
        for name in list(ways)[i % 3 :] + list(ways)[: i % 3]:
            began = time.perf_counter()
            counts[name] += ways[name](part)
            seconds[name] += time.perf_counter() - began
    assert len(set(counts.values())) == 1, counts
    print(f"{size:.1f} MB, {counts['gpt.tokenizers']:,} tokens, {os.cpu_count()} cores")
    for name, spent in seconds.items():
        print(f"{name:18} {size / spent:6.2f} MB/s   gpt.tokenizers / {name} = {spent / seconds['gpt.tokenizers']:.2f}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 50)
