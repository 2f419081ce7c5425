"""Several processes as one program: they find each other, process 0 goes first, and all end together.

JAX detects how a job was launched (Slurm, Open MPI, Cloud TPU, Kubernetes) and makes the devices of all processes
available. Its coordination service has two shortcomings: if a process dies, the others abort with a stack trace after
10 s or more, and any program can join. So each process first connects to process 0 by a lifeline
(`gpt.runtime.lifeline`), which ends all processes at once with a message, and admits only processes that know the
job's secret. launch/README.md describes both for users.
"""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

from gpt.runtime import output, versions
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.lifeline import Hub, Spoke, host_and_port

_lifeline: Hub | Spoke | None = None  # None in a job of one process


@dataclasses.dataclass(frozen=True)
class Job:
    """Where the processes of a job meet. Without the first three, JAX reads the launcher's environment variables.

    Attributes:
      coordinator: HOST:PORT, the host of process 0 and a free port there.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      timeout: seconds to wait for the other processes.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 300


def start(job: Job) -> None:
    """Joins the other processes of the job, if there are any.

    Has to be called before JAX is used. In a process that has joined a job, another call does nothing.

    Raises:
      UsageError: the values of `job` contradict each other.
      UserError: a process did not join within the timeout, or has other code, libraries or settings.
    """
    global _lifeline
    if _lifeline:
        return
    _ignore_absent_accelerators()
    values = {name: getattr(job, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        given = [name for name in values if name not in missing]
        raise UsageError(f"--{' and --'.join(given)} needs --{' and --'.join(missing)}.")
    address, count, index, devices = *values.values(), None
    if missing:
        # The public jax.distributed.initialize detects the same values, but ends the process if a peer is missing.
        from jax._src.clusters import ClusterEnv

        try:
            detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(job.timeout))
        except (RuntimeError, LookupError, ValueError, OSError) as error:
            raise UserError(
                f"Cannot detect the processes of this job from the launcher's variables: {error!r}. "
                "Set --coordinator, --num_processes and --process_id."
            ) from None
        address, count, index, devices = detected
    elif index >= count:
        raise UsageError(f"--process_id={index} has to be less than --num_processes={count}.")
    elif not re.fullmatch(r".+:0*[1-9]\d{0,4}", address, re.ASCII) or host_and_port(address)[1] > 65535:
        raise UsageError(f"--coordinator={address} has to be of the form HOST:PORT.")
    if not address or count == 1:
        return
    import jax

    own = address, count, index, job.timeout, versions.facts()
    hub = Hub(*own) if index == 0 else None
    _lifeline = hub or Spoke(*own)
    output.is_first = index == 0
    # The lifeline listens at the coordinator's port, so JAX's service needs another one.
    service, listens_at = share("service", hub.service if hub else tuple)
    jax.config.update("jax_enable_preemption_service", False)  # `signals.Interrupted` agrees on the step to stop at
    jax.distributed.initialize(
        service,
        count,
        index,
        coordinator_bind_address=listens_at,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(job.timeout),
        shutdown_timeout_seconds=60,
    )


def _ignore_absent_accelerators() -> None:
    """Keeps JAX from looking for TPUs and GPUs that this machine does not have, unless the user selected platforms.

    If the TPU or GPU compiler is installed for plans only, JAX logs errors about absent devices, and the profiler
    crashes without a TPU.
    """
    import jax
    from jax._src import hardware_utils  # the tests by which JAX itself decides whether devices should be present

    has_gpu_plugin = bool(importlib.util.find_spec("jax_cuda13_plugin"))
    if jax.config.values["jax_platforms"] is not None or not (has_gpu_plugin or importlib.util.find_spec("libtpu")):
        return
    if hardware_utils.num_available_tpu_chips_and_device_id()[0] == 0:
        has_gpu = has_gpu_plugin and hardware_utils.has_visible_nvidia_gpu()
        jax.config.update("jax_platforms", "cuda,cpu" if has_gpu else "cpu")


def is_first() -> bool:
    """Returns whether this process is process 0, which prints and writes for all processes."""
    return _lifeline is None or _lifeline.index == 0


def is_several() -> bool:
    """Returns whether the job has several processes."""
    return _lifeline is not None


def share(key: str, compute: Callable[[], Any]) -> Any:
    """Returns, on all processes, what `compute` returns on process 0. The other processes wait and do not call it.

    Args:
      key: name of the value, to be used once.
      compute: returns a JSON value; in JSON's form, a tuple becomes a list.
    """
    return _lifeline.share(key, compute) if _lifeline else compute()


def first_before_others(key: str, function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0, then on the others, which find the results of process 0 in the cache.

    Args:
      key: name of the call, to be used once.

    Returns:
      What `function` returns on this process.
    """
    result = function() if is_first() else None
    share(key, lambda: None)
    return result if is_first() else function()


def failed(text: str, code: int, own_fault: bool) -> int:
    """Ends all processes because of an error in this one. Returns `code` if this is the only process.

    Args:
      text: message for the user, which process 0 prints too.
      code: exit code of all processes.
      own_fault: False if the death of another process may have caused the error, so that the message about that
        process gets printed first.
    """
    if _lifeline is None:
        if text:
            output.show(text, sys.stderr)
        return code
    return _lifeline.failed(text, code, own_fault)


def finish() -> None:
    """Tells the other processes that this process is about to exit normally."""
    if _lifeline:
        _lifeline.finish()
