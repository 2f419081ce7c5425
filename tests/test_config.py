"""Configs: what is said of a change."""

import math

from gpt import config, train
from gpt.config import Config, OptimizerConfig, TrainConfig


def changed(old: Config, new: Config, step: int = 1000) -> list[str]:
    """What is said of a resume after some steps, with 640 rows in an epoch."""

    class Recorded:
        def __init__(self, config):
            self.config = config

    return list(train.describe_changes(config.differences(old, new), Recorded(old), Recorded(new), 640, step))


def with_train(old: Config, **changes) -> Config:
    train_config = TrainConfig(**{"steps": 0, "batch_size": 16, **changes})
    return Config(model=old.model, optimizer=old.optimizer, train=train_config)


COSINE = Config(optimizer=OptimizerConfig(learning_rate=4e-3), train=TrainConfig(steps=1000, batch_size=16))


def test_a_longer_run_says_what_becomes_of_the_learning_rate():
    """By steps, epochs or tokens; half of a cosine of 4e-3 to 4e-4 is 2.2e-3."""
    becomes = ": the learning rate at step 1,000 becomes 0.0022 instead of 0.0004"
    assert changed(COSINE, with_train(COSINE, steps=2000)) == ["changed: train.steps 1000 → 2000" + becomes]
    in_epochs = changed(COSINE, with_train(COSINE, epochs=50.0))
    assert in_epochs == ["changed: train.steps 1000 → 0", "changed: train.epochs 0.0 → 50.0" + becomes]
    tokens = 2000.0 * 16 * COSINE.model.length
    assert changed(COSINE, with_train(COSINE, tokens=tokens))[-1].endswith(becomes)
    optimizer = OptimizerConfig(learning_rate=4e-3, decay_tokens=tokens)
    assert changed(COSINE, Config(optimizer=optimizer, train=COSINE.train))[-1].endswith(becomes)
    optimizer = OptimizerConfig(learning_rate=4e-2)
    (line,) = changed(COSINE, Config(optimizer=optimizer, train=COSINE.train))
    assert line.endswith("becomes 0.004 instead of 0.0004")


def test_nothing_is_said_of_a_learning_rate_that_stays():
    until = OptimizerConfig(decay_tokens=500.0 * 16 * COSINE.model.length)
    fixed = Config(optimizer=until, train=COSINE.train)
    for old in (fixed, Config(optimizer=OptimizerConfig(final_fraction=1.0), train=COSINE.train)):
        assert changed(old, with_train(old, steps=2000)) == ["changed: train.steps 1000 → 2000"]
    assert changed(COSINE, with_train(COSINE, steps=1000, log_every=5)) == ["changed: train.log_every 10 → 5"]
    assert not math.isnan(train.learning_rate(COSINE, 640, 0))
