"""From what a compiled step does to how long it takes, by a roofline (Williams et al. 2009, 10.1145/1498765.1498785).

The assumptions, all towards a step that is too short:
- A kernel takes as long as its matrix products at the peak of bfloat16, or as the bytes that it moves at the peak
  bandwidth of the main memory, whichever is longer; kernels run one after the other. Work on vectors is free.
- A collective goes round a ring, along each direction of each axis of the torus that its group spans (TPU), or through
  NVLink and, where a group spans hosts, through the network card of each GPU; links reach their public bandwidth.
- A collective that the compiler made asynchronous, or fused with products, costs only what is longer than all kernels
  together; any other is waited for.
- Kernels of attention compute what the causal mask leaves, and read and write their operands and results once.
- Both branches of a condition run (the parts of chunked attention that lie in the future are such branches).
- The input is there in time, and nothing is evaluated or saved.
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
    """The time of a step and where it goes, in seconds.

    Args:
      model_flops: model FLOPs of a step, for each device.

    Returns:
      {"products": of kernels that wait for products, "memory": of those that wait for the main memory,
      "network": {"hidden": overlapping, "waited_for"}, "roofline": the whole step, "compiler": the whole step with
      the compiler's estimate in the place of the kernels', or None, "step": the longer of the two, "mfu", "binds"}.
    """
    products = memory = copies = 0.0
    for operation in operations:
        by_flops, by_bytes = operation.flops / chip.flops, operation.bytes / chip.bandwidth
        if operation.overlaps:
            copies += operation.times * by_bytes
        elif by_flops > by_bytes:
            products += operation.times * by_flops
        else:
            memory += operation.times * by_bytes
    # Copies that run beside the kernels still share the main memory with them.
    traffic = sum(operation.times * operation.bytes for operation in operations) / chip.bandwidth
    memory += max(0.0, traffic - products - memory)
    seconds = [(collective.overlaps, network_seconds(collective, mesh, chip)) for collective in collectives]
    hidden = sum(time for overlaps, time in seconds if overlaps)
    waited_for = sum(time for overlaps, time in seconds if not overlaps)

    def step(kernels: float) -> float:
        return max(kernels, hidden) + waited_for

    compiler = compiler_seconds(operations, chip)
    roofline = step(products + memory)
    longest = max(roofline, step(compiler)) if compiler else roofline
    parts = {"products": products, "memory": memory, "network": waited_for + max(0.0, hidden - products - memory)}
    return {
        "products": products,
        "memory": memory,
        "network": {"hidden": hidden, "waited_for": waited_for},
        "roofline": roofline,
        "compiler": compiler and step(compiler),
        "step": longest,
        "mfu": model_flops / chip.flops / longest,
        "binds": max(parts, key=parts.get),
    }


def compiler_seconds(operations: list[Operation], chip: Chip) -> float | None:
    """The compiler's own estimate of all kernels, or None if it does not cover nearly all of the traffic and FLOPs.

    Kernels of attention, of which it has none, stand in it as in the roofline.
    """
    if not chip.clock:
        return None
    opaque = [operation for operation in operations if operation.opaque]
    known = [o for o in operations if o.cycles is not None or o.overlaps or o.opaque]

    def roofline(of: list[Operation]) -> float:
        return sum(o.times * max(o.flops / chip.flops, o.bytes / chip.bandwidth) for o in of)

    if roofline(known) < 0.95 * roofline(operations):
        return None
    return sum(operation.times * (operation.cycles or 0) for operation in known) / chip.clock + roofline(opaque)


def network_seconds(collective: Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """How long the collectives take if nothing else used their links."""
    return collective.sent / ring_bandwidth(collective.axes, collective.group, mesh, chip)


@functools.lru_cache(maxsize=4096)
def ring_bandwidth(axes: tuple[str, ...], size: int, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Bytes/s that a device sends round a ring of its group.

    Args:
      axes: mesh axes along which the devices of a group differ.
      size: devices in a group.
    """
    group = _group(axes, mesh)[:size]
    islands = {hardware.island(device) for device in group}
    if not chip.ring:  # NVLink to a switch within a host; between hosts each GPU of the group has its card
        return chip.link if len(islands) == 1 else min(chip.link, chip.network * len(group) / len(islands))
    if len(islands) > 1:
        return chip.network
    links = 0.0
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    ends = everywhere.max(axis=0) + 1
    for places, length in zip(np.array([device.coords for device in group]).T, ends, strict=True):
        steps = np.diff(np.unique(places))
        if len(steps):
            joined = len(steps) + 1 == length and length % chip.ring == 0
            links += (2 if joined else 1) / steps.min()  # a group that takes every second chip shares its links
    return chip.link * links if links else math.inf


def _group(axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> list[jax.Device]:
    """The devices along some mesh axes, from the first."""
    where = tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)
    return list(mesh.devices[where].flat)
