"""Sharding-first training of GPT-like models with JAX and Flax Linen. For notebooks and other programs:

    import gpt

    config = gpt.read_config("configs/char_tiny.py", {"train.steps": 200})
    gpt.train_model(config, "runs/first")
    model = gpt.load_model("runs/first")
    print(model.generate("ROMEO:", num_tokens=200), model.evaluate())
    print(gpt.plan_step(gpt.read_config("configs/pretrain.py:gpt2-124m"), "v5e:4x4")["seconds"]["mfu"])

Importing this package imports no JAX. The commands (`python -m gpt.main` and the others) call the same functions.
"""

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from gpt.runtime import progress

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.inference.model import TrainedModel
    from gpt.runtime.cluster import Job


def read_config(file: str | PathLike, changes: Mapping[str, Any] | None = None) -> "Config":
    """Returns the config of a config file, like "configs/char.py" or "configs/char.py:gpt-mini".

    Args:
      changes: new values by key, like {"train.steps": 1000}.

    Raises:
      UserError: there is no such file, an error in it, no such key, or a value that the config refuses.
    """
    from gpt import config_files

    texts = ((key, str(value)) for key, value in (changes or {}).items())
    return config_files.read(str(file), texts)


def start(job: "Job | None" = None) -> None:
    """Makes JAX's settings and joins the other processes of a job. The functions below call this as well.

    Args:
      job: where the processes meet; None: as the launcher's variables tell, which is this process alone if there is
        no launcher.

    Raises:
      UserError: the job is contradictory, or another process did not arrive in time.
    """
    from gpt.runtime import backend, cluster

    backend.start(job or cluster.Job())


def train_model(
    config: "Config",
    workdir: str | PathLike,
    *,
    allow_config_change: bool = False,
    profile: bool = False,
    dry_run: bool = False,
    all_parameters: bool = False,
    job: "Job | None" = None,
) -> int:
    """Trains a model, from the newest checkpoint of the workdir if there is one.

    Args:
      workdir: folder of the run, or a place in a bucket.
      allow_config_change: resume although the config of the run was another.
      profile: write a trace of a few steps for TensorBoard's profiler.
      dry_run: read and check everything, compile the step, show what would be trained, and leave the workdir alone.
      all_parameters: show the sharding of all parameters instead of the largest.
      job: see `start`.

    Returns:
      0 when the run is complete, 128 + the number of the signal that stopped it.

    Raises:
      UserError: see `gpt.train.train`.
    """
    with progress.task(progress.STARTING):
        start(job)
        from gpt import train
        from gpt.checkpointing.workdir import Workdir
        from gpt.runtime import backend

        backend.divide_cpu(config.work(config.train.batch_size // config.train.micro_batches))
    return train.train(
        config,
        Workdir(workdir),
        allow_config_change=allow_config_change,
        profile=profile,
        dry_run=dry_run,
        all_parameters=all_parameters,
    )


def load_model(
    workdir: str | PathLike,
    checkpoint: str = "best",
    *,
    batch_size: int | None = None,
    rows: int = 0,
    job: "Job | None" = None,
) -> "TrainedModel":
    """Returns a trained model, to generate and to be evaluated.

    Args:
      checkpoint: "best" (lowest validation loss), "last", or a step; with ",raw" after it, the parameters of the last
        step although the run kept a moving average of them.
      batch_size: examples of a batch in evaluations; None: as in training.
      rows: examples that will be computed together; 0: not known.
      job: see `start`.

    Raises:
      UserError: there is no run, no such checkpoint, or it is damaged.
    """
    with progress.task("loading the model"):
        start(job)
        from gpt.checkpointing import loading
        from gpt.checkpointing.workdir import Workdir
        from gpt.inference.model import TrainedModel
        from gpt.runtime import backend

        folder = Workdir(workdir)
        backend.divide_cpu(folder.read().config.work(rows))
        return TrainedModel(**vars(loading.load(folder, checkpoint, batch_size)))


def plan_step(config: "Config", topology: str) -> dict[str, Any]:
    """Returns the plan of a config: its training step, compiled for devices that are not present, and measured.

    The compilation runs in another process, so that it does not change JAX's settings in this one.

    Args:
      topology: chips and their arrangement, like "v5e:16x16", "4xv5p:8x8x16" or "h100:8".

    Returns:
      The values that `python -m gpt.plan --json` prints: seconds, bytes and FLOPs of one device and one step.

    Raises:
      UserError: the config or the topology does not allow it, the compiler rejects the program, or it crashes.
    """
    from gpt.planning import plans

    return plans.plan_elsewhere(config, topology)
