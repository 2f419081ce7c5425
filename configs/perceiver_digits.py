"""A Perceiver IO (arXiv 2107.14795) that classifies scikit-learn's digits from single pixels, on two CPU cores.

16 learned latents read the 64 pixels, and a learned query reads the class from the latents. The data is the same as in
configs/vit_digits.py and needs `pip install -e ".[images]"`.
"""

from gpt.config import default_config
from gpt.data.images import ImagesConfig
from gpt.models.perceiver import PerceiverIOConfig


def get_config():
    config = default_config(PerceiverIOConfig(), ImagesConfig())
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.model.image_size = 8
    config.model.channels = 1
    config.model.num_latents = 16
    config.model.positions = "sincos"  # learned embeddings start too small relative to single pixels
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.data.shift = 1  # by up to one pixel in each direction, which makes nine variants of each image
    config.train.batch_size = 64
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_tokens = 100 * 64 * 64  # 100 steps
    return config
