"""Tests the vision transformer against published sizes, and tests what it attends to and the effect of each option."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt import sharding
from gpt.checkpointing.stacking import stack_layers
from gpt.models import vit
from gpt.models.sizes import named_size
from gpt.models.vit import ViT, ViTConfig
from gpt.runtime.errors import UserError

# Skipping LLVM's optimizations takes a third of the compilation time and changes results by rounding only.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
TINY = ViTConfig(num_layers=2, num_heads=2, embed_dim=16, image_size=6, patch_size=2, channels=3)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)


def make(**options) -> ViTConfig:
    return dataclasses.replace(TINY, **options).resolve(5, "cpu")


def random_params(config):
    """Returns parameters far from their initial values, so that each of them has an effect."""
    abstract = jax.eval_shape(lambda: ViT(config).init(jax.random.key(0), config.blank(1)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), nn.unbox(abstract)["params"])


def logits(config, params, images=IMAGES, **options):
    return np.asarray(quick_jit(functools.partial(ViT(config).apply, **options))({"params": params}, images))


@pytest.mark.parametrize(
    ("size", "patch_size", "expected"),
    # The numbers are those of timm's vit_*_patch*_224 with 1,000 classes.
    [
        ("Ti", 16, 5_717_416),
        ("S", 16, 22_050_664),
        ("B", 16, 86_567_656),
        ("B", 32, 88_224_232),
        ("L", 16, 304_326_632),
        ("H", 14, 632_045_800),
    ],
)
def test_published_sizes(size, patch_size, expected):
    config = ViTConfig(patch_size=patch_size, **named_size(size, "vit")).resolve(1000, "cpu")
    abstract = jax.eval_shape(lambda: ViT(config).init(jax.random.key(0), config.blank(1)))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == config.num_parameters() == expected


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_number_of_parameters_from_the_config(pooling, positions):
    for bias in ("all", "none", "qkv,norm"):
        config = make(pooling=pooling, positions=positions, bias=bias)
        assert sum(x.size for x in jax.tree.leaves(random_params(config))) == config.num_parameters()


def test_flops_of_the_base_model():
    config = ViTConfig(**named_size("B", "vit")).resolve(1000, "cpu")
    # A forward pass has 17.6 billion multiply-adds per image (arXiv 2012.12877, table 5); training has 3 × that.
    assert config.length * config.flops_per_token() / 6 == pytest.approx(17.6e9, rel=0.02)


def test_patches_are_squares_row_by_row():
    numbered = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(vit.patches(numbered, 2))
    assert patches.shape == (2, 6, 12)
    for number, (row, column) in enumerate((r, c) for r in (0, 2) for c in (0, 2, 4)):
        square = np.asarray(numbered)[:, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(patches[:, number], square.reshape(2, 12))


def test_positions_of_sines_tell_every_place_apart():
    table = vit.sincos_positions(3, 16)
    assert table.shape == (9, 16)
    frequencies = 10_000.0 ** -(np.arange(4) / 3)
    np.testing.assert_allclose(table[5, :4], np.sin(2 * frequencies), atol=1e-6)  # row 1, column 2
    np.testing.assert_allclose(table[5, 12:], np.cos(1 * frequencies), atol=1e-6)
    apart = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (apart[~np.eye(9, dtype=bool)] > 0.1).all()


@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "positions": "sincos"}], ids=str)
def test_every_patch_counts_and_its_place_too(options):
    config = make(**options)
    params = random_params(config)
    before = logits(config, params)
    for row in (0, 2, 4):
        for column in (0, 2, 4):
            changed = IMAGES.copy()
            changed[:, row : row + 2, column : column + 2] ^= 128
            assert (np.abs(logits(config, params, changed) - before) > 1e-5).all(), (row, column)
    swapped = IMAGES.copy()
    swapped[:, :2, :2], swapped[:, 4:, 4:] = IMAGES[:, 4:, 4:], IMAGES[:, :2, :2]
    assert (np.abs(logits(config, params, swapped) - before) > 1e-5).all()


def test_tokens_see_those_after_them():
    # The class token is first: with causal attention it would not depend on the image.
    config = make(positions="sincos", num_layers=1)
    first, second = logits(config, random_params(config))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"remat": "full"}], ids=str)
def test_the_same_function(options):
    config, other = make(**NO_DROPOUT), make(**NO_DROPOUT, **options)
    params = random_params(config)
    theirs = stack_layers(params) if other.scan_layers else params

    def loss(config, params):
        return jnp.square(ViT(config).apply({"params": params}, IMAGES, deterministic=False)).mean()

    value, grads = quick_jit(jax.value_and_grad(functools.partial(loss, config)))(params)
    their_value, their_grads = quick_jit(jax.value_and_grad(functools.partial(loss, other)))(theirs)
    assert their_value == pytest.approx(float(value), rel=1e-5)
    grads = stack_layers(grads) if other.scan_layers else grads
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grads, their_grads)


@pytest.mark.parametrize("rate", ["embed_dropout", "residual_dropout", "attention_dropout"])
def test_each_dropout_drops_in_training_only(rate):
    config = make(**NO_DROPOUT | {rate: 0.5})
    params = random_params(config)

    def trained(seed):
        return logits(config, params, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(trained(0), trained(0))
    assert np.abs(trained(0) - trained(1)).max() > 1e-3
    np.testing.assert_array_equal(logits(config, params), logits(make(**NO_DROPOUT), params))


def test_pixels_are_scaled_channel_by_channel():
    config = make(pixel_mean="0.1,0.2,0.3", pixel_std="0.5,0.25,1")
    params = random_params(config)
    plain = make(pixel_mean="0", pixel_std="1")
    scaled = logits(plain, params, np.round(IMAGES * 1.0).astype(np.uint8))
    assert np.abs(logits(config, params) - scaled).max() > 1e-3
    mean, std = config.pixel_scale()
    np.testing.assert_allclose([mean, std], [[0.1, 0.2, 0.3], [0.5, 0.25, 1]], rtol=1e-6)


def test_computes_in_bfloat16_and_gives_float32():
    config = dataclasses.replace(make(), dtype="bfloat16")
    result = jax.eval_shape(ViT(config).apply, {"params": random_params(config)}, IMAGES)
    assert (result.shape, result.dtype) == ((2, 5), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True}], ids=str)
def test_every_parameter_names_its_axes_and_is_sharded(options):
    config = make(**options)
    abstract = jax.eval_shape(lambda: ViT(config).init(jax.random.key(0), config.blank(1)))["params"]
    for path, axes in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(abstract), is_leaf=lambda x: isinstance(x, P)
    ):
        name = sharding.path_name(path)
        assert len(axes) == len(_at(nn.unbox(abstract), path).shape), name
        assert set(axes) <= set(sharding.LOGICAL_AXES), name
    layout = sharding.make_layout(sharding.MeshConfig("fsdp_tp", data=2, fsdp=2, model=2))
    shardings = layout.state_shardings(abstract)
    whole, held = 0, 0
    for leaf, where in zip(jax.tree.leaves(nn.unbox(abstract)), jax.tree.leaves(shardings), strict=True):
        whole, held = whole + leaf.size, held + np.prod(where.shard_shape(leaf.shape))
    assert held < 0.32 * whole  # a quarter, plus the parameters that are not sharded


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, r"model\.patch_size=5 does not divide model\.image_size=6\."),
        ({"num_heads": 3}, r"model\.num_heads=3 does not divide model\.embed_dim=16\."),
        ({"pooling": "max"}, r"model\.pooling='max' is not known; choose one of class_token, mean\."),
        ({"positions": "rotary"}, r"model\.positions='rotary' is not known; choose one of learned, sincos\."),
        ({"positions": "sincos", "embed_dim": 18}, r"model\.positions=sincos needs a multiple of 4"),
        ({"attention": "splash"}, r"model\.attention='splash' is not known; choose one of auto, dense\."),
        ({"channels": 0}, r"model\.channels=0 is not known; choose one of 1, 3\."),
        ({"pixel_mean": "0.5,0.5"}, r"model\.pixel_mean='0\.5,0\.5' has to be a number, or one for each of .*=3"),
        ({"pixel_std": "wide"}, r"model\.pixel_std='wide' has to be a number"),
        ({"pixel_std": "0"}, r"model\.pixel_std=0 has to be greater than 0"),
        ({"vocab_size": -1}, r"model\.vocab_size=-1 must not be negative\."),
        ({"image_size": 2**20}, r"model\.image_size=1048576 has to be greater than 0 and at most 16384"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **options)


def test_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_size=5, but the data has 6 classes; set 0\."):
        make().resolve(6, "cpu")


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="image_size=6"):
        jax.eval_shape(ViT(make()).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
