"""Reads compiled programs: XLA's HLO as text, as the compilers for TPU and GPU write it.

XLA's own cost_analysis() counts what is in a loop once, and knows no GPU. So the text is read here, and what is in a
loop is multiplied by its trip count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What takes no time of a device, or whose time another instruction stands for: the -done of a -start, for one.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "optimization-barrier", "while", "call", "conditional", "async-start", "async-update"}
# Kernels of attention, and how many products as large as that of queries and keys each does.
_ATTENTION_PRODUCTS = {
    r"splash_mha_fwd": 2,
    r"splash_mha_dq": 3,
    r"splash_mha_dkv": 4,
    r"__cudnn\$fmha(ScaleBias)?Softmax$": 2,
    r"__cudnn\$fmha(ScaleBias)?SoftmaxBackward$": 5,
}
# The TPU compiler's cycles for what it gives no estimate of.
_NO_ESTIMATE = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def get(self, pattern: str) -> str | None:
        """The group of a pattern that is searched in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a device runs as one kernel.

    Attributes:
      times: how often a step runs it.
      flops: of its matrix products, once.
      bytes: read from and written to the device's main memory, once.
      cycles: the compiler's own estimate of its length, once; None where it gives none.
      overlaps: a copy that runs beside other operations.
      opaque: a kernel of attention, which the compiler knows nothing of.
    """

    name: str
    times: int
    flops: int
    bytes: int
    cycles: int | None = None
    overlaps: bool = False
    opaque: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes.

    The kind is the compiler's choice. It takes some gathers and scatters apart into steps around a ring that
    overlap with products: these are of the kind collective-permute. Others it does by all-reduce, which sends
    twice as much: a gather as a sum of parts with zeros around them, a scatter as a sum of which a part is kept.

    Attributes:
      axes: mesh axes along which the devices of a group differ.
      group: devices in a group; less than there are along the axes if it goes by parts of them.
      overlaps: other operations run meanwhile.
      count: how often a step runs one; an asynchronous one counts once.
      bytes: what they take in a step, or for an all-gather, give. So the all-reduce of a gradient counts the
        bytes of the gradient, and the all-gather of a parameter those of the whole parameter.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    overlaps: bool
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends if done around a ring: no way of doing it sends less."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


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
        self._touched = functools.cache(self._touched)

    def shapes(self, computation: str, instruction: Instruction) -> list[str]:
        """Shapes of the operands."""
        return [self.computations[computation][operand].shape for operand in instruction.operands]

    def walk(
        self, computation: str = "", times: int = 1, fusions: bool = True
    ) -> Iterator[tuple[str, Instruction, int]]:
        """(its computation, instruction, how often a step runs it) of all that is run; of branches, each one.

        Args:
          computation: where to begin; "" is the entry.
          times: how often that is run.
          fusions: go into fusions, too.

        Raises:
          ValueError: a loop's trip count cannot be told.
        """
        computation = computation or self.entry
        for instruction in self.computations[computation].values():
            yield computation, instruction, times
            called, runs = [], times
            if instruction.opcode == "while":
                called = [instruction.get(r"body=%?([\w.\-]+)")]
                runs *= self.trips(computation, instruction)
            elif instruction.opcode in ("call", "async-start") or (fusions and instruction.opcode == "fusion"):
                called = [instruction.get(r"(?:calls|to_apply)=%?([\w.\-]+)")]
            elif instruction.opcode == "conditional":
                called = re.findall(r"(?:_computation=|branch_computations=\{|, )%([\w.\-]+)", instruction.attributes)
            for name in called:
                yield from self.walk(name, runs, fusions)

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

    def traffic(self, computation: str, instruction: Instruction) -> int:
        """Bytes of the main memory that an instruction reads and writes.

        Of what a slice is taken from, or put into, only the slice counts.
        """
        shapes = self.shapes(computation, instruction)
        if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):  # (to, from, …) in some order
            ends = _arrays(instruction.shape)[:2]
            return min(map(_bytes, ends)) * sum(_main_bytes(end) > 0 for end in ends)
        if instruction.opcode == "fusion":
            parts, written = self._touched(instruction.get(r"calls=%?([\w.\-]+)"))
        else:
            parts, written = _slices(instruction, shapes)
        results = _arrays(instruction.shape)
        if len(written) != len(results):  # a tuple that is passed on whole
            written = [None] * len(results)
        sizes = [_main_bytes(shape) for shape in [*shapes, *results]]
        return sum(
            size if part is None else min(part, size) for part, size in zip([*parts, *written], sizes, strict=True)
        )

    def _touched(self, fused: str) -> tuple[list[int | None], list[int | None]]:
        """Of each parameter and each result of a fusion, the bytes it reads or writes; None for all of it."""
        inside, root = self.computations[fused], self.roots[fused]
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in inside.values():
            for place, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, place))

        def through(instruction: Instruction) -> tuple[list[int | None], list[int | None]]:
            if instruction.opcode == "fusion":
                return self._touched(instruction.get(r"calls=%?([\w.\-]+)"))
            return _slices(instruction, self.shapes(fused, instruction))

        def read(name: str) -> int | None:
            total = 0
            for user, place in users.get(name, []):
                part = read(user.name) if user.opcode == "bitcast" else through(user)[0][place]
                if part is None or (user is root and user.opcode == "tuple"):
                    return None
                total += part
            return total

        def written(name: str) -> list[int | None]:
            instruction = inside[name]
            if instruction.opcode == "tuple":
                return [part for operand in instruction.operands for part in written(operand)]
            if instruction.opcode == "bitcast":
                return written(instruction.operands[0])
            return through(instruction)[1]

        parameters = [i for i in inside.values() if i.opcode == "parameter"]
        parameters.sort(key=lambda parameter: int(parameter.arguments))
        return [read(parameter.name) for parameter in parameters], written(root.name)


parse = functools.lru_cache(maxsize=1)(Module)  # of a large program it takes seconds


def operations(text: str) -> list[Operation]:
    """What an HLO module runs, collectives left out; see `collectives`.

    Raises:
      ValueError: a loop's trip count cannot be told.
    """
    module, found = parse(text), []
    for computation, instruction, times in module.walk(fusions=False):
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode.removesuffix("-start") in COLLECTIVES:
            continue
        if opcode in ("send", "recv") or instruction.get(r'custom_call_target="(AllocateBuffer)"'):
            continue
        if opcode == "fusion":
            inside = module.walk(instruction.get(r"calls=%?([\w.\-]+)"))
            flops = sum(runs * _flops(module, where, product) for where, product, runs in inside)
        else:
            flops = _flops(module, computation, instruction)
        cycles = int(instruction.get(r'"estimated_cycles":"(\d+)"') or _NO_ESTIMATE)
        found.append(
            Operation(
                instruction.name,
                times,
                flops,
                module.traffic(computation, instruction),
                cycles if cycles < _NO_ESTIMATE else None,
                overlaps=opcode.endswith("-start"),
                opaque=_attention_products(instruction) > 0,
            )
        )
    return found


def _flops(module: Module, computation: str, product: Instruction) -> int:
    """FLOPs of an instruction if it is a matrix product or a kernel of attention, else 0."""
    if products := _attention_products(product):
        return products * _attention_flops(product, module.shapes(computation, product))
    cublas = product.opcode == "custom-call" and product.get(r'custom_call_target="(__cublas)')
    if not cublas and product.opcode not in ("dot", "convolution"):
        return 0
    left, right = map(_sizes, module.shapes(computation, product)[:2])  # a third one of cuBLAS is added
    flops = _convolution_flops if product.opcode == "convolution" else _dot_flops
    return flops(product, left, right, _sizes(product.shape))


def _attention_products(kernel: Instruction) -> int:
    target = kernel.opcode == "custom-call" and kernel.get(r'custom_call_target="([^"]*)"')
    name = kernel.name if target == "tpu_custom_call" else target or ""
    return next((number for pattern, number in _ATTENTION_PRODUCTS.items() if re.match(pattern, name)), 0)


def _attention_flops(kernel: Instruction, shapes: list[str]) -> int:
    """FLOPs of a product of queries and keys, T·(S - T/2) of each head: those that the causal mask leaves, for the last
    T of S tokens, which are the most. What a kernel computes beyond them, in blocks on the diagonal, is not counted."""
    q, k = [sizes for sizes in map(_sizes, shapes) if len(sizes) == 4][:2]
    length = 2 if kernel.name.startswith("splash") else 1  # [B, H, T, K], or of cuDNN [B, T, H, K]
    return math.prod(q) * (2 * k[length] - q[length])


def _dot_flops(dot: Instruction, left: list[int], _, result: list[int]) -> int:
    # lhs_contracting_dims={1}, or of cuBLAS "lhs_contracting_dimensions":["1"]
    contracted = dot.get(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)') or ""
    return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))


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
        overlaps = instruction.opcode.endswith("-start")
        if kind in COLLECTIVES:
            axes, group = _axes(instruction, mesh)
            operands = module.shapes(computation, instruction)
        elif kind == "send" and (between_slices := instruction.get(r'_megascale_transfer_type="(\w+)"')):
            kind, overlaps = between_slices.lower().replace("_", "-"), True
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
            overlaps = True
        if computation.startswith("all-reduce-scatter"):  # it writes a reduce-scatter as an all-reduce and a slice
            kind = "reduce-scatter"
        size = sum(map(_bytes, operands)) * (group if kind == "all-gather" else 1)
        count, total = found.get((kind, axes, group, overlaps), (0, 0))
        found[kind, axes, group, overlaps] = count + times, total + times * size
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
    """[groups, members] of device ids, which XLA writes in three ways.

    {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0), an array of ids reshaped; mesh['a'=2,'b'=4] {'a','b':(2)2}, the
    axes along which groups go, or parts of them (of b the inner 2), after device_ids=(…) if these are not in order.
    """
    numbers = lambda part: [int(number) for number in re.findall(r"\d+", part)]  # noqa: E731
    if match := re.match(r"\{(\{[^}]*\}(?:,\{[^}]*\})*)\}", text):
        return np.array([numbers(group) for group in match[1].split("},")])
    if match := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match[2], devices).reshape(numbers(match[1]))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        ids = np.arange(devices)
        if match[2]:
            ids = _iota(match[2], devices) if match[2].startswith("[") else np.array(numbers(match[2]))
        chosen = {name: part and numbers(part) for name, part in re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", match[3])}
        shape, outside, inside = [], [], []
        for name, size in re.findall(r"'(\w+)'=(\d+)", match[1]):
            outer, part = (chosen[name] or (1, int(size))) if name in chosen else (int(size), 1)
            inside.append(len(shape) + 1)
            outside += [len(shape), len(shape) + 2]
            shape += [outer, part, int(size) // (outer * part)]
        members = math.prod(shape[axis] for axis in inside)
        return ids.reshape(shape).transpose(outside + inside).reshape(-1, members)
    return np.arange(devices)[None]


def _iota(text: str, devices: int) -> np.ndarray:
    """The numbers of the devices in the shape and order of [2,4]T(1,0)."""
    sizes, *order = [[int(number) for number in part.split(",")] for part in re.findall(r"[\d,]+", text)]
    return np.arange(devices).reshape(sizes).transpose(*order)


def _slices(instruction: Instruction, shapes: list[str]) -> tuple[list[int | None], list[int | None]]:
    """Bytes of each operand and each result that are touched where that is a part of them, else None."""
    whole: list[int | None] = [None] * len(shapes)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return [_bytes(instruction.shape), *whole[1:]], [None]
    if instruction.opcode == "dynamic-update-slice":  # in place
        return [0, *whole[1:]], [_bytes(shapes[1])]
    return whole, [None]


def _arrays(shape: str) -> list[str]:
    """The arrays of a shape, which may be a tuple: ["bf16[8,128]{1,0:T(8,128)}", …]."""
    return re.findall(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", re.search(r"\[([\d,]*)\]", shape)[1])]


def _bytes(shape: str) -> int:
    """Bytes of bf16[8,128]{1,0}, or of a tuple of such."""
    arrays = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", shape)
    return sum(int(bits or 8) * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in arrays) // 8


def _main_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the main memory, which S(n) in a layout denies."""
    return sum(_bytes(array) for array in _arrays(shape) if not re.search(r"S\([1-9]\d*\)", array))
