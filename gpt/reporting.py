"""What a person sees of a training run: lines of text, and what loggers such as TensorBoard show."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt import parameters, sharding, statistics
from gpt.checkpointing.run import Run
from gpt.config import Config, flatten, is_harmless
from gpt.data.base import IGNORED, Dataset, Shown
from gpt.data.combined import Mixture
from gpt.data.packing import PackedDocuments
from gpt.data.text import Corpus
from gpt.inference import pictures
from gpt.optimizer import factor_of_kernels, schedule
from gpt.runtime import cluster, hardware
from gpt.runtime.errors import UserError
from gpt.runtime.loggers import Loggers
from gpt.runtime.progress import Speed, Steps, say, task
from gpt.step import Program, count

# The config keys by which runs are compared even if they have their default values, or change only the length.
HPARAMS = ("seed", "model.family", "optimizer.learning_rate", "train.batch_size", "train.steps")

# The config keys that decide the learning rate of a step, with those of the optimizer.
SCHEDULE_KEYS = ("train.steps", "train.epochs", "train.tokens", "train.batch_size", "model.block_size")


class Report:
    """Shows the steps and evaluations of a run, as a line of progress and to loggers.

    Args:
      total_steps: number of steps of the run.
      num_evaluated: number of examples of an evaluation.

    Attributes:
      steps: the line about the steps.
      loggers: write the measurements, and have to be started.
      speed: measures the rates of the steps.
      norms: those of the last step, on the devices; see `Program.train_step`.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        dataset: Dataset,
        examples: Any,
        num_evaluated: int,
        loggers: Loggers,
        total_steps: int,
    ):
        self.steps, self.loggers, self._settings, self._program = Steps(total_steps), loggers, config.train, program
        self._length, self._examples, self._num_evaluated = config.model.length, examples, num_evaluated
        self._tokens_per_step = config.train.batch_size * config.model.length
        has_loggers = config.train.loggers and cluster.is_first()
        self._bytes = (
            bytes_per_target(dataset, examples, total_steps * config.train.batch_size) if has_loggers else None
        )
        self._kernels = factor_of_kernels(config.optimizer, program.model.config.width_ratio)
        self._shown: set[str] = set()  # totals that have not always been 0
        mesh = program.layout.mesh
        chip = hardware.of_device(mesh.devices.flat[0])
        flops_per_step = self._tokens_per_step * program.model.config.flops_per_token()
        self.speed = Speed(self._tokens_per_step, flops_per_step, chip.flops * mesh.size if chip else None)
        self.norms: jax.Array | None = None

    def step(self, step: int, metrics: dict[str, float], mean_loss: float | None, skipped: int) -> bool:
        """Shows the metrics of a step; returns whether it was one of each `train.log_every` steps.

        Args:
          mean_loss: running mean of the losses.
          skipped: how many updates or batches the run has left out so far.
        """
        is_logged = step % self._settings.log_every == 0
        rates, left = self.speed.rates(), self._seconds_left(step)
        self.steps.update(step, metrics["loss"], mean_loss, rates, left, milestone=is_logged)
        if is_logged:
            if self._bytes:
                metrics = metrics | {"bits_per_byte": metrics["loss"] / math.log(2) / self._bytes}
            if self._kernels != 1:
                metrics = metrics | {"learning_rate_of_kernels": metrics["learning_rate"] * self._kernels}
            totals = {"tokens": step * self._tokens_per_step, "skipped": skipped} | self.speed.rates()
            self._shown |= {name for name, value in totals.items() if value}
            values = {f"train/{name}": value for name, value in metrics.items()}
            values |= {f"progress/{name}": value for name, value in totals.items() if name in self._shown}
            values |= {f"used_memory/{name}": value / 1e9 for name, value in hardware.memory_in_use().items()}
            for name, tokens, epochs in sources(self._examples, step, self._settings.batch_size, self._length):
                values |= {f"sources/{name}/tokens": tokens, f"sources/{name}/epochs": epochs}
            self.loggers.scalars(step, values)
            self.speed.restart()
        return is_logged

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Shows that the training step is compiled meanwhile, and excludes the time from the rates."""
        with self.speed.pause("compilation"), task("compiling the training step"):
            yield

    def _seconds_left(self, step: int) -> float:
        """Returns the time that the remaining steps, evaluations and saves will take."""
        total = self.steps.total_steps

        def due(every: int) -> int:
            """Returns how many of each `every` steps are left; the last step counts in any case."""
            return total // every - step // every + bool(total % every) if every else 1

        evaluations = due(self._settings.eval_every), float(self._num_evaluated * self._length)
        pauses = {"evaluation": evaluations, "save": (due(self._settings.checkpoint_every), 0.0)}
        return self.speed.left(total - step, pauses)

    def evaluation(
        self, step: int, measures: dict[str, float], result: dict[str, Any], best_loss: float, params: Any
    ) -> None:
        """Shows the result of an evaluation.

        Args:
          best_loss: the lowest loss of the evaluations before.
          params: the parameters that are trained.
        """
        self.steps.evaluated(step, measures, best=measures["loss"] < best_loss)
        if seen := [*sources(self._examples, step, self._settings.batch_size, self._length)]:
            parts = (f"{name} {tokens:,} ({epochs:.2f} epochs)" for name, tokens, epochs in seen)
            say(f"tokens seen of {', '.join(parts)}")
        if not self._settings.loggers:
            return
        _, *measured = measures.items()  # the first is the number of targets
        values = {f"validation/{name}": value for name, value in measured}
        values["validation/best_loss"] = min(best_loss, measures["loss"])
        axes = self._program.trained_axes
        names = statistics.names(params, axes)
        if self.norms is not None:
            for kind, norms in zip(("gradient", "update", "parameter"), jax.device_get(self.norms), strict=True):
                values |= {f"weights/{kind}_norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
        self.loggers.scalars(step, values)
        self.loggers.histogram(step, "validation/logits", result["logits_counts"], result["logits_edges"])
        found = statistics.histograms(params, axes, self._program.layout)
        for name, (counts, edges) in zip(names, found, strict=True):
            self.loggers.histogram(step, f"weights/histogram/{name}", counts, edges)
        self.loggers.flush()

    def preview(self, step: int, shown: Shown) -> None:
        """Shows samples, or examples of mistakes."""
        if shown.text:
            say("\n".join("  │ " + line for line in shown.text.splitlines()))
            self.loggers.text(step, "sample", "    " + shown.text.replace("\n", "\n    "))
        for name, pixels in shown.pictures.items():
            self.loggers.image(step, f"validation/{name}", pictures.png(pixels))
        self.loggers.flush()

    def left_out(self, step: int, text: str, skipped: int) -> None:
        """Shows that the update or the batch of a step is left out."""
        text = f"Step {step:,} {text} ({skipped} of at most {self._settings.max_skipped})."
        say(text)
        self.loggers.text(step, "skipped", text)


def hparams(config: Config, program: Program) -> dict[str, Any]:
    """Returns the settings to compare runs by: those that change its results and are not the default, and `HPARAMS`."""
    values = flatten(dataclasses.asdict(config))
    parts = {part: type(getattr(config, part))() for part in ("model", "data")}  # with the default values
    defaults = flatten(dataclasses.asdict(Config(**parts)))
    changed = {key for key, value in values.items() if value != defaults[key] and not is_harmless(key)}
    chosen = {key: value for key, value in values.items() if key in changed.union(HPARAMS)}
    return {"parameters": program.num_parameters()} | chosen


def bytes_per_target(dataset: Dataset, examples: Any, count: int) -> float | None:
    """Returns the mean number of bytes of text that a target stands for, from a sample; None if the data is no text.

    Args:
      examples: the source of the training examples.
      count: number of training examples of the run.
    """
    if not isinstance(dataset, Corpus):
        return None
    is_mixture = isinstance(examples, Mixture)
    parts = [*examples.parts.values()] if is_mixture else [examples]
    means = []
    for part in parts:
        places = np.linspace(0, len(part) - 1, 64).astype(int)
        targets = np.concatenate([part.example(0, int(i))["targets"] for i in places])
        means.append(dataset.tokenizer.byte_lengths[targets[targets != IGNORED]].mean())
    return float(np.average(means, weights=examples.drawn(count, 1) if is_mixture else None))


class Tracer:
    """Writes a profiler trace of a few steps, after the first steps.

    Args:
      path: folder of TensorBoard's events.
      start: the step that the run starts after.
    """

    def __init__(self, path: Path, start: int, skip: int = 3, steps: int = 3):
        self._path, self._first, self._after = path, start + skip, start + skip + steps
        self._running = False

    def before_step(self, step: int) -> None:
        """Starts or stops the trace, where that is due."""
        if step == self._first and not self._running:
            jax.profiler.start_trace(str(self._path))
            self._running = True
        elif step == self._after:
            self.stop()

    def stop(self) -> None:
        """Stops the trace, if it is running."""
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # a full disk, for instance: no reason to end the run
                say(f"note: cannot write the trace to {self._path}: {error}.")


def sources(examples: Any, step: int, batch_size: int, length: int) -> Iterator[tuple[str, int, float]]:
    """Yields (name, tokens seen, epochs seen) of each source of a mixture after a step."""
    if isinstance(examples, Mixture):
        drawn = examples.drawn(step * batch_size, batch_size)
        for (name, part), count in zip(examples.parts.items(), drawn, strict=True):
            yield name, int(count) * length, float(count / len(part))


def describe(
    program: Program, config: Config, dataset: Dataset, total_steps: int, examples: Any, evaluated: tuple[int, int]
) -> Iterator[str]:
    """Yields lines that tell what is about to be trained, on what data and which devices.

    Args:
      examples: the source of the training examples.
      evaluated: number of examples of an evaluation, and of all that are for validation.
    """
    c, mesh, batch_size = program.model.config, program.layout.mesh, config.train.batch_size
    yield f"model  {program.num_parameters():,} parameters: {c.summary()}, {c.dtype}"
    state = program.abstract_state
    if c.lora_rank:
        yield f"lora   {count(state.params):,} parameters are trained: rank {c.lora_rank} at {c.lora_targets}"
    yield f"data   {dataset.describe()}"
    for part in examples.parts.values() if isinstance(examples, Mixture) else [examples]:
        if isinstance(part, PackedDocuments):
            yield f"       {part.summary}"
    trees = (state.params, state.frozen), (state.opt_state, state.ema)
    held = [sharding.bytes_per_device(tree) / 1e6 for tree in trees]
    whole = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6 for tree in trees]
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield f"mesh   {sizes} over {mesh.size} × {mesh.devices.flat[0].device_kind}{hosts}, rules {config.mesh.rules}"
    yield (
        f"memory {sum(held):,.1f} MB a device: parameters {held[0]:,.1f}, optimizer {held[1]:,.1f} "
        f"(of {whole[0]:,.1f} and {whole[1]:,.1f} in all)"
    )
    tokens = batch_size * c.length
    epochs = total_steps * batch_size / len(examples)
    yield f"run    {total_steps:,} steps × {tokens:,} tokens = {total_steps * tokens:,} tokens, {epochs:.1f} epochs"
    for name, seen, epochs in sources(examples, total_steps, batch_size, c.length):
        yield f"       of them from {name}: {seen:,} ({seen / (total_steps * tokens):.1%}), {epochs:.2f} epochs"
    if evaluated[0] < evaluated[1]:
        yield f"eval   {evaluated[0]:,} of {evaluated[1]:,} validation examples, the same at each evaluation"


def parameter_table(program: Program, is_whole: bool) -> str:
    """Returns a table of how the parameters are sharded: all of them, or the largest."""
    found = parameters.of_program(program)
    return "\n".join("       " + line for line in (parameters.table if is_whole else parameters.largest)(found))


def describe_memory(config: Config, program: Program) -> str:
    """Compiles the training step, and returns a line about the memory that it needs on each device.

    Raises:
      UserError: a device has less memory.
    """
    from gpt.planning import compiling

    with task("compiling the training step"):
        try:
            used: Any = compiling.compile_step(config, program).executable.memory_analysis()
        except compiling.DoesNotFit as error:
            raise UserError(f"The training step needs more memory than a device has: {error}.") from None
    temporaries = (used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes) / 1e6
    whole = temporaries + used.argument_size_in_bytes / 1e6
    return f"step   {whole:,.1f} MB a device while it runs, {temporaries:,.1f} of them gradients and activations"


def describe_changes(
    changes: dict[str, tuple[Any, Any]], recorded: Run | None, run: Run, examples_per_epoch: int, step: int
) -> Iterator[str]:
    """Yields a line for each value that a resumed run changes, and what they do to the learning rate."""
    shifted = ""
    of_the_schedule = [key for key in changes if key.startswith("optimizer.") or key in SCHEDULE_KEYS]
    if recorded and of_the_schedule and step:
        was, is_now = (learning_rate(each.config, examples_per_epoch, step) for each in (recorded, run))
        if not math.isclose(was, is_now, rel_tol=1e-3):
            shifted = f": the learning rate at step {step:,} becomes {is_now:.2g} instead of {was:.2g}"
    for key, (old, new) in changes.items():
        yield f"changed: {key} {old!r} → {new!r}{shifted if [key] == of_the_schedule[-1:] else ''}"
    if changes.keys() & run.environment.keys():
        yield "note: with these the run resumes to rounding, not to the bit."


def learning_rate(config: Config, examples_per_epoch: int, step: int) -> float:
    """Returns the learning rate of the step that follows `step` steps."""
    total_steps = config.train.total_steps(config.model.length, examples_per_epoch)
    return float(schedule(config.optimizer, config.train.batch_size * config.model.length, total_steps)(step))
