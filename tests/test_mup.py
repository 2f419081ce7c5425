"""µP: the best learning rate of a narrow model is that of a wide one (arXiv 2203.03466)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt import optimizer, step
from gpt.data import tokens
from gpt.models.gpt import GPT, GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.runtime.cache import Cache

BASE = 32
VOCABULARY, LENGTH, ROWS = 64, 32, 8


def batches(steps: int) -> jax.Array:
    """Returns tokens [steps, ROWS, LENGTH + 1] of Shakespeare's plays: his 63 most frequent characters, and others."""
    text = np.frombuffer(tokens.shakespeare(Cache()).read_bytes()[:500_000], np.uint8)
    order = np.argsort(-np.bincount(text, minlength=256))
    text = np.minimum(np.argsort(order)[text], VOCABULARY - 1)
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, (steps, ROWS))
    return jnp.asarray(text[starts[..., None] + np.arange(LENGTH + 1)], jnp.int32)


def losses(width: int, name: str, base_width: int, rates: np.ndarray, steps: int) -> np.ndarray:
    """Returns the mean training loss of the last steps for each learning rate."""
    config = GPTConfig(
        num_layers=2,
        num_heads=4,
        embed_dim=width,
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        base_width=base_width,
        scan_layers=True,
        dtype="float32",
        attention="dense",
        embed_dropout=0.0,
        residual_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPT(config)
    data = batches(steps)
    boxed = jax.eval_shape(model.init, jax.random.key(0), data[0, :, :-1])["params"]
    axes = nn.get_partition_spec(boxed)

    def train(rate):
        settings = OptimizerConfig(name=name, weight_decay=0.0)
        tx = optimizer.make_optimizer(settings, lambda count: rate * (1 - count / steps), axes, config.width_ratio)
        params = nn.unbox(model.init(jax.random.key(0), data[0, :, :-1])["params"])

        def update(carry, batch):
            params, state = carry

            def loss_of(params):
                return step.token_losses(model.apply({"params": params}, batch[:, :-1]), batch[:, 1:]).mean()

            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(update, (params, tx.init(params)), data)[1][-steps // 5 :].mean()

    return np.asarray([jax.jit(train)(rate) for rate in rates])


@pytest.mark.parametrize(
    ("name", "exponents"), [("adamw", (-9, -7, -5)), pytest.param("muon", (-9, -7, -5, -3), marks=pytest.mark.slow)]
)
def test_best_learning_rate_of_a_narrow_model_is_that_of_a_wide_one(name, exponents):
    """Learning rates differ by factors of four. Without µP, the best one for AdamW is lower for a wide model."""

    def best(width, base_width):
        return exponents[np.nanargmin(losses(width, name, base_width, 2.0 ** np.array(exponents), 80))]

    narrow = best(BASE, BASE)
    assert narrow == best(128, BASE)
    if name == "adamw":
        assert narrow > best(128, 0)


def test_base_width_changes_nothing_but_attention_at_that_width():
    """With heads of 64, a model of the base width is the usual one, and a wider one differs as the table says."""
    shape = {"num_layers": 2, "num_heads": 1, "embed_dim": 64, "block_size": 8, "vocab_size": VOCABULARY}
    plain = GPTConfig(dtype="float32", attention="dense", **shape)
    tokens_BxT = batches(1)[0, :2, :8]

    def logits(**options):
        model = GPT(dataclasses.replace(plain, **options))
        return model.apply(model.init(jax.random.key(0), tokens_BxT), tokens_BxT)

    np.testing.assert_allclose(logits(base_width=64), logits(), rtol=1e-6, atol=1e-6)
    model = GPT(dataclasses.replace(plain, base_width=16))
    usual, scaled = (GPT(c).init(jax.random.key(0), tokens_BxT)["params"] for c in (plain, model.config))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(usual))
    for (path, a), b in zip(leaves, jax.tree.leaves(nn.unbox(scaled)), strict=True):
        np.testing.assert_allclose(b, a / 2 if path[-1].key == "kernel" else a, rtol=1e-6)
    # Equal parameters give logits that are divided by the ratio of the widths.
    params = {"params": usual}
    np.testing.assert_allclose(4 * model.apply(params, tokens_BxT), GPT(plain).apply(params, tokens_BxT), atol=1e-5)


@pytest.mark.parametrize(("name", "factor"), [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_kernels_of_blocks_learn_more_slowly_in_a_wider_model(name, factor):
    config = OptimizerConfig(name=name, weight_decay=0.0)
    shape = {"num_layers": 1, "num_heads": 2, "embed_dim": 8, "block_size": 4, "vocab_size": 5}
    model = GPT(GPTConfig(tie_embeddings=False, dtype="float32", attention="dense", **shape))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    axes, shapes = nn.get_partition_spec(boxed), nn.unbox(boxed)
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), shapes)

    def update(ratio):
        tx = optimizer.make_optimizer(config, lambda count: 1.0, axes, ratio)
        return jax.jit(tx.update)(params, tx.init(params), params)[0]

    leaves = jax.tree_util.tree_leaves_with_path(update(1.0))
    for (path, usual), scaled in zip(leaves, jax.tree.leaves(update(4.0)), strict=True):
        inner = path[-1].key == "kernel" and path[0].key != "head"
        np.testing.assert_allclose(scaled, factor * usual if inner else usual, rtol=1e-6, err_msg=str(path))
