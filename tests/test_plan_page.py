"""The page of a plan: its data, its static parts, and (if node is installed) what its script draws."""

import configparser
import copy
import fnmatch
import html.parser
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpt.planning import report
from gpt.planning.report import MEMORY_PARTS, TEXTS

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
VOID = {"meta", "br", "wbr"}
MEMORY = {"parameters": 4e9, "optimizer": 2e9, "batch": 0, "padding": 0, "temporaries": 1e9, "output": 0}
MESH = {"data": 2, "fsdp": 4, "sequence": 1, "model": 1}


def plan(**changes) -> dict[str, Any]:
    """Returns a report like those of `gpt.planning.compiling.measure`."""
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
        "compiler_message": None,
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
            "compute": 0.5,
            "memory": 0.25,
            "network": {"overlapped": 0.2, "exposed": 0.15},
            "roofline": 0.9,
            "compiler": 1.0,
            "step": 1.0,
            "mfu": 0.321,
            "bottleneck": "compute",
        },
    } | changes


def collective(kind: str, seconds: float, overlaps: bool = False) -> dict[str, Any]:
    sizes = {"group": 4, "count": 12, "bytes": 4e9, "sent": 3e9, "bandwidth": 1e11}
    return {
        "kind": kind,
        "axes": ["fsdp"],
        "overlaps": overlaps,
        "seconds": seconds,
        "exposed": (not overlaps) * seconds,
        **sizes,
    }


def does_not_compile(**changes) -> dict[str, Any]:
    """Returns a report without what is unknown if the compiler rejects the program."""
    report = plan(fits=False, compiler_message="Used 20G of 10G hbm", **changes)
    known = ("capacity", "usable", "parameters", "optimizer", "batch")
    report["memory"] = {key: report["memory"][key] for key in known}
    return {k: v for k, v in report.items() if k not in ("hardware_flops", "memory_traffic", "collectives", "seconds")}


def placement(*ends: int, slices: int = 1) -> dict[str, Any]:
    devices = [list(place) for place in itertools.product(range(slices), *map(range, ends))]
    kernel = {"shape": [12, 768], "axes": ["layers", "embed"], "over": [[], ["fsdp"]], "count": 1, "note": ""}
    parameters = [{"name": f"block/{i}", "bytes": 1000 + i, **kernel} for i in range(10)]
    axes = {"batch_axes": ["data", "fsdp"], "length_axes": []}
    return {"devices": devices, "parameters": parameters, **axes}


PLACEMENT = placement(2, 4, 1)


# A minimal document for the script of the page: it prints the title and the HTML that the script writes.
DOM = """
const main = {}, document = {getElementById: id => id === "page" ? main : null};
%s
console.log(JSON.stringify([document.title, main.innerHTML]));
"""


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
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def widths(self, title: str) -> list[float]:
        """Returns the widths in percent of the pieces of bars whose title starts with a text."""
        titles = [(tag.get("title", ""), tag.get("style", "")) for _, tag in self.tags]
        return [float(re.match(r"width:([\d.]+)%", style)[1]) for name, style in titles if name.startswith(title)]

    def squares(self) -> int:
        """Returns the number of devices that are drawn, over all drawings."""
        return sum(tag["d"].count("M") for name, tag in self.tags if name == "path" and "fill" in tag)


def written(plans: list[dict[str, Any]], where: dict[str, Any] = PLACEMENT, price: float | None = None) -> str:
    """Returns the page as a file has it, after checks that hold for every page."""
    before = copy.deepcopy((plans, where))
    source = report.html(plans, where, price)
    assert (plans, where) == before
    assert not re.search(r"https?:|<link|url\(|@import|\bsrc=|\bNaN\b", source)
    assert source.count("<script>") == source.count("</script") == 1
    Page(source)
    return source


def embedded(source: str) -> dict[str, Any]:
    """Returns the data that the script of a page draws."""
    return json.loads(re.search(r"^const DATA = (.*);$", source, re.M)[1])


def shown(plans: list[dict[str, Any]], where: dict[str, Any] = PLACEMENT, price: float | None = None) -> Page:
    """Returns what the script of a page draws."""
    source = written(plans, where, price)
    script = DOM % re.search(r"<script>(.*)</script>", source, re.S)[1]
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, check=True)
    title, drawn = json.loads(done.stdout)
    assert title == f"Plan for {plans[0]['topology']}"
    assert not re.search(r"\bNaN\b|undefined|null|\[object", drawn)
    return Page(drawn)


def test_the_data_of_a_page_is_the_data_of_its_plans():
    plans, where = [plan(), does_not_compile()], placement(2, 4, 1)
    assert embedded(written(plans, where, 2.5)) == {
        "plans": plans,
        "placement": where,
        "price": 2.5,
        **TEXTS,
        "kernels": ["cudnn", "splash"],
    }
    assert list(embedded(written(plans))["memory_parts"]) == list(MEMORY)  # the order of the pieces of a bar


def test_no_text_of_a_plan_ends_the_script():
    bad = "</script><script>alert(1)</script><!--"
    assert embedded(written([plan(topology=bad)]))["plans"][0]["topology"] == bad


def test_the_asset_names_what_it_draws():
    asset = Path(report.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert asset.count("PLANS") == 1
    for key in plan().keys() - {"chip"} | plan()["seconds"].keys() | MEMORY_PARTS.keys() - MEMORY.keys():
        assert re.search(rf"\b{key}\b", asset), key
    assert "@media print" in asset
    assert "prefers-color-scheme: dark" in asset
    assert "needs JavaScript" in Page(asset).text


def test_the_assets_of_the_package_are_installed(request):
    setup = configparser.ConfigParser()
    setup.read(request.config.rootpath / "setup.cfg")
    patterns = setup["options.package_data"]["*"].split(", ")
    assets = [
        path for path in (request.config.rootpath / "gpt").rglob("*.*") if path.suffix not in (".py", ".pyc", ".md")
    ]
    assert assets
    for asset in assets:
        assert any(fnmatch.fnmatch(asset.name, pattern) for pattern in patterns)


def test_lines_of_the_text_report_fit_a_terminal():
    large = {"num_parameters": 174.6e9, "steps": 143_052, "batch_size": 1024, "block_size": 2048, "devices": 1024}
    large |= {"attention": "splash", "model_flops": 2204e12, "seconds": plan()["seconds"] | {"step": 15.0}}
    for each in (plan(**large), plan(), does_not_compile()):
        assert all(len(line) <= 118 for text in report.text(each, 4.2) for line in text.splitlines())


@needs_node
def test_one_plan():
    text = shown([plan()], price=2.5).text
    for expected in (
        "1.2 billion parameters on v5e:2x4",
        "8 × v5e, fsdp data=2 fsdp=4, remat dots, layers scanned, 2 micro-batches",
        "32 examples of 1,000 tokens per step",
        "Fits: 7.00 GB of 10.00 GB per device, of which JAX uses 75% by default",
        "1,000.0 mscompute-bound (matrix products)",
        "32,0004,000 per device",
        "32.1%",
        "10h00m36,000 steps, 1.152 billion tokens",
        "80.0on 8 devices",
        "200at 2.5 per device-hour",
        "optimizer state 2.000 GB",
        "786.00MiB: bf16[8,50304]",
        "32 examples / 2 data / 4 fsdp: 4 per device, 2 per micro-batch.",
        "768 embed / 4 fsdp",
        "2 smaller ones",
        "12 in groups of 4: 4.0000 GB, 3.0000 GB sent at 100 GB/s",
        "1.4 to 3.5 times as long as those for GPUs",
    ):
        assert expected in text
    assert "All plans" not in text
    assert "does not fit" not in text


@needs_node
def test_bars_are_as_long_as_what_they_stand_for():
    drawn = shown([plan()])
    assert [drawn.widths(f"{MEMORY_PARTS[part]} ")[0] for part in MEMORY] == [40, 20, 0, 0, 10, 0]
    assert drawn.widths("permute") + drawn.widths("all-reduce") + drawn.widths("all-gather") == [100, 50, 25]
    assert drawn.widths("compute-bound kernels") == [50]
    assert drawn.widths("memory-bound kernels") == [25]
    assert drawn.widths("exposed collectives") == [15, 15]
    assert drawn.widths("kernels as the compiler") == [85]
    assert [tag["style"] for name, tag in drawn.tags if tag.get("class") == "usable"] == ["left:75.000%"]


@needs_node
def test_a_step_that_waits_for_overlapping_collectives_too():
    seconds = plan()["seconds"] | {"network": {"overlapped": 0.85, "exposed": 0.15}, "roofline": 1.0, "compiler": None}
    drawn = shown([plan(seconds=seconds)])
    assert drawn.widths("*overlapped collectives") == [10, 85]  # 0.75 s of them overlap with the kernels


@pytest.mark.parametrize("total", [12e9, 7.9e9])
@needs_node
def test_compiled_but_too_large(total):
    report = plan(fits=False)
    report["memory"] |= {"temporaries": total - 6e9, "total": total}
    drawn = shown([report])
    assert f"Does not fit: {total / 1e9:.2f} GB of 10.00 GB" in drawn.text
    assert "--search looks for a mesh" in drawn.text
    assert drawn.widths("parameters")[0] == pytest.approx(100 * 4e9 / max(total, 10e9), abs=1e-3)


@needs_node
def test_not_compiled():
    text = shown([does_not_compile()]).text
    for expected in (
        "Does not fit in 10.00 GB per device",
        "The compiler: Used 20G of 10G hbm.",
        "more than 6.00 of 10.00 GB",
    ):
        assert expected in text
    assert "Time of a step" not in text


@needs_node
def test_not_even_sized():
    report = does_not_compile()
    del report["num_parameters"], report["model_flops"]  # like `compiling.refused`
    report["memory"] = {"capacity": 10e9, "usable": 10e9}
    text = shown([report]).text
    assert "Plan on v5e:2x4" in text
    assert "? of 10.00 GB" in text


@needs_node
def test_comparison():
    plans = [plan(flags=[f"--config.mesh.fsdp={i}"], batch_size=32 * i) for i in range(1, 14)]
    plans += [does_not_compile(flags=[], topology="v5p:2x2x2")]
    drawn = shown(plans)
    for i in range(1, 14):
        assert (
            f"v5e:2x4 fsdp data=2 fsdp=4, remat dots, layers scanned, 2 micro-batches--config.mesh.fsdp={i}"
            in drawn.text
        )
    assert "v5p:2x2x2 fsdp data=2" in drawn.text
    assert "2 more plans are in the table below" in drawn.text
    assert len(drawn.widths("parameters")) == 12
    assert "9.000" in drawn.text  # GB sent


@needs_node
def test_every_device_is_drawn_once_for_each_axis_in_use():
    drawn = shown([plan()])
    assert drawn.squares() == 2 * 8
    assert "all 8" in drawn.text
    outlined = [tag["d"].count("M") for name, tag in drawn.tags if tag.get("class") == "group"]
    assert outlined == [2, 4]  # a group along data, and one along fsdp


@needs_node
def test_colours_show_the_index_along_an_axis():
    drawn = shown([plan()])
    named = [tag["fill"] for name, tag in drawn.tags if name == "path" and "fill" in tag]
    assert named[:2] == ["#48348c", "#f5dc32"]
    assert named[2:] == ["#48348c", "#26828e", "#54be6a", "#f5dc32"]
    # Device 1 in the order of the mesh is next to device 0 along fsdp, at x = 0, y = 1.
    (second,) = [tag["d"] for name, tag in drawn.tags if tag.get("fill") == "#26828e" and name == "path"]
    assert second.startswith("M1 21h")


@needs_node
def test_planes_slices_and_hosts_have_names():
    several = shown([plan(mesh=MESH | {"data": 4})], placement(2, 1, 2, slices=4)).text
    assert "slice 3, z 1" in several
    assert "a group spans 4 slices" in several
    hosts = shown([plan()], placement(4, slices=2))
    assert hosts.squares() == 2 * 8
    assert "host 1" in hosts.text
    assert "a group spans 2 hosts" in hosts.text


@needs_node
def test_devices_that_are_not_drawn_are_counted():
    drawn = shown([plan(mesh=MESH | {"data": 16, "fsdp": 384})], placement(16, 16, 24))
    assert drawn.squares() == 2 * 4096
    assert "4,096 of 6,144; 2,048 are left out" in drawn.text


@needs_node
def test_one_device():
    drawn = shown([plan(mesh=dict.fromkeys(MESH, 1), devices=1, collectives=[])], placement(1, 1, 1))
    assert drawn.squares() == 1
    assert "None." in drawn.text


@needs_node
def test_text_is_escaped():
    bad = "<i title='\">&"
    report = plan(topology=bad, chip=bad, remat=bad, flags=[bad], compiler_message=bad)
    report["memory"]["largest"] = [bad]
    report["collectives"][0] |= {"kind": bad, "axes": [bad]}
    where = copy.deepcopy(PLACEMENT)
    where["parameters"][0] |= {"name": bad, "axes": [bad, bad]}
    drawn = shown([report, report], where)
    assert drawn.text.count(bad) >= 12
    assert bad in {tag.get("title") for _, tag in drawn.tags}


@needs_node
def test_whole_run_of_unknown_length():
    text = shown([plan(steps=None)], price=2.5).text
    assert "unknown" in text
    assert "device-hours" not in text
