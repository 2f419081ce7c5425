"""A vision transformer (arXiv 2010.11929) for a folder of images with a subfolder for each class, for an accelerator.

Takes a size as an argument: --config=configs/vit.py:S (the sizes are in gpt/models/sizes.toml); the default is Ti.
Needs `pip install -e ".[images]"` and --config.data.path=FOLDER. `gpt.plan` reads no data, so a plan needs
--config.model.vocab_size=NUMBER_OF_CLASSES.

The recipe follows the simple ViT (arXiv 2205.01580): mean pooling, sine and cosine positions, random crops and
horizontal flips, batches of 1,024, 90 epochs. It leaves out RandAugment and MixUp.
"""

from gpt.config import default_config
from gpt.data.images import ImagesConfig
from gpt.models.sizes import named_size
from gpt.models.vit import ViTConfig


def get_config(size: str = "Ti"):
    config = default_config(ViTConfig(), ImagesConfig())
    config.model.update(named_size(size, "vit"))
    config.model.pooling = "mean"
    config.model.positions = "sincos"
    config.model.embed_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.scan_layers = True
    config.model.remat = "dots"
    config.data.crop = 0.05
    config.data.flip = True
    config.data.threads = 16
    config.data.prefetch = 16
    config.train.batch_size = 1024
    config.train.steps = 0
    config.train.epochs = 90.0
    config.train.eval_every = 1000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_tokens = 10_000 * 1024 * 196  # 10,000 steps
    config.optimizer.b2 = 0.999
    return config
