"""A trained model, opened from its workdir alone: for evaluating, sampling, and as the start of another run."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gpt import sharding
from gpt.checkpointing.run import Base, Run
from gpt.checkpointing.workdir import Workdir
from gpt.config import Config
from gpt.data import tokenizers
from gpt.data.base import Dataset
from gpt.models import lora
from gpt.models.base import ModelConfig
from gpt.runtime import cluster, files
from gpt.runtime.errors import UserError
from gpt.step import Program, build


class Weights:
    """A checkpoint of a workdir, to take the model's parameters from.

    Attributes:
      run: what the workdir says.
      step: of the checkpoint.

    Raises:
      UserError: there is no run, no such checkpoint, or it is damaged.
    """

    def __init__(self, workdir: Workdir, checkpoint: str):
        self.workdir, self.run = workdir, workdir.read()
        self._checkpoints = workdir.checkpoints(run=self.run)
        self.step = self._checkpoints.find(checkpoint)
        self._base = Weights.of_base(self.run.base, workdir) if self.run.base else None

    @classmethod
    def of_base(cls, base: Base, workdir: Workdir) -> "Weights":
        """The weights that the adapters in a workdir belong to.

        Raises:
          UserError: they are missing, have changed, or are in a bucket although the workdir is not: opening one uses no
            network.
        """
        if files.is_local(workdir.path) and not files.is_local(base.path):
            raise UserError(
                f"--workdir={workdir.path}: base.path={base.path} in run.json is an address on the network; download "
                "that workdir and name the copy there."
            )
        try:
            weights = cls(Workdir(base.path), str(base.step))
        except UserError as error:
            raise UserError(f"The weights that adapters were trained for: {error}") from None
        if weights._checkpoints.digest(weights.step) != base.digest:
            raise UserError(
                f"Step {base.step} of {base.path} has other weights than those that the adapters were trained for: put "
                "these back, or name their workdir as base.path in run.json."
            )
        return weights

    def as_base(self) -> Base:
        """The record of these weights for adapters."""
        return Base(str(self.workdir.path), self.step, self._checkpoints.digest(self.step))

    def restore(self, program: Program) -> Any:
        """The parameters, adapters merged, sharded as the program wants them.

        Raises:
          UserError: a shape differs, by its name, or the checkpoint is damaged.
        """
        if self._base:
            scan_layers = program.model.config.scan_layers
            config = with_batch(self.run.config, program.layout.batch_shards)
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=scan_layers))
            own = build(config, self.run.tokenizer.vocab_size, program.layout, total_steps=1)
            adapters = self._checkpoints.restore(self.step, params=own.abstract_state.params)["params"]
            return own.merge(self._base.restore(program), adapters)
        return self._checkpoints.restore(self.step, params=program.abstract_params)["params"]

    def restore_each(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
        """All parameters, by name, as `Checkpoints.restore_each` gives them, adapters merged.

        Raises:
          UserError: as `restore`.
        """
        adapters = self._adapters()
        arrays = self._base.restore_each(shapes) if self._base else self._checkpoints.restore_each(self.step, shapes)
        for name, array in zip(shapes, arrays, strict=True):
            if name in adapters:
                array = array + self.run.config.model.lora_scale * lora.product(adapters[name], array.shape)
            yield array

    def _adapters(self) -> dict[str, dict[str, np.ndarray]]:
        """The matrices of each adapter, by the name of its kernel, layers stacked."""
        if not self._base:
            return {}
        config = self.run.config.model.resolve(self.run.tokenizer.vocab_size, "cpu")
        config = dataclasses.replace(config, scan_layers=True)
        abstract = jax.eval_shape(lambda: config.module().init(jax.random.key(0), config.blank(1)))["lora"]
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract))
        shapes = {sharding.path_name(path): leaf.shape for path, leaf in leaves}
        found = {}
        for name, array in zip(shapes, self._checkpoints.restore_each(self.step, shapes), strict=True):
            place, _, matrix = name.rpartition("/")
            found.setdefault(f"{place}/kernel", {})[matrix] = array
        return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint is and what can be done with it.

    Attributes:
      step: of the checkpoint.
      program: its functions, for the devices of this machine.
      params: restored and sharded.
      batch_size: rows in a batch of `program`.
    """

    workdir: Workdir
    run: Run
    step: int
    program: Program
    params: Any
    batch_size: int

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.run.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self.program.model.config

    def dataset(self, path: str | None = None) -> Dataset:
        """The data of the run, or other data of its kind. Raises UserError where that has changed, or there is none."""
        if path is None and self.run.fingerprint is None:
            raise UserError(f"--workdir={self.workdir.path} holds converted weights and no data; name some by --data.")
        config, model = self.run.config.data.opened(path), self.model_config if path is None else None
        say = functools.partial(print, file=sys.stderr) if cluster.is_first() else lambda line: None
        dataset = cluster.first_before_others("data", lambda: config.load(self.tokenizer, model, say))
        if path is None and dataset.fingerprint != self.run.fingerprint:
            raise UserError(
                f"The data of the run in {self.workdir.path} has changed since the training began: its fingerprint is "
                f"{dataset.fingerprint}, that of the run {self.run.fingerprint}."
            )
        return dataset


def load(workdir: Workdir, checkpoint: str, batch_size: int | None = None) -> Loaded:
    """The model of a workdir, on the mesh of its training if there are the devices for it, else on all devices.

    Args:
      checkpoint: "best", "last" or a step.
      batch_size: rows of a batch, made up to what the mesh divides; None: as in training.

    Raises:
      UserError: there is no run, no such checkpoint, or it is damaged.
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
    """The config with batches of another size, in one part, and no kernel that this platform may lack."""
    train = dataclasses.replace(config.train, batch_size=batch_size, micro_batches=1)
    return dataclasses.replace(config, train=train, model=config.model.without_kernel())
