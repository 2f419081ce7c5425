"""The mesh, the table from logical to mesh axes, and everything derived from the two."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt.errors import UserError

# Logical axis -> mesh axes. A mesh axis is given once per tensor, to the first rule that asks for it:
# `batch` stands first, so an activation [batch, length, embed] is sharded over its batch, while a
# parameter [embed, mlp], which has no batch, is sharded over `fsdp` and `model`.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("heads", "model"),
    ("mlp", "model"),
    ("embed", "fsdp"),
    ("kv", None),
    ("length", None),
    ("layers", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1, which takes the rest."""

    data: int = -1  # the batch; parameters replicated
    fsdp: int = 1  # the batch and the parameters (arXiv 1910.02054, stage 3)
    model: int = 1  # heads, MLP and vocabulary (arXiv 1909.08053)

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{axis}={size} has to be at least 1, or -1 for all remaining devices.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("Only one of mesh." + ", mesh.".join(sizes) + " may be -1.")


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: every device of every process).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), known)
    wanted = " × ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if remainder or rest == 0:
        raise UserError(f"{wanted} needs a multiple of {known} devices, but there are {len(devices)}.")
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise UserError(f"{wanted} takes {known} devices, but there are {len(devices)}; set one axis to -1.")
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh, batch_size: int | None = None) -> Iterator[None]:
    """Puts the mesh and the rules in force for what is traced inside.

    Args:
      batch_size: rows of the batches to be traced, if the mesh need not divide them (a single prompt):
        they are replicated when it does not.
    """
    rules = RULES
    if batch_size is not None and batch_size % batch_shards(mesh):
        rules = tuple((name, None if name == "batch" else axes) for name, axes in RULES)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in dict(RULES)["batch"])


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """The rows of a global batch that the devices of this process need."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({rows.indices(batch_size)[:2] for (rows,) in indices})
    start, stop = bounds[0][0], bounds[-1][1]
    if (stop - start) != sum(b - a for a, b in bounds) or start % (stop - start):
        raise UserError("The mesh gives this process rows of the batch that do not lie together; put `data` first.")
    return range(start, stop)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf, from the logical axis names it is boxed with.

    Args:
      abstract_state: a tree of jax.ShapeDtypeStruct, those with axis names in Flax's boxes.

    Raises:
      UserError: a mesh axis does not divide the axis of a parameter that is sharded over it.
    """
    logical = nn.get_partition_spec(abstract_state)
    shardings = nn.logical_to_mesh_sharding(logical, mesh, RULES)

    def check(path, leaf, sharding, names):
        for size, axes, name in zip(leaf.shape, sharding.spec, names, strict=False):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if size % mesh.shape[axis]:
                    parameter = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
                    hint = "; set model.vocab_multiple" if name == "vocab" else ""
                    raise UserError(
                        f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} {name} of {parameter}{hint}."
                    )

    jax.tree_util.tree_map_with_path(check, nn.unbox(abstract_state), shardings, logical)
    return shardings


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree of (abstract) arrays with those shardings."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))
