"""Formats plans, which `gpt.planning.compiling.measure` returns, as text or as an HTML page."""

import dataclasses
import json
import math
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt.config import flatten
from gpt.models.kernels import KERNELS
from gpt.runtime import hardware
from gpt.runtime.progress import columns, duration

Report = dict[str, Any]

TEXTS = tomllib.loads(Path(__file__).with_name("report.toml").read_text(encoding="utf-8"))
MEMORY_PARTS = TEXTS["memory_parts"]
WIDTH = 80  # columns of the text
BAR = 38  # columns of a bar


@dataclasses.dataclass(frozen=True)
class Unit:
    """The unit of all figures of one kind in a report, like GB.

    Attributes:
      size: the unit in bytes, FLOPs or seconds.
      digits: decimals of a figure.
    """

    name: str
    size: float
    digits: int

    def number(self, value: float) -> str:
        """Returns a value in this unit; one that would be rounded to 0 is "<0.01" instead."""
        is_small = 0 < value < 0.5 * 10**-self.digits * self.size
        return f"<{10**-self.digits:g}" if is_small else f"{value / self.size:,.{self.digits}f}"

    def __call__(self, value: float) -> str:
        return f"{self.number(value)} {self.name}"


def units(reports: Sequence[Report]) -> dict[str, Unit]:
    """Returns the units of "bytes", "flops" and "seconds" in which the largest memory, work and step have 4 digits."""
    memory = [needed(each["memory"]) for each in reports]
    work = [max(each.get("model_flops", 0), each.get("hardware_flops", 0)) for each in reports]
    steps = [each.get("seconds", {}).get("step", 0) for each in reports]
    chosen = {}
    for (kind, sizes), figures in zip(TEXTS["units"].items(), (memory, work, steps), strict=True):
        largest = max(figures)
        name = next((name for name, size in sizes.items() if largest >= size), list(sizes)[-1])
        digits = 3 - math.floor(math.log10(max(largest / sizes[name], 1)))
        chosen[kind] = Unit(name, sizes[name], max(digits, 0))
    return chosen


def needed(memory: dict[str, Any]) -> float:
    """Returns the bytes that a step needs on a device, or as many of them as are known."""
    return memory.get("total") or memory.get("needed") or memory["capacity"]


def text(report: Report, price: float | None = None) -> Iterator[str]:
    """Yields the lines of the whole report.

    Args:
      price: price of one device for an hour.
    """
    unit = units([report])
    model = f"{model_name(report)} on " if "num_parameters" in report else ""
    micro = f", {report['micro_batches']} micro-batches" if report["micro_batches"] > 1 else ""
    layers = "scanned" if report["scan_layers"] else "unrolled"
    yield from _wrapped(f"{model}{report['topology']}: {report['devices']:,} × {report['chip']}, {mesh_name(report)}")
    yield from _wrapped(
        f"{report['batch_size']:,} examples of {report['block_size']:,} tokens per step{micro}; "
        f"attention {report['attention']}, remat {report['remat']}, layers {layers}"
    )
    yield ""
    yield from _memory(report, unit["bytes"])
    if "seconds" not in report:
        return
    flops, compiled = report["model_flops"], report["hardware_flops"]
    yield ""
    yield "WORK per device and step"
    work, ratio = unit["flops"], compiled / flops
    yield f"  model           {work(flops):>14}   6 per parameter and token, and full attention"
    yield f"  compiled        {work(compiled):>14}   {ratio:.2f} × the model's, recomputation included"
    if report["attention"] in KERNELS:
        yield f"{'':33}and only the causal part of {report['attention']} attention"
    yield f"  memory traffic  {unit['bytes'](report['memory_traffic']):>14}"
    yield ""
    yield "COMMUNICATION per device and step"
    yield from _collectives(report, unit)
    yield ""
    yield from _estimate(report, unit["seconds"], price)


def _wrapped(line: str, indent: int = 0) -> list[str]:
    """Returns the lines of a text of WIDTH columns; those after the first are indented."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def verdict(report: Report, unit: Unit) -> str:
    """Returns whether a plan fits, and how much of a device's memory it needs."""
    memory = report["memory"]
    capacity, usable = memory["capacity"], memory["usable"]
    share = f", of which JAX uses {usable / capacity:.0%} by default" if usable < capacity else ""
    if "total" not in memory and "needed" not in memory:
        return f"DOES NOT FIT in {unit(capacity)} per device{share}"
    answer = f"{'FITS' if report['fits'] else 'DOES NOT FIT'}: {'' if 'total' in memory else 'at least '}"
    return f"{answer}{unit(needed(memory))} of {unit(capacity)} per device{share}"


def _memory(report: Report, unit: Unit) -> Iterator[str]:
    memory, end = report["memory"], 0
    yield from _wrapped(verdict(report, unit))
    if report["compiler_message"]:
        yield from _wrapped(f"The compiler: {report['compiler_message']}.")
    for part, name in MEMORY_PARTS.items():
        if part in memory:
            start, end = end, end + memory[part]
            yield f"  {name:24}{unit(memory[part]):>12}  {_bar(start, end, memory)}"
    for size, shapes in memory.get("largest", ()):
        yield f"  {'largest buffers':24}{unit(size):>12}  {shapes}"[:WIDTH]
    if not report["fits"]:
        yield "  --search looks for a mesh, remat policy and micro-batches that fit"


def _bar(start: float, end: float, memory: dict[str, Any]) -> str:
    """Returns a bar from one number of bytes to another, with "│" where the memory of the device ends.

    "┊" is where the memory that JAX uses ends. The bar is "▒" from the first of these marks on.
    """
    cell = max(needed(memory), memory["capacity"]) / BAR
    usable, capacity = round(memory["usable"] / cell), round(memory["capacity"] / cell)
    filled = range(round(start / cell), round(end / cell))
    cells = ["█▒"[i >= usable] if i in filled else " " for i in range(BAR)]
    cells.insert(capacity, "│")
    return "".join([*cells[:usable], *("┊" if usable < capacity else ""), *cells[usable:]]).rstrip()


def _collectives(report: Report, unit: dict[str, Unit]) -> Iterator[str]:
    if not report["collectives"]:
        yield "  none"
        return
    size, time = unit["bytes"], unit["seconds"]
    lines = [["  kind", "count", size.name, "sent", "GB/s", time.name, "exposed", "over"]]
    for c in report["collectives"]:
        line = [f"  {c['kind']}{'*' if c['overlaps'] else ''}", f"{c['count']:,}"]
        line += [size.number(c["bytes"]), size.number(c["sent"]), f"{c['bandwidth'] / 1e9:,.0f}"]
        lines.append([*line, time.number(c["seconds"]), time.number(c["exposed"]), "+".join(c["axes"])])
    yield from columns(lines, left=1)


def _estimate(report: Report, unit: Unit, price: float | None) -> Iterator[str]:
    seconds = report["seconds"]
    exposed, overlapped = (unit(seconds["network"][part]) for part in ("exposed", "overlapped"))
    figure = {name: value for name, (_, value) in figures(report, price).items()}
    yield f"ESTIMATE: {TEXTS['bottlenecks'][seconds['bottleneck']]}"
    yield f"  kernels         {unit(seconds['compute']):>14} compute-bound, {unit(seconds['memory'])} memory-bound"
    yield f"  collectives     {exposed:>14} exposed, {overlapped} overlapped"
    yield f"  step            {unit(seconds['roofline']):>14} by the roofline"
    if seconds["compiler"]:
        yield f"                  {unit(seconds['compiler']):>14} by the compiler's estimate of its kernels"
    else:
        yield "                  (the compiler gives no usable estimate of its kernels)"
    yield (
        f"  throughput      {figure['tokens/s']:14,.0f} tokens/s by the longer, "
        f"{figure['tokens/s per device']:,.0f} per device"
    )
    yield f"  MFU             {seconds['mfu']:14.1%} of the chip's peak"
    if report["steps"]:
        run, seen = report["steps"] * seconds["step"], report["steps"] * report["batch_size"] * report["block_size"]
        seen_text = f"{seen / 1e9:,.1f} billion" if seen >= 1e9 else f"{seen:,}"
        cost = f", {amount(figure['price'])} at {price:g} each" if price is not None else ""
        yield from _wrapped(
            f"  whole run       {duration(run):>14} for {report['steps']:,} steps, {seen_text} tokens, "
            f"{amount(figure['device-hours'])} device-hours{cost}",
            indent=33,
        )
    else:
        yield "  whole run              unknown: train.epochs depends on the data;"
        yield "                         set train.steps or train.tokens"
    if report.get("flags"):
        yield from _wrapped(f"  flags           {' '.join(report['flags'])}", indent=18)
    yield ""
    yield from _wrapped(TEXTS["assumptions"])


def table(reports: Sequence[Report]) -> Iterator[str]:
    """Yields a header, and the figures and the name of each plan, in the given order."""
    size, work, time = units(reports).values()
    lines = [["", f"step {time.name}", "MFU", size.name, work.name, f"sent {size.name}", "plan"]]
    for i, r in enumerate(reports, 1):
        line = [str(i)] + [""] * 5
        if "seconds" in r:
            seconds, sent = r["seconds"], sum(c["sent"] for c in r["collectives"])
            line = [str(i), time.number(seconds["step"]), f"{seconds['mfu']:.1%}", size.number(r["memory"]["total"])]
            line += [work.number(r["hardware_flops"]), size.number(sent)]
        reason = f": {r['compiler_message']}" if r["compiler_message"] else ""
        lines.append([*line, plan_name(r) + ("" if r["fits"] else f"; does not fit{reason}")])
    header, *rest = columns(lines, left=0)
    for each in (header, *rest):
        yield from _wrapped(each, indent=header.index("plan"))


def figures(report: Report, price: float | None = None) -> dict[str, tuple[str, float]]:
    """Returns the figures that a comparison shows, {name: (kind, value)}.

    The kinds are those of `units`, "share", "rate", and "hours" or "price", of which less is better.
    """
    known = {"needed": report["memory"].get("total") or report["memory"].get("needed"), **report}
    if "seconds" in report:
        seconds, tokens = report["seconds"]["step"], report["batch_size"] * report["block_size"]
        rates = {"tokens_per_second": tokens / seconds, "tokens_per_device": tokens / seconds / report["devices"]}
        known |= rates | {"sent": sum(c["sent"] for c in report["collectives"])}
        if report["steps"]:
            hours = report["steps"] * seconds / 3600
            cost = None if price is None else hours * report["devices"] * price
            known |= {"hours": hours, "device_hours": hours * report["devices"], "price": cost}
    values = flatten(known)
    found = {name: (kind, values.get(key)) for name, (kind, key) in TEXTS["figures"].items()}
    return {name: (kind, value) for name, (kind, value) in found.items() if value is not None}


def comparison(reports: Sequence[Report], price: float | None = None) -> Iterator[str]:
    """Yields lines that compare plans: figures with their ratios to those of the first, and configs where they differ.

    Args:
      price: price of one device for an hour.
    """
    unit = units(reports)
    shown: dict[str, Any] = unit | {"share": "{:.1%}".format, "rate": "{:,.0f}".format}
    shown |= dict.fromkeys(("hours", "price"), amount)
    for i, each in enumerate(reports, 1):
        yield from _wrapped(f"{i}: {verdict(each, unit['bytes'])}; {plan_name(each)}", indent=3)
    yield ""
    of_plans = [figures(each, price) for each in reports]
    lines = [["", "1", *(cell for i in range(2, len(reports) + 1) for cell in (f"{i}", f"{i} ÷ 1")), ""]]
    for name, (kind, _) in TEXTS["figures"].items():
        values = [each[name][1] if name in each else None for each in of_plans]
        if any(values):
            texts = ["–" if value is None else shown[kind](value) for value in values]
            ratios = [f"{value / values[0]:.3f}" if value is not None and values[0] else "–" for value in values]
            others = [cell for pair in zip(texts[1:], ratios[1:], strict=True) for cell in pair]
            lines.append([f"  {name}", texts[0], *others, ""])
    yield from columns(lines, left=1)
    yield ""
    settings = [{"topology": each["topology"]} | flatten(each.get("config", {})) for each in reports]
    keys = dict.fromkeys(key for each in settings for key in each)
    lines = [[f"  {key}", *(str(each.get(key, "–")) for each in settings), ""] for key in keys]
    if different := [line for line in lines if len(set(line[1:-1])) > 1]:
        yield from columns([["differences", *map(str, range(1, len(reports) + 1)), ""], *different], left=1)
    else:
        yield "The configs do not differ."


def chips() -> Iterator[str]:
    """Yields the lines of a table of the chips that a topology can name, and their public figures."""
    lines = [["chip", "up to", "TFLOP/s", "memory GB", "GB/s", "link GB/s", "network GB/s", ""]]
    for chip in hardware.CHIPS:
        if chip.memory:
            figures = (chip.flops / 1e12, chip.memory / 1e9, chip.bandwidth / 1e9, chip.link / 1e9, chip.network / 1e9)
            lines.append([chip.name, chip.largest, *(f"{figure:,.4g}" for figure in figures), ""])
    yield from columns(lines, left=2)
    yield ""
    yield "TFLOP/s: peak of dense bfloat16 matrix products."
    yield "link: in one direction, to one neighbour in the torus (TPU) or to the NVLink switch (GPU)."
    yield "network: in one direction, per device, between slices (4xv5e:16x16) or hosts (4xh100:8) of any number."
    yield "gpt/runtime/chips.toml names the sources."


def html(plans: list[Report], placement: dict[str, Any] | None, price: float | None = None) -> str:
    """Returns a page with the first plan in detail and a comparison of all plans; it needs no network and no library.

    Args:
      placement: `compiling.placement` of the first plan; None: the page does not show it.
      price: price of one device for an hour.
    """
    shown = [each | {"figures": figures(each, price), "config": flatten(each.get("config", {}))} for each in plans]
    data = {"plans": shown, "placement": placement, "price": price, "kernels": list(KERNELS)} | TEXTS
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # A "<" in a text could end the script.
    return template.replace("PLANS", json.dumps(data).replace("<", "\\u003c"))


def amount(number: float) -> str:
    """Returns a number without a unit: "1,234.5" or, if it is small, three digits: "0.00123"."""
    return f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def model_name(report: Report) -> str:
    """Returns the size of the model, like "174.6 billion parameters"."""
    number = report["num_parameters"]
    return f"{number / 1e9:,.1f} billion parameters" if number >= 1e9 else f"{number / 1e6:,.1f} million parameters"


def mesh_name(report: Report) -> str:
    """Returns the rules and the mesh sizes greater than 1, like "fsdp data=4 fsdp=8"."""
    sizes = [f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1]
    return " ".join([report["rules"], *sizes, *(["zero1"] if report["zero1"] else [])])


def plan_name(report: Report) -> str:
    """Returns what distinguishes a plan: topology, mesh, batch and the options that a search changes."""
    micro = f" in {report['micro_batches']:,} micro-batches" if report["micro_batches"] > 1 else ""
    return (
        f"{report['topology']} {mesh_name(report)}, batch {report['batch_size']:,}{micro}, attention "
        f"{report['attention']}, remat {report['remat']}, {'scanned' if report['scan_layers'] else 'unrolled'}"
    )
