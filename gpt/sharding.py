"""The device mesh, the rules that map logical axes to mesh axes, and the shardings that follow from both.

The models name the axes of their parameters and activations. `MeshConfig` chooses a table of rules and the size of each
mesh axis, `make_layout` creates the mesh, and `Layout` derives all shardings.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt.runtime import hardware
from gpt.runtime.errors import UserError, nearest
from gpt.runtime.fields import Options, option

# With more shards, the memory of a device hardly shrinks, and collectives take longer (launch/SCALING.md).
MAX_FSDP = 64
# The mesh axes, from the slowest links between devices to the fastest.
AXES = ("data", "fsdp", "sequence", "model")

# Logical axis -> mesh axes. In one tensor, a mesh axis goes to the first rule that names it. `batch` comes first, so an
# activation [batch, length, embed] is sharded over its batch, and a parameter [embed, mlp] over `fsdp` and `model`.
Rules = tuple[tuple[str, tuple[str, ...]], ...]
_BATCH: Rules = (("batch", ("data", "fsdp")),)
_TENSOR: Rules = (("vocab", ("model",)), ("heads", ("model",)), ("mlp", ("model",)))
_EMBED: Rules = (("embed", ("fsdp",)),)
PRESETS: dict[str, Rules] = {
    "dp": _BATCH,  # data parallelism: parameters are replicated
    "fsdp": _BATCH + _EMBED,  # parameters are sharded over `fsdp`, like the batch (ZeRO stage 3, arXiv 1910.02054)
    "fsdp_tp": _BATCH + _TENSOR + _EMBED,  # adds tensor parallelism over `model` (arXiv 1909.08053)
    # Adds sequence parallelism. Parameters have no length, so that `sequence` can shard their width.
    "sp": (*_BATCH, ("length", ("sequence",)), *_TENSOR, ("embed", ("fsdp", "sequence")), *_EMBED),
}
# The names that a rule may have. Besides those above: `keys` (length on the side of attention's keys and values), `kv`
# (size of a head), `layers` (axis of scanned layers), `rank` (of LoRA), `patch` (numbers in a patch) and `classes`.
LOGICAL_AXES = ("batch", "length", "keys", "embed", "heads", "kv", "mlp", "vocab", "layers", "rank", "patch", "classes")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Options):
    """The sharding rules, and the number of devices along each mesh axis.

    One size may be -1: that axis takes the remaining devices. If none is, an `fsdp` of 0 becomes the largest number of
    at most `MAX_FSDP` that divides them (with the rules `dp`: 1), and the others go to `data` if its size is 0. If
    `data` has a size, they all go to `fsdp`. Every other size of 0 means 1.
    """

    section: ClassVar[str] = "mesh"

    rules: str = option("dp", f"one of {', '.join(PRESETS)}; changes may follow: fsdp,embed=fsdp+data", harmless=True)
    data: int = option(0, "devices that shard the batch; parameters are replicated", harmless=True, least=-1)
    fsdp: int = option(0, "devices that shard the batch and the parameters", harmless=True, least=-1)
    sequence: int = option(0, "devices that shard the sequence length of activations", harmless=True, least=-1)
    model: int = option(0, "devices that shard heads, MLP and vocabulary", harmless=True, least=-1)
    # ZeRO stage 1, arXiv 1910.02054
    zero1: bool = option(False, "shard the optimizer state of replicated parameters over mesh.data", harmless=True)

    def __post_init__(self):
        super().__post_init__()
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if list(sizes.values()).count(-1) > 1:
            raise UserError("Only one of mesh." + ", mesh.".join(sizes) + " may be -1.")
        used = _parameter_axes(self.table()) | {"data"}
        for axis, size in sizes.items():
            if size not in (0, 1) and axis not in used:
                presets = [name for name, rules in PRESETS.items() if axis in _parameter_axes(rules)]
                raise UserError(
                    f"mesh.{axis}={size}, but mesh.rules={self.rules} does not use the axis {axis}; "
                    f"choose mesh.rules={' or '.join(presets)}."
                )

    def table(self) -> Rules:
        """Returns the preset of `rules` with its changes applied; rules for further logical axes come last."""
        preset, *changes = self.rules.split(",")
        if preset not in PRESETS:
            known = f"choose one of {', '.join(PRESETS)}{nearest(preset, list(PRESETS))}"
            raise UserError(f"mesh.rules={self.rules}: {preset!r} is not known; {known}")
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
        """Returns the size of each mesh axis for a number of devices.

        Raises:
          UserError: the product of the sizes is not the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if -1 not in sizes.values():
            is_free = sizes["fsdp"] == 0 and self.rules.split(",")[0] != "dp"
            if is_free and sizes["data"]:
                sizes["fsdp"] = -1
            elif is_free:
                rest = max(1, num_devices // math.prod(size or 1 for size in sizes.values()))
                sizes["fsdp"] = max(size for size in range(1, MAX_FSDP + 1) if rest % size == 0)
            sizes["data"] = sizes["data"] or (1 if -1 in sizes.values() else -1)
        sizes = {axis: size or 1 for axis, size in sizes.items()}
        known = math.prod(size for size in sizes.values() if size != -1)
        product = " × ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        rest, remainder = divmod(num_devices, known)
        if remainder or rest == 0:
            raise UserError(f"{product} needs a multiple of {known} devices, but there are {num_devices}.")
        sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            raise UserError(f"{product} takes {known} devices, but there are {num_devices}; set one axis to -1.")
        return sizes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules for it, which together determine the sharding of every array of a run."""

    mesh: Mesh
    rules: Rules
    zero1: bool = False

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Makes the mesh and the rules the current ones for functions that are traced in the context."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(_complete(self.rules)):
            yield

    def without(self, axes: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
        """Leaves mesh axes out of the current rules, for a function that `jax.shard_map` maps over these axes."""
        rules = ((name, tuple(axis for axis in over if axis not in axes)) for name, over in self.rules)
        return nn.logical_axis_rules(_complete(tuple(rules)))

    def for_decoding(self, rows: int) -> "Layout":
        """Returns a layout for decoding: without sharded length, nor batch if the mesh does not divide `rows`."""
        unsharded = {"length"} | ({"batch"} if rows % self.batch_shards else set())
        rules = tuple((name, () if name in unsharded else axes) for name, axes in self.rules)
        return dataclasses.replace(self, rules=rules)

    def spec(self, *names: str | None) -> P:
        """Returns the mesh axes of an array whose axes have these logical names."""
        return nn.logical_to_mesh_axes(names, _complete(self.rules)) or P()

    @property
    def batch(self) -> NamedSharding:
        """Sharding of an array whose first axis is the batch."""
        return NamedSharding(self.mesh, self.spec("batch"))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds in full."""
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def batch_shards(self) -> int:
        """Number of shards of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in dict(self.rules)["batch"])

    @functools.cached_property
    def replica_axes(self) -> tuple[str, ...]:
        """Mesh axes that shard the batch and nothing else: all devices along them hold the same parameters.

        There are none if the length is sharded too: `jax.shard_map` over a part of such a mesh crashes XLA.
        """
        used = _parameter_axes(self.rules)
        axes = (axis for axis in dict(self.rules)["batch"] if axis not in used and self.mesh.shape[axis] > 1)
        return tuple(axes) if self.length_shards == 1 else ()

    @functools.cached_property
    def length_shards(self) -> int:
        """Number of shards of the sequence length of activations."""
        return self.size(self.spec("length")[0])

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Returns the sorted indices of the examples of a global batch that this process's devices need."""
        slices = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices if index is not None]))

    def state_shardings(self, abstract_state: Any, extra: tuple[str, ...] = ()) -> Any:
        """Returns a NamedSharding for each leaf, derived from the logical axis names of its Flax box.

        A mesh axis that does not divide the axis that the rules name shards another axis of the same leaf: of those
        that it divides, the one with the largest shards, the first of equals. `layers` is no candidate, because each
        layer would have to be sent by the few devices that hold it. Without a candidate, the leaf is whole along the
        mesh axis. Only mesh axes of the batch or the length may move so: those of `heads`, `mlp` and `vocab` shard
        activations too.

        Args:
          abstract_state: a tree of jax.ShapeDtypeStruct, in Flax's boxes if their axes have names.
          extra: mesh axes that also shard each leaf, in the same way: `data` for ZeRO stage 1.

        Raises:
          UserError: a mesh axis that may not move does not divide the axis of a parameter.
        """
        movable = self._axes_of("batch", "length")

        def shard(path, leaf, names) -> NamedSharding:
            over: list[tuple[str, ...]] = [()] * len(leaf.shape)
            moved = [axis for axis in extra if axis not in self._axes_of(*names)]
            for i, (size, axes) in enumerate(zip(leaf.shape, self.spec(*names), strict=False)):
                for axis in axes_of_entry(axes):
                    if size % self.size((*over[i], axis)) == 0:
                        over[i] += (axis,)
                    elif axis in movable:
                        moved.append(axis)
                    else:
                        hint = "; set model.vocab_multiple" if names[i] == "vocab" else ""
                        self._check_divides(axes, size, f"the {size} {names[i]} of {path_name(path)}{hint}")
            for axis in moved:
                left = [size // self.size(axes) for size, axes in zip(leaf.shape, over, strict=True)]
                fitting = [i for i, name in enumerate(names) if name != "layers" and left[i] % self.size(axis) == 0]
                if fitting:
                    over[max(fitting, key=lambda i: left[i])] += (axis,)
            return NamedSharding(self.mesh, P(*over))

        return jax.tree_util.tree_map_with_path(shard, nn.unbox(abstract_state), nn.get_partition_spec(abstract_state))

    def check_length(self, length: int) -> None:
        """Raises UserError unless the mesh divides the sequence length, in tokens."""
        what = f"the {length} tokens of an example (model.block_size, or the patches of an image)"
        self._check_divides(self.spec("length")[0], length, what)

    def _check_divides(self, axes: str | tuple[str, ...] | None, size: int, what: str) -> None:
        if size % self.size(axes):
            raise UserError(f"{self.named_sizes(axes, 'mesh.')} does not divide {what}.")

    def named_sizes(self, axes: str | tuple[str, ...] | None, prefix: str = "") -> str:
        return " × ".join(f"{prefix}{axis}={self.mesh.shape[axis]}" for axis in axes_of_entry(axes))

    def _axes_of(self, *names: str | None) -> tuple[str, ...]:
        return tuple(itertools.chain(*map(axes_of_entry, self.spec(*names))))

    def size(self, axes: str | tuple[str, ...] | None) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes_of_entry(axes))


def make_layout(config: MeshConfig, devices: list[jax.Device] | None = None) -> Layout:
    """Creates the mesh and returns it with its rules.

    If slow links connect groups of devices (slices of TPUs, hosts of GPUs), the outer mesh axes cross them: `data` as
    far as its size allows, then `fsdp`, and so on.

    Args:
      config: the rules and the sizes of the mesh axes.
      devices: the devices of the mesh. None means all devices of all processes.

    Raises:
      UserError: the product of the sizes is not the number of devices, or does not fit their groups.
    """
    devices = hardware.devices() if devices is None else devices
    shape = tuple(config.shape(len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across: list[int] = []
        for size in shape:
            across.append(math.gcd(size, slices // math.prod(across)))
        if math.prod(across) != slices:
            sizes = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
            advice = f"choose a mesh.data that is a multiple of {slices}"
            raise UserError(f"The mesh {sizes} does not fit {slices} groups of devices on slow links; {advice}.")
        within = [size // outer for size, outer in zip(shape, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), config.table(), config.zero1)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on one device of a tree of jax.Array, or of jax.ShapeDtypeStruct with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def path_name(path: tuple) -> str:
    """Returns the keys of a path in a tree as one string, for example "block_0/mlp/up/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _parameter_axes(rules: Rules) -> set[str]:
    """Returns the mesh axes that shard more than the batch."""
    return {axis for name, axes in rules for axis in axes if name != "batch"}


def axes_of_entry(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns an entry of a PartitionSpec as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _complete(rules: Rules) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """Returns the rules in Flax's form, with one for every logical axis: the compiler would choose for the others."""
    named = tuple((name, axes[0] if len(axes) == 1 else axes or None) for name, axes in rules)
    return named + tuple((name, None) for name in LOGICAL_AXES)
