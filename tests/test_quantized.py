"""Products with factors of 8 bits, against the same arithmetic in NumPy, and training with them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt.models import mesh, quantized
from gpt.models.gpt import GPT, GPTConfig
from gpt.runtime.errors import UserError

RNG = np.random.default_rng(0)
TINY = GPTConfig(num_layers=2, num_heads=2, embed_dim=32, block_size=32)


def rounded(x: np.ndarray, axes: tuple[int, ...], dtype) -> np.ndarray:
    """Returns x as `quantized` stores it, without its functions: scale, round, and scale back, in float64."""
    limit = {jnp.int8: 127, jnp.float8_e4m3fn: 448, jnp.float8_e5m2: 57344}[dtype]
    scale = np.abs(x).max(axis=axes, keepdims=True) / limit
    factors = np.round(x / scale) if dtype is jnp.int8 else (x / scale).astype(np.float32).astype(dtype)
    return factors.astype(np.float64) * scale


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_numbers_of_8_bits_are_near_the_originals(dtype):
    x = np.concatenate([RNG.normal(0, 3, (4, 50)), np.zeros((1, 50)), [[1e-30] * 50]]).astype(np.float32)
    factors, scales = quantized.quantized(x, 1, dtype)
    assert factors.dtype == dtype
    assert scales.shape == (6,)
    error = np.abs(factors.astype(np.float32) * scales[:, None] - x)
    bound = {jnp.int8: 0.5 / 127, jnp.float8_e4m3fn: 2.0**-4, jnp.float8_e5m2: 2.0**-3}[dtype]
    assert np.all(error <= bound * np.abs(x).max(axis=1, keepdims=True) * 1.001)


@pytest.mark.parametrize("kind", quantized.FORMATS)
@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "contracted"),
    [((6, 8), (8, 5), 1), ((2, 3, 8), (8, 5), 1), ((2, 3, 4, 2), (4, 2, 5), 2)],
)
@pytest.mark.parametrize("outputs", [1, 2])
def test_product_and_gradients_are_those_of_rounded_factors(kind, x_shape, kernel_shape, contracted, outputs):
    kernel_shape = kernel_shape + (3,) * (outputs - 1)
    kept, gradients, _ = quantized.FORMATS[kind]
    x, kernel = (RNG.normal(size=shape).astype(np.float32) for shape in (x_shape, kernel_shape))
    rows = len(x_shape) - contracted
    y, backward = jax.vjp(lambda x, kernel: quantized.product(x, kernel, contracted, kind), x, kernel)
    dy = RNG.normal(size=y.shape).astype(np.float32)
    dx, dkernel = backward(dy)
    x_near, kernel_near = rounded(x, tuple(range(rows, x.ndim)), kept), rounded(kernel, None, kept)
    dy_near = rounded(dy, tuple(range(rows, dy.ndim)), gradients)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(y, np.tensordot(x_near, kernel_near, contracted))
    close(dx, np.tensordot(dy_near, kernel_near, (range(rows, dy.ndim), range(contracted, kernel.ndim))))
    close(dkernel, np.tensordot(x, dy, (range(rows), range(rows))))  # not rounded


def variables_of(config):
    model = GPT(config)
    return nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


@pytest.mark.parametrize("kind", quantized.FORMATS)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_logits_are_near_those_of_exact_products(kind, platform, monkeypatch):
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    config = dataclasses.replace(TINY, scan_layers=True).resolve(50, "cpu")
    variables, tokens = variables_of(config), RNG.integers(0, 50, (2, 32), np.int32)
    exact = GPT(config).apply(variables, tokens)
    changed = GPT(dataclasses.replace(config, products=kind)).apply(variables, tokens)
    error = np.linalg.norm(changed - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05  # it is rounded, and not by much


def test_training_reaches_the_loss_of_exact_products():
    """The data is a noisy cycle of 50 tokens: a step to the next one with probability 0.8, else to any."""
    steps = np.where(RNG.random((64, 33)) < 0.8, 1, RNG.integers(0, 50, (64, 33)))
    tokens, optimizer = np.cumsum(steps, axis=1).astype(np.int32) % 50, optax.adam(1e-2)

    def final_loss(kind):
        config = dataclasses.replace(
            TINY, embed_dropout=0, residual_dropout=0, attention_dropout=0, products=kind
        ).resolve(50, "cpu")

        def of_loss(variables):
            logits = GPT(config).apply(variables, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def step(variables, state):
            loss, gradients = jax.value_and_grad(of_loss)(variables)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(variables, updates), state, loss

        variables = variables_of(config)
        state, losses = optimizer.init(variables), []
        for _ in range(60):
            variables, state, loss = step(variables, state)
            losses.append(float(loss))
        return losses[0], losses[-1]

    first, exact = final_loss("dtype")
    assert exact < 0.6 * first
    for kind in quantized.FORMATS:
        assert final_loss(kind)[1] == pytest.approx(exact, abs=0.05), kind


def test_an_unknown_format_is_refused():
    with pytest.raises(
        UserError, match=r"model\.products='int4' is not known; choose one of dtype, int8, fp8; did you mean int8\?"
    ):
        GPTConfig(products="int4")
