"""Reads the FLOPs, memory traffic and collectives of a compiled program from its HLO text, for TPU and GPU.

XLA's own cost_analysis() counts the body of a loop once and does not support GPUs. This module multiplies the body of
a loop by its trip count.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Opcodes that take no time on a device, or whose time is that of the instructions that they call.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "optimization-barrier", "while", "call", "conditional", "async-start", "async-update"}
# Attention kernels, and how many matrix products of the size of queries × keys each computes.
_ATTENTION_PRODUCTS = {
    r"splash_mha_fwd": 2,
    r"splash_mha_dq": 3,
    r"splash_mha_dkv": 4,
    r"__cudnn\$fmha(ScaleBias)?Softmax$": 2,
    r"__cudnn\$fmha(ScaleBias)?SoftmaxBackward$": 5,
}
# Bytes that are read of each operand, or written of each result; infinite for all of it.
Accesses = list[float]
# What the TPU compiler writes as estimated cycles if it has no estimate.
_NO_ESTIMATE = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `%name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are the arguments."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @functools.cached_property
    def called(self) -> str:
        """Name of the computation that a fusion, a call, a loop or a kernel on the SparseCores runs, or ""."""
        return self.get(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")

    def get(self, pattern: str) -> str:
        """Returns the first group of a pattern that is searched for in the attributes, or ""."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kernel of a device.

    Attributes:
      name: the name of the instruction.
      times: how often a step runs it.
      flops: FLOPs of its matrix products in one run.
      flops_8bit: those of them whose factors have 8 bits.
      bytes: bytes that one run reads from and writes to the main memory.
      cycles: the compiler's estimate of the clock cycles of one run, or None.
      overlaps: True for a copy that runs at the same time as other operations.
      opaque: True for an attention kernel, whose cost the compiler does not estimate.
    """

    name: str
    times: int
    flops: int
    bytes: int
    cycles: int | None = None
    overlaps: bool = False
    opaque: bool = False
    flops_8bit: int = 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a step that have the same kind, mesh axes and group size.

    The compiler chooses the kind. It splits some gathers and scatters into steps around a ring that overlap with matrix
    products; these have the kind collective-permute. It replaces others by an all-reduce, which sends twice as much: a
    gather by the sum of shards padded with zeros, a scatter by a sum of which a device keeps its shard.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: mesh axes along which the devices of a group differ.
      group: number of devices in a group, which can be less than the product of the axes.
      overlaps: kernels run at the same time.
      count: how often a step runs such a collective; the start and the end of an asynchronous one count once.
      bytes: total size of the operands (all-gather: of the results) in a step. For example, the all-reduce of a
        gradient counts the bytes of the gradient, and the all-gather of a parameter those of the whole parameter.
      rings: number of one-way rings that share the data, if the program states it (libtpu for the SparseCores), else 0.
      beside: for each instruction, if they overlap: how often a step runs it, its bytes in one run, and the kernels
        between its start and its end; None: it is part of a kernel, or a loop runs meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    overlaps: bool
    count: int
    bytes: int
    rings: int = 0
    beside: tuple[tuple[int, int, Sequence[Operation] | None], ...] = dataclasses.field(default=(), compare=False)

    @property
    def sent(self) -> float:
        """Bytes that a device sends around a ring, which is the minimum of all algorithms."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


class Module:
    """An HLO module.

    Attributes:
      computations: {computation: {name: Instruction}}.
      roots: {computation: the Instruction that is its result}.
      entry: name of the computation that a device runs.
    """

    # ROOT? %name = shape opcode(arguments)attributes; the arguments can contain two levels of parentheses.
    _LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)(.*)$")

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        self._accesses = functools.cache(self._uncached_accesses)
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                name = header[2]
                self.computations[name] = {}
                if header[1]:
                    self.entry = name
            elif match := self._LINE.match(line):
                instruction = Instruction(*match.groups()[1:])
                self.computations[name][instruction.name] = instruction
                if match[1]:
                    self.roots[name] = instruction

    def shapes(self, computation: str, instruction: Instruction) -> list[str]:
        """Returns the shapes of the operands."""
        return [self.computations[computation][operand].shape for operand in instruction.operands]

    def walk(
        self, computation: str = "", times: int = 1, fusions: bool = True
    ) -> Iterator[tuple[str, Instruction, int]]:
        """Yields (computation, instruction, how often a step runs it) for every instruction, of all branches.

        Args:
          computation: the computation to start with; "" is the entry.
          times: how often a step runs that computation.
          fusions: also yield the instructions inside fusions.

        Raises:
          ValueError: the trip count of a loop is not known.
        """
        computation, calls = computation or self.entry, ("call", "async-start", *(("fusion",) if fusions else ()))
        for instruction in self.computations[computation].values():
            yield computation, instruction, times
            called, runs = [instruction.called], times
            if instruction.opcode == "while":
                runs *= self.trips(computation, instruction)
            elif instruction.opcode == "conditional":
                branches = r"(?:_computation=|branch_computations=\{|, )%([\w.\-]+)"
                called = re.findall(branches, instruction.attributes)
            elif instruction.opcode not in calls and not _is_wrapper(instruction):
                continue
            for name in called:
                yield from self.walk(name, runs, fusions)

    @functools.cached_property
    def asynchronous(self) -> dict[str, tuple[str, Instruction]]:
        """The computations that run beside kernels, as on the SparseCores of a TPU: where and what starts each."""
        starts: dict[str, tuple[str, Instruction]] = {}
        for computation, instruction, _ in self.walk():
            if instruction.called and (instruction.opcode == "async-start" or computation in starts):
                starts[instruction.called] = starts.get(computation, (computation, instruction))
        return starts

    def beside(self, computation: str, start: Instruction) -> list[Instruction] | None:
        """Returns the kernels between the start of an asynchronous operation and its end; None: a loop or a call."""
        scheduled, kernels = self.computations[computation], list[Instruction]()
        users = [instruction for instruction in scheduled.values() if start.name in instruction.operands]
        start = next((user for user in users if user.opcode == "async-update"), start)  # only then it has its operands
        for instruction in itertools.dropwhile(lambda other: other is not start, scheduled.values()):
            if start.name in instruction.operands:
                return kernels
            if instruction.opcode in ("while", "call", "conditional"):
                return None
            if _is_kernel(instruction):
                kernels.append(instruction)
        return None  # it ends in another computation

    def trips(self, computation: str, loop: Instruction) -> int:
        """Returns the trip count of a loop.

        If the compiler does not state it, the counter has to be an element of the loop's tuple that starts at a
        constant, grows by a constant, and is compared with a constant.

        Raises:
          ValueError: the loop has another form.
        """
        if known := loop.get(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        condition, body = loop.get(r"condition=%?([\w.\-]+)"), loop.called
        in_body = self.computations[body]
        with contextlib.suppress(IndexError, StopIteration, ValueError):
            counter, limit = self.roots[condition].operands
            i = int(self.computations[condition][counter].get(r"index=(\d+)"))
            start = self._constant(computation, self.computations[computation][loop.operands[0]].operands[i])
            stop = self._constant(condition, limit)
            add = in_body[self.roots[body].operands[i]]
            step = next(self._constant(body, name) for name in add.operands if in_body[name].opcode == "constant")
            if "direction=LT" in self.roots[condition].attributes and add.opcode == "add":
                return max(0, -(-(stop - start) // step))
        raise ValueError(f"the trip count of the loop {loop.name} is not known")

    def _constant(self, computation: str, name: str) -> int:
        instruction = self.computations[computation][name]
        while instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[computation][instruction.operands[0]]
        return int(instruction.arguments)

    def traffic(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes of the main memory that an instruction reads and writes.

        Of an array that is sliced or updated in place, only the slice counts.
        """
        shapes = self.shapes(computation, instruction)
        if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):  # (to, from, …) in some order
            ends = _arrays(instruction.shape)[:2]
            return min(map(_bytes, ends)) * sum(_main_bytes(end) > 0 for end in ends)
        reads, writes = self._partial_accesses(computation, instruction)
        results = _arrays(instruction.shape)
        if len(writes) != len(results):  # a tuple that is passed through unchanged
            writes = [math.inf] * len(results)
        sizes = [_main_bytes(shape) for shape in [*shapes, *results]]
        return int(sum(map(min, [*reads, *writes], sizes)))

    def _partial_accesses(self, computation: str, instruction: Instruction) -> tuple[Accesses, Accesses]:
        """Returns the bytes that are read of each operand and written of each result; infinite for all."""
        if instruction.opcode == "fusion":
            return self._accesses(instruction.called)
        shapes = self.shapes(computation, instruction)
        whole: Accesses = [math.inf] * len(shapes)
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return [_bytes(instruction.shape), *whole[1:]], [math.inf]
        if instruction.opcode == "dynamic-update-slice":  # in place
            return [0, *whole[1:]], [_bytes(shapes[1])]
        return whole, [math.inf]

    def _uncached_accesses(self, fused: str) -> tuple[Accesses, Accesses]:
        """Returns `_partial_accesses` of the fusion of a computation."""
        inside, root = self.computations[fused], self.roots[fused]
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in inside.values():
            for index, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, index))

        def reads(name: str) -> float:
            total = 0.0
            for user, index in users.get(name, []):
                if user is root and user.opcode == "tuple":
                    return math.inf
                total += reads(user.name) if user.opcode == "bitcast" else self._partial_accesses(fused, user)[0][index]
            return total

        def writes(name: str) -> Accesses:
            instruction = inside[name]
            if instruction.opcode == "tuple":
                return [part for operand in instruction.operands for part in writes(operand)]
            if instruction.opcode == "bitcast":
                return writes(instruction.operands[0])
            return self._partial_accesses(fused, instruction)[1]

        parameters = [i for i in inside.values() if i.opcode == "parameter"]
        parameters.sort(key=lambda parameter: int(parameter.arguments))
        return [reads(parameter.name) for parameter in parameters], writes(root.name)


parse = functools.lru_cache(maxsize=1)(Module)  # parsing a large program takes seconds


def operations(text: str) -> list[Operation]:
    """Returns the operations of an HLO module, without the collectives.

    Raises:
      ValueError: the trip count of a loop is not known.
    """
    module, result = parse(text), []
    for computation, instruction, times in module.walk(fusions=False):
        if not _is_kernel(instruction):
            continue
        opcode, inside = instruction.opcode, [(computation, instruction, 1)]
        if opcode == "fusion":
            inside = list(module.walk(instruction.called))
        products = [(runs * _flops(module, place, each), place, each) for place, each, runs in inside]
        start = module.asynchronous.get(computation)
        cycles = int(instruction.get(r'"estimated_cycles":"(\d+)"') or _NO_ESTIMATE)
        result.append(
            Operation(
                instruction.name,
                times,
                sum(flops for flops, _, _ in products),
                module.traffic(computation, instruction),
                cycles if cycles < _NO_ESTIMATE else None,
                overlaps=opcode.endswith("-start") or (start is not None and module.beside(*start) != []),
                opaque=_attention_products(instruction) > 0,
                flops_8bit=sum(flops for flops, place, each in products if flops and _is_8bit(module, place, each)),
            )
        )
    return result


def _is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction runs on a device and is no collective. A loop itself is no kernel."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode.removesuffix("-start") in COLLECTIVES:
        return False
    is_buffer = instruction.get(r'custom_call_target="(AllocateBuffer)"')
    return not (is_buffer or opcode in ("send", "recv") or _is_wrapper(instruction))


def _is_wrapper(instruction: Instruction) -> bool:
    """Returns whether an instruction calls a computation that runs on the SparseCores."""
    return instruction.opcode == "custom-call" and bool(instruction.get(r"(called_computations=\{%called_computation)"))


def _flops(module: Module, computation: str, product: Instruction) -> int:
    """Returns the FLOPs of an instruction if it is a matrix product or an attention kernel, else 0."""
    if products := _attention_products(product):
        return products * _attention_flops(product, module.shapes(computation, product))
    cublas = product.opcode == "custom-call" and product.get(r'custom_call_target="(__cublas)')
    if not cublas and product.opcode not in ("dot", "convolution"):
        return 0
    left, right = map(_sizes, module.shapes(computation, product)[:2])  # cuBLAS adds a third operand to the product
    if product.opcode == "convolution":
        return _convolution_flops(product, left, right, _sizes(product.shape))
    # lhs_contracting_dims={1}, or for cuBLAS "lhs_contracting_dimensions":["1"]
    contracted = product.get(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
    return 2 * math.prod(_sizes(product.shape)) * math.prod(left[axis] for axis in _numbers(contracted))


def _is_8bit(module: Module, computation: str, product: Instruction) -> bool:
    """Returns whether the factors of a matrix product have 8 bits. Attention kernels only have such masks."""
    return not _attention_products(product) and all(
        re.match(r"[su]8\[|f8", shape) for shape in module.shapes(computation, product)[:2]
    )


def _attention_products(kernel: Instruction) -> int:
    """Returns how many matrix products an attention kernel computes; 0 for any other instruction."""
    target = kernel.opcode == "custom-call" and kernel.get(r'custom_call_target="([^"]*)"')
    name = kernel.name if target == "tpu_custom_call" else target or ""
    return next((number for pattern, number in _ATTENTION_PRODUCTS.items() if re.match(pattern, name)), 0)


def _attention_flops(kernel: Instruction, shapes: list[str]) -> int:
    """Returns the FLOPs of one product of queries and keys under a causal mask.

    The queries are taken as the last T of S tokens, so each head has T·(S - T/2) scores. Masked scores that a kernel
    computes are not counted; see `kernels.attention_share`.
    """
    # Among indices and masks, the queries and the keys are the first two arrays of numbers.
    q, k = [_sizes(shape) for shape in shapes if re.match(r"(?:bf16|f16|f32)\[(?:\d+,){2,3}\d+\]", shape)][:2]
    length = -2 if kernel.name.startswith("splash") else 1  # splash: [B, H, T, K] or [H, T, K]; cuDNN: [B, T, H, K]
    return math.prod(q) * (2 * k[length] - q[length])


def _convolution_flops(convolution: Instruction, left: list[int], right: list[int], result: list[int]) -> int:
    # Products with the padding and with the zeros of a dilation do not count. (The TPU compiler writes a batch of
    # matrix products as one convolution, dilated so that each matrix meets only its own factor.)
    labels = re.split("_|->", convolution.get(r"dim_labels=([\w>\-]+)"))
    window = dict(re.findall(r"(\w+)=(\S+)", convolution.get(r"window=\{([^}]*)\}")))
    flops = 2 * result[labels[2].index("b")] * result[labels[2].index("f")] * right[labels[1].index("i")]
    for axis in range(len(left) - 2):
        size, stride, left_dilation, right_dilation = (
            int(window[name].split("x")[axis]) if name in window else 1
            for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        padding = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        outputs = np.arange(result[labels[2].index(str(axis))])[:, None]
        position = outputs * stride + np.arange(size) * right_dilation - padding
        end = left[labels[0].index(str(axis))] * left_dilation
        flops *= int(np.sum((position >= 0) & (position < end) & (position % left_dilation == 0)))
    return flops


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns the collectives of an HLO module that was compiled for the mesh, most bytes first.

    Raises:
      ValueError: the trip count of a loop is not known.
    """
    module, seen = parse(text), set()
    kernels = functools.cache(lambda: {operation.name: operation for operation in operations(text)})
    totals: dict[tuple[str, tuple[str, ...], int, bool, int], list[tuple[int, int, list[Operation] | None]]] = {}
    for computation, instruction, times in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        beside: list[Operation] | None = []
        start = (computation, instruction) if instruction.opcode.endswith("-start") else None
        if start := module.asynchronous.get(computation, start):
            found = module.beside(*start)
            beside = None if found is None else [kernels()[each.name] for each in found]
        if kind in COLLECTIVES:
            axes, group = _axes(instruction, mesh)
            operands = module.shapes(computation, instruction)
        elif kind == "send" and (between_slices := instruction.get(r'_megascale_transfer_type="(\w+)"')):
            kind, beside = between_slices.lower().replace("_", "-"), None
            axes, group = _slice_axes(mesh)
            operands = module.shapes(computation, instruction)[:1]  # the second operand is a token
        else:
            continue
        # The TPU compiler splits a collective and fuses each part with a matrix product. The parts share chain and
        # channel, and the instruction of each part has the shape of the whole collective.
        if chain := instruction.get(r'chain_id="(\w+)"'):
            if (chain, channel := instruction.get(r"channel_id=(\d+)")) in seen:
                continue
            seen.add((chain, channel))
            beside = None
        if computation.startswith("all-reduce-scatter"):  # a reduce-scatter, written as an all-reduce and a slice
            kind = "reduce-scatter"
        size = sum(map(_bytes, operands)) * (group if kind == "all-gather" else 1)
        rings = instruction.attributes.count('"phase_rings"')
        totals.setdefault((kind, axes, group, beside != [], rings), []).append((times, size, beside))
    merged = []
    for (kind, axes, group, overlaps, rings), runs in totals.items():
        count, size = sum(run[0] for run in runs), sum(run[0] * run[1] for run in runs)
        merged.append(Collective(kind, axes, group, overlaps, count, size, rings, tuple(runs) if overlaps else ()))
    return sorted(merged, key=lambda collective: -collective.bytes)


def _axes(collective: Instruction, mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes along which the devices of a group differ, and the size of a group."""
    pairs = collective.get(r"source_target_pairs=\{(.*?\})\}")
    groups = _groups(f"{{{pairs}}}" if pairs else collective.get(r"replica_groups=(.*)"), mesh.size)
    # The ids are positions in the mesh, not JAX's device ids.
    positions = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), axis=-1)
    differ = (positions != positions[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, differs in zip(mesh.shape, differ, strict=True) if differs)
    return axes, math.prod(mesh.shape[axis] for axis in axes) if pairs else groups.shape[1]


def _slice_axes(mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes that cross slices, and the number of slices; hosts send the data between slices."""
    slices = np.array([device.slice_index for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    axes = tuple(axis for i, axis in enumerate(mesh.shape) if (slices != slices.take([0], i)).any())
    return axes, len(np.unique(slices))


def _groups(text: str, devices: int) -> np.ndarray:
    """Returns the device ids of replica groups as an array [groups, members].

    XLA writes the groups in three ways:
    - a list: {{0,1},{2,3}}
    - a reshaped array of ids: [2,2]<=[4] or [2,2]<=[2,2]T(1,0)
    - axes of a mesh or parts of them: mesh['a'=2,'b'=4] {'a','b':(2)2} (of b the inner 2), with device_ids=(…) before
      the axes if the ids are not in order
    """
    if match := re.match(r"\{(\{[^}]*\}(?:,\{[^}]*\})*)\}", text):
        return np.array([_numbers(group) for group in match[1].split("},")])
    if match := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match[2], devices).reshape(_numbers(match[1]))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        ids = np.arange(devices)
        if match[2]:
            ids = _iota(match[2], devices) if match[2].startswith("[") else np.array(_numbers(match[2]))
        chosen = {name: part and _numbers(part) for name, part in re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", match[3])}
        shape, outside, inside = list[int](), list[int](), list[int]()
        for name, size in re.findall(r"'(\w+)'=(\d+)", match[1]):
            outer, part = (chosen[name] or (1, int(size))) if name in chosen else (int(size), 1)
            inside.append(len(shape) + 1)
            outside += [len(shape), len(shape) + 2]
            shape += [outer, part, int(size) // (outer * part)]
        members = math.prod(shape[axis] for axis in inside)
        return ids.reshape(shape).transpose(outside + inside).reshape(-1, members)
    return np.arange(devices)[None]


def _iota(text: str, devices: int) -> np.ndarray:
    """Returns the device ids as an array that is reshaped and transposed as [2,4]T(1,0) describes."""
    sizes, *order = map(_numbers, re.findall(r"[\d,]+", text))
    return np.arange(devices).reshape(sizes).transpose(*order)


def _arrays(shape: str) -> list[str]:
    """Returns the arrays of a shape, which can be a tuple: ["bf16[8,128]{1,0:T(8,128)}", …]."""
    return re.findall(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _sizes(shape: str) -> list[int]:
    return _numbers(shape.partition("[")[2].partition("]")[0])


def _bytes(shape: str) -> int:
    """Returns the bytes of a shape, like bf16[8,128]{1,0} or a tuple of such arrays."""
    arrays = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", shape)
    return sum(int(bits or 8) * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in arrays) // 8


def _main_bytes(shape: str) -> int:
    """Returns the bytes of the arrays of a shape that are in the main memory, that is, without S(n) in their layout."""
    return sum(_bytes(array) for array in _arrays(shape) if not re.search(r"S\([1-9]\d*\)", array))
