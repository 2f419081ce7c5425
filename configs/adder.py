"""Addition of numbers of three digits, learnt from examples: minGPT's demo, to 99 % of the sums that it never saw.

Other sums: --config.data.operators=+- (or *), --config.data.digits=2, --config.data.modulus=97. One that is longer
says which model.block_size it needs.
"""

from gpt.config import default_config
from gpt.data.arithmetic import ArithmeticConfig


def get_config():
    config = default_config(data=ArithmeticConfig())
    config.model.block_size = 12  # 123+456=9750
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.embed_dropout = 0.0  # half a million sums, each seen once or so
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 256
    config.train.steps = 1000
    config.train.log_every = 50
    config.train.eval_every = 250
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_tokens = 100 * 256 * 12  # 100 steps
    return config
