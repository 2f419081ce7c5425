"""Estimates the time of a compiled step by a roofline (Williams et al. 2009, doi 10.1145/1498765.1498785).

The assumptions, nearly all of which make the estimate too short:
- A kernel takes as long as its matrix products at the peak of their format, or as its bytes at the peak bandwidth of
  the main memory, whichever is longer. Kernels run one after another. Vector operations take no time.
- A collective uses a ring along each direction of each axis of the torus that its group spans (TPU), or one link for
  each ring if the program states how many there are; or NVLink and, if the group spans hosts, the network card of each
  GPU. Links reach their public bandwidth.
- A collective that the compiler made asynchronous overlaps with the kernels that it scheduled between the start and
  the end; kernels wait for the rest. One that is fused with matrix products overlaps as a whole. Together, those that
  overlap cost the time by which they exceed all kernels. Any other collective is exposed: kernels wait for it.
- Attention kernels compute what the causal mask leaves (on TPUs, whole blocks of it), and read and write their operands
  and results once.
- Both branches of a conditional run (chunked attention skips future chunks with conditionals).
- The input arrives in time, and the step includes no evaluation and no checkpoint.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from gpt.planning.hlo import Collective, Operation
from gpt.runtime import hardware
from gpt.runtime.hardware import Chip


def estimate(
    operations: list[Operation],
    collectives: list[Collective],
    mesh: jax.sharding.Mesh,
    chip: Chip,
    model_flops: float,
) -> dict[str, Any]:
    """Estimates the time of a step and its parts, in seconds.

    Args:
      model_flops: model FLOPs of a step per device.

    Returns:
      {"compute": time of the compute-bound kernels, "memory": of the memory-bound kernels,
      "network": {"overlapped", "exposed"}: of the collectives, "roofline": of the step by the roofline,
      "compiler": of the step with the compiler's estimate of the kernels, or None, "step": the longer of the two,
      "mfu": model FLOPs utilisation, "bottleneck": "compute", "memory" or "network"}.
    """
    each = [(o.times * _product_seconds(o, chip), o.times * o.bytes / chip.bandwidth) for o in operations]
    alone = [times for times, operation in zip(each, operations, strict=True) if not operation.overlaps]
    compute = sum(by_flops for by_flops, by_bytes in alone if by_flops > by_bytes)
    memory = sum(by_bytes for by_flops, by_bytes in alone if by_flops <= by_bytes)
    # Overlapping copies share the bandwidth of the main memory with the kernels.
    memory = max(memory, sum(by_bytes for _, by_bytes in each) - compute)
    network = sum(network_seconds(collective, mesh, chip) for collective in collectives)
    exposed = sum(exposed_seconds(collective, mesh, chip) for collective in collectives)
    overlapped = network - exposed
    kernels, estimated = compute + memory, compiler_seconds(operations, chip)
    roofline = max(kernels, overlapped) + exposed
    compiler = max(estimated, overlapped) + exposed if estimated else None
    step = max(roofline, compiler or 0.0)
    parts = {"compute": compute, "memory": memory, "network": exposed + max(0.0, overlapped - kernels)}
    return {
        "compute": compute,
        "memory": memory,
        "network": {"overlapped": overlapped, "exposed": exposed},
        "roofline": roofline,
        "compiler": compiler,
        "step": step,
        "mfu": model_flops / chip.flops / step,
        "bottleneck": max(parts, key=lambda part: parts[part]),
    }


def compiler_seconds(operations: list[Operation], chip: Chip) -> float | None:
    """Returns the compiler's own estimate of all kernels, in seconds.

    Attention kernels, which the compiler does not estimate, count as in the roofline. Returns None if the estimate
    covers less than 95 % of the roofline's time.
    """
    if not chip.clock:
        return None
    known = [o for o in operations if o.cycles is not None or o.overlaps or o.opaque]

    def roofline(chosen: list[Operation]) -> float:
        return sum(o.times * _roofline_seconds(o, chip) for o in chosen)

    if roofline(known) < 0.95 * roofline(operations):
        return None
    return sum(o.times * (o.cycles or 0) for o in known) / chip.clock + roofline([o for o in known if o.opaque])


def exposed_seconds(collective: Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Returns the seconds for which kernels wait for the collectives."""
    seconds = network_seconds(collective, mesh, chip)
    if not collective.overlaps:
        return seconds
    per_byte = seconds / max(collective.bytes, 1)
    return sum(
        times * max(0.0, per_byte * size - sum(_kernel_seconds(kernel, chip) for kernel in kernels))
        for times, size, kernels in collective.beside
        if kernels is not None
    )


def _kernel_seconds(kernel: Operation, chip: Chip) -> float:
    """Returns the longer of the times of one run of a kernel by the roofline and by the compiler; 0 if it overlaps."""
    return 0.0 if kernel.overlaps else max(_roofline_seconds(kernel, chip), (kernel.cycles or 0) / (chip.clock or 1))


def _roofline_seconds(operation: Operation, chip: Chip) -> float:
    """Returns the seconds of one run: those of its FLOPs or of its bytes, whichever is longer."""
    return max(_product_seconds(operation, chip), operation.bytes / chip.bandwidth)


def _product_seconds(operation: Operation, chip: Chip) -> float:
    narrow = operation.flops_8bit
    return (operation.flops - narrow) / chip.flops + narrow / (chip.flops_8bit or chip.flops)


def network_seconds(collective: Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Returns the seconds that the collectives take if nothing else uses their links."""
    return collective.sent / bandwidth(collective, mesh, chip)


def bandwidth(collective: Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Returns the bytes per second that a device sends: over a link for each ring that the program states, or all."""
    most = ring_bandwidth(collective.axes, collective.group, mesh, chip)
    return min(most, collective.rings * chip.link) if collective.rings else most


@functools.lru_cache(maxsize=4096)
def ring_bandwidth(axes: tuple[str, ...], size: int, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Returns the bytes per second that a device can send along the rings of its group.

    Args:
      axes: mesh axes along which the devices of a group differ.
      size: number of devices in a group.
    """
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)
    group = list(mesh.devices[index].flat)[:size]
    islands = {hardware.island(device) for device in group}
    if not chip.ring:  # hosts have an NVLink switch inside; between hosts, each GPU of the group uses its network card
        return chip.link if len(islands) == 1 else min(chip.link, chip.network * len(group) / len(islands))
    if len(islands) > 1:
        return chip.network
    links = 0.0
    lengths = np.array([device.coords for device in mesh.devices.flat]).max(axis=0) + 1
    for coordinates, length in zip(np.array([device.coords for device in group]).T, lengths, strict=True):
        distances = np.diff(np.unique(coordinates))
        if len(distances):
            closed = len(distances) + 1 == length and length % chip.ring == 0
            links += (2 if closed else 1) / distances.min()  # groups that interleave share their links
    return chip.link * links if links else math.inf
