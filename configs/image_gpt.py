"""An image GPT that draws the digits of scikit-learn pixel by pixel, after a few minutes on two CPU cores.

The 1,797 images of 8 × 8 pixels have 17 levels of grey, which are the tokens, and a token for the class comes first:
`pip install -e ".[images]"`. A folder of images in colour, with a subfolder for each class, is drawn in the same way:
`--config.data.path=FOLDER --config.data.channels=3 --config.data.image_size=32 --config.model.block_size=1024`.
"""

from gpt.config import default_config
from gpt.data.pixels import PixelsConfig


def get_config():
    config = default_config(data=PixelsConfig())
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.block_size = 64  # the pixels
    config.data.shift = 1  # by a pixel to each side: there are few images, and this makes nine of each
    config.train.batch_size = 32
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_tokens = 100 * 32 * 64  # 100 steps
    return config
