"""A character model that learns to write something like Shakespeare in about three minutes on two CPU cores."""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.block_size = 64
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 16
    config.train.steps = 2500
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_tokens = 1e5
    return config
