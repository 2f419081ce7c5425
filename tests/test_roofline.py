"""The roofline estimate of a step, compared with arithmetic by hand."""

import dataclasses

import numpy as np
import pytest

from gpt.planning import roofline
from gpt.planning.hlo import Collective, Operation
from gpt.runtime import hardware

CHIP = hardware.Chip("x", ("X",), flops=100.0, memory=1000, bandwidth=10.0, link=2.0, network=0.5, ring=4)
GPU = dataclasses.replace(CHIP, ring=0)


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int]
    slice_index: int = 0
    platform: str = "tpu"


class Mesh:
    """A mesh of devices of a torus, in the given order."""

    def __init__(self, shape: dict[str, int], devices: list[Device]):
        self.shape, self.devices = shape, np.empty(len(devices), object)
        self.devices[:] = devices
        self.devices = self.devices.reshape(tuple(shape.values()))
        self.size = len(devices)


def torus(x: int, y: int) -> list[Device]:
    return [Device((i, j)) for i in range(x) for j in range(y)]


LINE = Mesh({"data": 2, "model": 3}, torus(2, 3))


def gather(size: int, axes=("model",), group=3, overlaps=False) -> Collective:
    return Collective("all-gather", axes, group, overlaps, 1, size)


def test_a_kernel_is_compute_bound_or_memory_bound():
    operations = [
        Operation("product", times=2, flops=500, bytes=10),  # 5 s against 1 s
        Operation("sum", times=3, flops=0, bytes=20),  # 2 s
    ]
    seconds = roofline.estimate(operations, [], LINE, CHIP, model_flops=800)
    assert (seconds["compute"], seconds["memory"]) == (10, 6)
    assert seconds["step"] == seconds["roofline"] == 16
    assert seconds["mfu"] == pytest.approx(8 / 16)
    assert seconds["bottleneck"] == "compute"
    assert seconds["compiler"] is None


def test_products_of_8_bits_have_their_own_peak():
    chip = dataclasses.replace(CHIP, flops_8bit=2 * CHIP.flops)
    operations = [Operation("product", 1, 500, 10, flops_8bit=300)]  # 2 s and 1.5 s
    assert roofline.estimate(operations, [], LINE, chip, 1)["compute"] == 3.5
    assert roofline.estimate(operations, [], LINE, CHIP, 1)["compute"] == 5


def test_overlapping_copies_share_the_memory_bandwidth():
    operations = [Operation("product", 1, 500, 10), Operation("copy-start", 1, 0, 90, overlaps=True)]
    seconds = roofline.estimate(operations, [], LINE, CHIP, 1)
    assert (seconds["compute"], seconds["memory"]) == (5, 5)  # 100 bytes at 10 bytes/s, 5 s of them during the product
    assert seconds["roofline"] == 10


def test_a_collective_uses_a_link_for_each_ring_that_the_program_states():
    axes = ("data", "model")
    mesh = Mesh({"data": 4, "model": 4}, torus(4, 4))  # four links of 2 bytes/s
    gathers = [Collective("all-gather", axes, 16, True, 1, 9, rings) for rings in range(6)]
    assert [roofline.bandwidth(each, mesh, CHIP) for each in gathers] == [8, 2, 4, 6, 8, 8]


@pytest.mark.parametrize(("size", "step", "bottleneck"), [(6, 10 + 4, "compute"), (60, 20 + 4, "network")])
def test_only_synchronous_collectives_are_exposed(size, step, bottleneck):
    operations = [Operation("product", 1, 1000, 0)]  # 10 s
    # A line of three devices sends 2/3 of the bytes over one link of 2 bytes/s.
    collectives = [gather(size, overlaps=True), gather(12)]
    seconds = roofline.estimate(operations, collectives, LINE, CHIP, 1)
    assert seconds["network"] == {"overlapped": pytest.approx(size / 3), "exposed": pytest.approx(4)}
    assert seconds["step"] == pytest.approx(step)
    assert seconds["bottleneck"] == bottleneck


def test_the_compilers_estimate_counts_if_it_covers_the_program():
    chip = dataclasses.replace(CHIP, clock=10.0)
    known = Operation("product", times=2, flops=500, bytes=0, cycles=80)  # 8 s, at least 5 s by the roofline
    unknown = Operation("tiny", 1, 0, 1)
    seconds = roofline.estimate([known, unknown], [gather(12)], LINE, chip, 1)
    assert seconds["compiler"] == seconds["step"] == 16 + 4
    assert seconds["roofline"] == pytest.approx(10 + 0.1 + 4)
    uncovered = dataclasses.replace(unknown, bytes=100)
    assert roofline.estimate([known, uncovered], [], LINE, chip, 1)["compiler"] is None
    kernel = dataclasses.replace(uncovered, opaque=True)  # an attention kernel counts as in the roofline
    assert roofline.estimate([known, kernel], [], LINE, chip, 1)["compiler"] == 16 + 10
    assert roofline.estimate([known], [], LINE, CHIP, 1)["compiler"] is None  # a chip without a clock


@pytest.mark.parametrize(
    ("mesh", "axes", "group", "links"),
    [
        (LINE, ("model",), 3, 1),  # a line
        (Mesh({"data": 2, "model": 4}, torus(2, 4)), ("model",), 4, 2),  # a ring has two directions
        (Mesh({"data": 4, "model": 4}, torus(4, 4)), ("data", "model"), 16, 4),  # two rings
        (Mesh({"data": 2, "model": 2}, torus(4, 1)), ("data",), 2, 0.5),  # chips 0 and 2 share their links with 1 and 3
        (Mesh({"data": 2, "model": 2}, torus(4, 1)), ("model",), 2, 1),
        (Mesh({"data": 8}, torus(8, 1)), ("data",), 8, 2),
    ],
)
def test_links_that_a_ring_uses(mesh, axes, group, links):
    assert roofline.ring_bandwidth(axes, group, mesh, CHIP) == links * CHIP.link


def test_between_slices_the_network_counts():
    devices = [Device((i, 0), slice_index=s) for s in range(2) for i in range(4)]
    mesh = Mesh({"data": 2, "model": 4}, devices)
    assert roofline.ring_bandwidth(("data",), 2, mesh, CHIP) == CHIP.network
    assert roofline.ring_bandwidth(("model",), 4, mesh, CHIP) == 2 * CHIP.link
    # Each GPU of the group uses its network card, up to the bandwidth of NVLink.
    assert roofline.ring_bandwidth(("data",), 2, mesh, GPU) == GPU.network
    assert roofline.ring_bandwidth(("data", "model"), 8, mesh, GPU) == min(GPU.link, 4 * GPU.network)
    assert roofline.ring_bandwidth(("model",), 4, mesh, GPU) == GPU.link


def test_a_ring_sends_the_minimum():
    assert Collective("all-reduce", ("data",), 4, False, 1, 100).sent == 150
    assert Collective("reduce-scatter", ("data",), 4, False, 1, 100).sent == 75
    assert Collective("collective-permute", ("data",), 4, True, 1, 100).sent == 100
