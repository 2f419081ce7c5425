"""Learns the addition of three-digit numbers from examples, like minGPT's adder demo.

Other arithmetic: --config.data.operators=+- (or *), --config.data.digits=2, --config.data.modulus=97. If the examples
become longer than model.block_size, the error message gives the size that they need.
"""

from gpt.config import default_config
from gpt.data.arithmetic import ArithmeticConfig


def get_config():
    config = default_config(data=ArithmeticConfig())
    config.model.block_size = 12  # 123+456=9750: the answer is padded and its digits are reversed
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.embed_dropout = 0.0  # most of the half million training sums are seen at most once
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 256
    config.train.steps = 1000
    config.train.log_every = 50
    config.train.eval_every = 250
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_tokens = 100 * 256 * 12  # 100 steps
    return config
