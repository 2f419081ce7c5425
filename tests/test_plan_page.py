"""The page of a plan: well-formed, complete, and true to the figures that it draws."""

import copy
import html.parser
import itertools
import re
from typing import Any

import pytest

from gpt.planning import page
from gpt.planning.report import MEMORY_PARTS

VOID = {"meta", "br", "wbr"}
MEMORY = {"parameters": 4e9, "optimizer": 2e9, "batch": 0, "padding": 0, "temporaries": 1e9, "output": 0}
MESH = {"data": 2, "fsdp": 4, "sequence": 1, "model": 1}


def plan(**changes) -> dict[str, Any]:
    """A report as `gpt.planning.step.measure` makes it."""
    memory = {"capacity": 10e9, "usable": 7.5e9, **MEMORY, "total": 7e9, "largest": ["786.00MiB: bf16[8,50304]"]}
    return {
        "topology": "v5e:2x4",
        "chip": "v5e",
        "devices": 8,
        "mesh": MESH,
        "rules": "fsdp",
        "zero1": False,
        "batch_size": 32,
        "micro_batches": 2,
        "block_size": 1000,
        "attention": "dense",
        "remat": "dots",
        "scan_layers": True,
        "steps": 36000,
        "memory": memory,
        "fits": True,
        "compiler_says": None,
        "num_parameters": 1_234_000_000,
        "model_flops": 2e12,
        "hardware_flops": 3e12,
        "memory_traffic": 4e9,
        "collectives": [
            collective("all-gather", 0.05),
            collective("all-reduce", 0.1),
            collective("permute", 0.2, True),
        ],
        "seconds": {
            "products": 0.5,
            "memory": 0.25,
            "network": {"hidden": 0.2, "waited_for": 0.15},
            "roofline": 0.9,
            "compiler": 1.0,
            "step": 1.0,
            "mfu": 0.321,
            "binds": "products",
        },
    } | changes


def collective(kind: str, seconds: float, overlaps: bool = False) -> dict[str, Any]:
    sizes = {"group": 4, "count": 12, "bytes": 4e9, "sent": 3e9, "bandwidth": 1e11}
    return {"kind": kind, "axes": ["fsdp"], "overlaps": overlaps, "seconds": seconds, **sizes}


def does_not_compile(**changes) -> dict[str, Any]:
    """What is left of a plan if the compiler gives up."""
    report = plan(fits=False, compiler_says="Used 20G of 10G hbm", **changes)
    known = ("capacity", "usable", "parameters", "optimizer", "batch")
    report["memory"] = {key: report["memory"][key] for key in known}
    return {k: v for k, v in report.items() if k not in ("hardware_flops", "memory_traffic", "collectives", "seconds")}


def placement(*ends: int, slices: int = 1) -> dict[str, Any]:
    devices = [list(place) for place in itertools.product(range(slices), *map(range, ends))]
    kernel = {"shape": [12, 768], "axes": ["layers", "embed"], "over": [[], ["fsdp"]], "count": 1}
    parameters = [{"name": f"block/{i}", "bytes": 1000 + i, **kernel} for i in range(10)]
    return {"devices": devices, "parameters": parameters}


PLACEMENT = placement(2, 4, 1)


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and keeps the text and the attributes of all tags."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def widths(self, title: str) -> list[float]:
        """Of the pieces of bars of a name that begins like this, in percent."""
        titles = [(tag.get("title", ""), tag.get("style", "")) for _, tag in self.tags]
        return [float(re.match(r"width:([\d.]+)%", style)[1]) for name, style in titles if name.startswith(title)]

    def squares(self) -> int:
        """Devices drawn, over all drawings."""
        return sum(tag["d"].count("M") for name, tag in self.tags if name == "path" and "fill" in tag)


def shown(plans: list[dict[str, Any]], where: dict[str, Any] = PLACEMENT, price: float | None = None) -> Page:
    before = copy.deepcopy((plans, where))
    source = page.html(plans, where, price)
    assert (plans, where) == before
    assert not re.search(r"https?:|<script|<link|url\(|@import|\bnan\b", source)
    return Page(source)


def test_one_plan():
    text = shown([plan()], price=2.5).text
    for said in (
        "1.2 billion parameters on v5e:2x4",
        "8 × v5e, fsdp data=2 fsdp=4, remat dots, layers scanned, in 2 parts",
        "32 rows of 1,000 tokens a step",
        "Fits: 7.00 GB of 10.00 GB a device, of which JAX takes 75% unless told otherwise",
        "1,000.0 msmatrix products bind",
        "32,0004,000 a device",
        "32.1%",
        "10h00m36,000 steps, 1.152 billion tokens",
        "80.0of 8 devices",
        "200at 2.5 a device-hour",
        "optimizer state 2.000 GB",
        "786.00MiB: bf16[8,50304]",
        "32 rows / 2 data / 4 fsdp: 4 a device, 2 at a time",
        "768 embed / 4 fsdp",
        "2 smaller ones",
        "12 in groups of 4: 4.0000 GB, 3.0000 GB sent at 100 GB/s",
        "Published runs took",
    ):
        assert said in text
    assert "All plans" not in text
    assert "does not fit" not in text


def test_bars_are_as_long_as_what_they_stand_for():
    drawn = shown([plan()])
    assert [drawn.widths(f"{MEMORY_PARTS[part]} ")[0] for part in MEMORY] == [40, 20, 0, 0, 10, 0]
    assert drawn.widths("permute") + drawn.widths("all-reduce") + drawn.widths("all-gather") == [100, 50, 25]
    assert drawn.widths("kernels that wait for products") == [50]
    assert drawn.widths("kernels that wait for memory") == [25]
    assert drawn.widths("network waited for") == [15, 15]
    assert drawn.widths("kernels as the compiler") == [85]
    assert [tag["style"] for name, tag in drawn.tags if tag.get("class") == "usable"] == ["left:75.000%"]


def test_a_step_that_waits_for_overlapping_collectives_too():
    seconds = plan()["seconds"] | {"network": {"hidden": 0.85, "waited_for": 0.15}, "roofline": 1.0, "compiler": None}
    assert shown([plan(seconds=seconds)]).widths("*beside kernels") == [10, 85]  # 0.75 s of it beside the kernels


@pytest.mark.parametrize("total", [12e9, 7.9e9])
def test_compiled_but_too_large(total):
    report = plan(fits=False, nearest=None)
    report["memory"] |= {"temporaries": total - 6e9, "total": total}
    drawn = shown([report])
    assert f"Does not fit: {total / 1e9:.2f} GB of 10.00 GB" in drawn.text
    assert "None of the changes tried fits" in drawn.text
    assert drawn.widths("parameters")[0] == pytest.approx(100 * 4e9 / max(total, 10e9), abs=1e-3)


def test_not_compiled():
    nearest = {"flags": ["--config.model.remat=full", "--config.mesh.fsdp=8"], "total": 6.5e9}
    text = shown([does_not_compile(nearest=nearest)]).text
    for said in (
        "Does not fit in 10.00 GB a device",
        "The compiler: Used 20G of 10G hbm.",
        "more than 6.00 of 10.00 GB",
        "Nearest change that fits, 6.50 GB: --config.model.remat=full --config.mesh.fsdp=8",
    ):
        assert said in text
    assert "Time of a step" not in text


def test_not_even_sized():
    report = does_not_compile()
    del report["num_parameters"], report["model_flops"]  # as from `step.refused`
    report["memory"] = {"capacity": 10e9, "usable": 10e9}
    text = shown([report]).text
    assert "Plan on v5e:2x4" in text
    assert "? of 10.00 GB" in text


def test_comparison():
    plans = [plan(flags=[f"--config.mesh.fsdp={i}"], batch_size=32 * i) for i in range(1, 14)]
    plans += [does_not_compile(flags=[], topology="v5p:2x2x2")]
    drawn = shown(plans)
    for i in range(1, 14):
        assert f"v5e:2x4 fsdp data=2 fsdp=4, remat dots, layers scanned, in 2 parts--config.mesh.fsdp={i}" in drawn.text
    assert "v5p:2x2x2 fsdp data=2" in drawn.text
    assert "2 more plans: in the table below" in drawn.text
    assert len(drawn.widths("parameters")) == page.MOST_BARS
    assert "9.000" in drawn.text  # GB sent


def test_every_device_is_drawn_once_for_each_axis_in_use():
    drawn = shown([plan()])
    assert drawn.squares() == 2 * 8
    assert "all 8" in drawn.text
    outlined = [tag["d"].count("M") for name, tag in drawn.tags if tag.get("class") == "group"]
    assert outlined == [2, 4]  # a group along data, and one along fsdp


def test_colours_show_the_index_along_an_axis():
    drawn = shown([plan()])
    named = [tag["fill"] for name, tag in drawn.tags if name == "path" and "fill" in tag]
    assert named[:2] == [page._colour(0, 2), page._colour(1, 2)]
    assert named[2:] == [page._colour(i, 4) for i in range(4)]
    # Device 1 in the order of the mesh is next to device 0 along fsdp, and lies at x = 0, y = 1.
    (second,) = [tag["d"] for name, tag in drawn.tags if tag.get("fill") == page._colour(1, 4) and name == "path"]
    assert second.startswith("M1 21h")


def test_planes_slices_and_hosts_have_names():
    several = shown([plan(mesh=MESH | {"data": 4})], placement(2, 1, 2, slices=4)).text
    assert "slice 3, z 1" in several
    assert "a group spans 4 slices" in several
    hosts = shown([plan()], placement(4, slices=2))
    assert hosts.squares() == 2 * 8
    assert "host 1" in hosts.text
    assert "a group spans 2 hosts" in hosts.text


def test_devices_that_are_not_drawn_are_counted():
    drawn = shown([plan(mesh=MESH | {"data": 16, "fsdp": 384})], placement(16, 16, 24))
    assert drawn.squares() == 2 * page.MOST_DEVICES
    assert "4,096 of 6,144; 2,048 are left out" in drawn.text


def test_one_device():
    drawn = shown([plan(mesh=dict.fromkeys(MESH, 1), devices=1, collectives=[])], placement(1, 1, 1))
    assert drawn.squares() == 1
    assert "None." in drawn.text


def test_text_is_escaped():
    bad = "<i title='\">&"
    report = plan(
        topology=bad, chip=bad, remat=bad, flags=[bad], compiler_says=bad, nearest={"flags": [bad], "total": 1}
    )
    report["memory"]["largest"] = [bad]
    report["collectives"][0] |= {"kind": bad, "axes": [bad]}
    where = copy.deepcopy(PLACEMENT)
    where["parameters"][0] |= {"name": bad, "axes": [bad, bad]}
    drawn = shown([report, report], where)
    assert drawn.text.count(bad) >= 12
    assert bad in {tag.get("title") for _, tag in drawn.tags}


def test_whole_run_of_unknown_length():
    text = shown([plan(steps=None)], price=2.5).text
    assert "not known" in text
    assert "device-hours" not in text
