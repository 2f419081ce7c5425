"""GPT-3 (arXiv 2005.14165, table 2.1): 96 layers, 96 heads, 12,288 wide, block 2,048, 175 billion parameters.

300 billion tokens in all, as published. Batches there grow to 3.2 million tokens; here they are 2 million, which
1,024 devices divide.
"""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 96
    config.model.num_heads = 96
    config.model.embed_dim = 12_288
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
    config.optimizer.learning_rate = 6e-5
    config.optimizer.warmup_tokens = 375e6
    config.optimizer.decay_tokens = 260e9
    return config
