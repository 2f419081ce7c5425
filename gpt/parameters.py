"""How each parameter of a program is sharded, for people to read."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

import jax

from gpt.runtime.progress import columns
from gpt.sharding import axes_of_entry, bytes_per_device, path_name
from gpt.step import Program, variables

LARGEST, WIDTH = 5, 73  # lines and columns of the short table


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The sharding of a parameter, or of the same parameter in each of several layers.

    Attributes:
      name: path of the parameter, with `*` for the number of the layer.
      shape: global shape.
      axes: logical names of the axes.
      over: for each axis, the mesh axes that shard it.
      count: number of layers that have the parameter.
      bytes: bytes of one such parameter on one device.
      note: how and why `over` is not what the rules say; else empty.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    over: tuple[tuple[str, ...], ...]
    count: int
    bytes: int
    note: str


def of_program(program: Program) -> list[Parameter]:
    """Returns how each parameter of the model and of its adapters is sharded, with one entry for all layers."""
    layout, state, parameters = program.layout, program.abstract_state, dict[str, Parameter]()
    for collection, tree in variables(state.params, state.frozen).items():
        names = jax.tree.leaves(program.logical_axes[collection], is_leaf=lambda x: isinstance(x, jax.P))
        for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(tree), names, strict=True):
            name = re.sub(r"block_\d+", "block_*", path_name(path))
            count = parameters[name].count + 1 if name in parameters else 1
            over = tuple(axes_of_entry(each) for each in leaf.sharding.spec)
            notes = []
            for size, ruled in zip(leaf.shape, layout.spec(*axes), strict=False):
                if size % layout.size(ruled):
                    whole = "+".join(axis for axis in axes_of_entry(ruled) if axis not in itertools.chain(*over))
                    reason = f"{size:,} is not divisible by {layout.named_sizes(ruled)}"
                    notes.append(f"whole over {whole}: {reason}" if whole else reason)
            parameter = Parameter(name, leaf.shape, tuple(axes), over, count, bytes_per_device(leaf), "; ".join(notes))
            parameters[name] = parameter
    return list(parameters.values())


def table(parameters: list[Parameter]) -> Iterator[str]:
    """Yields the lines of a text table of `parameters`, with the reason where the rules could not be followed."""
    lines = [("parameter", "shape", "logical axes", "sharded over", "bytes a device", "")]
    for p in parameters:
        size = f"{p.count} × {p.bytes:,}" if p.count > 1 else f"{p.bytes:,}"
        lines.append((p.name, _shape(p), ", ".join(p.axes), _shards(p), size, p.note))
    yield from columns(lines, left=4)


def largest(parameters: list[Parameter]) -> Iterator[str]:
    """Yields the lines of a table, 73 columns wide, of the `LARGEST` parameters, and all notes."""
    ordered = sorted(parameters, key=lambda p: -p.count * p.bytes)[:LARGEST]
    lines = [("largest parameters", "shape", "MB a device", "sharded")]
    for p in ordered:
        size = f"{p.count * p.bytes / 1e6:,.2f}"
        lines.append((p.name, f"{p.count} × ({_shape(p)})" if p.count > 1 else _shape(p), size, _shards(p)))
    for line in columns(lines, left=2):
        yield line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
    yield from (f"{p.name}: {p.note}" for p in parameters if p.note)
    if len(parameters) > LARGEST:
        yield f"… and {len(parameters) - LARGEST} smaller ones; --all_parameters shows all"


def _shape(parameter: Parameter) -> str:
    return " × ".join(map(str, parameter.shape))


def _shards(parameter: Parameter) -> str:
    return ", ".join("+".join(axes) or "-" for axes in parameter.over) if any(parameter.over) else "-"
