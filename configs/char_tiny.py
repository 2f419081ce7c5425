"""A character model that writes Shakespeare-like text after a few minutes of training on two CPU cores."""

from gpt.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.block_size = 64
    config.model.positions = "rotary"  # learned positions reach 1.69 nats instead of 1.64
    # The run is shorter than one epoch, so it cannot overfit.
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 16
    config.train.steps = 3000
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 4e-3  # small models tolerate a high learning rate
    config.optimizer.warmup_tokens = 1e5
    return config
