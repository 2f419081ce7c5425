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
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt import cluster, hardware, metrics, sharding
from gpt.checkpoint import Checkpoints, Run, Workdir, refuse_changes
from gpt.config import Config, TrainConfig
from gpt.data import Dataset, pipeline
from gpt.errors import UserError
from gpt.loaded import Weights
from gpt.program import Program, TrainState, build, count, evaluate

MEAN_OVER = 50  # steps that the running mean of the loss looks back, about


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
      UserError: the config, the data or the workdir do not allow it, another run is at work there, all checkpoints are
        damaged, the last save failed, or the loss is not finite.
    """
    with workdir.lock():
        return _train(config, workdir, allow_config_change, profile)


def _train(config: Config, workdir: Workdir, allow_config_change: bool, profile: bool) -> int:
    layout = sharding.make_layout(config.mesh)
    pipeline.check_batch(config.train.batch_size, layout, config.train.micro_batches)
    before = workdir.read() if workdir.has_begun else None
    if before and before.fingerprint is None:
        raise UserError(
            f"--workdir={workdir.path} holds converted weights; start from them in another --workdir, with "
            f"--config.train.init_from={workdir.path}."
        )
    origin = first_weights(config, before)
    progress = metrics.Progress(enabled=cluster.is_first())
    tokenizer = before.tokenizer if before else origin.run.tokenizer if origin else config.tokenizer
    dataset = cluster.first_before_others(
        "data", lambda: config.data.load(tokenizer, config.model, progress.say, progress.status)
    )
    run = Run(config, dataset.tokenizer, dataset.fingerprint)
    if before:
        run = dataclasses.replace(run, base=before.base, skipped=before.skipped)
    changes = refuse_changes(before, run, workdir.path, allow_config_change) if before else {}

    batch_size = config.train.batch_size
    training, validation = dataset.training(config.model, config.seed), dataset.evaluation("val", config.model)
    tokens_per_step = batch_size * config.model.length
    total_steps = config.train.total_steps(config.model.length, len(training))
    program = build(config, dataset.tokenizer.vocab_size, layout, total_steps)
    program.check_memory(program.abstract_state)
    first = [origin.restore(program)] if origin else []  # used up by `begin`
    if config.model.lora_rank and not run.base:
        run = dataclasses.replace(run, base=origin.as_base(first[0]))
    preview = dataset.preview(program, config, validation)
    workdir.record(run)

    progress.total_steps = total_steps
    for line in describe(program, config, dataset, total_steps, len(training)):
        progress.say(line)
    for key, (was, now) in changes.items():
        progress.say(f"changed: {key} {was!r} → {now!r}")

    checkpoints, rows = workdir.checkpoints(config.train.keep_checkpoints, progress.say), layout.local_rows(batch_size)

    def begin() -> tuple[int, TrainState, Iterator[dict[str, jax.Array]], float | None]:
        """The newest step saved, or 0, and state, batches and running mean of the loss after it."""
        step, state = checkpoints.last_whole(lambda step: restore(checkpoints, step, program)) or (0, None)
        params = None
        if origin and (config.model.lora_rank or not step):
            params = first.pop() if first else origin.restore(program)
        if step:
            state = state.replace(frozen=params or {})
        else:
            with layout.use():
                state = program.begin(params) if origin else program.init()
        numbers = training, batch_size, config.seed, rows, step, config.data.prefetch, run.skipped
        batches = pipeline.to_devices(pipeline.training_batches(*numbers), layout, rows, batch_size)
        return step, state, batches, checkpoints.mean_loss(step) if step else None

    start, state, batches, mean_loss = begin()
    best = checkpoints.best()
    best_loss = best[1] if best else math.inf
    if start >= total_steps:
        progress.say(f"Nothing to do: {start:,} of {total_steps:,} steps are done in {workdir.path}.")
        return 0
    if start:
        progress.say(f"resuming after step {start:,}")
    elif origin:
        progress.say(f"starting from step {origin.step:,} of {origin.workdir.path}")

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
            checkpoints.poll()
        return int(stop_signal)

    def leave_out(bad: BadStep) -> int:
        """Records that the batch of a step is left out from now on; returns its number.

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
        return number

    def evaluate_and_sample(step: int) -> float:
        params = program.whole(state)
        result = evaluate(program, params, validation, batch_size)
        measures = dataset.report(validation, result)
        progress.evaluated(step, measures, best=result["loss"] < best_loss)
        tensorboard.scalars(step, {f"validation/{name}": value for name, value in measures.items()})
        tensorboard.histogram(step, "validation/logits", result["logits_counts"], result["logits_edges"])
        shown = preview(params, step, result)
        if shown.text:
            progress.say("\n".join("  │ " + line for line in shown.text.splitlines()))
            tensorboard.text(step, "sample", "    " + shown.text.replace("\n", "\n    "))
        for name, png in shown.images.items():
            tensorboard.image(step, name, png)
        tensorboard.flush()
        return result["loss"]

    tracer, may_wait = Tracer(workdir.path, start) if profile else None, True
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
                                tensorboard.flush()  # a run killed after it goes on with the points of all steps
                                checkpoints.save(done, state.params, state.opt_state, loss, mean_loss)
                            best_loss = min(best_loss, loss if evaluate_now else math.inf)
                except BadStep as bad:
                    with speed.pause():
                        number = leave_out(bad)
                        state = batch = pending = measured = None  # room for the state of before
                        done, state, batches, mean_loss = begin()
                        batch = next(batches)
                        tensorboard.restart(done)
                        back = f"back to step {done:,} and on without batch {number:,}"
                        left_out(bad.step, f"{bad.what}: {back}", len(run.skipped))
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
    if checkpoints.failure:
        raise UserError(f"{checkpoints.failure} The same command goes on from there.")
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


def first_weights(config: Config, before: Run | None) -> Weights | None:
    """The weights that a run starts from, or that its adapters belong to; None: random ones, or those it has saved.

    Raises:
      UserError: there are none, they have another kind of tokenizer, or adapters have none to belong to.
    """
    if before and before.base:
        return Weights.of_base(before.base)
    if before:
        return None
    if not config.train.init_from:
        if config.model.lora_rank:
            raise UserError(
                f"model.lora_rank={config.model.lora_rank}: adapters are for trained weights; name them by "
                "train.init_from."
            )
        return None
    try:
        weights = Weights(Workdir(config.train.init_from), "best")
    except UserError as error:
        raise UserError(f"train.init_from={config.train.init_from}: {error}") from None
    if weights.run.config.tokenizer.name != config.tokenizer.name:
        raise UserError(
            f"train.init_from={config.train.init_from} has a tokenizer of the kind "
            f"{weights.run.config.tokenizer.name}; set tokenizer.name={weights.run.config.tokenizer.name}."
        )
    return weights


def restore(checkpoints: Checkpoints, step: int, program: Program) -> TrainState:
    """The state after a step, sharded as the program wants it, without what is frozen."""
    abstract = program.abstract_state
    restored = checkpoints.restore(step, params=abstract.params, optimizer=abstract.opt_state)
    counter = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(counter, restored["params"], restored["optimizer"])


def describe(
    program: Program, config: Config, dataset: Dataset, total_steps: int, rows_per_epoch: int
) -> Iterator[str]:
    """What is about to be trained, on what and where, a line each."""
    c, mesh, batch_size = program.model.config, program.layout.mesh, config.train.batch_size
    yield f"model  {program.num_parameters():,} parameters: {c.summary()}, {c.dtype}"
    state = program.abstract_state
    if c.lora_rank:
        yield f"lora   {count(state.params):,} parameters are trained: rank {c.lora_rank} at {c.lora_targets}"
    yield f"data   {dataset.describe()}"
    trees = (state.params, state.frozen), state.opt_state
    held = [sharding.bytes_per_device(tree) / 1e6 for tree in trees]
    whole = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6 for tree in trees]
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield f"mesh   {sizes} over {mesh.size} × {mesh.devices.flat[0].device_kind}{hosts}, rules {config.mesh.rules}"
    yield (
        f"memory {sum(held):,.1f} MB a device: parameters {held[0]:,.1f}, optimizer {held[1]:,.1f} "
        f"(of {whole[0]:,.1f} and {whole[1]:,.1f} in all)"
    )
    yield from ("       " + line for line in sharding.table(program.parameters()))
    tokens = batch_size * c.length
    epochs = total_steps * batch_size / rows_per_epoch
    yield f"run    {total_steps:,} steps × {tokens:,} tokens = {total_steps * tokens:,} tokens, {epochs:.1f} epochs"


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
