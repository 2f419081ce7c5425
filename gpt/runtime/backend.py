"""JAX's settings for the machine at hand, made before JAX is first used. Each gives way to the user's own.

Compiled programs are kept in the cache (`gpt.cache`), so that only the first start of a program waits for the compiler.
JAX_COMPILATION_CACHE_DIR names another folder for them; JAX_ENABLE_COMPILATION_CACHE=0 keeps none.

The cores of a CPU become devices, for the mesh to use: within one device, XLA leaves a good part of a step to a
single core. XLA_FLAGS=--xla_force_host_platform_device_count=N sets another number.

XLA_OPTIONS are flags of XLA that make our programs faster; what XLA_FLAGS says already stays as it is.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gpt.runtime import cluster
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError

# YNNPACK's matrix products, the default of jaxlib 0.10, are slower than Eigen's: by a fifth for 16 rows.
XLA_OPTIONS = {"--xla_cpu_experimental_ynn_fusion_type": ""}
OPTIONS_KNOWN_TO = "0.10."  # the versions of jaxlib: one that does not know an option would end the process
CACHE_SIZE = 4 << 30  # bytes; beyond it, what was not used for longest goes
MAX_CPU_DEVICES = 8  # each holds the parameters, and more of them gain little
PARAMETERS_PER_TOKEN = 5_000  # of a step on a device; of more, one device for all cores is as fast or faster
STATE_BYTES = 16  # of a parameter: itself, its gradient and Adam's two moments, in float32


@dataclasses.dataclass(frozen=True)
class Work:
    """What decides how many devices a CPU is worth dividing into.

    Attributes:
      parameters: number of parameters of the model, all of which each device reads and updates in a step.
      tokens: tokens of a step, or of one part of its batch; 0 if not known.
      divides: whether the mesh and the batch can be divided over that many devices.
    """

    parameters: int
    tokens: int
    divides: Callable[[int], bool]


def start(job: cluster.Job) -> None:
    """Makes the settings, and joins the other processes of this job, if there are any.

    Raises:
      UserError, UsageError: as `cluster.start` and `Cache`.
    """
    import jax

    set_xla_options()
    cluster.start(job)
    if not jax.config.jax_compilation_cache_dir:
        cache = Cache(say=lambda line: cluster.is_first() and print(line, file=sys.stderr))
        keep_compiled(cache.path / "xla")


def keep_compiled(folder: Path) -> None:
    """Has JAX keep compiled programs in a folder, and compile those again that are cut off or changed there."""
    import jax
    from jax._src import compilation_cache, lru_cache

    class Checked(lru_cache.LRUCache):
        """JAX's cache, whose own never replaces an entry, with a digest at the end of each."""

        def get(self, key: str) -> bytes | None:
            found = super().get(key) or b""
            if found[-32:] == hashlib.sha256(found[:-32]).digest():
                return found[:-32]
            (folder / f"{key}-cache").unlink(missing_ok=True)
            return None

        def put(self, key: str, value: bytes) -> None:
            super().put(key, value + hashlib.sha256(value).digest())

        def _evict_if_needed(self, *, additional_size: int = 0) -> None:
            for entry in folder.glob("*-cache"):  # a process that died left no time of use, and JAX would fail for it
                if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                    entry.unlink(missing_ok=True)
            super()._evict_if_needed(additional_size=additional_size)

    compilation_cache.LRUCache = Checked
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_SIZE)


def check_xla_flags() -> None:
    """Raises UserError where XLA refuses XLA_FLAGS, for which it would end the process.

    A fork tries them: the time for this is a few hundredths of a second, and only where the user has set some.
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
        reason = lines[0].partition("] ")[2] if lines else "it ended without a word"
        raise UserError(f"XLA_FLAGS={os.environ['XLA_FLAGS']} is refused by XLA: {reason.rstrip('.')}.")


def set_xla_options() -> None:
    """Adds XLA_OPTIONS to XLA_FLAGS."""
    import jaxlib

    given = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__.startswith(OPTIONS_KNOWN_TO):
        options = (f"{name}={value}" for name, value in XLA_OPTIONS.items() if name not in given)
        os.environ["XLA_FLAGS"] = " ".join([given, *options]).strip()


def divide_cpu(work: Work) -> None:
    """Makes the cores of the CPU several JAX devices, unless several processes share the machine or JAX is in use."""
    import jax
    from jax._src import xla_bridge  # no public function tells whether JAX has created its devices

    is_set_by_user = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not (cluster.is_several() or is_set_by_user or xla_bridge.backends_are_initialized()):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cpu_devices(work, cores, memory))


def cpu_devices(work: Work, cores: int, memory: float) -> int:
    """Returns into how many devices to divide a CPU: the most that are worth it, or the fewest beyond the cores.

    Args:
      memory: bytes of the machine; the training state of all devices may take a quarter.
    """
    most = min(cores, MAX_CPU_DEVICES, int(memory / 4 / (STATE_BYTES * work.parameters)))
    if work.tokens:
        most = min(most, PARAMETERS_PER_TOKEN * work.tokens // work.parameters)
    most = max(1, most)
    # More devices than cores let a user try a mesh that needs them.
    counts = (*range(most, 0, -1), *range(most + 1, 65))
    return next((count for count in counts if work.divides(count)), 1)
