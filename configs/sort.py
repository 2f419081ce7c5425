"""Ten digits put in order, learnt from examples: minGPT's demo, at greater length.

Other lengths: --config.data.size=6 --config.data.digits=3, which are minGPT's.
"""

from gpt.config import default_config
from gpt.data.arithmetic import SortConfig


def get_config():
    config = default_config(data=SortConfig())
    config.model.block_size = 21  # 5291734680=0123456789
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.embed_dropout = 0.0  # there are more rows than it will see
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 256
    config.train.steps = 1200
    config.train.log_every = 50
    config.train.eval_every = 300
    config.optimizer.learning_rate = 4e-3
    config.optimizer.decay = "linear"  # to nothing: the last mistakes go when steps are small
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_tokens = 100 * 256 * 21  # 100 steps
    return config
