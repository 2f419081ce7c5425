"""A vision transformer that classifies scikit-learn's digits after a few minutes on two CPU cores.

Needs `pip install -e ".[images]"`. Of the 1,797 images of 8 × 8 pixels, a random fifth is held out for validation.
"""

from gpt.config import default_config
from gpt.data.images import ImagesConfig
from gpt.models.vit import ViTConfig


def get_config():
    config = default_config(ViTConfig(), ImagesConfig())
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.image_size = 8
    config.model.channels = 1
    config.model.patch_size = 2
    config.model.pooling = "mean"
    config.model.positions = "sincos"
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.data.shift = 1  # by up to one pixel in each direction, which makes nine variants of each image
    config.train.batch_size = 64
    config.train.steps = 2000  # 89 epochs
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_tokens = 100 * 64 * 16  # 100 steps
    return config
