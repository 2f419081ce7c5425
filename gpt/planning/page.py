"""Shows plans, which `gpt.planning.step.measure` makes, as a page that needs nothing but a browser."""

import itertools
import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, NamedTuple

from gpt.models.kernels import KERNELS
from gpt.planning.report import ASSUMPTIONS, BINDS, MEMORY_PARTS, Report, duration_ms, mesh_name, model_name
from gpt.runtime.progress import duration
from gpt.sharding import MeshConfig

# How much is drawn or shown at once: more would be too small to read.
MOST_DEVICES = 4096
MOST_BARS = 12
MOST_PARAMETERS = 8
# Bars are cut off at this many times the memory of a device: one that is far too long would hide the others.
MOST_MEMORY = 2.0

_BLUE, _ORANGE, _RED, _GREY, _GREEN, _PURPLE = "#4878b8", "#e08a3c", "#c24f7a", "#9a9a9a", "#4aa37c", "#8d6cc0"
_PARTS = dict(zip(MEMORY_PARTS, (_BLUE, _ORANGE, _PURPLE, _GREY, _GREEN, _RED), strict=True))
_SCALE = ((72, 52, 140), (38, 130, 142), (84, 190, 106), (245, 220, 50))  # like viridis: dark to light, not only by hue

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --soft: #5d6670; --line: #d5dae0; --field: #eceff2;
  --good: #1d7a46; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #15181b; --text: #e4e7ea; --soft: #98a2ac; --line: #363c43;
  --field: #262b31; --good: #5cc98c; --bad: #ff8a80; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; max-width: 1100px; padding: 20px 16px 60px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6em; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15em; margin: 36px 0 8px; padding-top: 10px; border-top: 1px solid var(--line); }
h3 { font-size: 1em; margin: 0; }
p { margin: 4px 0 8px; }
th, dt, summary, figcaption, .soft, .key, .planes { color: var(--soft); font-size: 13px; font-weight: normal; }
.verdict { font-size: 1.1em; } .good { color: var(--good); } .bad { color: var(--bad); white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px 20px; margin: 18px 0; }
dd { margin: 0; } dd b { display: block; font-size: 1.3em; line-height: 1.2; }
.row { display: flex; flex-wrap: wrap; gap: 0 16px; margin-top: 12px; } .row span:last-child { margin-left: auto; }
.bar { position: relative; height: 18px; background: var(--field); } .thin { height: 8px; margin-top: 3px; }
.bar div { display: flex; height: 100%; overflow: hidden; } .bar i { flex: none; }
.bar b { position: absolute; top: -3px; bottom: -3px; border-right: 2px solid var(--text); margin-left: -2px; }
.bar .usable { border-right-style: dotted; }
.hatched { background-image: repeating-linear-gradient(45deg, transparent 0 3px, var(--back) 3px 6px); }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0; }
.key i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; vertical-align: -1px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; } .upper td { border-bottom: 0; }
code { font: 12px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; } .flags { display: block; user-select: all; }
.flags span { display: inline-block; } .plan { min-width: 280px; }
.whole { white-space: nowrap; color: var(--soft); } .divided { white-space: nowrap; font-weight: 600; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 24px; }
figure { margin: 16px 0 0; } .planes { display: flex; flex-wrap: wrap; gap: 8px 12px; margin-top: 6px; }
.planes svg { display: block; max-width: 100%; height: auto; } .planes text { font-size: 10px; text-anchor: middle; }
.group { fill: none; stroke: var(--text); }
.strip { display: inline-flex; width: 130px; height: 12px; margin: 0 4px; vertical-align: -1px; } .strip i { flex: 1; }
summary { cursor: pointer; margin-top: 8px; }
@media (max-width: 500px) { td { font-size: 13px; } td, th { padding-right: 8px; } }
@media print { body { max-width: none; padding: 0; font-size: 12px; } .plan { min-width: 200px; }
  .wide { overflow: visible; } .row, figure { break-inside: avoid; }
  details::details-content { content-visibility: visible; } }
"""


class Piece(NamedTuple):
    """A piece of a bar; a hatched one is time that lies beside something else."""

    name: str
    size: float
    colour: str
    hatched: bool = False


class Square(NamedTuple):
    """A device in a plane of the torus, or in a host."""

    x: int
    y: int
    index: int
    outlined: bool


def html(plans: list[Report], placement: dict[str, Any], price: float | None = None) -> str:
    """The page: the first plan in detail, and a comparison of all.

    Args:
      placement: of the first plan, from `gpt.planning.step.placement`.
      price: of a device for an hour.
    """
    plans, placement = _escaped(plans), _escaped(placement)
    first = plans[0]
    sections = [_head(first, price), _memory(plans), _where(first, placement)]
    if "seconds" in first:
        sections += [_communication(first), _time(first)]
    if len(plans) > 1:
        sections.append(_comparison(plans))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Plan for {first['topology']}</title>\n<style>{_STYLE}</style></head><body>",
            *itertools.chain(*sections),
            f"<h2>Assumptions</h2><p>{escape(ASSUMPTIONS)}</p></body></html>\n",
        ]
    )


def _escaped(value: Any) -> Any:
    """The same with every string escaped, so that nothing below has to think of it."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, (list, tuple)) else value


def _head(report: Report, price: float | None) -> Iterator[str]:
    memory, capacity, usable = report["memory"], report["memory"]["capacity"], report["memory"]["usable"]
    share = f", of which JAX takes {usable / capacity:.0%} unless told otherwise" if usable < capacity else ""
    model = model_name(report) if "num_parameters" in report else "Plan"
    yield f"<h1>{model} on {report['topology']}</h1>"
    yield f"<p>{report['devices']:,} × {report['chip']}, {_name(report)};"
    yield f"{report['batch_size']:,} rows of {report['block_size']:,} tokens a step</p>"
    verdict = '<b class="good">Fits' if report["fits"] else '<b class="bad">Does not fit'
    need = f": {memory['total'] / 1e9:.2f} GB of" if "total" in memory else " in"
    yield f'<p class="verdict">{verdict}</b>{need} {capacity / 1e9:.2f} GB a device{share}</p>{_says(report)}'
    if nearest := report.get("nearest"):
        yield f"<p>Nearest change that fits, {nearest['total'] / 1e9:.2f} GB: {_flags(nearest)}</p>"
    elif "nearest" in report:
        yield "<p>None of the changes tried fits; take more devices, or look with --search.</p>"
    if "seconds" in report:
        facts = (
            f"<div><dt>{name}</dt><dd><b>{fact}</b>{more}</dd></div>" for name, fact, more in _facts(report, price)
        )
        yield f"<dl>{''.join(facts)}</dl>"
    if report.get("flags"):
        yield f"<p>Its flags: {_flags(report)}</p>"


def _facts(report: Report, price: float | None) -> Iterator[tuple[str, str, str]]:
    """What one wants to know first: (name, value, what else there is to say)."""
    seconds, devices, steps = report["seconds"], report["devices"], report["steps"]
    tokens = report["batch_size"] * report["block_size"]
    yield "step", duration_ms(seconds["step"]), BINDS[seconds["binds"]]
    yield "tokens/s", f"{tokens / seconds['step']:,.0f}", f"{tokens / seconds['step'] / devices:,.0f} a device"
    yield "MFU", f"{seconds['mfu']:.1%}", "of the chip's peak"
    if not steps:
        yield "whole run", "not known", "train.epochs depends on the data; set train.steps or train.tokens"
        return
    run, hours = steps * seconds["step"], steps * seconds["step"] * devices / 3600
    yield "whole run", duration(run), f"{steps:,} steps, {steps * tokens / 1e9:,.3f} billion tokens"
    yield "device-hours", f"{hours:,.1f}", f"of {devices:,} devices"
    if price is not None:
        yield "price", f"{hours * price:,.0f}", f"at {price:g} a device-hour"


def _memory(plans: list[Report]) -> Iterator[str]:
    yield "<h2>Memory of a device</h2>"
    bars = [_memory_pieces(plan["memory"]) for plan in plans[:MOST_BARS]]
    longest = max(sum(piece.size for piece in bar) for bar in bars)
    scale = min(MOST_MEMORY, max(1.0, longest))
    for rank, (plan, bar) in enumerate(zip(plans, bars, strict=False), 1):
        capacity, usable = plan["memory"]["capacity"], plan["memory"]["usable"]
        name = f"{rank}. {_name(plan, plans)}" if len(plans) > 1 else "all of it"
        name += "" if plan["fits"] else ' <span class="bad">does not fit</span>'
        known = (
            plan["memory"].get("total") or plan["memory"].get("needed") or sum(piece.size for piece in bar) * capacity
        )
        need = f"{'' if 'total' in plan['memory'] else 'more than '}{known / 1e9:.2f}" if known else "?"
        marks = {"capacity": 1.0} | ({"usable": usable / capacity} if usable < capacity else {})
        yield _bar(name, f"{need} of {capacity / 1e9:.2f} GB", bar, scale, marks)
    notes = ["│ all that a device has"]
    if any(plan["memory"]["usable"] < plan["memory"]["capacity"] for plan in plans):
        notes.append("┊ what JAX takes of it unless told otherwise")
    if longest > scale:
        notes.append(f"bars are cut off at {scale:g} × what a device has")
    if len(plans) > 1:
        notes.append("figures: of plan 1")
    if len(plans) > MOST_BARS:
        notes.append(f"{len(plans) - MOST_BARS} more plans: in the table below")
    yield _key(bars[0], notes)
    if largest := plans[0]["memory"].get("largest"):
        yield f"<p>Its largest buffers: {', '.join(f'<code>{buffer}</code>' for buffer in largest)}</p>"


def _memory_pieces(memory: dict[str, Any]) -> list[Piece]:
    """Shares of the device's memory; what is not known has none."""
    return [
        Piece(
            f"{name} {memory[part] / 1e9:,.3f} GB" if part in memory else name,
            memory.get(part, 0) / memory["capacity"],
            _PARTS[part],
        )
        for part, name in MEMORY_PARTS.items()
    ]


def _where(report: Report, placement: dict[str, Any]) -> Iterator[str]:
    """The mesh on the topology, and beside it what its axes divide."""
    sizes, places = report["mesh"], placement["devices"]
    left_out = len(places) - MOST_DEVICES
    count = (
        f"{MOST_DEVICES:,} of {len(places):,}; {left_out:,} are left out" if left_out > 0 else f"all {len(places):,}"
    )
    yield '<h2>What lies where</h2><div class="halves"><div>'
    yield f"<p>Each square is a device ({count}) at its place{', x to the right, y down' * (len(places[0]) > 2)};"
    yield "its colour is its index along a mesh axis. Collectives run within groups along it: one is outlined.</p>"
    for axis in [axis for axis, size in sizes.items() if size > 1] or list(sizes)[:1]:
        yield _drawing(axis, sizes, places)
    yield f"</div><div><h3>Batch</h3><p>{_batch(report)}</p><h3>Parameters</h3>"
    if report["zero1"]:
        yield "<p>The optimizer state is divided by data as well (ZeRO-1).</p>"
    yield from _parameters(placement["parameters"], sizes)
    yield "</div></div>"


def _drawing(axis: str, sizes: dict[str, int], places: list[list[int]]) -> str:
    """The devices, coloured by their index along a mesh axis."""
    number, size, torus = list(sizes).index(axis), sizes[axis], len(places[0]) > 2
    indices = list(itertools.product(*map(range, sizes.values())))
    group = {device for device, index in enumerate(indices) if not any(index[:number] + index[number + 1 :])}
    words = {0: "slice" if torus else "host", 3: "z"}
    several = [i for i in words if len({tuple(place[i : i + 1]) for place in places}) > 1]
    planes: dict[str, list[Square]] = {}
    for device in sorted(range(len(places)), key=lambda d: (places[d][0], places[d][3:], places[d]))[:MOST_DEVICES]:
        place = places[device]
        square = Square(place[1], place[2] if torus else 0, indices[device][number], device in group)
        planes.setdefault(", ".join(f"{words[i]} {place[i]}" for i in several), []).append(square)
    side = max(5, min(20, int(320 / math.sqrt(min(len(places), MOST_DEVICES)))))
    strip = "".join(f'<i style="background:{_colour(i, min(size, 32))}"></i>' for i in range(min(size, 32)))
    outside = len({places[device][0] for device in group})
    spans = f"; a group spans {outside} {words[0]}s" if outside > 1 else ""
    drawn = (f"<div>{_plane(squares, axis, size, side)}{name}</div>" for name, squares in planes.items())
    return (
        f'<figure><h3>{axis}</h3><figcaption>0 <span class="strip">{strip}</span> {size - 1}{spans}</figcaption>'
        f'<div class="planes">{"".join(drawn)}</div></figure>'
    )


def _plane(squares: list[Square], axis: str, size: int, side: int) -> str:
    """Squares whose sides are so many pixels, coloured by their index along an axis of that size."""

    def path(attribute: str, chosen: Iterable[Square], title: str) -> str:
        shape = "".join(f"M{s.x * side + 1} {s.y * side + 1}h{side - 1}v{side - 1}h{1 - side}z" for s in chosen)
        return f'<path {attribute} d="{shape}"><title>{title}</title></path>'

    drawn = [
        path(f'fill="{_colour(index, size)}"', (s for s in squares if s.index == index), f"{axis} {index}")
        for index in sorted({s.index for s in squares})
    ]
    if side >= 16:  # there is room for the index itself
        for s in squares:
            colour = "#fff" if s.index < 0.45 * size else "#000"
            drawn.append(
                f'<text x="{(s.x + 0.5) * side}" y="{(s.y + 0.5) * side + 4}" fill="{colour}">{s.index}</text>'
            )
    drawn.append(
        path(f'class="group" stroke-width="{min(2, side // 5)}"', (s for s in squares if s.outlined), "one group")
    )
    width, height = (side * (1 + max(places)) + 2 for places in ([s.x for s in squares], [s.y for s in squares]))
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(drawn)}</svg>'


def _colour(index: int, size: int) -> str:
    low, between = divmod(index / max(1, size - 1) * (len(_SCALE) - 1), 1)
    ends = _SCALE[int(low)], _SCALE[min(int(low) + 1, len(_SCALE) - 1)]
    return "#" + "".join(f"{round(a + (b - a) * between):02x}" for a, b in zip(*ends, strict=True))


def _batch(report: Report) -> str:
    sizes, rules = report["mesh"], dict(MeshConfig(rules=report["rules"]).table())
    over, rows = rules["batch"], report["batch_size"]
    on_one = rows // math.prod(sizes[axis] for axis in over)
    said = f"{rows:,} rows{_divided(over, sizes)}: {on_one:,} a device"
    if report["micro_batches"] > 1:
        said += f", {on_one / report['micro_batches']:g} at a time"
    if length := _divided(rules.get("length", ()), sizes):
        said += f"; their activations {report['block_size']:,} tokens{length}"
    same = [axis for axis, size in sizes.items() if size > 1 and axis not in over]
    return f"{said}. Devices along {' and '.join(same)} have the same rows." if same else f"{said}."


def _divided(over: Iterable[str], sizes: dict[str, int]) -> str:
    """What something is divided by, if by anything."""
    return "".join(f" / {sizes[axis]} {axis}" for axis in over if sizes[axis] > 1)


def _parameters(parameters: list[dict[str, Any]], sizes: dict[str, int]) -> Iterator[str]:
    rows = []
    for p in sorted(parameters, key=lambda p: -p["count"] * p["bytes"]):
        shape = []
        for length, name, over in zip(p["shape"], p["axes"], p["over"], strict=True):
            divided = _divided(over, sizes)
            shape.append(f'<span class="{"divided" if divided else "whole"}">{length:,} {name}{divided}</span>')
        times = f"{p['count']} × " if p["count"] > 1 else ""
        rows.append([p["name"].replace("/", "/<wbr>"), " × ".join(shape), f"{times}{p['bytes']:,}"])
    header = ["parameter", "shape / mesh axes it is sharded over", "bytes a device"]
    yield _table(header, rows[:MOST_PARAMETERS], 1)
    if rest := rows[MOST_PARAMETERS:]:
        yield f"<details><summary>{len(rest)} smaller ones</summary>{_table(header, rest, 1)}</details>"


def _communication(report: Report) -> Iterator[str]:
    yield "<h2>Communication of a device in a step</h2>"
    collectives = sorted(report["collectives"], key=lambda c: -c["seconds"])
    for c in collectives:
        name = (
            f"{c['kind']}{'*' * c['overlaps']} over {'+'.join(c['axes'])} "
            f'<span class="soft">{c["count"]:,} in groups of {c["group"]:,}: {c["bytes"] / 1e9:.4f} GB, '
            f"{c['sent'] / 1e9:.4f} GB sent at {c['bandwidth'] / 1e9:,.0f} GB/s</span>"
        )
        piece = Piece(c["kind"], c["seconds"], _RED, c["overlaps"])
        yield _bar(name, duration_ms(c["seconds"]), [piece], collectives[0]["seconds"])
    network = report["seconds"]["network"]
    yield _key(_network(network["waited_for"], network["hidden"])) if collectives else "<p>None.</p>"


def _network(waited_for: float, hidden: float) -> list[Piece]:
    return [
        Piece(f"network waited for {duration_ms(waited_for)}", waited_for, _RED),
        Piece(f"*beside kernels {duration_ms(hidden)}", hidden, _RED, True),
    ]


def _time(report: Report) -> Iterator[str]:
    seconds = report["seconds"]
    waited, beside = _network(seconds["network"]["waited_for"], seconds["network"]["hidden"])
    kernels = [
        Piece(f"kernels that wait for {what} {duration_ms(seconds[what])}", seconds[what], colour)
        for what, colour in (("products", _BLUE), ("memory", _ORANGE))
    ]
    rows = [("by the roofline", seconds["roofline"], kernels)]
    if seconds["compiler"]:
        estimated = seconds["compiler"] - waited.size
        kernels = [Piece(f"kernels as the compiler estimates them {duration_ms(estimated)}", estimated, _GREEN)]
        rows.append(("by the compiler's estimate of its kernels", seconds["compiler"], kernels))
    yield "<h2>Time of a step</h2>"
    for name, total, kernels in rows:
        # What lies beside the kernels makes the step longer only by what outlasts them.
        longer = beside._replace(size=max(0.0, total - waited.size - sum(piece.size for piece in kernels)))
        yield _bar(name, duration_ms(total), [*kernels, longer, waited], seconds["step"])
        yield _bar("", "", [beside], seconds["step"])
    yield _key(
        [*(piece for *_, kernels in rows for piece in kernels), waited, beside],
        ["the longer of the two counts"] * (len(rows) > 1),
    )
    model, compiled = report["model_flops"], report["hardware_flops"]
    yield f"<p>Work: {model / 1e12:,.3f} TFLOP of the model; compiled {compiled / 1e12:,.3f}, {compiled / model:.2f} ×,"
    masked = ", and of attention what its mask leaves" * (report["attention"] in KERNELS)
    yield f"with what the backward pass computes again{masked}; "
    yield f"{report['memory_traffic'] / 1e9:,.1f} GB of memory traffic.</p>"


def _comparison(plans: list[Report]) -> Iterator[str]:
    yield "<h2>All plans</h2>"
    header, rows = ["", "plan", "binds", "batch", "GB", "TFLOP", "sent GB", "step", "MFU"], []
    for rank, plan in enumerate(plans, 1):
        name = f'<div class="plan">{_name(plan, plans)}{_says(plan)}{_flags(plan) if plan.get("flags") else ""}</div>'
        row = [f"{rank}", name, '<span class="bad">does not fit</span>', f"{plan['batch_size']:,}"]
        if "seconds" in plan:
            row[2] = plan["seconds"]["binds"] if plan["fits"] else row[2]
            row += [f"{plan['memory']['total'] / 1e9:.2f}", f"{plan['hardware_flops'] / 1e12:,.3f}"]
            row += [f"{sum(c['sent'] for c in plan['collectives']) / 1e9:,.3f}"]
            row += [duration_ms(plan["seconds"]["step"]), f"{plan['seconds']['mfu']:.1%}"]
        rows.append(row + ["–"] * (len(header) - len(row)))
    yield _table(header, rows, 6)


def _name(plan: Report, among: Iterable[Report] = ()) -> str:
    """What a plan is, with its topology if others have another."""
    topology = f"{plan['topology']} " if len({each["topology"] for each in among}) > 1 else ""
    layers = "scanned" if plan["scan_layers"] else "unrolled"
    parts = f", in {plan['micro_batches']:,} parts" if plan["micro_batches"] > 1 else ""
    return f"{topology}{mesh_name(plan)}, remat {plan['remat']}, layers {layers}{parts}"


def _says(plan: Report) -> str:
    return f"<p>The compiler: {plan['compiler_says']}.</p>" if plan["compiler_says"] else ""


def _flags(plan: dict[str, Any]) -> str:
    """To be copied: a click selects all."""
    return f'<code class="flags">{" ".join(f"<span>{flag}</span>" for flag in plan["flags"])}</code>'


def _bar(name: str, value: str, pieces: Iterable[Piece], scale: float, marks: dict[str, float] | None = None) -> str:
    """Pieces one after the other under a line of text, with lines at the marks; the width stands for the scale."""

    def percent(size: float) -> str:
        return f"{100 * size / scale if scale else 0:.3f}%"

    drawn = "".join(
        f'<i class="{"hatched" * p.hatched}" style="width:{percent(p.size)};background-color:{p.colour}" '
        f'title="{p.name}"></i>'
        for p in pieces
    )
    lines = "".join(f'<b class="{mark}" style="left:{percent(at)}"></b>' for mark, at in (marks or {}).items())
    text = f'<div class="row"><span>{name}</span><span>{value}</span></div>' if name else ""
    return f'{text}<div class="bar{"" if name else " thin"}"><div>{drawn}</div>{lines}</div>'


def _key(pieces: Iterable[Piece], notes: Iterable[str] = ()) -> str:
    colours = (f'<i class="{"hatched" * p.hatched}" style="background-color:{p.colour}"></i>{p.name}' for p in pieces)
    return f'<div class="key">{"".join(f"<span>{entry}</span>" for entry in (*colours, *notes))}</div>'


def _table(header: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table of which the last so many columns are numbers."""

    def line(tag: str, cells: list[str]) -> str:
        classes = [""] * (len(cells) - numbers) + [' class="number"'] * numbers
        return "<tr>" + "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"

    return f'<div class="wide"><table>{line("th", header)}{"".join(line("td", row) for row in rows)}</table></div>'
