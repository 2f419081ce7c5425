"""Pretraining of GPT-2 (Radford et al. 2019) and GPT-3 (arXiv 2005.14165, table 2.1) in their published sizes.

Takes the size as an argument: --config=configs/pretrain.py:gpt3-7b. Every size trains on 300 billion tokens without
dropout. gpt2-124m fits on eight chips of 16 GB with --config.train.micro_batches=4.

- gpt2-124m follows nanoGPT's reproduction of the smallest GPT-2: batches of 524,288 tokens.
- gpt2-1558m is the largest GPT-2. OpenAI did not publish its batch size and learning rate; this config takes those of
  the GPT-3 model nearest in size (XL). Its 25 heads are divisible by 5 and 25 only, so `mesh.model` must be 1, 5 or 25.
  If `mesh.fsdp` does not divide 1,600, the kernels of attention are whole on each device (the first table says so).
- gpt3-7b and gpt3-175b use batches of 2,097,152 tokens. The batch of the published 175B run grew to 3.2 million tokens;
  the smaller one is divisible by 1,024 devices. gpt3-175b needs a multiple of 256 devices, or another mesh.

The tokenizer is GPT-2's (`pip install -e ".[bpe]"`, or --config.tokenizer.path=FOLDER). To train the same shape on
bytes, add --config.tokenizer.name=byte --config.model.vocab_size=0.
"""

from typing import NamedTuple

from gpt.config import default_config
from gpt.runtime.fields import check_choice


class Size(NamedTuple):
    num_layers: int
    num_heads: int
    embed_dim: int
    block_size: int  # context length in tokens
    batch_size: int  # in sequences
    learning_rate: float
    warmup_tokens: float
    decay_tokens: float  # 0: the whole run
    vocab_multiple: int  # the padded vocabulary fills the tiles of a TPU, and `mesh.model` divides it
    rules: str
    fsdp: int  # devices that shard the parameters; 0: at most 64
    model: int  # devices that share an example; 0: 1
    scan_layers: bool  # a scan compiles faster, but copies what a layer keeps for the backward pass


SIZES = {
    "gpt2-124m": Size(12, 12, 768, 1024, 512, 6e-4, 2000 * 512 * 1024, 0.0, 128, "dp", 0, 0, False),
    "gpt2-1558m": Size(48, 25, 1600, 1024, 1024, 2e-4, 375e6, 260e9, 640, "fsdp", 0, 0, False),
    "gpt3-7b": Size(32, 32, 4096, 2048, 1024, 1.2e-4, 375e6, 260e9, 1024, "fsdp", 0, 0, False),
    "gpt3-175b": Size(96, 96, 12_288, 2048, 1024, 6e-5, 375e6, 260e9, 1024, "fsdp_tp", 64, 4, True),
}


def get_config(size: str = "gpt2-124m"):
    check_choice("size", size, SIZES)
    shape = SIZES[size]
    config = default_config()
    for key in ("num_layers", "num_heads", "embed_dim", "block_size", "vocab_multiple", "scan_layers"):
        config.model[key] = getattr(shape, key)
    config.model.vocab_size = 50_257  # the tokenizer's; stated here because `gpt.plan` reads no tokenizer
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.remat = "dots"
    config.tokenizer.name = "gpt2"
    config.mesh.rules = shape.rules
    config.mesh.fsdp = shape.fsdp
    config.mesh.model = shape.model
    config.train.batch_size = shape.batch_size
    config.train.steps = 0
    config.train.tokens = 300e9
    config.train.eval_every = 1000
    config.optimizer.learning_rate = shape.learning_rate
    config.optimizer.warmup_tokens = shape.warmup_tokens
    config.optimizer.decay_tokens = shape.decay_tokens
    return config
