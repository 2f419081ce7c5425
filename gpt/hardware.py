"""The accelerators that are known, their public figures, and clusters of them that are not there."""

import dataclasses
import os
import re

import jax

from gpt.errors import UsageError, UserError

_TPU_PAGES = "cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of what JAX shows as one device.

    Attributes:
      kinds: how JAX's `device_kind` may begin.
      flops: peak of dense bfloat16 products, in FLOP/s.
      memory: bytes of the main memory (HBM).
      bandwidth: of the main memory, in bytes/s.
      link: of a fast link in one direction, in bytes/s: to one neighbour in the torus, or to the NVLink switch.
      network: of the slow network between slices or hosts in one direction, in bytes/s a chip.
      clock: Hz, by which the TPU compiler's cycles become seconds; 0 where there are none.
      full_ring: a torus axis of this length (or a multiple) has its ends joined; 0 where there is no torus.
      usable: fraction of the memory that JAX gives to a program.
      largest: the largest topology that can be asked for.
      source: where the figures are published.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    full_ring: int = 0
    usable: float = 1.0
    largest: str = ""
    source: str = ""


GIB = 2**30
# The first entry of which a kind begins a device's kind counts.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 50e9, 3.1e9, 1.05e9, 4, 1.0, "v4:16x16x16", _TPU_PAGES + "v4"),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 50e9, 3.1e9, 1.5e9, 16, 1.0, "v5e:16x16",
        _TPU_PAGES + "v5e",
    ),
    Chip(
        "v5p", ("TPU v5p", "TPU v5"), 459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, 1.75e9, 4, 1.0, "v5p:16x16x24",
        _TPU_PAGES + "v5p",
    ),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 100e9, 12.5e9, 1.75e9, 16, 1.0, "v6e:16x16",
        _TPU_PAGES + "v6e",
    ),
)  # fmt: skip


def of_device(device: jax.Device) -> Chip | None:
    """The chip that a device is, or None where it is not known."""
    return next((chip for chip in CHIPS if device.device_kind.startswith(chip.kinds)), None)


def of_topology(name: str) -> Chip:
    """The chip of a topology like v5e:16x16 or 4xv5e:16x16.

    Raises:
      UsageError: it does not look like one, or there is no such chip.
    """
    _, kind, _ = _parse(name)
    for chip in CHIPS:
        if chip.name == kind and chip.largest:
            return chip
    known = ", ".join(chip.name for chip in CHIPS if chip.largest)
    raise UsageError(f"--topology={name}: there is no chip {kind!r}; choose one of {known}, or see --list_topologies.")


def place(device: jax.Device) -> list[int]:
    """Where a device is: slice or host, then its coordinates in the torus, or its number in the host."""
    return [getattr(device, "slice_index", 0) or 0, *getattr(device, "coords", [device.local_hardware_id])]


def compiler_packages(topology: str) -> tuple[str, ...]:
    """The packages that hold the compiler for a topology."""
    return ("libtpu",) if of_topology(topology).full_ring else ("jax-cuda13-plugin", "jax-cuda13-pjrt")


def _parse(name: str) -> tuple[int, str, str]:
    """(4, "v5e", "16x16") of 4xv5e:16x16."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if not match:
        raise UsageError(f"--topology={name} has to look like v5e:16x16, or 4xv5e:16x16 for four slices.")
    return int(match[1] or 1), match[2], match[3]


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology like v5e:16x16, or of several slices of it: 4xv5e:16x16.

    Raises:
      UserError: libtpu is not installed, or (a UsageError) does not know the topology.
    """
    slices, kind, layout = _parse(name)
    # libtpu would ask the cloud what machine this is, complain that it is none, and let no second process in.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    from jax.experimental import topologies

    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(topology_name=f"{kind}:{layout}", platform="tpu", **several).devices
    except RuntimeError as error:
        if "TPU support not installed" in str(error):
            raise UserError('The TPU compiler is not installed: pip install "gpt-spmd[plan]".') from error
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UsageError(f"--topology={name} is refused by libtpu: {reason}.") from error
