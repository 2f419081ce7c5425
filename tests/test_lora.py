"""LoRA: the values of adapters, runs that train them, and the use of the trained adapters."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from gpt import sharding, step, train
from gpt.checkpointing import loading
from gpt.checkpointing.stacking import stack_layers, unstack_layers
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.interop import huggingface
from gpt.models import lora
from gpt.models.gpt import GPT, GPTConfig
from gpt.optimizer import OptimizerConfig
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

TARGETS = "qkv,out,up,down"
WIDTHS = {"qkv": (32, 96), "out": (32, 32), "up": (32, 128), "down": (128, 32)}
SMALL = GPTConfig(
    vocab_size=40,
    dtype="float32",
    attention="dense",
    num_layers=2,
    num_heads=4,
    embed_dim=32,
    block_size=16,
    lora_rank=3,
    lora_targets=TARGETS,
)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), tree)


def model_and_variables(config, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (2, 16), 0, config.vocab_size)
    model = GPT(config)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, unboxed(model.init(jax.random.key(0), tokens))))
    return model, random_like(shapes, seed), tokens


def unboxed(tree):
    return jax.tree.map(lambda x: x.unbox(), tree, is_leaf=lambda x: hasattr(x, "unbox"))


def by_hand(variables, alpha, rank):
    """Returns {path of a kernel: matrices kernel, a and b} in float64, for each layer."""
    kernels, adapters = (flatten_dict(variables[name]) for name in ("params", "lora"))
    for *place, name in adapters:
        if name == "a":
            kernel, a, b = kernels[(*place, "kernel")], adapters[(*place, "a")], adapters[(*place, "b")]
            rows, columns = WIDTHS[place[-1]]
            layers = len(kernel) if place[0] == "blocks" else 1
            sizes = (rows, columns), (rows, rank), (rank, columns)
            yield (
                (*place, "kernel"),
                [np.asarray(x, np.float64).reshape(layers, *s) for x, s in zip((kernel, a, b), sizes, strict=True)],
            )


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("targets", ["qkv", TARGETS])
def test_adapters_add_their_product_to_the_kernels(scan_layers, targets):
    config = dataclasses.replace(SMALL, scan_layers=scan_layers, lora_targets=targets, lora_alpha=7.5)
    model, variables, tokens = model_and_variables(config)
    expected = flatten_dict(variables["params"])
    places = list(by_hand(variables, 7.5, 3))
    assert {place[-2] for place, _ in places} == set(targets.split(","))
    for place, (kernel, a, b) in places:
        changed = kernel + 7.5 / 3 * np.einsum("lir,lro->lio", a, b)
        expected[place] = jnp.asarray(changed.reshape(expected[place].shape), jnp.float32)
    merged = flatten_dict(lora.merge(variables["params"], variables["lora"], 7.5 / 3))
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6, err_msg=str(name))
    plain = GPT(dataclasses.replace(config, lora_rank=0))
    from_merged = plain.apply({"params": lora.merge(variables["params"], variables["lora"], 2.5)}, tokens)
    np.testing.assert_allclose(model.apply(variables, tokens), from_merged, atol=2e-5)
    # Without the collection, a model with adapters is the plain one.
    without = {"params": variables["params"]}
    np.testing.assert_array_equal(model.apply(without, tokens), plain.apply(without, tokens))
    assert np.abs(model.apply(variables, tokens) - plain.apply(without, tokens)).max() > 1e-3


def test_gradients_are_those_of_the_kernels_projected():
    """The chain rule for W + s·a·b gives the gradients s·dW·bᵀ and s·aᵀ·dW."""
    model, variables, tokens = model_and_variables(SMALL)
    scale = 16 / 3

    def loss(adapters, params):
        return jnp.square(model.apply({"params": params, "lora": adapters}, tokens)).mean()

    def plain_loss(params):
        return jnp.square(GPT(dataclasses.replace(SMALL, lora_rank=0)).apply({"params": params}, tokens)).mean()

    found = flatten_dict(jax.grad(loss)(variables["lora"], variables["params"]))
    merged = lora.merge(variables["params"], variables["lora"], scale)
    kernels = flatten_dict(jax.grad(plain_loss)(merged))
    for (*place, _), (kernel, a, b) in by_hand(variables, 16, 3):
        (gradient,) = np.asarray(kernels[(*place, "kernel")], np.float64).reshape(kernel.shape)
        expected_a, expected_b = scale * gradient @ b[0].T, scale * a[0].T @ gradient
        for name, expected in (("a", expected_a), ("b", expected_b)):
            np.testing.assert_allclose(
                found[(*place, name)].reshape(expected.shape), expected, rtol=1e-3, atol=1e-6, err_msg=f"{place} {name}"
            )


def test_flops_and_what_is_trained():
    plain = GPTConfig(vocab_size=65)
    adapted = dataclasses.replace(plain, lora_rank=4, lora_targets="qkv,down")
    weights = 12 * 8 * 512**2 + 65 * 512
    scores = 12 * 8 * 512 * 128
    assert plain.flops_per_token() == 6 * weights + scores
    assert adapted.flops_per_token() == 4 * weights + 6 * 8 * 4 * (4 * 512 + 5 * 512) + scores
    assert adapted.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": -1}, r"model\.lora_rank=-1 must not be negative"),
        ({"lora_targets": "q"}, r"model\.lora_targets='q' has to be some of qkv,out,up,down"),
        ({"lora_targets": ""}, r"model\.lora_targets='' has to be some"),
        ({"lora_alpha": 0.0}, r"model\.lora_alpha=0\.0"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**values)


@pytest.fixture(scope="module")
def base(play, tmp_path_factory):
    """Returns the workdir of a run of a few steps without LoRA."""
    config = Config(
        model=GPTConfig(num_layers=2, num_heads=4, embed_dim=32, block_size=16, vocab_multiple=8),
        data=dataclasses.replace(Config().data, path=str(play)),
        train=dataclasses.replace(
            Config().train, batch_size=16, steps=4, log_every=1, eval_every=0, checkpoint_every=4, sample_tokens=0
        ),
    )
    workdir = Workdir(tmp_path_factory.mktemp("base"))
    assert train.train(config, workdir) == 0
    return workdir


def adapting(base, steps=6, **mesh):
    """Returns the config of a run that trains adapters on a base, with dropout."""
    config = base.read().config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora_rank=2, lora_targets="qkv,down"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=dataclasses.replace(
            config.train, steps=steps, eval_every=3, checkpoint_every=3, init_from=str(base.path), sample_tokens=4
        ),
        mesh=MeshConfig(**mesh),
    )


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("adapted"))
    assert train.train(adapting(base), workdir) == 0
    return workdir


def arrays(workdir, step="last"):
    params = loading.load(workdir, step).params
    return {"/".join(name): np.asarray(x) for name, x in flatten_dict(params).items()}


def adapters_of(workdir, step):
    abstract = loading.load(workdir, str(step)).program.abstract_state.params
    restored = workdir.checkpoints()[step].restore(params=abstract)["params"]
    return {"/".join(name): np.asarray(x) for name, x in flatten_dict(restored).items()}


def test_a_run_changes_the_adapted_kernels_and_nothing_else(base, adapted):
    before, after = arrays(base), arrays(adapted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"block_{i}/{name}/kernel" for i in range(2) for name in ("attention/qkv", "mlp/down")}
    for name in changed:
        rows = 32 if "qkv" in name else 128
        difference = (after[name] - before[name]).reshape(rows, -1)
        sizes = np.linalg.svd(difference, compute_uv=False)
        assert sizes[1] > 1e-3 > 1e-5 > sizes[2], "of rank 2"


def test_a_checkpoint_holds_the_adapters_and_their_optimizer_state_alone(base, adapted):
    program = loading.load(adapted, "last").program
    trained = 2 * 2 * (32 + 96 + 128 + 32)
    assert step.count(program.abstract_state.params) == trained
    moments = [x for x in jax.tree.leaves(program.abstract_state.opt_state) if x.ndim]
    assert step.count(moments) == 2 * trained
    assert program.num_parameters() == step.count(loading.load(base, "last").params)
    for item, arrays_saved in (("params", trained), ("optimizer", 2 * trained)):
        saved = ocp.PyTreeCheckpointHandler().metadata(adapted.path / "checkpoints" / "6" / item).tree
        shapes = [x.shape for x in jax.tree.leaves(saved, is_leaf=lambda x: hasattr(x, "shape"))]
        assert sum(np.prod(shape) for shape in shapes if shape) == arrays_saved


def test_resumed_equals_uninterrupted_to_the_bit(base, adapted, tmp_path, capsys):
    workdir = Workdir(tmp_path)
    short = adapting(base, steps=3)
    # The schedule ends at the same step as that of the whole run.
    decay = dataclasses.replace(short.optimizer, decay_tokens=6.0 * 16 * 16)
    assert train.train(dataclasses.replace(short, optimizer=decay), workdir) == 0
    longer = dataclasses.replace(adapting(base), optimizer=decay)
    assert train.train(longer, workdir) == 0
    out = capsys.readouterr().out
    assert f"starting from step 4 of {base.path}" in out
    assert "resuming after step 3" in out
    assert "lora   1,152 parameters are trained: rank 2 at qkv,down" in out
    expected, found = adapters_of(adapted, 6), adapters_of(workdir, 6)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_any_mesh_trains_the_same(base, adapted, tmp_path):
    mesh = {"rules": "fsdp_tp", "data": 2, "fsdp": 2, "model": 2, "zero1": True}
    assert train.train(adapting(base, **mesh), Workdir(tmp_path)) == 0
    expected = arrays(adapted)
    for name, array in arrays(Workdir(tmp_path)).items():
        np.testing.assert_allclose(array, expected[name], atol=2e-4, err_msg=name)


def test_frozen_weights_that_change_in_memory_stop_the_run(base, tmp_path, monkeypatch):
    save = train.Training._save

    def change_and_save(self, loss=None):
        if self.step == 6:
            frozen = self.state.frozen
            scale = frozen["final_norm"]["scale"]
            changed = jax.device_put(scale.at[0].add(1e-6), scale.sharding)  # on all devices
            self.state = self.state.replace(frozen=frozen | {"final_norm": frozen["final_norm"] | {"scale": changed}})
        save(self, loss)

    monkeypatch.setattr(train.Training, "_save", change_and_save)
    with pytest.raises(UserError, match=r"Step 6 was not saved because the frozen weights changed in memory"):
        train.train(adapting(base), Workdir(tmp_path))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_stacked_layers_train_what_layers_apart_do(base, tmp_path):
    """Dropout is off, because its random numbers differ, and the initial adapters are the same for both layouts."""
    losses, adapters = {}, None
    for scan_layers in (False, True):
        config = adapting(base, rules="fsdp")
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model,
                scan_layers=scan_layers,
                remat="dots",
                embed_dropout=0.0,
                residual_dropout=0.0,
                attention_dropout=0.0,
            ),
            train=dataclasses.replace(config.train, micro_batches=2),
        )
        vocab_size = base.read().tokenizer.vocab_size
        program = step.build(config, vocab_size, sharding.make_layout(config.mesh), 6)
        with program.layout.use():
            state = program.begin(loading.Weights(base, "last").restore(program))
            if scan_layers:
                shardings = jax.tree.map(lambda x: x.sharding, state.params)
                state = state.replace(params=jax.device_put(stack_layers(adapters), shardings))
            adapters = jax.tree.map(np.asarray, state.params)
            tokens = jax.random.randint(jax.random.key(0), (16, 17), 0, vocab_size)
            batch = jax.device_put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, program.layout.batch)
            for _ in range(3):
                state, measured = program.train_step(state, batch)
        losses[scan_layers] = float(measured["loss"])
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_an_export_has_the_adapters_merged(adapted, tmp_path):
    folder = tmp_path / "hf"
    huggingface.to_hf(adapted, "last", folder)
    tensors, expected = load_file(folder / "model.safetensors"), arrays(adapted)
    for i in range(2):
        found = tensors[f"transformer.h.{i}.mlp.c_proj.weight"]
        np.testing.assert_allclose(found, expected[f"block_{i}/mlp/down/kernel"], atol=1e-6)
    back = Workdir(tmp_path / "back")
    huggingface.from_hf(folder, back, 8)
    for name, array in arrays(back).items():
        rows = 60 if name.startswith("token") else None  # without the padding
        np.testing.assert_allclose(array[:rows], expected[name][:rows], atol=1e-6, err_msg=name)


def test_a_run_starts_from_merged_weights_and_adapters_go_on_top_of_adapters(adapted, tmp_path):
    expected = arrays(adapted, "best")
    config = adapted.read().config
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora_rank=0, scan_layers=True), mesh=MeshConfig("fsdp")
    )
    program = step.build(config, adapted.read().tokenizer.vocab_size, sharding.make_layout(config.mesh), 1)
    same = unstack_layers(loading.Weights(adapted, "best").restore(program))
    for name, array in flatten_dict(same).items():
        np.testing.assert_allclose(array, expected["/".join(name)], atol=1e-6, err_msg=str(name))

    again = adapting(adapted, steps=1)
    again = dataclasses.replace(again, optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0))
    workdir = Workdir(tmp_path / "again")
    assert train.train(again, workdir) == 0
    for name, array in arrays(workdir).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)
    # Another mesh may round the merged weights differently.
    longer = dataclasses.replace(
        again, mesh=MeshConfig("fsdp_tp", model=2), train=dataclasses.replace(again.train, steps=2)
    )
    assert train.train(longer, workdir, allow_config_change=True) == 0
    huggingface.to_hf(workdir, "last", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")["transformer.h.1.mlp.c_proj.weight"]
    np.testing.assert_allclose(found, expected["block_1/mlp/down/kernel"], atol=1e-6)


def test_a_base_that_is_missing_or_has_changed_is_refused(base, adapted, tmp_path):
    moved = Workdir(shutil.copytree(adapted.path, tmp_path / "moved"))
    record = json.loads((moved.path / "run.json").read_text())
    assert record["base"]["path"] == str(base.path)
    assert record["base"]["step"] == 4
    digest = record["base"]["digest"]

    record["base"]["path"] = str(tmp_path / "gone")
    (moved.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"Cannot open the base of the adapters in .*moved: .*gone: there is no such folder"
    ):
        loading.load(moved, "last")

    record["base"] |= {"path": str(base.path), "digest": record["base"]["digest"] ^ 1}
    (moved.path / "run.json").write_text(json.dumps(record))
    for use in (
        lambda: loading.load(moved, "last"),
        lambda: huggingface.to_hf(moved, "last", tmp_path / "hf"),
        lambda: train.train(adapting(base, steps=7), moved),
    ):
        with pytest.raises(
            UserError, match=r"Step 4 of .*base\d has other weights than the base of the adapters in .*moved: "
        ):
            use()
    assert not (tmp_path / "hf" / "model.safetensors").exists()

    # The path of the same weights does not matter.
    record["base"] |= {"path": str(shutil.copytree(base.path, tmp_path / "copy")), "digest": digest}
    (moved.path / "run.json").write_text(json.dumps(record))
    for name, array in arrays(moved).items():
        np.testing.assert_array_equal(array, arrays(adapted)[name])


def test_weights_in_a_bucket_are_refused_for_adapters_on_a_disk(base, tmp_path):
    """The start is refused, because no later start could read the base."""
    config = adapting(base)
    elsewhere = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from="gs://bucket/run"))
    with pytest.raises(
        UserError, match=r"train\.init_from=gs://bucket/run: adapters in a local workdir need a local base"
    ):
        train.train(elsewhere, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_adapters_without_weights_are_refused(base, tmp_path):
    config = adapting(base)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))
    with pytest.raises(
        UserError, match=r"model\.lora_rank=2: adapters are for trained weights; name them by train\.ini"
    ):
        train.train(config, Workdir(tmp_path))
