"""What a run compiles: the state, the training step and the evaluation step, over a mesh."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt import optimizer, sharding
from gpt.config import Config
from gpt.data import pipeline
from gpt.data.base import IGNORED, Source
from gpt.models import lora
from gpt.runtime import hardware
from gpt.runtime.errors import UserError

HISTOGRAM_POSITIONS, HISTOGRAM_BINS = 64, 64
MOST_MISTAKES = 8  # rows that an evaluation keeps to be shown


@flax.struct.dataclass
class TrainState:
    """All that a step works on. `step` counts the steps done.

    `params` are those that are trained: the adapters of LoRA, with the model's own parameters in `frozen`, or these,
    and `frozen` is empty.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, to be compiled for a mesh, and the shardings they are compiled with.

    Attributes:
      layout: the mesh and the rules.
      model: the module that maps inputs to logits; its config is resolved.
      abstract_state: TrainState of jax.ShapeDtypeStruct, with shardings.
      logical_axes: of each parameter, by collection, the names of its axes, as a PartitionSpec.
      init: () -> TrainState, each array made on the devices that hold it.
      begin: (params) -> TrainState before the first step from given parameters of the model, which are used up.
      train_step: (state, batch) -> (state, metrics); the state given is used up.
      merge: (params, adapters) -> the model's parameters with the adapters in them.
      eval_step: (the model's parameters, batch) -> sums over the batch.
    """

    layout: sharding.Layout
    model: nn.Module
    abstract_state: TrainState
    logical_axes: Any
    init: jax.stages.Wrapped
    begin: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    merge: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @property
    def abstract_params(self) -> Any:
        """The model's parameters, as in `abstract_state`."""
        return self.abstract_state.frozen or self.abstract_state.params

    def whole(self, state: TrainState) -> Any:
        """The model's parameters in a state, adapters merged: what evaluation and sampling work with."""
        return self.merge(state.frozen, state.params) if state.frozen else state.params

    def parameters(self) -> list[sharding.Parameter]:
        """How each is sharded, of the model and of adapters."""
        state = self.abstract_state
        return [
            parameter
            for name, tree in variables(state.params, state.frozen).items()
            for parameter in sharding.parameters(tree, self.logical_axes[name])
        ]

    def num_parameters(self) -> int:
        """Of the model, without adapters."""
        return count(self.abstract_params)

    def check_memory(self, tree: Any) -> None:
        """Raises UserError if a device has too little memory to hold its part of a tree alone."""
        needed, there = sharding.bytes_per_device(tree), hardware.memory(self.layout.mesh.local_devices[0])
        if needed > there:
            raise UserError(
                f"The {needed / 1e9:,.1f} GB of parameters and optimizer state that are for each device are more than "
                f"its {there / 1e9:,.1f} GB; choose a smaller model, or shard it over more devices (mesh.rules)."
            )


def variables(params: Any, frozen: Any) -> dict[str, Any]:
    """Flax's collections for the model, of what is trained and what is not."""
    return {"params": frozen, "lora": params} if frozen else {"params": params}


def count(tree: Any) -> int:
    """Numbers in the arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def build(config: Config, vocab_size: int, layout: sharding.Layout, total_steps: int) -> Program:
    """The program of a run on a mesh; nothing is compiled or allocated yet.

    Args:
      vocab_size: of the tokenizer, or the number of classes.

    Raises:
      UserError: the mesh does not divide the batch or a parameter.
    """
    pipeline.check_batch(config.train.batch_size, layout, config.train.micro_batches)
    platform = layout.mesh.devices.flat[0].platform
    model_config = config.model.resolve(vocab_size, platform, layout.length_shards)
    layout.check_length(model_config.length)
    model = model_config.module()
    tokens_per_step = config.train.batch_size * model_config.length
    learning_rate = optimizer.schedule(config.optimizer, tokens_per_step, total_steps)

    def init_variables() -> dict[str, Any]:
        # Parameters do not depend on the batch, so the smallest that the mesh divides will do.
        return model.init(jax.random.key(config.seed), model_config.blank(layout.batch_shards))

    def logits_of(variables: dict[str, Any], batch: dict[str, jax.Array], **options: Any) -> jax.Array:
        starts = (batch["starts"],) if "starts" in batch else ()  # of documents, where these have borders
        return model.apply(variables, batch["inputs"], *starts, **options)

    logical_axes = nn.get_partition_spec(jax.eval_shape(init_variables))
    trained_axes = logical_axes["lora" if model_config.lora_rank else "params"]
    tx = optimizer.make_optimizer(config.optimizer, learning_rate, trained_axes)

    def begin(params) -> TrainState:
        trained, frozen = (init_variables()["lora"], params) if model_config.lora_rank else (params, {})
        return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), frozen)

    def init_boxed() -> TrainState:
        return begin(init_variables()["params"])

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        # A key for each (seed, step), so that a run resumed draws what it would have drawn.
        dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)

        def loss_of(params, batch, key):
            rngs = {"dropout": key}
            logits = logits_of(variables(params, state.frozen), batch, deterministic=False, rngs=rngs)
            return token_losses(logits, batch["targets"]).sum()

        loss, grads = accumulate(jax.value_and_grad(loss_of), config.train.micro_batches)(
            state.params, batch, dropout_key
        )
        # Last, as a sum over the devices' tokens before the model would have them all wait there for each other.
        weight = 1 / jnp.maximum(jnp.sum(batch["targets"] != IGNORED), 1)
        loss, grads = jax.tree.map(lambda total: weight * total, (loss, grads))
        if layout.zero1:  # each device updates the part of the parameters that its optimizer state is for
            grads = jax.lax.with_sharding_constraint(grads, layout.spread(abstract.params, shardings.params))
        gradient_norm = optimizer.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        skipped = {}
        if config.train.on_nonfinite == "skip":
            is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
            skipped = {"skipped": state.step + 1 - opt_state[-1].count}
        measured = skipped | {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "parameter_norm": optimizer.global_norm(params),
            "learning_rate": learning_rate(state.opt_state[-1].count),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), measured

    def eval_step(params, batch):
        logits, targets = logits_of({"params": params}, batch), batch["targets"]
        first = logits[0].reshape(-1, logits.shape[-1])[:HISTOGRAM_POSITIONS, :vocab_size]
        counts, edges = jnp.histogram(first, HISTOGRAM_BINS)
        counted, said = targets != IGNORED, logits.argmax(axis=-1)
        within_row = tuple(range(1, targets.ndim))
        return {
            "loss": token_losses(logits, targets).sum(),
            "targets": counted.sum(),
            "correct": jnp.sum(counted & (said == targets)),
            "rows": counted.any(axis=within_row),
            "mistaken": jnp.any(counted & (said != targets), axis=within_row),
            "said": said,
            "logits_counts": counts,
            "logits_edges": edges,
        }

    def merge(params, adapters):
        return lora.merge(params, adapters, model_config.lora_scale)

    abstract_boxed = jax.eval_shape(init_boxed)
    abstract = nn.unbox(abstract_boxed)
    shardings = layout.state_shardings(abstract_boxed)
    if layout.zero1:
        shardings = shardings.replace(opt_state=layout.spread(abstract.opt_state, shardings.opt_state))
    batch, everywhere = layout.batch, layout.replicated
    return Program(
        layout=layout,
        model=model,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
        ),
        logical_axes=logical_axes,
        init=jax.jit(lambda: nn.unbox(init_boxed()), out_shardings=shardings),
        begin=jax.jit(lambda params: nn.unbox(begin(params)), out_shardings=shardings, donate_argnums=0),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        merge=jax.jit(merge, out_shardings=shardings.frozen),
        eval_step=jax.jit(
            eval_step, in_shardings=(shardings.frozen or shardings.params, batch), out_shardings=everywhere
        ),
    )


def token_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """[B, T] cross-entropies in nats; 0 where the target is `IGNORED`. For classes, [B] of [B, V]."""
    # A comparison and a sum instead of an index: no gather across a sharded vocabulary.
    is_target_BxTxV = targets_BxT[..., None] == jnp.arange(logits_BxTxV.shape[-1])
    target_logits_BxT = jnp.sum(jnp.where(is_target_BxTxV, logits_BxTxV, 0), axis=-1)
    losses_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_logits_BxT
    return jnp.where(targets_BxT != IGNORED, losses_BxT, 0)


def accumulate(value_and_grad: Callable, parts: int) -> Callable:
    """`value_and_grad(params, batch, key)` as a sum over `parts` of the batch, one after the other."""
    if parts == 1:
        return value_and_grad

    def accumulated(params, batch, key):
        def split(x):
            # Each part takes rows from every device's share, so that no row has to move.
            x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
            return nn.with_logical_constraint(x, (None, "batch") + (None,) * (x.ndim - 2))

        def add(total, part):
            batch, i = part
            return jax.tree.map(jnp.add, total, value_and_grad(params, batch, jax.random.fold_in(key, i))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, (jax.tree.map(split, batch), jnp.arange(parts)))
        return total

    return accumulated


def evaluate(
    program: Program, params: Any, source: Source, batch_size: int, check: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Means over every target of a source.

    Greedy decoding of what a row asks for gives all of its targets just where each of them is the likeliest after
    those before it. So `exact_match` needs no decoding.

    Args:
      check: called with each batch; it may raise an exception to end the evaluation.

    Returns:
      {"loss": nats per target, "targets", "rows": how many, "accuracy": part of the targets that the model holds for
      the likeliest, "exact_match": part of the rows in which that is so of every target, "mistakes": of the first
      other rows the number and the likeliest in the place of each target, "logits_counts", "logits_edges": a
      histogram of the logits of the first tokens}.
    """
    rows = program.layout.local_rows(batch_size)
    total, mistaken, mistakes, pending, first = {}, 0, [], None, {}

    def add(number: int, sums: dict[str, Any]) -> None:
        nonlocal mistaken, first
        sums = jax.device_get(sums)
        wrong, said = np.flatnonzero(sums.pop("mistaken")), sums.pop("said")
        mistaken += len(wrong)
        mistakes.extend((number * batch_size + int(row), said[row]) for row in wrong[: MOST_MISTAKES - len(mistakes)])
        first = first or {name: sums[name] for name in ("logits_counts", "logits_edges")}
        for name in ("loss", "targets", "correct", "rows"):
            total[name] = total.get(name, 0) + sums[name].sum().item()

    with program.layout.use():
        batches = pipeline.evaluation_batches(source, batch_size, rows)
        for number, batch in enumerate(pipeline.to_devices(batches, program.layout, batch_size)):
            # One batch ahead and no more: a long queue would hold memory (and can deadlock CPU collectives).
            dispatched = number, program.eval_step(params, batch)
            check()
            if pending:
                add(*pending)
            pending = dispatched
        add(*pending)
    means = {"loss": total["loss"] / total["targets"], "accuracy": total["correct"] / total["targets"]}
    counts = {"targets": total["targets"], "rows": total["rows"], "exact_match": 1 - mistaken / total["rows"]}
    return means | counts | {"mistakes": mistakes} | first
