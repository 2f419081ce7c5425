"""GPT-2's largest model (Radford et al. 2019): 48 layers, 25 heads, 1,600 wide, block 1,024, 50,257 tokens.

OpenAI did not publish its batches. These are GPT-3's for the model nearest in size, XL (arXiv 2005.14165, table 2.1).
25 heads are divided only by 5 and 25, so `mesh.model` can be no other.
"""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 48
    config.model.num_heads = 25
    config.model.embed_dim = 1600
    config.model.block_size = 1024
    config.tokenizer.name = "gpt2"
    config.model.vocab_size = 50_257  # the tokenizer's, written down for `gpt.plan`, which reads none
    config.model.vocab_multiple = 640  # 50,560 rows: full tiles, and a `model` of 5 divides them
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.scan_layers = True
    config.model.remat = "full"
    config.mesh.rules = "fsdp"
    config.train.batch_size = 1024  # × 1,024 = 1,048,576 tokens
    config.train.steps = 0
    config.train.tokens = 300e9
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_tokens = 375e6
    config.optimizer.decay_tokens = 260e9
    return config
