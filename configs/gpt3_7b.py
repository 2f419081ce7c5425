"""GPT-3's model of 6.7 billion parameters (arXiv 2005.14165, table 2.1): 32 layers, 32 heads, 4,096 wide, block 2,048.

Batches of 2 million tokens, 300 billion tokens in all, as published there.
"""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.embed_dim = 4096
    config.model.block_size = 2048
    config.tokenizer.name = "gpt2"
    config.model.vocab_size = 50_257  # the tokenizer's, written down for `gpt.plan`, which reads none
    config.model.vocab_multiple = 1024  # 51,200 rows: full tiles on any part of `model`
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.scan_layers = True
    config.model.remat = "full"
    config.mesh.rules = "fsdp"
    config.train.batch_size = 1024  # × 2,048 = 2,097,152 tokens
    config.train.steps = 0
    config.train.tokens = 300e9
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 1.2e-4
    config.optimizer.warmup_tokens = 375e6
    config.optimizer.decay_tokens = 260e9
    return config
