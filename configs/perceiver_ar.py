"""A Perceiver AR (arXiv 2202.07765) that predicts characters from a context of 512 with 128 latents.

The last 128 characters of the context are latents. They read the other characters once, by cross-attention, and the
blocks work on the latents alone.
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
