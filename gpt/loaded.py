"""A trained model, opened from its workdir alone: for evaluating and sampling."""

import dataclasses
from typing import Any

from gpt import cluster, sharding, tokenizers, train
from gpt.checkpoint import Run, Workdir
from gpt.config import Config
from gpt.data import text
from gpt.errors import UserError
from gpt.models.gpt import GPTConfig


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
    program: train.Program
    params: Any
    batch_size: int

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.run.tokenizer

    @property
    def model_config(self) -> GPTConfig:
        return self.program.model.config

    def corpus(self, data: text.DataConfig | None = None) -> text.Corpus:
        """The corpus of the run, or another. Raises UserError where that of the run has changed, or it has none."""
        own = data is None
        if own and self.run.fingerprint is None:
            raise UserError(f"--workdir={self.workdir.path} holds converted weights and no text; name one by --data.")
        data, block_size = data or self.run.config.data, self.model_config.block_size if own else None
        data = dataclasses.replace(
            data, cache_dir=""
        )  # a workdir may be a stranger's, who is not to say where to write
        corpus = cluster.first_before_others("corpus", lambda: text.load(data, self.tokenizer, block_size))
        if own and corpus.fingerprint != self.run.fingerprint:
            raise UserError(
                f"The text in data.path={self.run.config.data.path!r} has changed since the training began: its "
                f"fingerprint is {corpus.fingerprint}, that of the run {self.run.fingerprint}."
            )
        return corpus


def load(workdir: Workdir, checkpoint: str, batch_size: int | None = None) -> Loaded:
    """The model of a workdir, on the mesh of its training if there are the devices for it, else on all devices.

    Args:
      checkpoint: "best", "last" or a step.
      batch_size: rows of a batch, made up to what the mesh divides; None: as in training.

    Raises:
      UserError: there is no run, no such checkpoint, or it is damaged.
    """
    run = workdir.read()
    checkpoints = workdir.checkpoints(read_only=True)
    step = checkpoints.find(checkpoint)
    try:
        layout = sharding.make_layout(run.config.mesh)
    except UserError:
        layout = sharding.make_layout(sharding.MeshConfig())
    batch_size = -(-(batch_size or run.config.train.batch_size) // layout.batch_shards) * layout.batch_shards
    program = train.build(with_batch(run.config, batch_size), run.tokenizer.vocab_size, layout, total_steps=1)
    program.check_memory(program.abstract_state.params)
    params = checkpoints.restore(step, params=program.abstract_state.params)["params"]
    checkpoints.close()
    return Loaded(workdir, run, step, program, params, batch_size)


def with_batch(config: Config, batch_size: int) -> Config:
    """The config with batches of another size, in one part."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size, micro_batches=1))
