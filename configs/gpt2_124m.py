"""GPT-2's smallest model (Radford et al. 2019): 12 layers, 12 heads, 768 wide, block 1,024, 50,257 tokens.

The recipe is that with which nanoGPT reproduces it: no dropout, batches of half a million tokens, 300 billion
tokens in all. Eight chips of 16 GB take a batch in parts: --config.train.micro_batches=4.

The vocabulary is GPT-2's (`pip install -e ".[bpe]"`, or a folder: --config.tokenizer.path). To train the same shape on
bytes: --config.tokenizer.name=byte --config.model.vocab_size=0.
"""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.block_size = 1024
    config.tokenizer.name = "gpt2"
    config.model.vocab_size = 50_257  # the tokenizer's, written down for `gpt.plan`, which reads none
    config.model.vocab_multiple = 128  # 50,304 rows: the tiles of a TPU are full, and `model` divides them
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.scan_layers = True  # compiles in two thirds of the time, for 0.6 GB more on a TPU
    config.model.remat = "dots"  # with 8 rows a chip 4.4 GB in place of 15.6, for 4 % more FLOPs
    config.train.batch_size = 512  # × 1,024 = 524,288 tokens
    config.train.steps = 0
    config.train.tokens = 300e9
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_tokens = 2000 * 512 * 1024  # 2,000 steps
    return config
