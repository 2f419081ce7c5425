"""A Perceiver AR: characters predicted from a context four times as long as what the blocks work on.

Of 512 characters the last 128 are latents, which read the others once; the blocks work on them alone.
"""

from gpt.config import default_config
from gpt.models.perceiver import PerceiverARConfig


def get_config():
    config = default_config(PerceiverARConfig())
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.block_size = 512
    config.model.num_latents = 128
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 8
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_tokens = 100 * 8 * 512  # 100 steps
    return config
