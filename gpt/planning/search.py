"""Finds the mesh, remat policy and micro-batches of the shortest step: by arithmetic first, then by compiling.

The arithmetic is rough. It decides what is compiled, and in which order; the report of the compiler decides the rest.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gpt import sharding
from gpt.config import Config, differences
from gpt.models.base import ModelConfig
from gpt.models.kernels import KERNELS
from gpt.models.transformer import REMAT_POLICIES
from gpt.planning import roofline
from gpt.runtime.errors import UserError
from gpt.runtime.hardware import Chip
from gpt.runtime.progress import Progress, duration
from gpt.sharding import AXES, MeshConfig

Report = dict[str, Any]
# Compilations in search of the nearest change that fits.
TRIES = 5
# Loops are unrolled for the last comparison if this many blocks or fewer have to be compiled.
LARGEST_UNROLLED = 16
# Part of the memory that a candidate is to use: nearer to the limit the compiler looks for savings, at length.
HEADROOM = 0.9
# Memory that a compilation may need.
COMPILER_BYTES = 4e9
# The TPU's compiler gathers and scatters a parameter of which a device has fewer columns than this by all-reduces, of
# twice the bytes, where nothing is sharded over `model` (seen for 12 to 64 columns, not for 96 and more).
NARROWEST_SHARD = 96


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config, and what arithmetic expects of it.

    Attributes:
      memory: bytes of a device.
      seconds: of a step.
    """

    config: Config
    memory: float
    seconds: float


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many factors, in order."""
    if parts == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in factorisations(number // factor, parts - 1))


def candidates(config: Config, devices: list[jax.Device], chip: Chip) -> list[Candidate]:
    """What the config could be changed to on these devices, the shortest expected step first.

    That is every size of the mesh axes that divides what lies along them, with the rules that use these axes, ZeRO-1
    where it means something, every remat policy, and every division into micro-batches.
    """
    model, batch_size, found = config.model, config.train.batch_size, []
    vocabulary = dataclasses.replace(model, vocab_size=model.vocab_size or config.data.vocab_size).padded_vocab_size
    for data, fsdp, sequence, model_axis in factorisations(len(devices), len(AXES)):
        divides = [
            (batch_size, data * fsdp),
            (model.length, sequence),
            (model.embed_dim, fsdp * sequence),
            *((size, model_axis) for size in (model.num_heads, model.mlp_dim, vocabulary)),
        ]
        if any(size % parts for size, parts in divides):
            continue
        rules = "sp" if sequence > 1 else "fsdp_tp" if model_axis > 1 else "fsdp" if fsdp > 1 else "dp"
        mesh = _shortest(MeshConfig(rules, data, fsdp, sequence, model_axis), len(devices))
        try:
            layout = sharding.make_layout(mesh, devices)
            _resolved(config, layout)
        except UserError:  # slices do not go into it, or the kernel of attention takes no part of the length
            continue
        rows = batch_size // (data * fsdp)
        parts_of_rows = [parts for parts in range(1, rows + 1) if rows % parts == 0]
        for zero1 in (False, True) if data > 1 else (False,):
            for remat, parts in itertools.product(REMAT_POLICIES, parts_of_rows):
                changed = dataclasses.replace(
                    config,
                    mesh=dataclasses.replace(mesh, zero1=zero1),
                    model=dataclasses.replace(model, remat=remat),
                    train=dataclasses.replace(config.train, micro_batches=parts),
                )
                found.append(expect(changed, layout, chip))
    return sorted(found, key=lambda candidate: candidate.seconds)


def _shortest(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The same mesh with as many sizes left to their default, 0, as can be."""
    for axis in AXES:
        shorter = dataclasses.replace(mesh, **{axis: 0})
        if shorter.shape(num_devices) == mesh.shape(num_devices):
            mesh = shorter
    return mesh


def _resolved(config: Config, layout: sharding.Layout) -> ModelConfig:
    vocab_size = config.model.vocab_size or config.data.vocab_size
    return config.model.resolve(vocab_size, layout.mesh.devices.flat[0].platform, layout.length_shards)


def expect(config: Config, layout: sharding.Layout, chip: Chip) -> Candidate:
    """Arithmetic: the memory of a device and the time of a step."""
    model, sizes = _resolved(config, layout), layout.mesh.shape
    data, fsdp, sequence, tensor = (sizes[axis] for axis in AXES)
    parts, width, heads, layers = config.train.micro_batches, model.embed_dim, model.num_heads, model.num_layers
    rows = config.train.batch_size / (data * fsdp)
    part_rows, length = rows / parts, model.length / sequence
    tokens = part_rows * length  # of a device in one micro-batch

    # Float32 state, gradients, and the weights that are gathered, in bfloat16.
    weights = model.num_parameters()
    held = weights / tensor / (1 if config.mesh.rules == "dp" else fsdp * sequence)
    optimizer = 8 * held / (data if config.mesh.zero1 else 1)
    gradients = held * (6 if parts > 1 else 4)
    gathered = 0 if held * tensor == weights else 4 * weights / layers / tensor

    # Activations that a layer keeps for the backward pass, and what is alive while one layer is worked on.
    linear = model.attention in ("chunked", *KERNELS)  # no scores in the main memory
    scores = 0 if linear else part_rows * heads / tensor * length * model.length
    wide = (3 * width + model.mlp_dim) / tensor + 3 * width
    kept = {"full": 2 * tokens * width, "dots": 2 * tokens * (wide + width)}
    kept["none"] = kept["dots"] + 6 * scores + 2 * tokens * (2 * model.mlp_dim / tensor + 6 * width)
    alive = 10 * scores + 6 * tokens * wide + 6 * tokens * model.padded_vocab_size / tensor
    memory = 4 * held + optimizer + gradients + gathered + layers * kept[model.remat] + alive

    again = {"none": 1.0, "dots": 1.05, "full": 4 / 3}[model.remat]
    flops = rows * length / tensor * model.flops_per_token()
    products = again * flops / chip.flops
    passes = 20 + 10 * (model.remat != "none")  # over scores, forward and backward, in bytes an element
    traffic = parts * layers * (passes * scores + 40 * tokens * wide) + 30 * held
    traffic += parts * 6 * weights / tensor  # weights are read as often as they are used

    def collective(axes: tuple[str, ...], size: float, times: float) -> float:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        group = math.prod(sizes[axis] for axis in axes)
        sent = times * size * (group - 1) / group
        return sent / roofline.ring_bandwidth(axes, group, layout.mesh, chip) if axes else 0.0

    network = collective(("data",), 2 * held, 2)
    if config.mesh.rules != "dp":
        narrow = chip.ring and tensor == 1 and width / (fsdp * sequence) < NARROWEST_SHARD
        network += parts * collective(("fsdp", "sequence"), 2 * weights / tensor, 6 if narrow else 3)
    network += parts * layers * collective(("model",), 2 * tokens * width, 2 * (4 + 2 * (model.remat == "full")))
    network += parts * layers * collective(("sequence",), 4 * tokens * sequence * width / tensor, 3)
    return Candidate(config, memory, max(products, traffic / chip.bandwidth) + 0.5 * network)


def nearest(
    config: Config,
    devices: list[jax.Device],
    chip: Chip,
    report: Report,
    plan: Callable[[Config], Report],
    progress: Progress,
) -> tuple[Config, Report] | None:
    """The change of the fewest keys with which a config fits that did not, compiled; None if none of the first does.

    Args:
      report: of the config as it is.
      plan: config -> report.
    """
    queue = _Queue(candidates(config, devices, chip), chip)
    queue.learn(expect(config, sharding.make_layout(config.mesh, devices), chip), report)
    queue.left.sort(key=lambda candidate: len(differences(config, candidate.config)))
    for _ in range(TRIES):
        if not (candidate := queue.next()):
            return None
        progress.status(f"does not fit; trying {' '.join(flags(config, candidate.config))}")
        report = plan(candidate.config)
        if report["fits"]:
            return candidate.config, report
        queue.learn(candidate, report)
    return None


def search(
    config: Config,
    devices: list[jax.Device],
    chip: Chip,
    compilations: int,
    plan: Callable[[Config], Report],
    progress: Progress,
) -> list[tuple[Config, Report]]:
    """Compiles the config and the most promising changes of it.

    Args:
      compilations: how many changes at most.
      plan: config -> report; called from several threads.

    Returns:
      (config, report) of those that were compiled, the best first: what fits, by the time of a step, then the rest.
    """
    itself = expect(config, sharding.make_layout(config.mesh, devices), chip)
    queue = _Queue(candidates(config, devices, chip), chip)
    progress.say(f"{len(queue.left):,} candidates by arithmetic; compiling {compilations}, and the config as it is")
    done: list[tuple[Config, Report]] = []
    began, at_once = time.perf_counter(), workers()

    def finished(candidate: Candidate, report: Report) -> None:
        queue.learn(candidate, report)
        done.append((candidate.config, report))
        progress.say(f"{summary(report)}  {' '.join(flags(config, candidate.config)) or 'the config as it is'}")

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(plan, config): itself}
        while True:
            while len(running) < at_once and len(done) + len(running) <= compilations:
                if not (candidate := queue.next()):
                    break
                running[pool.submit(plan, candidate.config)] = candidate
            if not running:
                break
            for future in concurrent.futures.wait(running, 1.0, "FIRST_COMPLETED").done:
                finished(running.pop(future), future.result())
            bar = "█" * len(done) + "▒" * len(running) + "░" * (compilations + 1 - len(done) - len(running))
            progress.status(f"{bar} {len(done)} of {compilations + 1} in {duration(time.perf_counter() - began)}")
    best, report = min(done, key=rank)
    if report["fits"] and (best.model.num_layers <= LARGEST_UNROLLED or not best.model.scan_layers):
        model = dataclasses.replace(best.model, scan_layers=not best.model.scan_layers)
        changed = expect(dataclasses.replace(best, model=model), sharding.make_layout(best.mesh, devices), chip)
        progress.status(f"the best with layers {'scanned' if model.scan_layers else 'unrolled'}")
        finished(changed, plan(changed.config))
    return sorted(done, key=rank)


class _Queue:
    """Candidates in the order to compile.

    Passed over are those that cannot fit, by what has been compiled so far, and those that differ in ZeRO-1 or
    micro-batches only from one that fits.
    """

    def __init__(self, found: list[Candidate], chip: Chip):
        self.left, self._usable = found, chip.memory * chip.usable
        self._scale: dict[str, float] = {}  # compiled memory over expected, by remat policy
        self._taken: set[tuple] = set()

    def next(self) -> Candidate | None:
        for candidate in self.left:
            scale = self._scale.get(candidate.config.model.remat, 1.0)
            if candidate.memory * scale <= HEADROOM * self._usable and self._kind(candidate) not in self._taken:
                self.left.remove(candidate)
                self._taken.add(self._kind(candidate))
                return candidate
        return None

    def learn(self, candidate: Candidate, report: Report) -> None:
        if "parameters" not in report["memory"]:  # not the memory was the reason
            return
        used = report["memory"].get("total") or max(report["memory"].get("needed", 0), 1.01 * self._usable)
        self._scale[candidate.config.model.remat] = used / candidate.memory
        if not report["fits"]:
            self._taken.discard(self._kind(candidate))

    @staticmethod
    def _kind(candidate: Candidate) -> tuple:
        mesh = candidate.config.mesh
        return candidate.config.model.remat, mesh.rules, *(getattr(mesh, axis) for axis in AXES)


def rank(planned: tuple[Config, Report]) -> tuple:
    """Sorts what fits by the time of a step, before what does not."""
    _, report = planned
    return not report["fits"], report.get("seconds", {}).get("step", math.inf)


def summary(report: Report) -> str:
    """Memory and step time in a few words."""
    if "seconds" not in report:
        return f"does not fit: {report['compiler_says']}"
    fits = "" if report["fits"] else "does not fit: "
    seconds = report["seconds"]
    return f"{fits}{report['memory']['total'] / 1e9:.1f} GB  {seconds['step']:.3f} s  MFU {seconds['mfu']:.1%}"


def flags(config: Config, changed: Config) -> list[str]:
    """The flags that make one config the other."""
    return [f"--config.{key}={new}" for key, (_, new) in differences(config, changed).items()]


def workers() -> int:
    """How many compilations this machine can run at once."""
    try:
        free = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1000
    except OSError:
        return 1
    return max(1, min(os.cpu_count() or 1, int(free // COMPILER_BYTES)))
