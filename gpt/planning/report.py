"""Formats plans, which `gpt.planning.compiling.measure` returns, as text or as an HTML page."""

import json
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt.models.kernels import KERNELS
from gpt.runtime import hardware
from gpt.runtime.progress import columns, duration

Report = dict[str, Any]

TEXTS = tomllib.loads(Path(__file__).with_name("report.toml").read_text(encoding="utf-8"))
MEMORY_PARTS = TEXTS["memory_parts"]


def text(report: Report, price: float | None = None) -> Iterator[str]:
    """Yields the lines of the whole report.

    Args:
      price: price of one device for an hour.
    """
    model = f"{model_name(report)} on " if "num_parameters" in report else ""
    micro = f", {report['micro_batches']} micro-batches" if report["micro_batches"] > 1 else ""
    layers = "scanned" if report["scan_layers"] else "unrolled"
    yield f"{model}{report['topology']}: {report['devices']:,} × {report['chip']}, {mesh_name(report)}"
    yield (
        f"{report['batch_size']:,} examples of {report['block_size']:,} tokens per step{micro}; "
        f"attention {report['attention']}, remat {report['remat']}, layers {layers}"
    )
    yield ""
    yield from _memory(report)
    if "seconds" not in report:
        return
    flops, compiled = report["model_flops"], report["hardware_flops"]
    yield ""
    yield "WORK per device and step"
    yield f"  model           {flops / 1e12:10.3f} TFLOP   6 per parameter and token; attention 12·layers·width·length"
    yield (
        f"  compiled        {compiled / 1e12:10.3f} TFLOP   {compiled / flops:.2f} × the model's, "
        f"with recomputation in the backward pass (remat={report['remat']})"
    )
    if report["attention"] in KERNELS:
        yield f"{'':36}and only the causal part of {report['attention']} attention"
    yield f"  memory traffic  {report['memory_traffic'] / 1e9:10.1f} GB"
    yield ""
    yield "COMMUNICATION per device and step"
    yield from _collectives(report)
    yield ""
    yield from _estimate(report, price)


def _memory(report: Report) -> Iterator[str]:
    memory = report["memory"]
    capacity, usable = memory["capacity"], memory["usable"]
    share = f", of which JAX uses {usable / capacity:.0%} by default" if usable < capacity else ""
    if "total" in memory:
        verdict = "FITS" if report["fits"] else "DOES NOT FIT"
        yield f"{verdict}: {memory['total'] / 1e9:.2f} GB of {capacity / 1e9:.2f} GB per device{share}"
    else:
        yield f"DOES NOT FIT in {capacity / 1e9:.2f} GB per device. The compiler: {report['compiler_message']}."
    for part, name in MEMORY_PARTS.items():
        if part in memory:
            bar = "█" * round(40 * memory[part] / capacity)
            yield f"  {name:24}{memory[part] / 1e9:9.3f} GB  {bar}".rstrip()
    for buffer in memory.get("largest", ()):
        yield f"    {buffer}"[:118]
    if not report["fits"]:
        yield "  --search looks for a mesh, remat policy and micro-batches that fit"


def _collectives(report: Report) -> Iterator[str]:
    if not report["collectives"]:
        yield "  none"
        return
    figures = f"{'group':>6}{'count':>7}{'GB':>10}{'sent GB':>10}{'GB/s':>8}{'ms':>10}{'exposed':>9}"
    yield f"  {'kind':20}{'mesh axes':20}{figures}"
    for c in report["collectives"]:
        yield (
            f"  {c['kind'] + ('*' if c['overlaps'] else ''):20}{'+'.join(c['axes']):20}{c['group']:6,}{c['count']:7,}"
            f"{c['bytes'] / 1e9:10.4f}{c['sent'] / 1e9:10.4f}{c['bandwidth'] / 1e9:8.0f}{c['seconds'] * 1e3:10.2f}"
            f"{c['exposed'] * 1e3:9.2f}"
        )


def _estimate(report: Report, price: float | None) -> Iterator[str]:
    seconds, tokens = report["seconds"], report["batch_size"] * report["block_size"]
    compute, memory = duration_ms(seconds["compute"]), duration_ms(seconds["memory"])
    exposed, overlapped = (duration_ms(seconds["network"][part]) for part in ("exposed", "overlapped"))
    yield f"ESTIMATE: {TEXTS['bottlenecks'][seconds['bottleneck']]}"
    yield f"  kernels         {compute:>14} compute-bound, {memory} memory-bound"
    yield f"  collectives     {exposed:>14} exposed, {overlapped} overlapped"
    yield f"  step            {duration_ms(seconds['roofline']):>14} by the roofline"
    if seconds["compiler"]:
        yield f"                  {duration_ms(seconds['compiler']):>14} by the compiler's estimate of its kernels"
    else:
        yield "                  (the compiler gives no usable estimate of its kernels)"
    yield (
        f"  throughput      {tokens / seconds['step']:14,.0f} tokens/s by the longer, "
        f"{tokens / seconds['step'] / report['devices']:,.0f} per device; MFU {seconds['mfu']:.1%}"
    )
    if report["steps"]:
        run, billions = report["steps"] * seconds["step"], report["steps"] * tokens / 1e9
        hours = run * report["devices"] / 3600
        cost = f", {hours * price:,.0f} at {price:g} each" if price is not None else ""
        yield (
            f"  whole run       {duration(run):>14}: {report['steps']:,} steps, {billions:,.1f} billion tokens, "
            f"{hours:,.1f} device-hours{cost}"
        )
    else:
        yield "  whole run       unknown: train.epochs depends on the data; set train.steps or train.tokens"
    if report.get("flags"):
        yield f"  flags           {' '.join(report['flags'])}"
    yield ""
    yield TEXTS["assumptions"]


def table(reports: Iterable[Report]) -> Iterator[str]:
    """Yields a header and a line for each plan, in the given order."""
    header = ["topology", "mesh", "remat", "scan", "micro", "batch", "GB", "TFLOP", "sent GB", "step", "MFU", ""]
    lines = [header]
    for r in reports:
        line = [r["topology"], mesh_name(r), r["remat"], "yes" if r["scan_layers"] else "no"]
        line += [f"{r['micro_batches']:,}", f"{r['batch_size']:,}"]
        if "seconds" in r:
            seconds, sent = r["seconds"], sum(c["sent"] for c in r["collectives"])
            line += [f"{r['memory']['total'] / 1e9:.2f}", f"{r['hardware_flops'] / 1e12:,.3f}", f"{sent / 1e9:,.3f}"]
            line += [duration_ms(seconds["step"]), f"{seconds['mfu']:.1%}", "" if r["fits"] else "does not fit"]
        else:
            line += [""] * 5 + [f"does not fit: {r['compiler_message']}"]
        lines.append(line)
    yield from columns(lines, left=4)


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


def html(plans: list[Report], placement: dict[str, Any], price: float | None = None) -> str:
    """Returns a page with the first plan in detail and a comparison of all plans; it needs no network and no library.

    Args:
      placement: `compiling.placement` of the first plan.
      price: price of one device for an hour.
    """
    data = {"plans": plans, "placement": placement, "price": price, "kernels": list(KERNELS)} | TEXTS
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # A "<" in a text could end the script.
    return template.replace("PLANS", json.dumps(data).replace("<", "\\u003c"))


def model_name(report: Report) -> str:
    """Returns the size of the model, like "174.6 billion parameters"."""
    number = report["num_parameters"]
    return f"{number / 1e9:,.1f} billion parameters" if number >= 1e9 else f"{number / 1e6:,.1f} million parameters"


def mesh_name(report: Report) -> str:
    """Returns the rules and the mesh sizes greater than 1, like "fsdp data=4 fsdp=8"."""
    sizes = [f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1]
    return " ".join([report["rules"], *sizes, *(["zero1"] if report["zero1"] else [])])


def duration_ms(seconds: float) -> str:
    """Returns a duration in milliseconds, or from 10 seconds on in seconds: "27.3 ms", "12.340 s"."""
    return f"{seconds:,.3f} s" if seconds >= 10 else f"{seconds * 1e3:,.1f} ms"
