"""Learns to sort ten digits from examples, like minGPT's sorting demo.

Other lengths: --config.data.size=6 --config.data.digits=3 are minGPT's.
"""

from gpt.config import default_config
from gpt.data.arithmetic import SortConfig


def get_config():
    config = default_config(data=SortConfig())
    config.model.block_size = 21  # 5291734680=0123456789
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.embed_dropout = 0.0  # there are more examples than the run sees
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 256
    config.train.steps = 1200
    config.train.log_every = 50
    config.train.eval_every = 300
    config.optimizer.learning_rate = 4e-3
    config.optimizer.decay = "linear"  # to zero: the last errors disappear when updates are small
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_tokens = 100 * 256 * 21  # 100 steps
    return config
