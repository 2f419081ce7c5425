"""Reaches a validation loss of 1.88 on tinyshakespeare in the shortest known time on two CPU cores.

    python -m gpt.main --config=configs/char_speedrun.py --config.data.path=tinyshakespeare.txt --workdir=runs/speedrun

Takes a time budget as an argument, for a larger model and more tokens: --config=configs/char_speedrun.py:15min. Muon
learns the most per token, which is worth its slower steps. configs/README.md lists the effect of each option.
"""

from gpt.config import default_config
from gpt.runtime.fields import check_choice

# Layers, heads, width, context length, batch size, steps, dropout.
TIMES = {
    "30s": (2, 2, 80, 64, 32, 240, 0.0),
    "3min": (3, 3, 96, 128, 16, 2400, 0.0),
    "15min": (4, 4, 160, 256, 12, 2400, 0.05),
}


def get_config(time: str = "30s"):
    check_choice("time", time, TIMES)
    layers, heads, width, length, rows, steps, dropout = TIMES[time]
    config = default_config()
    config.model.num_layers = layers
    config.model.num_heads = heads  # six heads of 16 dimensions reach a loss 0.05 nats higher than three of 32
    config.model.embed_dim = width
    config.model.block_size = length
    config.model.positions = "rotary"
    config.model.norm = "rmsnorm"
    config.model.qk_norm = "unit"
    config.model.bias = "none"
    config.model.embed_dropout = dropout
    config.model.residual_dropout = dropout
    config.model.attention_dropout = 0.0
    config.train.batch_size = rows
    config.train.steps = steps
    config.train.eval_every = 0
    config.train.sample_tokens = 0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.015
    config.optimizer.warmup_tokens = 5e3
    config.optimizer.decay = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    return config
