"""An image GPT that draws scikit-learn's digits pixel by pixel, after a few minutes on two CPU cores.

Needs `pip install -e ".[images]"`. The 1,797 images have 8 × 8 pixels with 17 grey levels, which are the tokens; the
class is the first token. A folder of colour images, with a subfolder for each class, works in the same way:
`--config.data.path=FOLDER --config.data.channels=3 --config.data.image_size=32 --config.model.block_size=1024`.
"""

from gpt.config import default_config
from gpt.data.pixels import PixelsConfig


def get_config():
    config = default_config(data=PixelsConfig())
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.block_size = 64  # the number of pixels
    config.data.shift = 1  # by up to one pixel in each direction, which makes nine variants of each image
    config.train.batch_size = 32
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_tokens = 100 * 32 * 64  # 100 steps
    return config
