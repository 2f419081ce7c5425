"""Shows plans, which `gpt.planning.step.measure` makes, as text."""

from collections.abc import Iterable, Iterator
from typing import Any

from gpt.models.kernels import KERNELS
from gpt.runtime import hardware
from gpt.runtime.hardware import Chip
from gpt.runtime.progress import duration

Report = dict[str, Any]

BINDS = {
    "products": "matrix products bind",
    "memory": "the bandwidth of the main memory binds",
    "network": "the network binds",
}
MEMORY_PARTS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "padding": "padding of these",
    "temporaries": "gradients, activations",
    "output": "results",
}
ASSUMPTIONS = """\
Assumed: kernels one after the other, each as long as its matrix products at the chip's peak or its bytes at the peak
bandwidth of the main memory; collectives round a ring over every link their group spans, at public bandwidth, those
marked * beside the kernels; both sides of a condition; input in time. Where the compiler estimates its kernels and that
is longer, it stands in place of the first. Published runs took 1.2 to 1.8 times the roofline (launch/PLANNING.md)."""


def text(report: Report, price: float | None = None) -> Iterator[str]:
    """Lines of the whole report.

    Args:
      price: of a device for an hour.
    """
    yield from _title(report)
    yield from _memory(report)
    if "seconds" not in report:
        return
    model, compiled = report["model_flops"], report["hardware_flops"]
    yield ""
    yield "WORK, a device and step"
    yield f"  model           {model / 1e12:10.3f} TFLOP   6 a weight and token; attention 12·layers·width·length"
    yield (
        f"  compiled        {compiled / 1e12:10.3f} TFLOP   {compiled / model:.2f} × the model's: "
        f"with what the backward pass computes again (remat={report['remat']})"
    )
    if report["attention"] in KERNELS:
        yield f"{'':41}of attention by {report['attention']}, what the mask leaves and no more"
    yield f"  memory traffic  {report['memory_traffic'] / 1e9:10.1f} GB"
    yield ""
    yield "COMMUNICATION, a device and step"
    yield from _collectives(report)
    yield ""
    yield from _estimate(report, price)


def _title(report: Report) -> Iterator[str]:
    rows, parts = report["batch_size"], report["micro_batches"]
    model = f"{model_name(report)} on " if "num_parameters" in report else ""
    yield f"{model}{report['topology']}: {report['devices']:,} × {report['chip']}, {mesh_name(report)}"
    yield (
        f"{rows:,} rows of {report['block_size']:,} tokens a step{f', in {parts} parts' if parts > 1 else ''}; "
        f"attention {report['attention']}, remat {report['remat']}, "
        f"layers {'scanned' if report['scan_layers'] else 'unrolled'}"
    )
    yield ""


def _memory(report: Report) -> Iterator[str]:
    memory = report["memory"]
    capacity, usable = memory["capacity"], memory["usable"]
    share = f", of which JAX takes {usable / capacity:.0%} unless told otherwise" if usable < capacity else ""
    if "total" in memory:
        verdict = "FITS" if report["fits"] else "DOES NOT FIT"
        yield f"{verdict}: {memory['total'] / 1e9:.2f} GB of {capacity / 1e9:.2f} GB a device{share}"
    else:
        yield f"DOES NOT FIT in {capacity / 1e9:.2f} GB a device. The compiler: {report['compiler_says']}."
    for part, name in MEMORY_PARTS.items():
        if part in memory:
            bar = "█" * round(40 * memory[part] / capacity)
            yield f"  {name:24}{memory[part] / 1e9:9.3f} GB  {bar}".rstrip()
    for buffer in memory.get("largest", ()):
        yield f"    {buffer}"[:118]
    if nearest := report.get("nearest"):
        yield f"  nearest change that fits, {nearest['total'] / 1e9:.2f} GB: {' '.join(nearest['flags'])}"
    elif "nearest" in report:
        yield "  none of the changes tried fits; take more devices, or look with --search"


def _collectives(report: Report) -> Iterator[str]:
    if not report["collectives"]:
        yield "  none"
        return
    yield f"  {'kind':20}{'over':20}{'group':>6}{'count':>7}{'GB':>10}{'sent GB':>10}{'GB/s':>8}{'ms':>10}"
    for c in report["collectives"]:
        yield (
            f"  {c['kind'] + ('*' if c['overlaps'] else ''):20}{'+'.join(c['axes']):20}{c['group']:6,}{c['count']:7,}"
            f"{c['bytes'] / 1e9:10.4f}{c['sent'] / 1e9:10.4f}{c['bandwidth'] / 1e9:8.0f}{c['seconds'] * 1e3:10.2f}"
        )


def _estimate(report: Report, price: float | None) -> Iterator[str]:
    seconds, tokens = report["seconds"], report["batch_size"] * report["block_size"]
    yield f"ESTIMATE: {BINDS[seconds['binds']]}"
    products, memory = duration_ms(seconds["products"]), duration_ms(seconds["memory"])
    waited_for, hidden = (duration_ms(seconds["network"][part]) for part in ("waited_for", "hidden"))
    yield f"  kernels that wait for products {products}, for memory {memory}"
    yield f"  network waited for {waited_for}, beside kernels {hidden}"
    yield f"  step            {duration_ms(seconds['roofline']):>14}   by the roofline"
    if seconds["compiler"]:
        yield f"                  {duration_ms(seconds['compiler']):>14}   by the compiler's estimate of its kernels"
    else:
        yield "                  the compiler gives no usable estimate of its kernels"
    yield (
        f"  at the longer   {tokens / seconds['step']:14,.0f} tokens/s, "
        f"{tokens / seconds['step'] / report['devices']:,.0f} a device; MFU {seconds['mfu']:.1%}"
    )
    if report["steps"]:
        run, hours = report["steps"] * seconds["step"], report["steps"] * seconds["step"] * report["devices"] / 3600
        cost = f", {hours * price:,.0f} at {price:g} each" if price is not None else ""
        yield (
            f"  whole run       {duration(run):>14}   {report['steps']:,} steps, {report['steps'] * tokens / 1e9:,.1f} "
            f"billion tokens: {hours:,.1f} device-hours{cost}"
        )
    else:
        yield "  whole run       not known: train.epochs depends on the data; set train.steps or train.tokens"
    if report.get("flags"):
        yield f"  its flags       {' '.join(report['flags'])}"
    yield ""
    yield ASSUMPTIONS


def table(reports: Iterable[Report]) -> Iterator[str]:
    """A line for each plan, in the order given, and a header."""
    header = ["topology", "mesh", "remat", "scan", "parts", "batch", "GB", "TFLOP", "sent GB", "step", "MFU", ""]
    lines = [header]
    for r in reports:
        line = [r["topology"], mesh_name(r), r["remat"], "yes" if r["scan_layers"] else "no"]
        line += [f"{r['micro_batches']:,}", f"{r['batch_size']:,}"]
        if "seconds" in r:
            seconds, sent = r["seconds"], sum(c["sent"] for c in r["collectives"])
            line += [f"{r['memory']['total'] / 1e9:.2f}", f"{r['hardware_flops'] / 1e12:,.3f}", f"{sent / 1e9:,.3f}"]
            line += [duration_ms(seconds["step"]), f"{seconds['mfu']:.1%}", "" if r["fits"] else "does not fit"]
        else:
            line += [""] * 5 + [f"does not fit: {r['compiler_says']}"]
        lines.append(line)
    yield from columns(lines, left=4)


def columns(lines: list[list[str]], left: int) -> Iterator[str]:
    """Lines of a table; its first columns are aligned to the left, as is the last, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *cells, last in lines:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        yield "  ".join([*aligned, last]).rstrip()


def chips(known: Iterable[Chip] = hardware.CHIPS) -> Iterator[str]:
    """A table of what can be asked for."""
    lines = [["chip", "up to", "TFLOP/s", "memory GB", "GB/s", "link GB/s", "network GB/s", ""]]
    for chip in known:
        if chip.memory:
            figures = (chip.flops / 1e12, chip.memory / 1e9, chip.bandwidth / 1e9, chip.link / 1e9, chip.network / 1e9)
            lines.append([chip.name, chip.largest, *(f"{figure:,.4g}" for figure in figures), ""])
    yield from columns(lines, left=2)
    yield ""
    yield "TFLOP/s: dense bfloat16. link: one direction, to a neighbour in the torus (TPU) or the NVLink switch (GPU)."
    yield "network: one direction, a device, between slices (4xv5e:16x16) or hosts (4xh100:8), as many as you like."
    yield hardware.SOURCES


def model_name(report: Report) -> str:
    """ "174.6 billion parameters"."""
    number = report["num_parameters"]
    return f"{number / 1e9:,.1f} billion parameters" if number >= 1e9 else f"{number / 1e6:,.1f} million parameters"


def mesh_name(report: Report) -> str:
    """ "fsdp data=4 fsdp=8": the rules, and the sizes that are not 1."""
    sizes = [f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1]
    return " ".join([report["rules"], *sizes, *(["zero1"] if report["zero1"] else [])])


def duration_ms(seconds: float) -> str:
    """ "27.3 ms", "12.340 s"."""
    return f"{seconds:,.3f} s" if seconds >= 10 else f"{seconds * 1e3:,.1f} ms"
