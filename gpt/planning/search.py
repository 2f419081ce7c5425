"""Searches for the mesh, attention, remat policy and micro-batches of the shortest step: by arithmetic, then compiling.

The arithmetic is rough. It only decides what is compiled, and in which order; the compiled programs decide the result.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator

import jax

from gpt import sharding
from gpt.config import Config, differences
from gpt.models import remat
from gpt.models.base import ModelConfig
from gpt.models.kernels import KERNELS
from gpt.planning import roofline
from gpt.planning.report import Report, units
from gpt.runtime import hardware
from gpt.runtime.errors import UserError
from gpt.runtime.hardware import Chip
from gpt.runtime.progress import say, task
from gpt.sharding import AXES, MeshConfig

# A search compiles deeper models with scanned layers, in a fraction of the time, and its best config as it was given.
LARGEST_UNROLLED = 16
# The values of `model.remat` that a search tries, from the most memory to the least.
REMAT = ("none", "dots", "qkv,attention,out", "attention,out", "full")
# A candidate should use at most this fraction of the memory: close to the limit, compilation takes much longer.
HEADROOM = 0.9
# Memory that one compilation may need, in bytes; several run at once in half of the memory of this machine.
COMPILER_BYTES = 4e9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config, and what the arithmetic expects of it.

    Attributes:
      memory: bytes of a device.
      seconds: duration of a step.
    """

    config: Config
    memory: float
    seconds: float


def factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Returns every ordered tuple of so many factors whose product is the number."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return (each for each in itertools.product(divisors, repeat=factors) if math.prod(each) == number)


def candidates(config: Config, devices: list[jax.Device], chip: Chip) -> list[Candidate]:
    """Returns every change of the config that a search considers, the shortest expected step first.

    The changes are all sizes of the mesh axes that divide what they shard, with the rules that use these axes, ZeRO-1
    if `data` is larger than 1, the attention that `auto` chooses and, if this is no kernel, the chunked one, every
    value of `REMAT`, and every division into micro-batches.
    """
    model, batch_size, result = config.model, config.train.batch_size, []
    vocabulary = dataclasses.replace(model, vocab_size=model.vocab_size or config.data.vocab_size).padded_vocab_size
    for data, fsdp, sequence, tensor in factorisations(len(devices), len(AXES)):
        shards = [(batch_size, data * fsdp), (model.length, sequence)]
        shards += [(size, tensor) for size in (model.kv_heads, model.mlp_dim, vocabulary)]
        if any(size % number for size, number in shards):
            continue
        rules = "sp" if sequence > 1 else "fsdp_tp" if tensor > 1 else "fsdp" if fsdp > 1 else "dp"
        mesh = _shortest(MeshConfig(rules, data, fsdp, sequence, tensor), len(devices))
        try:
            layout = sharding.make_layout(mesh, devices)
            attention = _attention_kinds(config, layout)
        except UserError:  # the mesh does not fit the slices
            continue
        examples = batch_size // (data * fsdp)
        divisors = [number for number in range(1, examples + 1) if examples % number == 0]
        zero1_choices = (False, True) if data > 1 else (False,)
        for zero1, kind, policy, micro_batches in itertools.product(zero1_choices, attention, REMAT, divisors):
            changed = dataclasses.replace(
                config,
                mesh=dataclasses.replace(mesh, zero1=zero1),
                model=dataclasses.replace(model, remat=policy, attention=kind),
                train=dataclasses.replace(config.train, micro_batches=micro_batches),
            )
            result.append(expect(changed, layout, chip))
    return sorted(result, key=lambda candidate: candidate.seconds)


def _shortest(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """Returns a config of the same mesh that leaves as many sizes as possible at their default, 0."""
    for axis in AXES:
        # mypy takes the keyword for any field of MeshConfig
        shorter = dataclasses.replace(mesh, **{axis: 0})  # type: ignore[arg-type]
        if shorter.shape(num_devices) == mesh.shape(num_devices):
            mesh = shorter
    return mesh


def _attention_kinds(config: Config, layout: sharding.Layout) -> list[str]:
    """Returns the values of `model.attention` to try: `auto`, and `chunked` where that is no kernel."""
    auto = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    if _resolved(auto, layout).attention in KERNELS or "chunked" not in config.model.attention_kinds:
        return ["auto"]
    return ["auto", "chunked"]


def _resolved(config: Config, layout: sharding.Layout) -> ModelConfig:
    vocab_size = config.model.vocab_size or config.data.vocab_size
    return config.model.resolve(vocab_size, layout.mesh.devices.flat[0].platform, layout.length_shards)


def expect(config: Config, layout: sharding.Layout, chip: Chip) -> Candidate:
    """Returns the config with the memory of a device and the time of a step, computed by arithmetic."""
    model, sizes, micro_batches = _resolved(config, layout), layout.mesh.shape, config.train.micro_batches
    data, fsdp, sequence, tensor = (sizes[axis] for axis in AXES)
    width, layers = model.embed_dim, model.num_layers
    # Per device; tokens are those of one micro-batch.
    examples = config.train.batch_size / (data * fsdp)
    length = model.length / sequence
    tokens = examples / micro_batches * length

    # Parameters and optimizer state in float32, gradients, and gathered parameters in bfloat16.
    weights = model.num_parameters()
    shard = weights / tensor / (1 if config.mesh.rules == "dp" else fsdp * sequence)
    optimizer = 8 * shard / (data if config.mesh.zero1 else 1)
    gradients = shard * (6 if micro_batches > 1 else 4)
    gathered = 0 if shard * tensor == weights else 4 * weights / layers / tensor

    # Activations that a layer saves for the backward pass, and the temporaries of one layer.
    scores = 0 if model.attention in ("chunked", *KERNELS) else tokens * model.num_heads / tensor * model.length
    layer_sizes = model.layer_weights
    outputs = {name: size / tensor for name, (_, size) in layer_sizes.items()}
    outputs["attention"] = model.num_heads * model.head_dim / tensor if model.attention in KERNELS else 0
    wide = sum(outputs.values()) + width / tensor
    kept = [name for name, on_host in remat.kept(model.remat).items() if not on_host]
    # The backward pass does not need the output of the last layer, "down".
    saved = 2 * tokens * (width / tensor + sum(outputs.get(name, 0) for name in kept if name != "down"))
    if model.remat == "none":
        saved += 6 * scores + 2 * tokens * (2 * outputs["up"] + 2 * outputs.get("gate", 0) + 6 * width / tensor)
    temporaries = 10 * scores + 6 * tokens * wide + 6 * tokens * model.padded_vocab_size / tensor
    memory = 4 * shard + optimizer + gradients + gathered + layers * saved + temporaries

    products = {name: inputs * size for name, (inputs, size) in layer_sizes.items()}
    again = sum(size for name, size in products.items() if name not in (*kept, "down")) / sum(products.values()) / 3
    recomputation = 1 + (0 if model.remat == "none" else 0.02 + again)
    compute = recomputation * examples * length / tensor * model.flops_per_token() / chip.flops
    passes = 20 + 10 * (model.remat != "none")  # bytes read and written per attention score
    traffic = micro_batches * layers * (passes * scores + 40 * tokens * wide) + 30 * shard
    traffic += micro_batches * 6 * weights / tensor  # each micro-batch reads the parameters again

    def collective(axes: tuple[str, ...], size: float, times: float) -> float:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        group = math.prod(sizes[axis] for axis in axes)
        sent = times * size * (group - 1) / group
        return sent / roofline.ring_bandwidth(axes, group, layout.mesh, chip) if axes else 0.0

    network = collective(("data",), 2 * shard, 2)
    if config.mesh.rules != "dp":
        # The compiler of v5p gathers by all-reduces, which send twice the bytes, among all of 64 devices or more.
        is_doubled = chip.name == "v5p" and fsdp * sequence == layout.mesh.size >= 64
        network += micro_batches * collective(("fsdp", "sequence"), 2 * weights / tensor, 6 if is_doubled else 3)
    activations = micro_batches * layers * tokens * width
    # The residual stream is gathered and scattered twice in each pass; its gradient for kernels gathers it again.
    network += collective(("model",), 2 * activations, 10 + 4 * (again > 0))
    network += collective(("sequence",), 4 * activations * sequence / tensor, 3)
    return Candidate(config, memory, max(compute, traffic / chip.bandwidth) + 0.5 * network)


def search(
    config: Config,
    devices: list[jax.Device],
    chip: Chip,
    compilations: int,
    plan: Callable[[Config], Report],
) -> list[tuple[Config, Report]]:
    """Compiles the config and its most promising changes.

    Args:
      compilations: maximum number of changes to compile.
      plan: function from a config to its plan; several threads call it.

    Returns:
      (config, plan) for each compiled config, the best first: those that fit by the time of a step, then the others.
    """

    def with_layers(config: Config, scanned: bool) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=scanned))

    is_deep = config.model.num_layers > LARGEST_UNROLLED
    first = with_layers(config, True) if is_deep else config
    queue = _Queue([each for each in candidates(first, devices, chip) if each.config != first], chip)
    say(f"{len(queue.candidates):,} candidates by arithmetic; compiling {compilations} and the config itself")
    done: list[tuple[Config, Report]] = []
    at_once = max(1, min(os.cpu_count() or 1, int(hardware.host_memory() / 2 // COMPILER_BYTES)))

    def finish(candidate: Candidate, report: Report) -> None:
        queue.learn(candidate, report)
        done.append((candidate.config, report))
        say(f"{summary(report)}  {' '.join(flags(config, candidate.config)) or 'the unchanged config'}")

    with (
        concurrent.futures.ThreadPoolExecutor(at_once) as pool,
        task("compiling candidates", compilations + 1) as shown,
    ):
        unchanged = expect(first, sharding.make_layout(config.mesh, devices), chip)
        running = {pool.submit(plan, first): unchanged}
        while running:
            for future in concurrent.futures.wait(running, 1.0, "FIRST_COMPLETED").done:
                finish(running.pop(future), future.result())
            wanted = min(at_once, compilations + 1 - len(done)) - len(running)
            for candidate in filter(None, (queue.next() for _ in range(wanted))):
                running[pool.submit(plan, candidate.config)] = candidate
            shown.done, shown.note = len(done), f"{len(done)} of {compilations + 1}"
    best, report = min(done, key=rank)
    if report["fits"] and not (is_deep and config.model.scan_layers):
        other = with_layers(best, not best.model.scan_layers)
        with task(f"compiling the best with layers {'scanned' if other.model.scan_layers else 'unrolled'}"):
            report = plan(other)
        finish(expect(other, sharding.make_layout(best.mesh, devices), chip), report)
    return sorted(done, key=rank)


class _Queue:
    """Candidates in the order in which to compile them.

    It skips candidates that cannot fit, judged by what has been compiled, and those that differ only in ZeRO-1 or
    micro-batches from one that fits.
    """

    def __init__(self, ordered: list[Candidate], chip: Chip):
        self.candidates, self._usable = ordered, chip.memory * chip.usable
        self._scale: dict[str, float] = {}  # compiled memory over expected memory, by remat policy
        self._taken: set[tuple] = set()

    def next(self) -> Candidate | None:
        for candidate in self.candidates:
            scale = self._scale.get(candidate.config.model.remat, 1.0)
            if candidate.memory * scale <= HEADROOM * self._usable and self._kind(candidate) not in self._taken:
                self.candidates.remove(candidate)
                self._taken.add(self._kind(candidate))
                return candidate
        return None

    def learn(self, candidate: Candidate, report: Report) -> None:
        if "parameters" not in report["memory"]:  # it was refused for another reason than memory
            return
        used = report["memory"].get("total") or max(report["memory"].get("needed", 0), 1.01 * self._usable)
        self._scale[candidate.config.model.remat] = used / candidate.memory
        if not report["fits"]:
            self._taken.discard(self._kind(candidate))

    @staticmethod
    def _kind(candidate: Candidate) -> tuple:
        return candidate.config.model.remat, dataclasses.replace(candidate.config.mesh, zero1=False)


def rank(planned: tuple[Config, Report]) -> tuple[bool, float]:
    """Returns the sort key of a plan: those that fit come first, by the time of a step."""
    _, report = planned
    return not report["fits"], report.get("seconds", {}).get("step", math.inf)


def summary(report: Report) -> str:
    """Returns the memory, step time and MFU of a plan, or why it does not fit."""
    if "seconds" not in report:
        return f"does not fit: {report['compiler_message']}"
    fits = "" if report["fits"] else "does not fit: "
    unit, seconds = units([report]), report["seconds"]
    memory, step = unit["bytes"](report["memory"]["total"]), unit["seconds"](seconds["step"])
    return f"{fits}{memory}  {step}  MFU {seconds['mfu']:.1%}"


def flags(config: Config, changed: Config) -> list[str]:
    """Returns the flags that turn one config into the other."""
    return [f"--config.{key}={new}" for key, (_, new) in differences(config, changed).items()]
