"""Accelerators and their public figures, this machine's devices, and topologies of devices that are not present."""

import contextlib
import dataclasses
import math
import os
import platform
import re
import resource
import string
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gpt.runtime.errors import UsageError, UserError, nearest, one_line


@dataclasses.dataclass(frozen=True, eq=False)
class Chip:
    """Public figures of an accelerator, for what JAX presents as one device; `chips.toml` has those of all chips.

    Attributes:
      name: name in a topology, as in v5e:4x4 or h100:8.
      kinds: prefixes of JAX's `device_kind` for this chip.
      flops: peak of dense bfloat16 matrix products, in FLOP/s.
      flops_8bit: peak of dense products of 8-bit factors (on TPUs, integers), in operations/s; 0 if it is not higher.
      memory: bytes of the main memory (HBM); 0 if plans do not support the chip.
      bandwidth: bandwidth of the main memory, in bytes/s.
      link: bandwidth of a fast link in one direction, in bytes/s: to a neighbor in the torus, or to the NVLink switch.
      network: bandwidth per chip of the slow network between slices or hosts in one direction, in bytes/s.
      clock: clock rate in Hz, which converts the TPU compiler's cycles to seconds; 0 for GPUs.
      ring: a torus axis of this length, or a multiple of it, has wraparound links; 0 for GPUs.
      largest: largest topology without a slow network.
      options: options of the compiler with which the training step is faster; see `backend.compiler_options`.
      gpu: what XLA needs to compile for the GPU; empty for TPUs.
    """

    name: str
    kinds: Sequence[str]
    flops: float
    flops_8bit: float = 0.0
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    ring: int = 0
    largest: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gpu: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def usable(self) -> float:
        """Fraction of the memory that JAX gives to programs unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another one."""
        return 1.0 if self.ring else 0.75

    @property
    def compiler(self) -> str:
        """Name of the Python package that contains the compiler."""
        return "libtpu" if self.ring else "jax-cuda13-pjrt"


_FIGURES = tomllib.loads(Path(__file__).with_name("chips.toml").read_text(encoding="utf-8"))
CHIPS = tuple(Chip(name, **figures) for name, figures in _FIGURES.items())


def devices() -> list[jax.Device]:
    """Returns all devices that JAX finds, of all processes.

    Raises:
      UserError: JAX_PLATFORMS names a platform that is not available.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if the platform's plugin is not installed
        if not (platforms := jax.config.values["jax_platforms"]):
            raise
        reason = one_line(error).partition(" (set JAX_PLATFORMS=")[0].rstrip(".") or "its plugin is not installed"
        raise UserError(
            f"JAX_PLATFORMS={platforms} is not available: {reason}; unset it, or install what it needs."
        ) from error


def of_device(device: jax.Device) -> Chip | None:
    """Returns the chip of a device, or None if the chip is not known."""
    return next((chip for chip in CHIPS if device.device_kind.startswith(tuple(chip.kinds))), None)


def memory(device: jax.Device) -> float:
    """Returns the bytes of memory that programs can use on a device. The devices of a CPU share the host's memory."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    total = host_memory()
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        total = min(total, limit)
    return total / jax.local_device_count()


def memory_in_use() -> dict[str, float]:
    """Returns the bytes in use, and their peak, on each device of this process; on a CPU, its resident memory."""
    found: dict[str, float] = {}
    for device in jax.local_devices():
        if stats := device.memory_stats():
            found[f"device_{device.id}"] = stats["bytes_in_use"]
            found[f"device_{device.id}_peak"] = stats.get("peak_bytes_in_use", 0)
    if not found:
        with contextlib.suppress(OSError), open("/proc/self/statm") as file:
            found["process"] = int(file.read().split()[1]) * resource.getpagesize()
    return found


def host_memory() -> float:
    """Returns the bytes of this host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """Returns the name of this machine's processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        if match := re.search(r"^model name\s*: (.+)$", file.read(), re.M):
            return match[1]
    return platform.processor() or platform.machine()


def of_topology(name: str) -> Chip:
    """Returns the chip of a topology like v5e:16x16 or 4xh100:8.

    Raises:
      UsageError: the name is not that of a topology, there is no such chip, or the topology is too large.
    """
    return _parse(name)[1]


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a topology, for which programs can be compiled without these devices.

    Args:
      name: v5e:16x16, or 4xv5e:16x16 for four slices; h100:8, or 4xh100:8 for four hosts.

    Raises:
      UserError: the compiler is not installed.
      UsageError: the name is not that of a topology, or the compiler does not know the topology.
    """
    count, chip, layout = _parse(name)
    from jax.experimental import topologies

    if chip.ring:
        # Otherwise libtpu queries the cloud about this machine, logs errors, and refuses a second process.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
        options: dict[str, Any] = {"platform": "tpu", "topology_name": f"{chip.name}:{layout}"}
        options |= {"num_slices": count} if count > 1 else {}
        options |= {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # both cores of a chip as one device
    else:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # hides XLA's warning about a program that is too large; plans say so
        options = {"platform": "cuda", "topology_name": chip.name, "topology": f"{count}x1x{layout}"}
        options |= {"target_config": _target_config(chip)}
    try:
        return topologies.get_topology_desc(**options).devices
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) or "TPU support not installed" in str(error):
            extra = "plan" if chip.ring else "plan-cuda"
            raise UserError(f'{chip.compiler} is not installed: pip install "gpt-spmd[{extra}]".') from error
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UsageError(f"--topology={name} is refused by {chip.compiler}: {reason}.") from error


def island(device: jax.Device) -> int:
    """Returns the number of the device's island: a slice of TPUs or a host of GPUs, within which links are fast."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", 0)


def place(device: jax.Device) -> list[int]:
    """Returns the position of a device in a topology: slice and torus coordinates, or host and number on the host."""
    return [island(device), *device.coords] if device.platform == "tpu" else [island(device), device.coords[-1]]


def _parse(name: str) -> tuple[int, Chip, str]:
    """Returns the number of slices or hosts, their chip, and their layout: 4, v5e and "16x16" for 4xv5e:16x16."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if not match:
        raise UsageError(f"--topology={name} has to look like v5e:16x16 or h100:8, or 4xv5e:16x16 for four of them.")
    count, kind, layout = match.groups()
    known = {chip.name: chip for chip in CHIPS if chip.memory}
    if not (chip := known.get(kind)):
        chips = f"choose one of {', '.join(known)}{nearest(kind, known.keys())}"
        raise UsageError(f"--topology={name}: there is no chip {kind!r}; {chips}")
    sizes, most = ([int(size) for size in x.split("x")] for x in (layout, chip.largest.split(":")[1]))
    if len(sizes) != len(most) or not 0 < math.prod(sizes) <= math.prod(most):
        raise UsageError(f"--topology={name}: {kind} has {len(most)} sizes, up to {chip.largest} or 4x{chip.largest}.")
    return int(count or 1), chip, layout


def _target_config(chip: Chip) -> str:
    """Returns XLA's GpuTargetConfigProto of a GPU in text format."""
    template = string.Template(Path(__file__).with_name("gpu_target.textproto").read_text(encoding="utf-8"))
    memory, bandwidth = int(chip.memory), int(chip.bandwidth)
    return template.substitute(chip.gpu, kind=chip.kinds[0], memory=memory, bandwidth=bandwidth)
