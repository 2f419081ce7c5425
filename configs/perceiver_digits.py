"""A Perceiver IO that tells the digits of scikit-learn apart, from single pixels, in a few minutes on two CPU cores.

16 learned latents read the 64 pixels, and a learned query reads the class from the latents. The data is that of
configs/vit_digits.py: `pip install -e ".[images]"`.
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
    config.model.positions = "sincos"  # learned ones begin too small to be seen beside single pixels
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.data.shift = 1  # by a pixel to each side: there are few images, and this makes nine of each
    config.train.batch_size = 64
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_tokens = 100 * 64 * 64  # 100 steps
    return config
