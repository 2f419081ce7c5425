"""Opens a trained model from its workdir: to evaluate it, to generate, or to start another run from its weights.

The checkpoints of a run with LoRA hold its adapters only. Their base, which is the checkpoint with the frozen weights
that the adapters were trained with, is in another workdir, and `run.json` records its path, step and digest. Whoever
opens the adapters opens the base too, verifies its digest, and gets parameters with the adapters merged into them. The
base may be a checkpoint of adapters itself, with another base.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from gpt import sharding
from gpt.checkpointing.run import Base, Run
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.data.base import Dataset
from gpt.models import lora
from gpt.models.base import ModelConfig
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError
from gpt.step import Program, build


class Weights:
    """The model parameters of a checkpoint, with adapters merged: their moving average if the run kept one.

    Args:
      checkpoint: "best", "last" or a step; followed by ",raw", the parameters of the last step and not their average.

    Attributes:
      run: the record of the workdir.
      step: step of the checkpoint.

    Raises:
      UserError: the run, the checkpoint or its base is missing or damaged.
    """

    def __init__(self, workdir: Workdir, checkpoint: str):
        self.workdir, self.run = workdir, workdir.read()
        checkpoints = workdir.checkpoints(run=self.run)
        self.step = checkpoints.find(checkpoint.removesuffix(",raw"))
        self._checkpoint = checkpoints[self.step]
        self._item = "ema" if self._checkpoint.digest("ema") and not checkpoint.endswith(",raw") else "params"
        self._base = Weights.of_base(self.run.base, workdir) if self.run.base else None

    @classmethod
    def of_base(cls, base: Base, workdir: Workdir) -> "Weights":
        """Returns the weights of the base of the adapters in a workdir.

        Raises:
          UserError: the base is missing, has other weights than the recorded ones, or is in a bucket although the
            workdir is local: opening a local workdir uses no network.
        """
        if files.is_local(workdir.path) and not files.is_local(base.path):
            raise UserError(f"--workdir={workdir.path}: base.path={base.path} is on the network; use a local copy.")
        try:
            weights = cls(Workdir(base.path), str(base.step))
        except UserError as error:
            raise UserError(f"Cannot open the base of the adapters in {workdir.path}: {error}") from None
        if weights.as_base().digest != base.digest:
            raise UserError(
                f"Step {base.step} of {base.path} has other weights than the base of the adapters in {workdir.path}: "
                "restore the weights, or set base.path in run.json to a workdir that has them."
            )
        return weights

    def as_base(self) -> Base:
        """Returns the record of these weights as the base of adapters."""
        return Base(str(self.workdir.path), self.step, self._checkpoint.digest(self._item))

    def restore(self, program: Program) -> Any:
        """Returns the parameters as a tree, sharded for a program.

        Raises:
          UserError: a parameter is missing or has another shape, or the checkpoint is damaged.
        """
        if not self._base:
            return self._checkpoint.restore(**{self._item: program.abstract_params})[self._item]
        model = dataclasses.replace(self.run.config.model, scan_layers=program.model.config.scan_layers)
        config = dataclasses.replace(with_batch(self.run.config, program.layout.batch_shards), model=model)
        own = build(config, self.run.tokenizer.vocab_size, program.layout, total_steps=1)
        adapters = self._checkpoint.restore(**{self._item: own.abstract_state.params})[self._item]
        return own.merge(self._base.restore(program), adapters)

    def restore_each(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yields all parameters on the host in parts, so that they need not fit in memory; see `Checkpoint`.

        Args:
          shapes: shapes by names such as "blocks/mlp/up/kernel", with stacked layers.

        Raises:
          UserError: see `restore`.
        """
        adapters = self.adapters()
        parts = self._base.restore_each(shapes) if self._base else self._checkpoint.restore_each(self._item, shapes)
        for name, start, part in parts:
            if name in adapters:
                adapter = {matrix: array[start : start + len(part)] for matrix, array in adapters[name].items()}
                part = part + self.run.config.model.lora_scale * lora.product(adapter, part.shape)
            yield name, start, part

    def adapters(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns the matrices of each adapter, {"a": …, "b": …} with stacked layers, by the name of its kernel."""
        if not self._base:
            return {}
        config = self.run.config.model.resolve(self.run.tokenizer.vocab_size, "cpu")
        config = dataclasses.replace(config, scan_layers=True)
        variables = jax.eval_shape(lambda: config.module().init(jax.random.key(0), config.blank(1)))
        shapes = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, nn.unbox(variables["lora"])), sep="/")
        adapters: dict[str, dict[str, np.ndarray]] = {}
        for name, start, part in self._checkpoint.restore_each(self._item, shapes):
            layer, _, matrix = name.rpartition("/")
            matrices = adapters.setdefault(f"{layer}/kernel", {})
            matrices.setdefault(matrix, np.empty(shapes[name], np.float32))[start : start + len(part)] = part
        return adapters


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model on the devices of this machine.

    Attributes:
      step: step of the checkpoint.
      program: functions of the model, for these devices.
      params: parameters, sharded for the program.
      batch_size: examples in a batch of the program.
    """

    workdir: Workdir
    run: Run
    step: int
    program: Program
    params: Any
    batch_size: int

    @property
    def tokenizer(self) -> Any:
        return self.run.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self.program.model.config

    def dataset(self, path: str | None = None) -> Dataset:
        """Returns the data of the run, or with a path other data of the same kind.

        Raises:
          UserError: the data of the run is missing, not known, or has changed since the training began.
        """
        if path is None and self.run.fingerprint is None:
            raise UserError(f"--workdir={self.workdir.path} holds converted weights and no data; name it with --data.")
        config, model = self.run.config.data.opened(path), self.model_config if path is None else None
        dataset = cluster.first_before_others("data", lambda: config.load(self.tokenizer, model))
        if path is None and dataset.fingerprint != self.run.fingerprint:
            raise UserError(
                f"The data of the run in {self.workdir.path} has changed since the training began (its fingerprint was "
                f"{self.run.fingerprint}, now {dataset.fingerprint}); restore it, or name other data with --data."
            )
        return dataset


def load(workdir: Workdir, checkpoint: str, batch_size: int | None = None) -> Loaded:
    """Returns the model of a workdir, on the mesh of its training if there are enough devices, else on all devices.

    Args:
      checkpoint: see `Weights`.
      batch_size: examples in a batch, rounded up to a multiple of the mesh's batch axes; None: as in training.

    Raises:
      UserError: the run or the checkpoint is missing or damaged, or the model does not fit in memory.
    """
    weights = Weights(workdir, checkpoint)
    run = weights.run
    try:
        layout = sharding.make_layout(run.config.mesh)
    except UserError:
        layout = sharding.make_layout(sharding.MeshConfig())
    batch_size = -(-(batch_size or run.config.train.batch_size) // layout.batch_shards) * layout.batch_shards
    program = build(with_batch(run.config, batch_size), run.tokenizer.vocab_size, layout, total_steps=1)
    program.check_memory(program.abstract_params)
    return Loaded(workdir, run, weights.step, program, weights.restore(program), batch_size)


def with_batch(config: Config, batch_size: int) -> Config:
    """Returns the config with another batch size, one micro-batch, and no attention kernel of another platform."""
    train = dataclasses.replace(config.train, batch_size=batch_size, micro_batches=1)
    return dataclasses.replace(config, train=train, model=config.model.without_kernel())
