"""A character model of any text, for an accelerator: 8 layers, 8 heads, 512 wide, context length 128.

Takes a model size as an argument: --config=configs/char.py:gpt-mini (the sizes are in gpt/models/sizes.toml).
"""

from gpt.config import default_config
from gpt.models.sizes import named_size


def get_config(size: str = ""):
    config = default_config()
    config.model.num_layers = 8
    config.model.num_heads = 8
    config.model.embed_dim = 512
    config.model.block_size = 128
    if size:
        config.model.update(named_size(size))
    config.train.batch_size = 128
    config.train.steps = 5000  # about 18 epochs of the plays
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_tokens = 100 * 128 * 128  # 100 steps
    return config
