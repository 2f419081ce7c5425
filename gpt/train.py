"""The training loop: build the program, restore, step, log, evaluate, save.

A step whose loss, gradient or parameters are not finite (or whose loss is a spike, where these are looked for) ends the
run, unless `train.on_nonfinite` says otherwise:

- `skip`: the devices leave the update out, and nothing waits for that. Parameters and optimizer state, with the count
  that the learning rate goes by, stay what they were; the step counts.
- `rollback`: back to the newest checkpoint, and on without the batch, whose number is recorded in the workdir. So the
  run is, to the bit, one that never saw it. (Metrics are read a step late: the step after it goes too, its batch comes
  again.)
"""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt import cluster, generate, hardware, metrics, optimizer, sharding
from gpt.checkpoint import Run, Workdir, refuse_changes
from gpt.config import Config, TrainConfig
from gpt.data import pipeline, text
from gpt.errors import UserError
from gpt.models.gpt import GPT

HISTOGRAM_POSITIONS, HISTOGRAM_BINS = 64, 64
MEAN_OVER = 50  # steps that the running mean of the loss looks back, about


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `step` counts the steps done."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, to be compiled for a mesh, and the shardings they are compiled with.

    Attributes:
      layout: the mesh and the rules.
      model: the module that maps tokens to logits.
      abstract_state: TrainState of jax.ShapeDtypeStruct, with shardings.
      logical_axes: of each parameter, the names of its axes, as a PartitionSpec.
      init: () -> TrainState, each array made on the devices that hold it.
      begin: (params) -> TrainState before the first step from given parameters, which are used up.
      train_step: (state, batch) -> (state, metrics); the state given is used up.
      eval_step: (params, batch) -> sums over the batch.
    """

    layout: sharding.Layout
    model: GPT
    abstract_state: TrainState
    logical_axes: Any
    init: Callable[[], TrainState]
    begin: Callable[[Any], TrainState]
    train_step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]

    def num_parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))

    def check_memory(self, tree: Any) -> None:
        """Raises UserError if a device has too little memory to hold its part of a tree alone."""
        needed, there = sharding.bytes_per_device(tree), hardware.memory(self.layout.mesh.local_devices[0])
        if needed > there:
            raise UserError(
                f"The {needed / 1e9:,.1f} GB of parameters and optimizer state that are for each device are more than "
                f"its {there / 1e9:,.1f} GB; choose a smaller model, or shard it over more devices (mesh.rules)."
            )


def build(config: Config, vocab_size: int, layout: sharding.Layout, total_steps: int) -> Program:
    """The program of a run on a mesh; nothing is compiled or allocated yet.

    Raises:
      UserError: the mesh does not divide the batch or a parameter.
    """
    pipeline.check_batch(config.train.batch_size, layout, config.train.micro_batches)
    model_config = config.model.resolve(vocab_size, layout.mesh.devices.flat[0].platform)
    layout.check_length(model_config.block_size)
    model = GPT(model_config)
    tokens_per_step = config.train.batch_size * model_config.block_size
    learning_rate = optimizer.schedule(config.optimizer, tokens_per_step, total_steps)
    tx = optimizer.make_optimizer(config.optimizer, learning_rate)

    def begin(params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    def init_boxed() -> TrainState:
        # Parameters do not depend on the batch, so the smallest that the mesh divides will do.
        tokens = jnp.zeros((layout.batch_shards, model_config.block_size), jnp.int32)
        return begin(model.init(jax.random.key(config.seed), tokens)["params"])

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        # A key for each (seed, step), so that a run resumed draws what it would have drawn.
        dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        weight = 1 / jnp.maximum(jnp.sum(batch["targets"] != text.IGNORED), 1)

        def loss_of(params, batch, key):
            logits = model.apply(
                {"params": params}, batch["inputs"], batch.get("starts"), deterministic=False, rngs={"dropout": key}
            )
            return weight * token_losses(logits, batch["targets"]).sum()

        loss, grads = accumulate(jax.value_and_grad(loss_of), config.train.micro_batches)(
            state.params, batch, dropout_key
        )
        if layout.zero1:  # each device updates the part of the parameters that its optimizer state is for
            grads = jax.lax.with_sharding_constraint(grads, layout.spread(abstract.params, shardings.params))
        gradient_norm = optax.tree.norm(grads)
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
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": learning_rate(state.opt_state[-1].count),
        }
        return TrainState(state.step + 1, params, opt_state), measured

    def eval_step(params, batch):
        logits = model.apply({"params": params}, batch["inputs"], batch.get("starts"))
        counts, edges = jnp.histogram(logits[0, :HISTOGRAM_POSITIONS, : model_config.vocab_size], HISTOGRAM_BINS)
        return {
            "loss": token_losses(logits, batch["targets"]).sum(),
            "tokens": jnp.sum(batch["targets"] != text.IGNORED),
            "logits_counts": counts,
            "logits_edges": edges,
        }

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
        logical_axes=nn.get_partition_spec(abstract_boxed.params),
        init=jax.jit(lambda: nn.unbox(init_boxed()), out_shardings=shardings),
        begin=jax.jit(begin, out_shardings=shardings, donate_argnums=0),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        eval_step=jax.jit(eval_step, in_shardings=(shardings.params, batch), out_shardings=everywhere),
    )


def token_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """[B, T] cross-entropies in nats; 0 where the target is `text.IGNORED`."""
    # A comparison and a sum instead of an index: no gather across a sharded vocabulary.
    is_target_BxTxV = targets_BxT[..., None] == jnp.arange(logits_BxTxV.shape[-1])
    target_logits_BxT = jnp.sum(jnp.where(is_target_BxTxV, logits_BxTxV, 0), axis=-1)
    losses_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_logits_BxT
    return jnp.where(targets_BxT != text.IGNORED, losses_BxT, 0)


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


def evaluate(program: Program, params: Any, source: pipeline.Source, batch_size: int) -> dict[str, Any]:
    """Means over every token of a source.

    Returns:
      {"loss": nats per token, "tokens": how many, "logits_counts", "logits_edges": a histogram of
      the logits of the first tokens}.
    """
    rows = program.layout.local_rows(batch_size)
    padding = {"inputs": 0, "targets": text.IGNORED, "starts": 0}
    with program.layout.use():
        batches = pipeline.evaluation_batches(source, batch_size, rows, padding)
        done, pending = [], None
        for batch in pipeline.to_devices(batches, program.layout, rows, batch_size):
            # One batch ahead and no more: a long queue would hold memory (and can deadlock CPU collectives).
            dispatched = program.eval_step(params, batch)
            if pending:
                done.append(jax.device_get(pending))
            pending = dispatched
        done.append(jax.device_get(pending))
    tokens = sum(int(sums["tokens"]) for sums in done)
    return done[0] | {"loss": sum(float(sums["loss"]) for sums in done) / tokens, "tokens": tokens}


class Interrupted:
    """Turns the first SIGTERM or Ctrl-C into a number that all processes agree on; the second Ctrl-C is immediate."""

    def __init__(self, layout: sharding.Layout):
        self._signal = 0
        self._everywhere = NamedSharding(layout.mesh, P(layout.mesh.axis_names))
        self._max = jax.jit(jnp.max, in_shardings=self._everywhere, out_shardings=layout.replicated)

    def __enter__(self) -> "Interrupted":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> jax.Array | int:
        """The signal that this or any other process has had, or 0; to be read like the metrics of a step.

        All processes read the same at the same step, so that they stop after the same one.
        """
        if jax.process_count() == 1:
            return self._signal
        mine = np.full(1, self._signal, np.int32)
        return self._max(jax.make_array_from_callback((self._everywhere.mesh.size,), self._everywhere, lambda _: mine))

    def _note(self, number: int, _) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(config: Config, workdir: Workdir, *, allow_config_change: bool = False, profile: bool = False) -> int:
    """Trains, from the newest checkpoint of the workdir if it has one.

    Args:
      allow_config_change: go on with a run although its config has changed.
      profile: write a trace of a few steps for TensorBoard's profiler.

    Returns:
      The exit code: 0 when the run is complete, 128 + the number of the signal that ended it.

    Raises:
      UserError: the config, the data or the workdir do not allow it, or the loss is not finite.
    """
    layout = sharding.make_layout(config.mesh)
    pipeline.check_batch(config.train.batch_size, layout, config.train.micro_batches)
    cluster.share("workdir", workdir.create)
    before = workdir.read() if workdir.has_begun else None
    if before and before.fingerprint is None:
        raise UserError(
            f"--workdir={workdir.path} holds converted weights; start from them in another --workdir, with "
            f"--config.train.init_from={workdir.path}."
        )
    origin = Origin(config) if config.train.init_from and not before else None
    progress = metrics.Progress(enabled=cluster.is_first())
    tokenizer = before.tokenizer if before else origin.tokenizer if origin else config.tokenizer
    corpus = cluster.first_before_others(
        "corpus", lambda: text.load(config.data, tokenizer, config.model.block_size, progress.say, progress.status)
    )
    run = Run(config, corpus.tokenizer, corpus.fingerprint, before.skipped if before else ())
    changes = refuse_changes(before, run, workdir.path, allow_config_change) if before else {}

    block_size, batch_size = config.model.block_size, config.train.batch_size
    training = text.TrainingWindows(corpus.train, block_size, config.seed, corpus.border)
    validation = text.EvaluationWindows(corpus.validation, block_size, corpus.border)
    tokens_per_step = batch_size * block_size
    total_steps = config.train.total_steps(block_size, len(training))
    program = build(config, corpus.tokenizer.vocab_size, layout, total_steps)
    program.check_memory(program.abstract_state)
    sample = Sampler(program, run)
    workdir.record(run)

    progress.total_steps = total_steps
    for line in describe(program, config, corpus, total_steps, len(training)):
        progress.say(line)
    for key, (was, now) in changes.items():
        progress.say(f"changed: {key} {was!r} → {now!r}")

    checkpoints = workdir.checkpoints(config.train.keep_checkpoints)
    start, best = checkpoints.last() or 0, checkpoints.best()
    best_loss = best[1] if best else math.inf
    if start >= total_steps:
        checkpoints.close()
        progress.say(f"Nothing to do: {start:,} of {total_steps:,} steps are done in {workdir.path}.")
        return 0
    if start:
        progress.say(f"resuming after step {start:,}")
    elif origin:
        progress.say(f"starting from step {origin.step:,} of {origin.path}")
    rows = layout.local_rows(batch_size)

    def begin(step: int) -> tuple[TrainState, Iterator[dict[str, jax.Array]], float | None]:
        """State, batches and running mean of the loss after a step that was saved, or before the first."""
        batches = pipeline.training_batches(
            training, batch_size, config.seed, rows, step, config.data.prefetch, run.skipped
        )
        batches = pipeline.to_devices(batches, layout, rows, batch_size)
        if step:
            return restore(checkpoints, step, program), batches, checkpoints.mean_loss(step)
        params = origin.restore(program) if origin else None
        with layout.use():
            return program.begin(params) if origin else program.init(), batches, None

    tensorboard = metrics.TensorBoard(workdir.path, start, enabled=cluster.is_first())
    tensorboard.text(start, "config", f"```json\n{json.dumps(dataclasses.asdict(config), indent=1)}\n```")
    chip = hardware.of_device(layout.mesh.devices.flat[0])
    flops_per_step = tokens_per_step * program.model.config.flops_per_token()
    speed = metrics.Speed(tokens_per_step, flops_per_step, chip and chip.flops * layout.mesh.size)

    def left_out(step: int, text: str, count: int) -> None:
        """Shows that a step's update or batch is left out."""
        text = f"Step {step:,} {text} ({count} of at most {config.train.max_skipped})."
        progress.say(text)
        tensorboard.text(step, "skipped", text)

    def report(step: int, measured: dict[str, jax.Array], stop_signal: jax.Array | int) -> int:
        """Waits for the step, checks and shows its metrics; returns the signal to stop on, or 0.

        Raises:
          BadStep: it is one, and its update was made.
        """
        nonlocal mean_loss
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        skipped = int(values.pop("skipped", len(run.skipped)))
        speed.step()
        if wrong := fault(values, config.train, mean_loss):
            is_skipped = not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]))
            if config.train.on_nonfinite != "skip" or not is_skipped or skipped > config.train.max_skipped:
                raise BadStep(step, wrong)
            left_out(step, f"{wrong}: its update is left out", skipped)
        else:
            mean_loss = values["loss"] if mean_loss is None else mean_loss + (values["loss"] - mean_loss) / MEAN_OVER
        progress.update(step, values["loss"], speed.rates(), milestone=step % config.train.log_every == 0)
        if step % config.train.log_every == 0:
            tensorboard.scalars(step, {f"train/{name}": value for name, value in values.items()})
            tensorboard.scalars(step, {"progress/tokens": step * tokens_per_step, "progress/skipped": skipped})
            tensorboard.scalars(step, {f"progress/{name}": value for name, value in speed.rates().items()})
            speed.restart()
        return int(stop_signal)

    def roll_back(bad: BadStep) -> int:
        """Records that the batch of a step is left out; returns the step to go back to.

        Raises:
          UserError: that is not wanted, or was done too often.
        """
        nonlocal run
        checkpoints.wait()
        saved = checkpoints.last()
        if config.train.on_nonfinite != "rollback" or len(run.skipped) >= config.train.max_skipped:
            kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
            hint = "train.on_nonfinite=rollback"
            if config.train.on_nonfinite != "stop":
                hint = "a larger train.max_skipped"
                kept = f"train.max_skipped={config.train.max_skipped} were left out already; {kept}"
            raise UserError(
                f"Step {bad.step} {bad.what}; {kept} in {workdir.path}. Try a lower optimizer.learning_rate, a longer "
                f"optimizer.warmup_tokens, or {hint}."
            )
        number = pipeline.batch_number(bad.step - 1, run.skipped)
        run = dataclasses.replace(run, skipped=(*run.skipped, number))
        workdir.record(run)
        tensorboard.restart(saved or 0)
        left_out(bad.step, f"{bad.what}: back to step {saved or 0:,} and on without batch {number:,}", len(run.skipped))
        return saved or 0

    def evaluate_and_sample(step: int) -> float:
        result = evaluate(program, state.params, validation, batch_size)
        progress.evaluated(step, result["loss"], best=result["loss"] < best_loss)
        tensorboard.scalars(step, {"validation/loss": result["loss"]})
        tensorboard.histogram(step, "validation/logits", result["logits_counts"], result["logits_edges"])
        if config.train.sample_tokens:
            written = sample(state.params, step)
            progress.say("\n".join("  │ " + line for line in written.splitlines()))
            tensorboard.text(step, "sample", "    " + written.replace("\n", "\n    "))
        tensorboard.flush()
        return result["loss"]

    tracer, may_wait = Tracer(workdir.path, start) if profile else None, True
    state, batches, mean_loss = begin(start)
    batch, pending, done, stop_signal, began, compiled = next(batches), None, start, 0, time.perf_counter(), False
    try:
        with Interrupted(layout) as interrupted:
            while done < total_steps and not stop_signal:
                try:
                    if tracer:
                        tracer.before_step(done)
                    if not compiled:
                        progress.say("compiling the training step …")
                    with contextlib.nullcontext() if compiled else speed.pause(), layout.use():
                        state, measured = program.train_step(state, batch)
                    done, compiled = done + 1, True
                    # While the device works on this step, the host fetches the next batch and reads the last metrics.
                    with speed.waiting(device_is_idle=measured["loss"].is_ready):
                        batch = next(batches)
                    if pending:
                        stop_signal = report(*pending)
                    pending = done, measured, interrupted.agreed()

                    is_last = done == total_steps
                    evaluate_now = is_last or (config.train.eval_every and done % config.train.eval_every == 0)
                    save_now = is_last or done % config.train.checkpoint_every == 0 or stop_signal
                    if evaluate_now or save_now:
                        stop_signal = report(*pending) or stop_signal
                        pending = None
                        with speed.pause():
                            loss = evaluate_and_sample(done) if evaluate_now else None
                            if save_now or loss < best_loss:
                                checkpoints.save(done, state.params, state.opt_state, loss, mean_loss)
                            best_loss = min(best_loss, loss if evaluate_now else math.inf)
                except BadStep as bad:
                    with speed.pause():
                        done = roll_back(bad)
                        state = batch = pending = measured = None  # room for the state of before
                        state, batches, mean_loss = begin(done)
                        batch = next(batches)
            if done < total_steps and checkpoints.last() != done:
                # All agreed on the signal only with the metrics of an evaluation that saved nothing.
                checkpoints.save(done, state.params, state.opt_state, mean_loss=mean_loss)
    except Exception as error:
        # Other processes may be gone, and what they have a part in would never end.
        may_wait = isinstance(error, UserError) or not cluster.is_several()
        raise
    finally:
        if tracer:
            tracer.stop()
        tensorboard.close()
        if may_wait:
            checkpoints.close()
    if done < total_steps:
        name = signal.Signals(stop_signal).name
        what = f"saved after step {done:,} of {total_steps:,}; the same command goes on from there."
        progress.say(f"Stopped by {name}, {what}")
        return 128 + stop_signal
    seconds = metrics.duration(time.perf_counter() - began)
    progress.say(f"Done: {total_steps:,} steps in {seconds}, best validation loss {best_loss:.4f}, in {workdir.path}")
    return 0


class BadStep(Exception):
    """A step that cannot stand: `step`, and in words `what` it gave."""

    def __init__(self, step: int, what: str):
        super().__init__(step, what)
        self.step, self.what = step, what


def fault(values: dict[str, float], config: TrainConfig, mean_loss: float | None) -> str:
    """What is wrong with a step, by its metrics and the running mean of the losses before; "" if nothing is."""
    if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm", "parameter_norm")):
        return "gave " + " and ".join(
            f"{name.replace('_', ' ')} {values[name]}" for name in ("loss", "gradient_norm", "parameter_norm")
        )
    if config.spike_factor and mean_loss is not None and values["loss"] > config.spike_factor * mean_loss:
        return f"gave loss {values['loss']:.4f}, more than train.spike_factor={config.spike_factor} × {mean_loss:.4f}"
    return ""


class Origin:
    """The checkpoint that a run takes its first parameters from: the best one in `train.init_from`.

    Attributes:
      path: of its workdir.
      tokenizer: which the run has to take over.
      step: of the checkpoint.

    Raises:
      UserError: there is none, or it has another kind of tokenizer.
    """

    def __init__(self, config: Config):
        workdir = Workdir(config.train.init_from)
        self.path = workdir.path
        try:
            run = workdir.read()
            self._checkpoints = workdir.checkpoints(read_only=True)
            self.step = self._checkpoints.find("best")
        except UserError as error:
            raise UserError(f"train.init_from={config.train.init_from}: {error}") from None
        if run.config.tokenizer.name != config.tokenizer.name:
            raise UserError(
                f"train.init_from={config.train.init_from} has a tokenizer of the kind {run.config.tokenizer.name}; "
                f"set tokenizer.name={run.config.tokenizer.name}."
            )
        self.tokenizer = run.tokenizer

    def restore(self, program: Program) -> Any:
        """The parameters, sharded as the program wants them. Raises UserError where a shape differs, by its name."""
        return self._checkpoints.restore(self.step, params=program.abstract_state.params)["params"]


def restore(checkpoints, step: int, program: Program) -> TrainState:
    """The state after a step, sharded as the program wants it."""
    abstract = program.abstract_state
    restored = checkpoints.restore(step, params=abstract.params, optimizer=abstract.opt_state)
    counter = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(counter, restored["params"], restored["optimizer"])


def describe(
    program: Program, config: Config, corpus: text.Corpus, total_steps: int, rows_per_epoch: int
) -> Iterator[str]:
    """What is about to be trained, on what and where, a line each."""
    c, mesh, batch_size = program.model.config, program.layout.mesh, config.train.batch_size
    shape = f"{c.num_layers} layers, {c.num_heads} heads, {c.embed_dim} wide, block {c.block_size}"
    yield f"model  {program.num_parameters():,} parameters: {shape}, {c.dtype}"
    yield (
        f"data   {len(corpus.train):,} training and {len(corpus.validation):,} validation tokens, "
        f"vocabulary {corpus.tokenizer.vocab_size}"
    )
    state = program.abstract_state
    held = [sharding.bytes_per_device(tree) / 1e6 for tree in (state.params, state.opt_state)]
    whole = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6 for tree in (state.params, state.opt_state)
    ]
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield f"mesh   {sizes} over {mesh.size} × {mesh.devices.flat[0].device_kind}{hosts}, rules {config.mesh.rules}"
    yield (
        f"memory {sum(held):,.1f} MB a device: parameters {held[0]:,.1f}, optimizer {held[1]:,.1f} "
        f"(of {whole[0]:,.1f} and {whole[1]:,.1f} in all)"
    )
    yield from ("       " + line for line in sharding.table(sharding.parameters(state.params, program.logical_axes)))
    tokens = batch_size * c.block_size
    epochs = total_steps * batch_size / rows_per_epoch
    yield f"run    {total_steps:,} steps × {tokens:,} tokens = {total_steps * tokens:,} tokens, {epochs:.1f} epochs"


class Sampler:
    """Samples of text during training."""

    def __init__(self, program: Program, run: Run):
        self._tokenizer, self._train = run.tokenizer, run.config.train
        self._prompt = generate.encode_prompt(run.tokenizer, run.config.train.sample_prompt, "train.sample_prompt")
        self._separator = run.tokenizer.separator  # of documents: the sample is one
        sampling = generate.Sampling(temperature=0.8)
        self._generator = generate.Generator(program.model, program.layout, sampling, stop_token=self._separator)

    def __call__(self, params: Any, seed: int) -> str:
        """The prompt and what the model makes of it."""
        decoding = self._generator.start(params, [self._prompt], seed=seed)
        *_, (sample,) = generate.continuations(
            decoding, self._tokenizer.decode, self._train.sample_tokens, stop_token=self._separator
        )
        return (self._train.sample_prompt or "\n") + sample.text


class Tracer:
    """A profiler trace of a few steps, once the first ones are over."""

    def __init__(self, path: Path, start: int, skip: int = 3, steps: int = 3):
        self._path, self._first, self._after = path, start + skip, start + skip + steps
        self._running = False

    def before_step(self, step: int) -> None:
        if step == self._first and not self._running:
            jax.profiler.start_trace(str(self._path))
            self._running = True
        elif step == self._after:
            self.stop()

    def stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
