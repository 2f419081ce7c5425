"""Several processes as one program: they find each other, wait for the first one, and end together.

JAX finds out how a job was launched (Slurm, Open MPI, TPU pods, Kubernetes) and joins the devices. Its coordination
service has no sentence for the person at the log (it aborts with a stack trace, 10 s after a death at the earliest) and
lets any program in. So each process first connects to process 0 and keeps this connection, its lifeline: when a process
dies, the connection closes, and all others end at once and know why.

Both ends of a lifeline first prove that they know the job's secret, which is in GPT_CLUSTER_SECRET, without sending it.
Where none is set, the proof only tells processes of gpt from other programs. launch/README.md describes this for users.
"""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from gpt.runtime import versions
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.lifeline import Hub, Spoke, host_and_port


@dataclasses.dataclass(frozen=True)
class Job:
    """Where the processes of a job meet. Without a coordinator, JAX asks the launcher's variables.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      timeout: seconds to wait for the other processes.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 300


def start(job: Job) -> None:
    """Joins the other processes of this job, if there are any, before JAX is used.

    Raises:
      UsageError: the flags contradict each other.
      UserError: a process did not come within --cluster_timeout.
    """
    global _lifeline
    _leave_an_absent_tpu_alone()
    given = {name: getattr(job, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UsageError(f"--{' and --'.join(set(given) - set(missing))} needs --{' and --'.join(missing)}.")
    address, count, index, devices = given["coordinator"], given["num_processes"], given["process_id"], None
    if missing:
        # The public jax.distributed.initialize finds out the same, but ends the process when a peer is missing.
        from jax._src.clusters import ClusterEnv

        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(job.timeout))
        except (RuntimeError, LookupError, ValueError, OSError) as error:
            raise UserError(
                f"Cannot tell the processes of this job from the launcher's variables: {error!r}. "
                "Set --coordinator, --num_processes and --process_id."
            ) from None
        address, count, index, devices = found
    elif index >= count:
        raise UsageError(f"--process_id={index} has to be less than --num_processes={count}.")
    elif not re.fullmatch(r".+:0*[1-9]\d{0,4}", address, re.ASCII) or host_and_port(address)[1] > 65535:
        raise UsageError(f"--coordinator={address} has to be of the form HOST:PORT.")
    if not address or count == 1:
        return
    import jax

    _lifeline = (Hub if index == 0 else Spoke)(address, count, index, job.timeout, versions.facts())
    # The port that was agreed on is the lifeline's, so JAX's service gets another one.
    service, listens_at = share("service", lambda: _lifeline.service())
    jax.config.update("jax_enable_preemption_service", False)  # the loop has its own way to agree on where to stop
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


def _leave_an_absent_tpu_alone() -> None:
    """Where libtpu is installed for `gpt.plan` alone, JAX looks for a TPU in vain, loudly, and its profiler crashes."""
    if "JAX_PLATFORMS" in os.environ or not importlib.util.find_spec("libtpu"):
        return
    import jax
    from jax._src import hardware_utils  # as JAX does itself, to tell whether a TPU should be there

    if hardware_utils.num_available_tpu_chips_and_device_id()[0] == 0:
        has_gpu = hardware_utils.has_visible_nvidia_gpu() and importlib.util.find_spec("jax_cuda13_plugin")
        jax.config.update("jax_platforms", "cuda,cpu" if has_gpu else "cpu")


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return _lifeline is None or _lifeline.index == 0


def is_several() -> bool:
    """Whether this process is one of several."""
    return _lifeline is not None


def share(key: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gives on process 0, the only one to call it; the others wait.

    Args:
      key: names it; used once.
      compute: returns what JSON can hold, which is the form that it arrives in.
    """
    return _lifeline.share(key, compute) if _lifeline else compute()


def first_before_others(key: str, function: Callable[[], Any]) -> Any:
    """`function()` on every process, on process 0 before the others: they find done what it left in a cache."""
    if is_first():
        result = function()
        share(key, lambda: None)
        return result
    share(key, lambda: None)
    return function()


def failed(text: str, code: int, own_fault: bool) -> int:
    """Ends all processes because of an error in this one; returns `code` where there is only one.

    Args:
      text: for the user; process 0 shows it too.
      own_fault: False if a process that has gone may be what caused the error; its word comes first then.
    """
    if _lifeline is None:
        if text:
            print(text, file=sys.stderr)
        return code
    return _lifeline.failed(text, code, own_fault)


def finish() -> None:
    """Says that this process is done, so that it may close its lifeline."""
    if _lifeline:
        _lifeline.finish()


_lifeline: Hub | Spoke | None = None
