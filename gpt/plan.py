"""Compiles the training step of a config for TPUs that are not there, and says what a step costs each of them.

    python -m gpt.plan --config=configs/gpt2_124m.py --topology=v5e:2x4,v5e:8x8,v5e:16x16 --batch_per_device=8

The program is the one that gpt.main would run there; the TPU's own compiler, in the package libtpu, needs no TPU.
4xv5p:8x8x16 stands for four such slices. All figures are those of one device and one step; GB are 10⁹ bytes.
"""

import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from gpt import cli, sharding
from gpt.config import Config, from_tree
from gpt.errors import UsageError, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, like configs/gpt2_124m.py.")
_TOPOLOGY = flags.DEFINE_list("topology", None, "TPUs to compile for: v5e:16x16, v5p:8x8x16, 4xv5e:16x16, …")
_BATCH_PER_DEVICE = flags.DEFINE_integer(
    "batch_per_device", None, "Rows of the batch for each device. Default: train.batch_size over all.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each topology instead.")

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step compiled for a topology.

    Attributes:
      batch_size: rows of a batch over all devices.
      program: what gpt.train.build made.
      hlo_text: the optimised program of one device.
    """

    topology: str
    batch_size: int
    program: Any
    executable: jax.stages.Compiled
    hlo_text: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes.

    The kind is the compiler's choice. It takes some gathers and scatters apart into steps around a ring that
    overlap with products: these are of the kind collective-permute. Others it does by all-reduce, which sends
    twice as much: a gather as a sum of parts with zeros around them, a scatter as a sum of which a part is kept.

    Attributes:
      axes: mesh axes along which the devices of a group differ.
      group: devices in a group; less than there are along the axes if it goes by parts of them.
      count: how often a step runs one; an asynchronous one counts once.
      bytes: what they take in a step, or for an all-gather, give. So the all-reduce of a gradient counts the
        bytes of the gradient, and the all-gather of a parameter those of the whole parameter.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends if done around a ring: no way of doing it sends less."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology like v5e:16x16, or of several slices of it: 4xv5e:16x16.

    Raises:
      UserError: libtpu is not installed, or (a UsageError) does not know the topology.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*:\d+(?:x\d+)*)", name)
    if not match:
        raise UsageError(f"--topology={name} has to look like v5e:16x16, or 4xv5e:16x16 for four slices.")
    slices, layout = match.groups()
    # libtpu would ask the cloud what machine this is, complain that it is none, and let no second process in.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    from jax.experimental import topologies

    try:
        several = {"num_slices": int(slices)} if slices else {}
        return topologies.get_topology_desc(topology_name=layout, platform="tpu", **several).devices
    except RuntimeError as error:
        if "TPU support not installed" in str(error):
            raise UserError('The TPU compiler is not installed: pip install "gpt-spmd[plan]".') from error
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UsageError(f"--topology={name} is refused by libtpu: {reason}.") from error


def compile_step(config: Config, topology: str) -> Compiled:
    """Compiles the training step that gpt.main would run on the topology.

    Raises:
      UserError: the config or the topology does not allow it.
      jax.errors.JaxRuntimeError: the compiler gave up; see `does_not_fit`.
    """
    from gpt import train

    model, batch_size = config.model, config.train.batch_size
    if not model.vocab_size:
        raise UserError("Set model.vocab_size: a plan reads no data and no tokenizer that would tell it.")
    layout = sharding.make_layout(config.mesh, topology_devices(topology))
    # The length of the run is a constant of the learning rate, and costs nothing.
    program = train.build(config, model.vocab_size, layout, config.train.total_steps(model.block_size, 1))
    tokens = jax.ShapeDtypeStruct((batch_size, model.block_size), jnp.int32, sharding=layout.batch)
    with layout.use():
        lowered = program.train_step.lower(program.abstract_state, {"inputs": tokens, "targets": tokens})
    with tempfile.TemporaryDirectory() as folder:
        # The compiler has to write the program down itself: printed from what it returns, a program fails on
        # asynchronous collectives of several arrays (a RET_CHECK with libtpu 0.0.52 for v5p).
        executable = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = list(Path(folder).glob("*.after_optimizations.txt"))
        hlo_text = written[0].read_text() if written else executable.as_text()  # none if it was in JAX's cache
    return Compiled(topology, batch_size, program, executable, hlo_text)


def does_not_fit(error: Exception) -> str | None:
    """What the compiler says of the memory, in its own words, if that is why it gave up."""
    figure = re.search(r"Ran out of memory (?:on HBM, |in memory space hbm\. )?(.*?)(?:\.\s|$)", str(error))
    return figure and figure[1]


# XLA's cost_analysis() counts what is in a loop once. So the program is read as text, and what is in a loop is
# multiplied by its trip count.


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def get(self, pattern: str) -> str | None:
        """The group of a pattern that is searched in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]


class Module:
    """An HLO module: {computation: {name: Instruction}}, the roots of the computations, and the entry's name."""

    # ROOT? %name = shape opcode(arguments)attributes; the arguments may hold parentheses of parentheses.
    _LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)(.*)$")

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else getattr(self, "entry", None)
            elif match := self._LINE.match(line):
                instruction = Instruction(*match.groups()[1:])
                self.computations[name][instruction.name] = instruction
                if match[1]:
                    self.roots[name] = instruction

    def shapes(self, computation: str, instruction: Instruction) -> list[str]:
        """Shapes of the operands."""
        return [self.computations[computation][operand].shape for operand in instruction.operands]

    def walk(self, computation: str = "", times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(its computation, instruction, how often a step runs it) of all that is run; of branches, each one."""
        computation = computation or self.entry
        for instruction in self.computations[computation].values():
            yield computation, instruction, times
            called, runs = [], times
            if instruction.opcode == "while":
                called = [instruction.get(r"body=%?([\w.\-]+)")]
                runs *= self.trips(computation, instruction)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = [instruction.get(r"(?:calls|to_apply)=%?([\w.\-]+)")]
            elif instruction.opcode == "conditional":
                called = re.findall(r"(?:_computation=|branch_computations=\{|, )%([\w.\-]+)", instruction.attributes)
            for name in called:
                yield from self.walk(name, runs)

    def trips(self, computation: str, loop: Instruction) -> int:
        """Trip count of a loop whose counter is element i of its tuple, from a constant up to another by a third.

        Raises:
          ValueError: the loop is of another kind.
        """
        if known := loop.get(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        condition, body = loop.get(r"condition=%?([\w.\-]+)"), loop.get(r"body=%?([\w.\-]+)")
        in_condition, in_body = self.computations[condition], self.computations[body]
        try:
            counter, limit = self.roots[condition].operands
            i = int(in_condition[counter].get(r"index=(\d+)"))
            start = self._constant(computation, self.computations[computation][loop.operands[0]].operands[i])
            stop = self._constant(condition, limit)
            add = in_body[self.roots[body].operands[i]]
            step = next(self._constant(body, name) for name in add.operands if in_body[name].opcode == "constant")
            if "direction=LT" in self.roots[condition].attributes and add.opcode == "add":
                return max(0, -(-(stop - start) // step))
        except (IndexError, StopIteration, TypeError, ValueError):
            pass
        raise ValueError(f"the trip count of the loop {loop.name} cannot be told")

    def _constant(self, computation: str, name: str) -> int:
        instruction = self.computations[computation][name]
        while instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[computation][instruction.operands[0]]
        return int(instruction.arguments)


parse = functools.lru_cache(maxsize=1)(Module)  # of a large program it takes seconds


def matmul_flops(text: str) -> int:
    """FLOPs of the matrix products of an HLO module, which TPUs call convolutions.

    Raises:
      ValueError: a loop's trip count cannot be told.
    """
    module, total = parse(text), 0
    for computation, product, times in module.walk():
        if product.opcode in ("dot", "convolution"):
            left, right = map(_sizes, module.shapes(computation, product))
            flops = _dot_flops if product.opcode == "dot" else _convolution_flops
            total += times * flops(product, left, right, _sizes(product.shape))
    return total


def _dot_flops(dot: Instruction, left: list[int], _, result: list[int]) -> int:
    contracted = re.findall(r"\d+", dot.get(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
    return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted)


def _convolution_flops(convolution: Instruction, left: list[int], right: list[int], result: list[int]) -> int:
    # Along a window axis a product counts if it is with an element: not with padding, and not with the zeros of
    # a dilation. (A batch of products comes as one convolution, dilated so that each meets only its own factor.)
    labels = re.split("_|->", convolution.get(r"dim_labels=([\w>\-]+)"))
    window = dict(re.findall(r"(\w+)=(\S+)", convolution.get(r"window=\{([^}]*)\}") or ""))
    flops = 2 * result[labels[2].index("b")] * result[labels[2].index("f")] * right[labels[1].index("i")]
    for axis in range(len(left) - 2):
        size, stride, left_dilation, right_dilation = (
            int(window[name].split("x")[axis]) if name in window else 1
            for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        padding = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        outputs = np.arange(result[labels[2].index(str(axis))])[:, None]
        place = outputs * stride + np.arange(size) * right_dilation - padding
        end = left[labels[0].index(str(axis))] * left_dilation
        flops *= int(np.sum((place >= 0) & (place < end) & (place % left_dilation == 0)))
    return flops


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """What an HLO module that was compiled for the mesh communicates, most bytes first.

    Raises:
      ValueError: a loop's trip count cannot be told.
    """
    module, found, seen = parse(text), {}, set()
    for computation, instruction, times in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            axes, group = _axes(instruction, mesh)
            operands = module.shapes(computation, instruction)
        elif kind == "send" and (between_slices := instruction.get(r'_megascale_transfer_type="(\w+)"')):
            kind = between_slices.lower().replace("_", "-")
            axes, group = _slice_axes(mesh)
            operands = module.shapes(computation, instruction)[:1]  # the other one is a token
        else:
            continue
        # The TPU compiler cuts a collective into parts and fuses each with a product that it overlaps with:
        # these share chain and channel, and each names the whole.
        if chain := instruction.get(r'chain_id="(\w+)"'):
            if (chain, channel := instruction.get(r"channel_id=(\d+)")) in seen:
                continue
            seen.add((chain, channel))
        if computation.startswith("all-reduce-scatter"):  # it writes a reduce-scatter as an all-reduce and a slice
            kind = "reduce-scatter"
        size = sum(map(_bytes, operands)) * (group if kind == "all-gather" else 1)
        count, total = found.get((kind, axes, group), (0, 0))
        found[kind, axes, group] = count + times, total + times * size
    return sorted((Collective(*key, *sums) for key, sums in found.items()), key=lambda c: -c.bytes)


def _axes(collective: Instruction, mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and the size of a group."""
    pairs = collective.get(r"source_target_pairs=\{(.*?\})\}")
    groups = _groups((pairs and f"{{{pairs}}}") or collective.get(r"replica_groups=(.*)") or "", mesh.size)
    # The ids are positions in the mesh, whatever the ids of the devices there.
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, differs in zip(mesh.shape, differ, strict=True) if differs)
    return axes, math.prod(mesh.shape[axis] for axis in axes) if pairs else groups.shape[1]


def _slice_axes(mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes that cross from slice to slice, and the number of slices; between slices the host sends."""
    slices = np.array([device.slice_index for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    axes = tuple(axis for i, axis in enumerate(mesh.shape) if (slices != slices.take([0], i)).any())
    return axes, len(np.unique(slices))


def _groups(text: str, devices: int) -> np.ndarray:
    """[groups, members] of device ids: {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0) or mesh['a'=2,'b'=2] {'a'}."""
    numbers = lambda part: [int(number) for number in re.findall(r"\d+", part)]  # noqa: E731
    if match := re.match(r"\{(\{[^}]*\}(?:,\{[^}]*\})*)\}", text):
        return np.array([numbers(group) for group in match[1].split("},")])
    if match := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\])(T\([\d,]+\))?", text):
        ids = np.arange(devices).reshape(numbers(match[2]))
        return ids.transpose(numbers(match[3]) if match[3] else None).reshape(numbers(match[1]))
    if match := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
        names, chosen = re.findall(r"'(\w+)'=", match[1]), re.findall(r"'(\w+)'", match[2])
        sizes = [int(size) for size in re.findall(r"=(\d+)", match[1])]
        order = [names.index(name) for name in sorted(names, key=chosen.__contains__)]
        members = math.prod(sizes[names.index(name)] for name in chosen)
        return np.arange(devices).reshape(sizes).transpose(order).reshape(-1, members)
    return np.arange(devices)[None]


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", re.search(r"\[([\d,]*)\]", shape)[1])]


def _bytes(shape: str) -> int:
    """Bytes of bf16[8,128]{1,0}, or of a tuple of such."""
    arrays = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", shape)
    return sum(int(bits or 8) * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in arrays) // 8


def measure(compiled: Compiled) -> dict[str, Any]:
    """What a step costs a device: FLOPs of matrix products, bytes of memory, and `collectives`."""
    mesh = compiled.program.layout.mesh
    memory = compiled.executable.memory_analysis()
    return {
        "topology": compiled.topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": compiled.batch_size,
        "parameters": compiled.program.num_parameters(),
        "flops": matmul_flops(compiled.hlo_text),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # beyond the arguments given up
        "collectives": collectives(compiled.hlo_text, mesh),
    }


COLUMNS = f"{'topology':16}{'devices':>8}  {'mesh':27}{'batch':>7}{'TFLOP':>9}{'memory GB':>11}  "
COLUMNS_OF_COLLECTIVE = f"{'collectives':19}{'over':20}{'group':>6}{'count':>7}{'GB':>9}"


def rows(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the table for a report of `measure`: one, and one more for each further kind of collective."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    memory = sum(report[f"{part}_bytes"] for part in ("argument", "temporary", "output"))
    left = (
        f"{report['topology']:16}{report['devices']:8,}  {mesh:27}{report['batch_size']:7,}"
        f"{report['flops'] / 1e12:9.3f}{memory / 1e9:11.2f}  "
    )
    for c in report["collectives"]:
        yield f"{left}{c.kind:19}{'+'.join(c.axes):20}{c.group:6,}{c.count:7,}{c.bytes / 1e9:9.4f}"
        left = " " * len(left)
    if not report["collectives"]:
        yield f"{left}none"


def main() -> int:
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UsageError("Name a config file and TPUs: --config=configs/gpt2_124m.py --topology=v5e:2x4,v5e:8x8.")
    jax.config.update("jax_platforms", "cpu")  # this machine's accelerators have no part in it
    jax.config.update("jax_enable_compilation_cache", False)  # it could not be read without a TPU
    config, exit_code = from_tree(_CONFIG.value), 0
    header = [] if _JSON.value else [COLUMNS + COLUMNS_OF_COLLECTIVE]
    for topology in _TOPOLOGY.value:
        if _BATCH_PER_DEVICE.value:
            batch_size = _BATCH_PER_DEVICE.value * len(topology_devices(topology))
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
        try:
            report = measure(compile_step(config, topology))
        except jax.errors.JaxRuntimeError as error:
            if not (figure := does_not_fit(error)):
                raise
            report, exit_code = {"topology": topology, "does_not_fit": figure}, 1
        if _JSON.value:
            lines = [json.dumps(report, default=dataclasses.asdict)]
        elif "does_not_fit" in report:
            lines = [f"{topology:16}does not fit: {report['does_not_fit']}"]
        else:
            lines = rows(report)
        print(*header, *lines, sep="\n", flush=True)
        header = []
    return exit_code


if __name__ == "__main__":
    cli.run(main)
