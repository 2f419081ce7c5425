"""Settings of JAX and XLA for this machine, made before JAX is first used. Settings of the user take precedence.

- JAX stores compiled programs in the cache (`gpt.runtime.cache`), so that only the first start of a program compiles.
  JAX_COMPILATION_CACHE_DIR selects another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns this off.
- The cores of a CPU become several JAX devices, over which the mesh shards a step, because XLA runs a large part of a
  step on a single core of a device. XLA_FLAGS=--xla_force_host_platform_device_count=N sets another number.
- XLA_OPTIONS are XLA flags for speed and for equal results of equal runs. A flag that XLA_FLAGS contains already keeps
  its value: XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=false gives up the second on GPUs.
- `compiler_options` are further ones for the training step on a TPU. An option that LIBTPU_INIT_ARGS contains keeps its
  value: LIBTPU_INIT_ARGS=--xla_tpu_enable_sparse_core_collective_offload_all_gather=false turns that option off.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpt.runtime import cache, cluster, pool
from gpt.runtime.errors import UserError

if TYPE_CHECKING:
    import jax

XLA_OPTIONS = {
    # YNNPACK's matrix products, the default since jaxlib 0.10, are slower than Eigen's for few rows.
    "--xla_cpu_experimental_ynn_fusion_type": "",
    # Otherwise GPUs sum the gradients of embeddings and attention in any order, and no run is repeated to the bit.
    "--xla_gpu_exclude_nondeterministic_ops": "true",
}
OPTIONS_KNOWN_TO = ("0.10.", "0.11.")  # versions of jaxlib; XLA ends the process if it does not know an option
LIBTPU_KNOWN = "0.0.52"  # the version of libtpu that knows the options of TPUs
MAX_CPU_DEVICES = 8  # each device holds all parameters, and more devices gain little
PARAMETERS_PER_TOKEN = 5_000  # limit for a step on one device; above it, a single device for all cores is as fast
STATE_BYTES = 16  # of each parameter: its value, its gradient and Adam's two moments, in float32


@dataclasses.dataclass(frozen=True)
class Work:
    """The properties of a training that decide into how many devices to divide a CPU.

    Attributes:
      parameters: number of parameters of the model. Each device reads and updates all of them in a step.
      tokens: number of tokens of a step, or of one micro-batch; 0 if not known.
      divides: returns whether the mesh and the batch can be divided over a number of devices.
    """

    parameters: int
    tokens: int
    divides: Callable[[int], bool]


def start(job: cluster.Job) -> None:
    """Makes the settings, and joins the other processes of the job if there are any.

    Raises:
      UserError: see `cluster.start` and `cache.Cache`.
    """
    import jax

    set_xla_options()
    cluster.start(job)
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = cache.Cache()
        cache.keep_compiled(folder.path / "xla")


def check_xla_flags() -> None:
    """Raises UserError if XLA_FLAGS has a flag that XLA rejects, because XLA would end the process without a message.

    A fork parses the flags, which takes a few hundredths of a second.
    """
    if not os.environ.get("XLA_FLAGS"):
        return
    from jaxlib import _jax

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 2)
        _ = _jax.CompileOptions().executable_build_options.debug_options  # parses the flags
        os._exit(0)
    os.close(writing)
    with open(reading, errors="replace") as file:
        lines = file.read().splitlines()
    if os.waitpid(pid, 0)[1]:
        reason = lines[0].partition("] ")[2] if lines else "the process ended without a message"
        raise UserError(f"XLA_FLAGS={os.environ['XLA_FLAGS']} is refused by XLA: {reason.rstrip('.')}.")


def set_xla_options() -> None:
    """Adds XLA_OPTIONS to the environment variable XLA_FLAGS."""
    import jaxlib

    user_flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__.startswith(OPTIONS_KNOWN_TO):
        options = (f"{name}={value}" for name, value in XLA_OPTIONS.items() if name not in user_flags)
        os.environ["XLA_FLAGS"] = " ".join([user_flags, *options]).strip()


def compiler_options(device: "jax.Device") -> dict[str, Any]:
    """Returns the options of the compiler with which the training step is faster on a device: those in `chips.toml`.

    Returns none for another version of the compiler, because it could refuse them, and none of an option that the
    environment variable LIBTPU_INIT_ARGS sets.
    """
    from gpt.runtime import hardware

    chip, user_flags = hardware.of_device(device), os.environ.get("LIBTPU_INIT_ARGS", "")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if chip and chip.options and importlib.metadata.version(chip.compiler) == LIBTPU_KNOWN:
            return {name: value for name, value in chip.options.items() if name not in user_flags}
    return {}


def divide_cpu(work: Work) -> None:
    """Makes the cores of the CPU several JAX devices, unless several processes share the machine or JAX is in use."""
    import jax
    from jax._src import xla_bridge  # no public function tells whether JAX has created its devices

    from gpt.runtime import hardware

    is_set_by_user = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not (cluster.is_several() or is_set_by_user or xla_bridge.backends_are_initialized()):
        jax.config.update("jax_num_cpu_devices", cpu_devices(work, pool.cores(), hardware.host_memory()))


def cpu_devices(work: Work, cores: int, memory: float) -> int:
    """Returns into how many devices to divide a CPU.

    The number is the largest that divides the work and that the cores, the memory and the tokens justify. If there is
    none, it is the smallest larger number that divides the work, so that users can try a mesh of more devices.

    Args:
      cores: number of cores that the process may use.
      memory: bytes of the machine's memory. The training state of all devices may use a quarter.
    """
    limit = min(cores, MAX_CPU_DEVICES, memory / 4 / (STATE_BYTES * work.parameters))
    if work.tokens:
        limit = min(limit, PARAMETERS_PER_TOKEN * work.tokens // work.parameters)
    most = max(1, int(limit))
    counts = (*range(most, 0, -1), *range(most + 1, 65))
    return next((count for count in counts if work.divides(count)), 1)
