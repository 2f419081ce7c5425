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
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt import cluster, durable, hardware, metrics, sharding, versions
from gpt.checkpoint import ORDER, Checkpoints, Run, Workdir, refuse_changes
from gpt.config import Config, TrainConfig
from gpt.data import Dataset, Shown, pipeline
from gpt.errors import UserError
from gpt.loaded import Weights
from gpt.optimizer import schedule
from gpt.program import Program, TrainState, build, count, evaluate
from gpt.signals import Interrupted, Stopped

# With the optimizer's keys, what the learning rate of a step depends on.
SETS_SCHEDULE = ("train.steps", "train.epochs", "train.tokens", "train.batch_size", "model.block_size")
MEAN_OVER = 50  # steps that the running mean of the loss looks back, about


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
        return Training(config, workdir, allow_config_change).finish(profile)


class Training:
    """A run of a config in a workdir, and how far it has come.

    `step` steps are done, and `state` is what they left; `batches` yields those to come. `run` is what the workdir
    records of it. `mean_loss` is the running mean of the loss, `best_loss` the best of the evaluations.
    """

    def __init__(self, config: Config, workdir: Workdir, allow_config_change: bool):
        """Builds and records the run, says what it is, and goes to where it stopped."""
        self.config, self.workdir = config, workdir
        self.layout = sharding.make_layout(config.mesh)
        pipeline.check_batch(config.train.batch_size, self.layout, config.train.micro_batches)
        before = workdir.read() if workdir.has_begun else None
        if before and before.fingerprint is None:
            raise UserError(
                f"--workdir={workdir.path} holds converted weights; start from them in another --workdir, with "
                f"--config.train.init_from={workdir.path}."
            )
        self.origin = origin = first_weights(config, before, workdir)
        self.progress = progress = metrics.Progress(enabled=cluster.is_first())
        tokenizer = before.tokenizer if before else origin.run.tokenizer if origin else config.tokenizer
        self.dataset = cluster.first_before_others(
            "data", lambda: config.data.load(tokenizer, config.model, progress.say, progress.status)
        )
        self.examples = self.dataset.training(config.model, config.seed)
        self.validation = self.dataset.evaluation("val", config.model)
        self.total_steps = config.train.total_steps(config.model.length, len(self.examples))
        self.program = build(config, self.dataset.tokenizer.vocab_size, self.layout, self.total_steps)
        self.program.check_memory(self.program.abstract_state)
        order = pipeline.order_digest(self.examples, config.seed)
        self.run = Run(
            config,
            self.dataset.tokenizer,
            self.dataset.fingerprint,
            environment=environment(self.layout, order),
            id=cluster.share("run", lambda: before.id if before else secrets.token_hex(8)),
        )
        if before:
            self.run = dataclasses.replace(self.run, base=before.base, skipped=before.skipped)
        self._first_params = origin.restore(self.program) if origin else None  # used up by `begin`
        if config.model.lora_rank and not self.run.base:
            self.run = dataclasses.replace(self.run, base=origin.as_base())
        self.checkpoints = workdir.checkpoints(config.train.keep_checkpoints, progress.say, self.run)
        changes = self._refuse_changes(before, allow_config_change) if before else {}
        self.preview = self.dataset.preview(self.program, config, self.validation)

        progress.total_steps = self.total_steps
        for line in describe(self.program, config, self.dataset, self.total_steps, len(self.examples)):
            progress.say(line)
        self.begin()
        workdir.record(self.run)  # only now: what could not be restored leaves no mark
        for line in describe_changes(changes, before, self.run, len(self.examples), self.step):
            progress.say(line)
        best = self.checkpoints.best()
        self.best_loss = best[1] if best else math.inf

    def _refuse_changes(self, before: Run, allow: bool) -> dict[str, tuple[Any, Any]]:
        """As `refuse_changes`, with what the newest checkpoint says to the config."""
        step, state, obstacle = self.checkpoints.last(), self.program.abstract_state, ""
        if not allow and step is not None:
            try:
                self.checkpoints.check_fits(step, params=state.params, optimizer=state.opt_state)
            except UserError as error:
                obstacle = str(error)
        return refuse_changes(before, self.run, self.workdir.path, allow, obstacle)

    def begin(self) -> None:
        """Goes to the newest step saved, or to step 0."""
        config, checkpoints = self.config, self.checkpoints
        params, self._first_params = self._first_params, None
        step, state = checkpoints.last_whole(lambda step: restore(checkpoints, step, self.program)) or (0, None)
        if params is None and self.origin and (config.model.lora_rank or not step):
            params = self.origin.restore(self.program)
        if step:
            state = state.replace(frozen=params if config.model.lora_rank else {})
        else:
            with self.layout.use():
                state = self.program.begin(params) if self.origin else self.program.init()
        self.checkpoints.keep_frozen(state.frozen)
        batch_size, rows = config.train.batch_size, self.layout.local_rows(config.train.batch_size)
        numbers = self.examples, batch_size, config.seed, rows, step, config.data.prefetch, self.run.skipped
        self.batches = pipeline.to_devices(pipeline.training_batches(*numbers), self.layout, rows, batch_size)
        self.step, self.state, self.mean_loss = step, state, checkpoints.mean_loss(step) if step else None

    def finish(self, profile: bool) -> int:
        """Makes the steps that are left; arguments and result as of `train`."""
        progress, workdir, start = self.progress, self.workdir, self.step
        if start >= self.total_steps and not self._lacks_evaluation():
            progress.say(f"Nothing to do: {start:,} of {self.total_steps:,} steps are done in {workdir.path}.")
            return 0
        if start:
            progress.say(f"resuming after step {start:,}")
        elif self.origin:
            progress.say(f"starting from step {self.origin.step:,} of {self.origin.workdir.path}")
        self.tensorboard = metrics.TensorBoard(workdir.path, start, cluster.is_first(), progress.say)
        settings = json.dumps(dataclasses.asdict(self.config), indent=1)
        self.tensorboard.text(start, "config", f"```json\n{settings}\n```")
        chip = hardware.of_device(self.layout.mesh.devices.flat[0])
        self.tokens_per_step = self.config.train.batch_size * self.config.model.length
        flops_per_step = self.tokens_per_step * self.program.model.config.flops_per_token()
        self.speed = metrics.Speed(self.tokens_per_step, flops_per_step, chip and chip.flops * self.layout.mesh.size)

        tracer = Tracer(workdir.path, start, progress.say) if profile else None
        may_wait, began = True, time.perf_counter()
        with Interrupted(self.layout) as interrupted:
            try:
                stop_signal = self._make_steps(interrupted, tracer)
            except Exception as error:
                # Other processes may be gone, and what they have a part in would never end.
                may_wait = isinstance(error, UserError) or not cluster.is_several()
                raise
            finally:
                if tracer:
                    tracer.stop()
                self.tensorboard.close()
                if may_wait:
                    self.checkpoints.close()
        if self.checkpoints.failure:
            raise UserError(f"{self.checkpoints.failure} The same command goes on from there.")
        if stop_signal and (self.step < self.total_steps or self._lacks_evaluation()):
            name = signal.Signals(stop_signal).name
            what = f"saved after step {self.step:,} of {self.total_steps:,}; the same command goes on from there."
            progress.say(f"Stopped by {name}, {what}")
            return 128 + stop_signal
        seconds = metrics.duration(time.perf_counter() - began)
        best = f"best validation loss {self.best_loss:.4f}"
        progress.say(f"Done: {self.total_steps:,} steps in {seconds}, {best}, in {workdir.path}")
        return 0

    def _make_steps(self, interrupted: Interrupted, tracer: "Tracer | None") -> int:
        """Until the last, or the one in which all processes know of a signal; returns that signal, or 0."""
        settings, speed = self.config.train, self.speed
        batch, pending, stop_signal, compiled = next(self.batches), None, 0, False
        if self._lacks_evaluation():
            interrupted.begin()
            with speed.pause():
                self._evaluate(interrupted)
            stop_signal = interrupted.poll()
        while self.step < self.total_steps and not stop_signal:
            try:
                if tracer:
                    tracer.before_step(self.step)
                if not compiled:
                    self.progress.say("compiling the training step …")
                with contextlib.nullcontext() if compiled else speed.pause(), self.layout.use():
                    self.state, measured = self.program.train_step(self.state, batch)
                if not compiled:
                    interrupted.begin()  # until now there was nothing to save
                self.step, compiled = self.step + 1, True
                # While the device works on this step, the host fetches the next batch and reads the last metrics.
                with speed.waiting(device_is_idle=measured["loss"].is_ready):
                    batch = next(self.batches)
                if pending:
                    self._report(*pending)
                pending = self.step, measured
                stop_signal = interrupted.poll()

                is_last, evaluate_now = self.step == self.total_steps, self._is_evaluated()
                save_now = is_last or self.step % settings.checkpoint_every == 0 or stop_signal
                if evaluate_now or save_now:
                    self._report(*pending)
                    pending = None
                    with speed.pause():
                        if save_now:  # first, for a scheduler that ends the run does not wait for an evaluation
                            self._save()
                        if evaluate_now and not stop_signal:
                            loss = self._evaluate(interrupted)
                            stop_signal = interrupted.poll()
                            if stop_signal and self.checkpoints.last() != self.step:
                                self._save(loss)
            except BadStep as bad:
                stop_signal = 0  # to be asked for again after a step that stands
                with speed.pause():
                    batch = pending = measured = None  # room for the state of before
                    self._go_back(bad)
                    batch = next(self.batches)
        return stop_signal

    def _is_evaluated(self) -> bool:
        """Whether an evaluation belongs to the step that was made last."""
        every = self.config.train.eval_every
        return self.step == self.total_steps or bool(every and self.step % every == 0)

    def _lacks_evaluation(self) -> bool:
        """Whether an end of the run came between the save of the last step and its evaluation."""
        is_saved = self.checkpoints.last() == self.step
        return is_saved and self._is_evaluated() and self.checkpoints.validation_loss(self.step) is None

    def _save(self, loss: float | None = None) -> None:
        self.tensorboard.flush()  # a run killed after it goes on with the points of all steps
        state = self.state
        self.checkpoints.save(self.step, state.params, state.opt_state, loss, self.mean_loss, state.frozen)

    def _report(self, step: int, measured: dict[str, jax.Array]) -> None:
        """Waits for a step, checks and shows its metrics.

        Raises:
          BadStep: it is one, and its update was made.
        """
        settings, tensorboard = self.config.train, self.tensorboard
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        skipped = int(values.pop("skipped", len(self.run.skipped)))
        self.speed.step()
        if wrong := fault(values, settings, self.mean_loss):
            is_skipped = not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]))
            if settings.on_nonfinite != "skip" or not is_skipped or skipped > settings.max_skipped:
                raise BadStep(step, wrong)
            self._say_left_out(step, f"{wrong}: its update is left out", skipped)
        else:
            mean = values["loss"] if self.mean_loss is None else self.mean_loss
            self.mean_loss = mean + (values["loss"] - mean) / MEAN_OVER
        self.progress.update(step, values["loss"], self.speed.rates(), milestone=step % settings.log_every == 0)
        if step % settings.log_every == 0:
            tensorboard.scalars(step, {f"train/{name}": value for name, value in values.items()})
            tensorboard.scalars(step, {"progress/tokens": step * self.tokens_per_step, "progress/skipped": skipped})
            tensorboard.scalars(step, {f"progress/{name}": value for name, value in self.speed.rates().items()})
            self.speed.restart()
            self.checkpoints.poll()

    def _go_back(self, bad: "BadStep") -> None:
        """To the newest checkpoint, where the batch of a step is recorded as one to be left out from now on.

        Raises:
          UserError: that is not wanted, or was done too often.
        """
        settings, skipped = self.config.train, self.run.skipped
        self.checkpoints.wait()
        saved = self.checkpoints.last()
        if settings.on_nonfinite != "rollback" or len(skipped) >= settings.max_skipped:
            kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
            hint = "train.on_nonfinite=rollback"
            if settings.on_nonfinite != "stop":
                hint = "a larger train.max_skipped"
                kept = f"train.max_skipped={settings.max_skipped} were left out already; {kept}"
            raise UserError(
                f"Step {bad.step} {bad.what}; {kept} in {self.workdir.path}. Try a lower optimizer.learning_rate, a "
                f"longer optimizer.warmup_tokens, or {hint}."
            )
        number = pipeline.batch_number(bad.step - 1, skipped)
        self.run = dataclasses.replace(self.run, skipped=(*skipped, number))
        self.workdir.record(self.run)
        self.state = None  # room for the one of before
        self.begin()
        self.tensorboard.restart(self.step)
        back = f"back to step {self.step:,} and on without batch {number:,}"
        self._say_left_out(bad.step, f"{bad.what}: {back}", len(self.run.skipped))

    def _say_left_out(self, step: int, text: str, count: int) -> None:
        """Shows that a step's update or batch is left out."""
        text = f"Step {step:,} {text} ({count} of at most {self.config.train.max_skipped})."
        self.progress.say(text)
        self.tensorboard.text(step, "skipped", text)

    def _evaluate(self, interrupted: Interrupted) -> float | None:
        """Shows loss, measures and samples on the validation split, and saves a step that is the best so far.

        Returns:
          The loss; None if a signal ended the evaluation.
        """
        step, tensorboard = self.step, self.tensorboard
        params = self.program.whole(self.state)
        try:
            result = evaluate(self.program, params, self.validation, self.config.train.batch_size, interrupted.check)
        except Stopped:
            return None
        measures = self.dataset.report(self.validation, result)
        self.progress.evaluated(step, measures, best=result["loss"] < self.best_loss)
        tensorboard.scalars(step, {f"validation/{name}": value for name, value in measures.items()})
        tensorboard.histogram(step, "validation/logits", result["logits_counts"], result["logits_edges"])
        tensorboard.flush()
        if self.checkpoints.last() == step:
            self.checkpoints.evaluated(step, result["loss"])
        elif result["loss"] < self.best_loss:
            self._save(result["loss"])
        self.best_loss = min(self.best_loss, result["loss"])
        try:
            shown = self.preview(params, step, result, interrupted.check)
        except Stopped:
            shown = Shown()
        if shown.text:
            self.progress.say("\n".join("  │ " + line for line in shown.text.splitlines()))
            tensorboard.text(step, "sample", "    " + shown.text.replace("\n", "\n    "))
        for name, png in shown.images.items():
            tensorboard.image(step, name, png)
        tensorboard.flush()
        return result["loss"]


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


def first_weights(config: Config, before: Run | None, workdir: Workdir) -> Weights | None:
    """The weights that a run starts from, or that its adapters belong to; None: random ones, or those it has saved.

    Raises:
      UserError: there are none, they have another kind of tokenizer, or adapters have none to belong to.
    """
    if before and before.base:
        return Weights.of_base(before.base, workdir)
    if before:
        return None
    if not config.train.init_from:
        if config.model.lora_rank:
            raise UserError(
                f"model.lora_rank={config.model.lora_rank}: adapters are for trained weights; name them by "
                "train.init_from."
            )
        return None
    if config.model.lora_rank and durable.is_local(workdir.path) and not durable.is_local(config.train.init_from):
        raise UserError(
            f"train.init_from={config.train.init_from}: adapters in a local workdir need a local base, for opening one "
            "uses no network; download that workdir first."
        )
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


def environment(layout: sharding.Layout, order: str) -> dict[str, str]:
    """What the numbers of a run depend on besides its config, for a resumed run to be compared with."""
    device = layout.mesh.devices.flat[0]
    kind = hardware.processor() if device.platform == "cpu" else device.device_kind
    shape = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    return versions.facts() | {"devices": f"{layout.mesh.size} × {kind}", "mesh": shape, ORDER: order}


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


def describe_changes(
    changes: dict[str, tuple[Any, Any]], before: Run | None, now: Run, rows_per_epoch: int, step: int
) -> Iterator[str]:
    """A line for each key that a resumed run changes; the last that the learning rate depends on says what it does."""
    shifted = ""
    of_the_schedule = [key for key in changes if key.startswith("optimizer.") or key in SETS_SCHEDULE]
    if of_the_schedule and step:
        was, is_now = (learning_rate(run.config, rows_per_epoch, step) for run in (before, now))
        if not math.isclose(was, is_now, rel_tol=1e-3):
            shifted = f": the learning rate at step {step:,} becomes {is_now:.2g} instead of {was:.2g}"
    for key, (old, new) in changes.items():
        yield f"changed: {key} {old!r} → {new!r}{shifted if [key] == of_the_schedule[-1:] else ''}"
    if changes.keys() & now.environment.keys():
        yield "note: with these the run resumes to rounding, not to the bit."


def learning_rate(config: Config, rows_per_epoch: int, step: int) -> float:
    """The learning rate of the step that follows `step` steps."""
    total_steps = config.train.total_steps(config.model.length, rows_per_epoch)
    return float(schedule(config.optimizer, config.train.batch_size * config.model.length, total_steps)(step))


class Tracer:
    """A profiler trace of a few steps, once the first ones are over."""

    def __init__(self, path: Path, start: int, say: Callable[[str], None], skip: int = 3, steps: int = 3):
        self._path, self._say, self._first, self._after = path, say, start + skip, start + skip + steps
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
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # a full disk, for instance: no reason to end the run
                self._say(f"note: cannot write the trace to {self._path}: {error}.")
