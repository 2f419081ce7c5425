"""The training loop: restore, step, report, save, evaluate.

Where the first parameters of a run come from:

- They are random, drawn from the seed. Or `train.init_from` names another workdir, and they are those of its best
  checkpoint.
- A run that is resumed continues from its own newest whole checkpoint, whatever it started from.
- With LoRA, the parameters of the other workdir are frozen. The checkpoints hold the adapters alone, so a resumed run
  reads the frozen parameters again from where they are; the workdir records which checkpoint that is.

What happens to a step whose loss, gradient or parameters are not finite, or whose loss is a spike: the run ends, unless
`train.on_nonfinite` has another value.

- `skip`: the devices leave out the update, without a wait. Parameters, their average and the optimizer state stay
  what they were, with the count of updates that decides the learning rate; the step counts.
- `rollback`: the run goes back to its newest checkpoint and on without the batch, whose number the workdir records. So
  the run is, to the bit, one that never saw this batch. Metrics are read a step late, so one more step is repeated.
"""

import contextlib
import dataclasses
import math
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gpt import reporting, sharding
from gpt.checkpointing.checkpoints import Checkpoints
from gpt.checkpointing.loading import Weights
from gpt.checkpointing.run import ORDER, Run, refuse_changes
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config, TrainConfig
from gpt.data import combined, pipeline
from gpt.data.base import Shown
from gpt.inference import previews
from gpt.runtime import cluster, files, hardware, loggers, versions
from gpt.runtime.errors import UserError
from gpt.runtime.progress import duration, say, task
from gpt.runtime.signals import Interrupted, Stopped
from gpt.step import Program, TrainState, build, evaluate

MEAN_OVER = 50  # steps that the running mean of the loss looks back, about


def train(
    config: Config,
    workdir: Workdir,
    *,
    allow_config_change: bool = False,
    profile: bool = False,
    dry_run: bool = False,
    all_parameters: bool = False,
) -> int:
    """Trains, from the newest checkpoint of the workdir if it has one.

    Args:
      allow_config_change: resume a run although its config has changed.
      profile: write a trace of a few steps for TensorBoard's profiler.
      dry_run: read and check everything, compile the step, show what would be trained, and leave the workdir alone.
      all_parameters: show the sharding of all parameters instead of the largest.

    Returns:
      The exit code: 0 when the run is complete, 128 + the number of the signal that ended it.

    Raises:
      UserError: the config, the data or the workdir do not allow it, another run is at work there, all checkpoints are
        damaged, the last save failed, or the loss is not finite.
    """
    with contextlib.nullcontext() if dry_run else workdir.lock():
        training = Training(config, workdir, allow_config_change, all_parameters)
        return training.check() if dry_run else training.finish(profile)


class Training:
    """A run of a config in a workdir.

    Attributes:
      step: steps done so far.
      state: parameters and optimizer state after them.
      batches: the batches to come.
      run: what the workdir records of the run.
      mean_loss: running mean of the training loss; None before the first step.
      best_loss: lowest validation loss among the checkpoints and evaluations.
    """

    def __init__(self, config: Config, workdir: Workdir, allow_config_change: bool, all_parameters: bool):
        """Reads the data, builds the program of the run, compares the run with its record, and describes it."""
        self.config, self.workdir = config, workdir
        loggers.require(config.train.loggers)
        self.layout = sharding.make_layout(config.mesh)
        pipeline.check_batch(config.train.batch_size, self.layout, config.train.micro_batches)
        recorded = workdir.read() if workdir.has_begun else None
        if recorded and recorded.fingerprint is None:
            raise UserError(
                f"--workdir={workdir.path} holds converted weights; start from them in another --workdir, with "
                f"--config.train.init_from={workdir.path}."
            )
        if recorded and allow_config_change:
            data = config.data.resumed(recorded.config.data, workdir.checkpoints().last() or 0)
            self.config = config = dataclasses.replace(config, data=data)
        self.initial = initial = initial_weights(config, recorded, workdir)

        # The data, and the program for it.
        tokenizer = recorded.tokenizer if recorded else initial.run.tokenizer if initial else config.tokenizer
        with task("reading the data"):
            self.dataset = cluster.first_before_others("data", lambda: config.data.load(tokenizer, config.model))
        self.examples = self.dataset.training(config.model, config.seed)
        self.total_steps = config.train.total_steps(config.model.length, len(self.examples))
        whole = self.dataset.evaluation("val", config.model)
        most = config.train.evaluated(len(whole), config.model.length, self.total_steps)
        self.validation = combined.bounded(whole, most, config.seed)
        with task("building the model"):
            self.program = build(config, self.dataset.tokenizer.vocab_size, self.layout, self.total_steps)
        self.program.check_memory(self.program.abstract_state)
        self.preview = previews.make(self.dataset, self.program, config, whole)

        # The record of the run, compared with the one in the workdir.
        self.run = Run(
            config,
            self.dataset.tokenizer,
            self.dataset.fingerprint,
            recorded.base if recorded else initial.as_base() if initial and config.model.lora_rank else None,
            recorded.skipped if recorded else (),
            len(self.validation),
            self.total_steps,
            environment(self.layout, pipeline.order_digest(self.examples, config.seed)),
            cluster.share("run", lambda: recorded.id if recorded else secrets.token_hex(8)),
        )
        self.checkpoints = workdir.checkpoints(config.train.keep_checkpoints, self.run)
        saved, changes = self.checkpoints.last() or 0, {}
        if recorded:
            changes = self._refuse_changes(recorded, allow_config_change)
        sources = self.examples, (len(self.validation), len(whole))
        for line in reporting.describe(self.program, config, self.dataset, self.total_steps, *sources):
            say(line)
        if all_parameters or not saved:
            say(reporting.parameter_table(self.program, all_parameters))
        for line in reporting.describe_changes(changes, recorded, self.run, len(self.examples), saved):
            say(line)

    def check(self) -> int:
        """Compiles the training step and shows its memory; returns 0."""
        say(reporting.describe_memory(self.config, self.program))
        saved = self.checkpoints.last()
        begins = f"resume after step {saved:,}" if saved else "start"
        say(f"Nothing was trained: without --dry_run, the run would {begins} in {self.workdir.path}.")
        return 0

    def _refuse_changes(self, recorded: Run, allow: bool) -> dict[str, tuple[Any, Any]]:
        """`refuse_changes`, with the reason why the newest checkpoint does not fit the config, if it does not."""
        step, state, obstacle = self.checkpoints.last(), self.program.abstract_state, ""
        if not allow and step is not None:
            try:
                self.checkpoints[step].check_fits(**state.items)
            except UserError as error:
                obstacle = str(error)
        return refuse_changes(recorded, self.run, self.workdir.path, allow, obstacle)

    def _begin(self) -> tuple[int, TrainState, Iterator[dict[str, jax.Array]], float | None]:
        """Returns step, state, batches and mean loss of the newest whole checkpoint, or of step 0."""
        config, program, checkpoints = self.config, self.program, self.checkpoints
        is_lora = bool(config.model.lora_rank)
        step, state = checkpoints.last_whole(lambda step: restore(checkpoints, step, program)) or (0, None)
        params = self.initial.restore(program) if self.initial and (is_lora or not step) else None
        if state is None:
            with self.layout.use():
                state = program.init() if params is None else program.begin(params)
        elif is_lora:
            state = state.replace(frozen=params)
        checkpoints.keep_frozen(state.frozen)
        batch_size, rows = config.train.batch_size, self.layout.local_rows(config.train.batch_size)
        batches = pipeline.training_batches(
            self.examples, batch_size, config.seed, rows, step, config.data.prefetch, self.run.skipped
        )
        batches = pipeline.to_devices(batches, self.layout, batch_size)
        return step, state, batches, checkpoints[step].record.mean_loss if step else None

    def finish(self, profile: bool) -> int:
        """Restores the newest checkpoint, records the run, and takes the remaining steps; as `train`."""
        with task("restoring" if self.checkpoints.last() else "creating the parameters"):
            self.step, self.state, self.batches, self.mean_loss = self._begin()
        self.best_loss = (self.checkpoints.best() or (0, math.inf))[1]
        self.workdir.record(self.run)  # only now: what could not be restored leaves no trace
        settings, hparams = dataclasses.asdict(self.config), reporting.hparams(self.config, self.program)
        session = loggers.Session(self.workdir.path, self.step, self.run.id, settings, hparams)
        chosen = loggers.Loggers(self.config.train.loggers, session, cluster.is_first())
        sources = self.dataset, self.examples, len(self.validation)
        self.report = reporting.Report(self.config, self.program, *sources, chosen, self.total_steps)
        start, total = self.step, self.total_steps
        if start >= total and not self._lacks_evaluation():
            say(f"Nothing to do: {start:,} of {total:,} steps are done in {self.workdir.path}.")
            return 0
        if start:
            say(f"resuming after step {start:,}")
        elif self.initial:
            say(f"starting from step {self.initial.step:,} of {self.initial.workdir.path}")
        self.report.loggers.begin()
        tracer = reporting.Tracer(self.workdir.path, start) if profile else None
        began = time.perf_counter()
        with Interrupted(self.layout.mesh) as interrupted, task(self.report.steps), self._closing(tracer):
            stop_signal = self._take_steps(interrupted, tracer)
        if self.checkpoints.failure:
            raise UserError(f"{self.checkpoints.failure} The same command resumes from there.")
        if stop_signal and (self.step < total or self._lacks_evaluation()):
            name = signal.Signals(stop_signal).name
            say(f"Stopped by {name}, saved after step {self.step:,} of {total:,}; the same command resumes from there.")
            return 128 + stop_signal
        seconds = duration(time.perf_counter() - began)
        say(f"Done: {total:,} steps in {seconds}, best validation loss {self.best_loss:.4f}, in {self.workdir.path}")
        return 0

    @contextlib.contextmanager
    def _closing(self, tracer: reporting.Tracer | None) -> Iterator[None]:
        """Closes the trace, the events and the checkpoints at the end, however it comes."""
        may_wait = True
        try:
            yield
        except Exception as error:
            # After an error, other processes may be gone, and a collective operation with them would never end.
            may_wait = isinstance(error, UserError) or not cluster.is_several()
            raise
        finally:
            if tracer:
                tracer.stop()
            self.report.loggers.close(self.step >= self.total_steps)
            if may_wait:
                with task("finishing the save"):
                    self.checkpoints.close()

    def _take_steps(self, interrupted: Interrupted, tracer: reporting.Tracer | None) -> int:
        """Takes steps until the last, or until all processes know of a signal; returns that signal, or 0."""
        settings, speed = self.config.train, self.report.speed
        batch, pending, stop_signal, is_compiled = next(self.batches), None, 0, False
        if self._lacks_evaluation():
            interrupted.begin()
            with speed.pause("evaluation"):
                self._evaluate(interrupted)
            stop_signal = interrupted.poll()
        while self.step < self.total_steps and not stop_signal:
            try:
                if tracer:
                    tracer.before_step(self.step)
                with contextlib.nullcontext() if is_compiled else self.report.compiling(), self.layout.use():
                    self.state, metrics = self.program.train_step(self.state, batch)
                if not is_compiled:
                    interrupted.begin()  # until now there was nothing to save
                self.step, is_compiled = self.step + 1, True
                # While the device computes this step, the host fetches the next batch and reads the last metrics.
                with speed.waiting(device_is_idle=metrics["loss"].is_ready):
                    batch = next(self.batches)
                if pending:
                    self._report(*pending)
                pending = self.step, metrics
                stop_signal = interrupted.poll()

                is_last, evaluate_now = self.step == self.total_steps, self._is_evaluated()
                save_now = is_last or self.step % settings.checkpoint_every == 0 or stop_signal
                if evaluate_now or save_now:
                    self._report(*pending)
                    pending = None
                    if save_now:  # first, because a scheduler that ends the run does not wait for an evaluation
                        with speed.pause("save"):
                            self._save()
                    if evaluate_now and not stop_signal:
                        with speed.pause("evaluation"):
                            loss = self._evaluate(interrupted)
                            stop_signal = interrupted.poll()
                            if stop_signal and self.checkpoints.last() != self.step:
                                self._save(loss)
            except BadStep as bad:
                stop_signal = 0  # polled again after a step that is kept
                with speed.pause("rollback"):
                    del batch, metrics  # frees memory for the restored state
                    self._roll_back(bad)
                    batch, pending = next(self.batches), None
        return stop_signal

    def _is_evaluated(self) -> bool:
        """Returns whether an evaluation belongs to the last step."""
        every = self.config.train.eval_every
        return self.step == self.total_steps or bool(every and self.step % every == 0)

    def _lacks_evaluation(self) -> bool:
        """Returns whether the run ended between the save of its last step and the evaluation that belongs to it."""
        is_saved = self.checkpoints.last() == self.step
        return is_saved and self._is_evaluated() and self.checkpoints[self.step].record.validation_loss is None

    def _save(self, loss: float | None = None) -> None:
        self.report.loggers.flush()  # a run killed after the save resumes with the events of all its steps
        state = self.state
        with task("saving"):
            self.checkpoints.save(self.step, state.items, loss, self.mean_loss, state.frozen)

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step, checks and shows its metrics.

        Raises:
          BadStep: the metrics are not finite or a spike, and the update was made.
        """
        settings = self.config.train
        self.report.norms = metrics.pop("norms")  # stay on the devices until an evaluation
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped", len(self.run.skipped)))
        self.report.speed.step()
        if problem := find_problem(values, settings, self.mean_loss):
            is_skipped = not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]))
            if settings.on_nonfinite != "skip" or not is_skipped or skipped > settings.max_skipped:
                raise BadStep(step, problem)
            self.report.left_out(step, f"{problem}: its update is left out", skipped)
        else:
            mean = values["loss"] if self.mean_loss is None else self.mean_loss
            self.mean_loss = mean + (values["loss"] - mean) / MEAN_OVER
        if self.report.step(step, values, self.mean_loss, skipped):
            self.checkpoints.poll()

    def _roll_back(self, bad: "BadStep") -> None:
        """Goes back to the newest checkpoint, and on without the batch of a bad step.

        Raises:
          UserError: the config does not ask for it, or it was done `train.max_skipped` times.
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
                f"Step {bad.step} {bad.problem}; {kept} in {self.workdir.path}. Try a lower optimizer.learning_rate, a "
                f"longer optimizer.warmup_tokens, or {hint}."
            )
        number = pipeline.batch_number(bad.step - 1, skipped)
        self.run = dataclasses.replace(self.run, skipped=(*skipped, number))
        self.workdir.record(self.run)
        del self.state  # frees memory for the restored state
        self.step, self.state, self.batches, self.mean_loss = self._begin()
        self.report.loggers.restart(self.step)
        back = f"back to step {self.step:,} and on without batch {number:,}"
        self.report.left_out(bad.step, f"{bad.problem}: {back}", len(self.run.skipped))

    def _evaluate(self, interrupted: Interrupted) -> float | None:
        """Evaluates the validation split, shows the result and samples, and saves a step that is the best so far.

        Returns:
          The loss; None if a signal ended the evaluation.
        """
        step, params = self.step, self.program.merged_params(self.state)
        options = self.validation, self.config.train.batch_size, interrupted.check
        try:
            result, raw = evaluate(self.program, params, *options), {}
            if self.state.ema:
                raw_params = self.program.merged_params(self.state, raw=True)
                raw = {"raw_loss": evaluate(self.program, raw_params, *options)["loss"]}
        except Stopped:
            return None
        loss = result["loss"]
        measures = self.dataset.report(self.validation, result) | raw
        self.report.evaluation(step, measures, result, self.best_loss, self.state.params)
        if self.checkpoints.last() == step:
            self.checkpoints.evaluated(step, loss)
        elif loss < self.best_loss:
            self._save(loss)
        self.best_loss = min(self.best_loss, loss)
        shown = Shown()
        with contextlib.suppress(Stopped), task("sampling"):
            shown = self.preview(params, step, result, interrupted.check)
        self.report.preview(step, shown)
        return loss


class BadStep(Exception):
    """A step whose update cannot be kept.

    Attributes:
      step: its number.
      problem: what is wrong with it, as `find_problem` describes it.
    """

    def __init__(self, step: int, problem: str):
        super().__init__(step, problem)
        self.step, self.problem = step, problem


def find_problem(metrics: dict[str, float], config: TrainConfig, mean_loss: float | None) -> str:
    """Returns what is wrong with the metrics of a step as text; "" if nothing is.

    Args:
      mean_loss: running mean of the losses of the steps before.
    """
    names = ("loss", "gradient_norm", "parameter_norm")
    if not all(math.isfinite(metrics[name]) for name in names):
        return "gave " + " and ".join(f"{name.replace('_', ' ')} {metrics[name]}" for name in names)
    if config.spike_factor and mean_loss is not None and metrics["loss"] > config.spike_factor * mean_loss:
        return f"gave loss {metrics['loss']:.4f}, more than train.spike_factor={config.spike_factor} × {mean_loss:.4f}"
    return ""


def initial_weights(config: Config, recorded: Run | None, workdir: Workdir) -> Weights | None:
    """Returns the weights of another workdir that a run starts from, or that its adapters belong to.

    Args:
      recorded: what the workdir records of the run; None: it has not begun.

    Returns:
      None where the parameters are random, or those of the run's own checkpoints.

    Raises:
      UserError: there are no such weights, they have another kind of tokenizer, or adapters have none to belong to.
    """
    if recorded:
        return Weights.of_base(recorded.base, workdir) if recorded.base else None
    if not config.train.init_from:
        if config.model.lora_rank:
            raise UserError(
                f"model.lora_rank={config.model.lora_rank}: adapters are for trained weights; name them by "
                "train.init_from."
            )
        return None
    if config.model.lora_rank and files.is_local(workdir.path) and not files.is_local(config.train.init_from):
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
    """Returns what the numbers of a run depend on besides its config: versions, devices, the mesh, the data order."""
    device = layout.mesh.devices.flat[0]
    kind = hardware.processor() if device.platform == "cpu" else device.device_kind
    shape = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    return versions.facts() | {"devices": f"{layout.mesh.size} × {kind}", "mesh": shape, ORDER: order}


def restore(checkpoints: Checkpoints, step: int, program: Program) -> TrainState:
    """Returns the state after a step, sharded for the program, without frozen parameters."""
    abstract = program.abstract_state
    restored = checkpoints[step].restore(**abstract.items)
    counter = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(counter, restored["params"], restored["optimizer"], ema=restored.get("ema", {}))
