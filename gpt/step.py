"""The training state, the training step and the evaluation step of a run, compiled over a mesh."""

import collections
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
from jax.sharding import PartitionSpec as P

from gpt import optimizer, sharding, statistics
from gpt.config import Config
from gpt.data import pipeline
from gpt.data.base import IGNORED, Source
from gpt.losses import fused_loss, token_losses
from gpt.models import lora
from gpt.runtime import backend, hardware, progress
from gpt.runtime.errors import UserError

HISTOGRAM_POSITIONS, HISTOGRAM_BINS = 64, 64
MAX_MISTAKES = 8  # examples with a wrong prediction that an evaluation returns


class TrainState(flax.struct.PyTreeNode):
    """What a training step reads and replaces.

    Attributes:
      step: number of steps done.
      params: the parameters that are trained: those of the model, or with LoRA those of its adapters.
      opt_state: the state of the optimizer.
      frozen: with LoRA, the parameters of the model; else empty.
      ema: with `optimizer.ema`, the moving average of `params`; else empty.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any = flax.struct.field(default_factory=dict)
    ema: Any = flax.struct.field(default_factory=dict)

    @property
    def items(self) -> dict[str, Any]:
        """What a checkpoint holds, by the names of its items."""
        return {"params": self.params, "optimizer": self.opt_state} | ({"ema": self.ema} if self.ema else {})


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run over a mesh, and the shardings of what they work on.

    Attributes:
      layout: the mesh and the rules.
      model: the module that maps inputs to logits, with a resolved config.
      abstract_state: a TrainState of jax.ShapeDtypeStruct with shardings.
      logical_axes: for each collection of variables, the logical axes of each parameter as a PartitionSpec.
      trained_axes: those of the collection that is trained.
      init: () -> TrainState with random parameters, each created on the devices that hold it.
      begin: (params) -> TrainState that starts from parameters of the model, which are donated.
      train_step: (state, batch) -> (state, metrics); the state passed in is donated. All metrics are numbers but
        `norms`: those of gradients, updates and parameters, [3, number], as `gpt.statistics.names` names them.
      merge: (params, adapters) -> the parameters of the model with the adapters added; ({}, params) -> params.
      eval_step: (parameters of the model, batch) -> sums over the batch.
    """

    layout: sharding.Layout
    model: nn.Module
    abstract_state: TrainState
    logical_axes: Any
    trained_axes: Any
    init: jax.stages.Wrapped
    begin: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    merge: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @property
    def abstract_params(self) -> Any:
        """The parameters of the model as jax.ShapeDtypeStruct with shardings."""
        return self.abstract_state.frozen or self.abstract_state.params

    def merged_params(self, state: TrainState, raw: bool = False) -> Any:
        """Returns the parameters of the model with adapters merged, for evaluation and sampling.

        Args:
          raw: return the parameters of the last step although there is a moving average.
        """
        trained = state.params if raw or not state.ema else state.ema
        return self.merge(state.frozen, trained) if state.frozen or trained is state.ema else trained

    def num_parameters(self) -> int:
        """Returns the number of parameters of the model, without adapters."""
        return count(self.abstract_params)

    def check_memory(self, tree: Any) -> None:
        """Raises UserError if the part of a tree that each device holds exceeds the memory of a device."""
        needed, available = sharding.bytes_per_device(tree), hardware.memory(self.layout.mesh.local_devices[0])
        if needed > available:
            raise UserError(
                f"Parameters and optimizer state need {needed / 1e9:,.1f} GB on each device, which has "
                f"{available / 1e9:,.1f} GB; choose a smaller model, or shard it over more devices (mesh.rules)."
            )


def variables(params: Any, frozen: Any) -> dict[str, Any]:
    """Returns the collections of variables that the model is applied with."""
    return {"params": frozen, "lora": params} if frozen else {"params": params}


def count(tree: Any) -> int:
    """Returns the number of elements of all arrays in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def build(config: Config, vocab_size: int, layout: sharding.Layout, total_steps: int) -> Program:
    """Returns the program of a run on a mesh; nothing is compiled or allocated yet.

    Args:
      vocab_size: number of tokens of the tokenizer, or of classes.
      total_steps: length of the run, which the learning rate depends on.

    Raises:
      UserError: the mesh does not divide the batch, the sequence length or a parameter.
    """
    pipeline.check_batch(config.train.batch_size, layout, config.train.micro_batches)
    platform = layout.mesh.devices.flat[0].platform
    model_config = config.model.resolve(vocab_size, platform, layout.length_shards)
    layout.check_length(model_config.length)
    if model_config.num_targets % (layout.length_shards * config.train.loss_chunks):
        raise UserError(
            f"train.loss_chunks={config.train.loss_chunks} does not divide the {model_config.num_targets} targets of "
            f"an example in {layout.length_shards} shards."
        )
    model = model_config.module()
    tokens_per_step = config.train.batch_size * model_config.length
    learning_rate = optimizer.schedule(config.optimizer, tokens_per_step, total_steps)

    def init_variables() -> Any:
        # The parameters do not depend on the batch, so the smallest one that the mesh divides is enough.
        return model.init(jax.random.key(config.seed), model_config.blank(layout.batch_shards))

    def outputs_of(variables: dict[str, Any], batch: dict[str, jax.Array], **options: Any) -> Any:
        starts = (batch["starts"],) if "starts" in batch else ()  # where documents begin, with data.document_borders
        return model.apply(variables, batch["inputs"], *starts, **options)

    logical_axes = nn.get_partition_spec(jax.eval_shape(init_variables))
    trained_axes = logical_axes["lora" if model_config.lora_rank else "params"]
    tx = optimizer.make_optimizer(config.optimizer, learning_rate, trained_axes, model_config.width_ratio)

    def begin(params) -> TrainState:
        trained, frozen = (init_variables()["lora"], params) if model_config.lora_rank else (params, {})
        ema = trained if config.optimizer.ema else {}
        return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), frozen, ema)

    def init_boxed() -> TrainState:
        return begin(init_variables()["params"])

    # Random masks are drawn for the whole batch, so that they are the same on every mesh.
    has_dropout = any(rate for name, rate in vars(model_config).items() if name.endswith("_dropout"))
    summed_last = () if has_dropout else layout.replica_axes

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        # A key for each (seed, step): a resumed run draws what it would have drawn without the interruption.
        dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)

        def loss_of(params, batch, key):
            whole, targets, train = variables(params, state.frozen), batch["targets"], config.train
            options = {"deterministic": False, "rngs": {"dropout": key}}
            if model_config.reads != "tokens":  # few logits
                return token_losses(outputs_of(whole, batch, **options), targets).sum()
            x_BxTxD = outputs_of(whole, batch, **options, with_head=False)
            head_VxD = model_config.head(whole["params"])
            return fused_loss(model_config, train.loss_chunks, train.z_loss, x_BxTxD, head_VxD, targets)

        gradients = accumulate(jax.value_and_grad(loss_of), config.train.micro_batches, layout, summed_last)
        loss, grads = gradients(state.params, batch, dropout_key)
        # The division comes last: a sum over all devices' tokens before the model would make them wait for each other.
        weight = 1 / jnp.maximum(jnp.sum(batch["targets"] != IGNORED), 1)
        loss, grads = jax.tree.map(lambda total: weight * total, (loss, grads))
        if layout.zero1:  # each device updates the parameters whose optimizer state it holds
            grads = jax.lax.with_sharding_constraint(grads, spread.params)
        gradient_norm = optimizer.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params, count = optax.apply_updates(state.params, updates), state.opt_state[-1].count
        ema = optimizer.average(state.ema, params, config.optimizer.ema, count) if state.ema else {}
        updated = state.replace(params=params, opt_state=opt_state, ema=ema)
        skipped = {}
        if config.train.on_nonfinite == "skip":
            is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
            updated = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state)
            skipped = {"skipped": state.step + 1 - updated.opt_state[-1].count}
        measured = skipped | {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "update_norm": optimizer.global_norm(updates),
            "parameter_norm": optimizer.global_norm(updated.params),
            "norms": jnp.stack([statistics.norms(x, trained_axes) for x in (grads, updates, updated.params)]),
            "learning_rate": learning_rate(count),
        }
        return updated.replace(step=state.step + 1), measured

    def eval_step(params, batch):
        logits, targets = outputs_of({"params": params}, batch), batch["targets"]
        first = logits[0].reshape(-1, logits.shape[-1])[:HISTOGRAM_POSITIONS, :vocab_size]
        counts, edges = jnp.histogram(first, HISTOGRAM_BINS)
        valid, predictions = targets != IGNORED, logits.argmax(axis=-1)
        within_example = tuple(range(1, targets.ndim))
        return {
            "loss": token_losses(logits, targets).sum(axis=within_example),
            "targets": valid.sum(axis=within_example),
            "correct": jnp.sum(valid & (predictions == targets), axis=within_example),
            "has_error": jnp.any(valid & (predictions != targets), axis=within_example),
            "predictions": predictions,
            "logits_counts": counts,
            "logits_edges": edges,
        }

    def merge(params, adapters):
        return lora.merge(params, adapters, model_config.lora_scale) if params else adapters

    abstract_boxed = jax.eval_shape(init_boxed)
    abstract = nn.unbox(abstract_boxed)
    shardings = layout.state_shardings(abstract_boxed)
    spread = layout.state_shardings(abstract_boxed, ("data",)) if layout.zero1 else shardings
    shardings = shardings.replace(opt_state=spread.opt_state, ema=spread.ema)
    batch, everywhere = layout.batch, layout.replicated
    return Program(
        layout=layout,
        model=model,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
        ),
        logical_axes=logical_axes,
        trained_axes=trained_axes,
        init=jax.jit(lambda: nn.unbox(init_boxed()), out_shardings=shardings),
        begin=jax.jit(lambda params: nn.unbox(begin(params)), out_shardings=shardings, donate_argnums=0),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
            compiler_options=backend.compiler_options(layout.mesh.devices.flat[0]),
        ),
        merge=jax.jit(merge, out_shardings=shardings.frozen or shardings.params),
        eval_step=jax.jit(
            eval_step, in_shardings=(shardings.frozen or shardings.params, batch), out_shardings=everywhere
        ),
    )


def accumulate(value_and_grad: Callable, parts: int, layout: sharding.Layout, summed_last: tuple[str, ...]) -> Callable:
    """Returns a function that adds up `value_and_grad(params, batch, key)` over `parts` of the batch, one by one.

    Args:
      summed_last: mesh axes of the batch over which results are summed once, after the last part. Over the other mesh
        axes, those of each part are summed, because a device may not have enough memory for unsharded gradients.
    """
    if parts == 1:
        return value_and_grad

    def accumulated(params, batch, key):
        def split(x):
            # Each part takes examples from every device's share, so that no example moves between devices.
            x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
            return nn.with_logical_constraint(x, (None, "batch") + (None,) * (x.ndim - 2))

        def add(total, part):
            batch, i = part
            return jax.tree.map(jnp.add, total, value_and_grad(params, batch, jax.random.fold_in(key, i))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        with layout.without(summed_last):
            total, _ = jax.lax.scan(add, zeros, (jax.tree.map(split, batch), jnp.arange(parts)))
        return jax.lax.psum(total, summed_last)

    if not summed_last:
        return accumulated
    specs = P(), P(summed_last), P()
    return jax.shard_map(accumulated, in_specs=specs, out_specs=P(), axis_names=set(summed_last), check_vma=False)


def evaluate(
    program: Program, params: Any, source: Source, batch_size: int, check: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Returns means over all targets of a source of examples.

    An example counts as an exact match if each of its targets is the likeliest token after the targets before it. Then
    greedy decoding would generate exactly these targets, so no decoding is needed.

    Args:
      params: the parameters of the model, as `Program.merged_params` returns them.
      check: called with each batch; it may raise an exception to end the evaluation.

    Returns:
      loss: mean cross-entropy in nats per target.
      targets, examples: how many there are.
      accuracy: fraction of the targets that are the likeliest prediction.
      exact_match: fraction of the examples whose targets all are.
      groups: {name: (loss, targets)} of the groups of examples, if the source has them.
      mistakes: for the first other examples, pairs of the index and the predictions, [T]; the index is that in the
        whole source if `source` is a sample of it.
      logits_counts, logits_edges: a histogram of the logits of the first tokens.
    """
    rows = program.layout.local_rows(batch_size)
    sums: dict[str, Any] = collections.defaultdict(lambda: np.zeros(4))  # by group: loss, targets, correct, examples
    group, place = getattr(source, "group", lambda index: ""), getattr(source, "place", int)
    mistakes: list[tuple[int, np.ndarray]] = []
    histogram: dict[str, np.ndarray] = {}
    num_mistakes, pending = 0, None

    def add(number: int, results: dict[str, jax.Array]) -> None:
        nonlocal num_mistakes, histogram
        found, first = jax.device_get(results), number * batch_size
        wrong = np.flatnonzero(found["has_error"])
        num_mistakes += len(wrong)
        for row in wrong[: MAX_MISTAKES - len(mistakes)]:
            mistakes.append((place(first + row), found["predictions"][row]))
        histogram = histogram or {name: found[name] for name in ("logits_counts", "logits_edges")}
        values = np.stack([*(found[name] for name in ("loss", "targets", "correct")), found["targets"] > 0])
        for index, value in zip(range(first, len(source)), values.T, strict=False):
            sums[group(index)] += value

    with program.layout.use(), progress.task("evaluating", len(source)) as shown:
        batches = pipeline.evaluation_batches(source, batch_size, rows)
        for number, batch in enumerate(pipeline.to_devices(batches, program.layout, batch_size)):
            # One batch ahead and no more: a long queue would hold memory (and can deadlock CPU collectives).
            dispatched = number, program.eval_step(params, batch)
            check()
            if pending:
                add(*pending)
                shown.done = number * batch_size
            pending = dispatched
        if pending:
            add(*pending)
    loss, targets, correct, examples = sum(sums.values())
    means = {"loss": loss / targets, "accuracy": correct / targets, "exact_match": 1 - num_mistakes / examples}
    groups = {name: (own[0] / max(1, own[1]), int(own[1])) for name, own in sums.items()}
    counts = {"targets": int(targets), "examples": int(examples), "groups": groups}
    return means | counts | {"mistakes": mistakes} | histogram
