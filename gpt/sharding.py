"""The mesh, the tables from logical to mesh axes, and everything derived from the two."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt.runtime import hardware
from gpt.runtime.errors import UserError
from gpt.runtime.fields import harmless

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# Logical axis -> mesh axes. A mesh axis is given once per tensor, to the first rule that asks for it:
# `batch` stands first, so an activation [batch, length, embed] is sharded over its batch, while a
# parameter [embed, mlp], which has no batch, is sharded over `fsdp` and `model`.
_BATCH: Rules = (("batch", ("data", "fsdp")),)
_TENSOR: Rules = (("vocab", ("model",)), ("heads", ("model",)), ("mlp", ("model",)))
_EMBED: Rules = (("embed", ("fsdp",)),)
PRESETS: dict[str, Rules] = {
    "dp": _BATCH,  # parameters replicated
    "fsdp": _BATCH + _EMBED,  # parameters sharded where the batch is (ZeRO stage 3, arXiv 1910.02054)
    "fsdp_tp": _BATCH + _TENSOR + _EMBED,  # and tensor parallelism (arXiv 1909.08053)
    # and the length of activations; parameters, which have no length, are sharded over `sequence` as well
    "sp": (*_BATCH, ("length", ("sequence",)), *_TENSOR, ("embed", ("fsdp", "sequence")), *_EMBED),
}
# Names that a rule of the user's may have: those above, `kv` (the size of a head), `layers` (the axis
# of scanned layers), `keys` (the length on the side of attention's keys and values), `rank` (of LoRA), and `patch` and
# `classes` (pixels of a patch and outputs of a classifier: too few to shard).
LOGICAL_AXES = ("batch", "length", "keys", "embed", "heads", "kv", "mlp", "vocab", "layers", "rank", "patch", "classes")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """What is sharded, and the number of devices along each mesh axis, from the slowest links to the fastest.

    Sizes may be -1, at most one, which takes the devices left. 0 stands for: the devices left on `fsdp`
    (for the rules `dp` on `data`), or on `data` if `fsdp` is set; 1 for the other axes.
    """

    rules: str = harmless("dp")  # dp, fsdp, fsdp_tp, sp; changes may follow: "fsdp,embed=fsdp+data,vocab="
    data: int = harmless(0)  # the batch; parameters replicated
    fsdp: int = harmless(0)  # the batch and the parameters
    sequence: int = harmless(0)  # the length of activations, for long blocks
    model: int = harmless(0)  # heads, MLP and vocabulary
    zero1: bool = harmless(False)  # optimizer state sharded over `data` as well (ZeRO stage 1, arXiv 1910.02054)

    def __post_init__(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < -1:
                raise UserError(f"mesh.{axis}={size} has to be at least 1, -1 for all remaining devices, or 0.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("Only one of mesh." + ", mesh.".join(sizes) + " may be -1.")
        used = _beside_the_batch(self.table()) | {"data"}
        for axis, size in sizes.items():
            if size not in (0, 1) and axis not in used:
                fitting = [name for name, rules in PRESETS.items() if axis in _beside_the_batch(rules)]
                raise UserError(
                    f"mesh.{axis}={size}, but mesh.rules={self.rules} has no use for {axis}; "
                    f"choose mesh.rules={' or '.join(fitting)}."
                )

    def table(self) -> Rules:
        """The rules that `rules` names, with the user's changes in their places, and what is new at the end."""
        preset, *changes = self.rules.split(",")
        if preset not in PRESETS:
            raise UserError(f"mesh.rules={self.rules}: {preset!r} is not known; choose one of {', '.join(PRESETS)}.")
        changed = {}
        for change in changes:
            name, _, axes = change.partition("=")
            changed[name] = tuple(axes.split("+")) if axes else ()
            if "=" not in change or name not in LOGICAL_AXES or not set(changed[name]) <= set(AXES):
                raise UserError(
                    f"mesh.rules={self.rules}: {change!r} is not of the form NAME=AXIS+AXIS with a NAME of "
                    f"{', '.join(LOGICAL_AXES)} and AXES of {', '.join(AXES)}."
                )
        rules = dict.fromkeys((name, changed.get(name, axes)) for name, axes in PRESETS[preset])
        return tuple(rules | dict.fromkeys(changed.items()))

    def shape(self, num_devices: int) -> dict[str, int]:
        """Size of each mesh axis on that many devices.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if -1 not in sizes.values():
            main = "data" if self.rules.split(",")[0] == "dp" else "fsdp"
            rest = next((axis for axis in (main, "data") if sizes[axis] == 0), None)
            if rest:
                sizes[rest] = -1
        sizes = {axis: size or 1 for axis, size in sizes.items()}
        known = math.prod(size for size in sizes.values() if size != -1)
        wanted = " × ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        rest, remainder = divmod(num_devices, known)
        if remainder or rest == 0:
            raise UserError(f"{wanted} needs a multiple of {known} devices, but there are {num_devices}.")
        sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            raise UserError(f"{wanted} takes {known} devices, but there are {num_devices}; set one axis to -1.")
        return sizes


AXES = ("data", "fsdp", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules in force on it: where every array of a run lies."""

    mesh: Mesh
    rules: Rules
    zero1: bool = False

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Puts the mesh and the rules in force for what is traced inside."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(_complete(self.rules)):
            yield

    def for_decoding(self, rows: int) -> "Layout":
        """The layout for one token at a time: its length is not sharded, nor are rows that the mesh does not divide."""
        whole = {"length"} | ({"batch"} if rows % self.batch_shards else set())
        rules = tuple((name, () if name in whole else axes) for name, axes in self.rules)
        return dataclasses.replace(self, rules=rules)

    def spec(self, *names: str | None) -> P:
        """Mesh axes of an array whose axes have these logical names."""
        return nn.logical_to_mesh_axes(names, _complete(self.rules))

    @property
    def batch(self) -> NamedSharding:
        """Sharding of an array whose first axis is the batch."""
        return NamedSharding(self.mesh, self.spec("batch"))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def batch_shards(self) -> int:
        """Number of parts that a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in dict(self.rules)["batch"])

    @functools.cached_property
    def length_shards(self) -> int:
        """Number of parts that the length of activations is split into."""
        return self._size(self.spec("length")[0])

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that the devices of this process need, in ascending order."""
        indices = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices]))

    def state_shardings(self, abstract_state: Any) -> Any:
        """A NamedSharding for each leaf, from the logical axis names it is boxed with.

        Args:
          abstract_state: a tree of jax.ShapeDtypeStruct, those with axis names in Flax's boxes.

        Raises:
          UserError: a mesh axis does not divide the axis of a parameter that is sharded over it.
        """
        logical = nn.get_partition_spec(abstract_state)
        shardings = nn.logical_to_mesh_sharding(logical, self.mesh, _complete(self.rules))

        def check(path, leaf, sharding, names):
            for size, axes, name in zip(leaf.shape, sharding.spec, names, strict=False):
                hint = "; set model.vocab_multiple" if name == "vocab" else ""
                self._check_divides(axes, size, f"the {size} {name} of {path_name(path)}{hint}")

        jax.tree_util.tree_map_with_path(check, nn.unbox(abstract_state), shardings, logical)
        return shardings

    def check_length(self, length: int) -> None:
        """Raises UserError unless the mesh divides the tokens of a row."""
        self._check_divides(
            self.spec("length")[0],
            length,
            f"the {length} tokens of a row (model.block_size, or the patches of an image)",
        )

    def spread(self, abstract: Any, shardings: Any) -> Any:
        """Shardings of the same arrays over `data` as well, along the first axis of each that can be divided."""
        size = self.mesh.shape["data"]

        def spread_one(leaf, sharding):
            spec = _axes_of_each(sharding, len(leaf.shape))
            if any("data" in axes for axes in spec):
                return sharding
            for i, axes in enumerate(spec):
                if leaf.shape[i] % (self._size(axes) * size) == 0:
                    spec[i] = (*axes, "data")
                    break
            return NamedSharding(self.mesh, P(*spec))

        return jax.tree.map(spread_one, abstract, shardings)

    def _check_divides(self, axes: str | tuple[str, ...] | None, size: int, what: str) -> None:
        if size % self._size(axes):
            over = " × ".join(f"mesh.{axis}={self.mesh.shape[axis]}" for axis in _axes(axes))
            raise UserError(f"{over} does not divide {what}.")

    def _size(self, axes: str | tuple[str, ...] | None) -> int:
        return math.prod(self.mesh.shape[axis] for axis in _axes(axes))


def make_layout(config: MeshConfig, devices: list[jax.Device] | None = None) -> Layout:
    """The mesh over `devices` (default: every device of every process), and the rules.

    Where slow links join groups of devices (slices of TPUs, hosts of GPUs), the outer mesh axes cross them:
    `data` as far as it divides, then `fsdp`, and so on.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = hardware.devices() if devices is None else devices
    shape = tuple(config.shape(len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = []
        for size in shape:
            across.append(math.gcd(size, slices // math.prod(across)))
        if math.prod(across) != slices:
            sizes = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
            raise UserError(f"The mesh {sizes} cannot be laid over {slices} groups of devices that slow links join.")
        within = [size // outer for size, outer in zip(shape, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), config.table(), config.zero1)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of jax.Array or of jax.ShapeDtypeStruct with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How a parameter, or each of several that are alike, is sharded.

    Attributes:
      axes: logical names of its axes.
      over: for each axis, the mesh axes that it is sharded over.
      count: number of parameters that are alike.
      bytes: of one of them on one device.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    over: tuple[tuple[str, ...], ...]
    count: int
    bytes: int


def parameters(params: Any, logical_axes: Any) -> list[Parameter]:
    """How each parameter is sharded; layers that are alike share an entry.

    Args:
      params: jax.ShapeDtypeStruct with shardings.
      logical_axes: the names of the axes of each, as a PartitionSpec.
    """
    found = {}
    names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, P))
    for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(params), names, strict=True):
        name = re.sub(r"block_\d+", "block_*", path_name(path))
        count = found[name].count + 1 if name in found else 1
        over = tuple(_axes_of_each(leaf.sharding, len(leaf.shape)))
        found[name] = Parameter(name, leaf.shape, tuple(axes), over, count, bytes_per_device(leaf))
    return list(found.values())


def table(found: list[Parameter]) -> Iterator[str]:
    """Lines that show `parameters`."""
    lines = [("parameter", "shape", "logical axes", "sharded over", "bytes a device")]
    for parameter in found:
        shards = ", ".join("+".join(axes) or "-" for axes in parameter.over)
        times = f"{parameter.count} × " if parameter.count > 1 else ""
        shape = " × ".join(map(str, parameter.shape))
        lines.append((parameter.name, shape, ", ".join(parameter.axes), shards, f"{times}{parameter.bytes:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *left, last in lines:
        cells = [cell.ljust(width) for cell, width in zip(left, widths[:-1], strict=True)]
        yield "  ".join([*cells, last.rjust(widths[-1])])


def path_name(path: tuple) -> str:
    """ "block_0/mlp/up/kernel" of a path in a tree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _beside_the_batch(rules: Rules) -> set[str]:
    return {axis for name, axes in rules for axis in axes if name != "batch"}


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _axes_of_each(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each axis of an array; a PartitionSpec may be shorter than the array has axes."""
    return [_axes(axes) for axes in sharding.spec] + [()] * (ndim - len(sharding.spec))


def _complete(rules: Rules) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """The rules as Flax takes them, with one for every logical axis: else it leaves an axis to the compiler."""
    named = tuple((name, axes[0] if len(axes) == 1 else axes or None) for name, axes in rules)
    return named + tuple((name, None) for name in LOGICAL_AXES)
