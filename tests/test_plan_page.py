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
from gpt.planning.report import MEMORY_PARTS, TEXTS, units

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
VOID = {"meta", "br", "wbr"}
MEMORY = {"parameters": 4e9, "optimizer": 2e9, "batch": 0, "padding": 0, "temporaries": 1e9, "output": 0}
MESH = {"data": 2, "fsdp": 4, "sequence": 1, "model": 1}


def plan(**changes) -> dict[str, Any]:
    """Returns a report like those of `gpt.planning.compiling.measure`."""
    memory = {"capacity": 10e9, "usable": 7.5e9, **MEMORY, "total": 7e9, "largest": [(824180736, "bf16[8,50304]")]}
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
    report["memory"] = {key: report["memory"][key] for key in known} | {"temporaries": 15e9, "needed": 21e9}
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


def written(plans: list[dict[str, Any]], where: dict[str, Any] | None = PLACEMENT, price: float | None = None) -> str:
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


def shown(plans: list[dict[str, Any]], where: dict[str, Any] | None = PLACEMENT, price: float | None = None) -> Page:
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
    shown = [each | {"figures": report.figures(each, 2.5), "config": {}} for each in plans]
    assert embedded(written(plans, where, 2.5)) == {
        "plans": json.loads(json.dumps(shown)),
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


def large_plan(**changes) -> dict[str, Any]:
    large = {"num_parameters": 174.6e9, "steps": 143_052, "batch_size": 1024, "block_size": 2048, "devices": 1024}
    large |= {"attention": "splash", "model_flops": 2204e12, "hardware_flops": 2200e12}
    large |= {"seconds": plan()["seconds"] | {"step": 15.0, "compiler": 15.0}}
    return plan(**large | {"collectives": [collective("collective-permute", 1.063, True)]} | changes)


def test_lines_of_the_text_report_fit_80_columns():
    flags = [f"--config.model.{name}=value" for name in ("attention", "remat", "scan_layers")]
    for each in (large_plan(flags=flags), plan(), does_not_compile()):
        assert all(len(line) <= 80 for line in report.text(each, 4.2))
    assert all(len(line) <= 80 for line in report.table([large_plan(), does_not_compile()]))
    assert all(len(line) <= 80 for line in report.comparison([large_plan(), plan(), does_not_compile()], 4.2))


def small_plan(**changes) -> dict[str, Any]:
    """Returns a plan of a model whose memory, work and times are a thousandth of those of `plan`, or less."""
    memory = {part: size / 1e5 for part, size in MEMORY.items()} | {"total": 7e4, "largest": []}
    seconds = {"compute": 5e-6, "memory": 2e-6, "roofline": 9e-6, "compiler": 1e-5, "step": 1e-5}
    seconds |= {"network": {"overlapped": 0, "exposed": 1e-9}}
    moved = [collective("all-gather", 1e-9) | {"bytes": 4e4, "sent": 3}]
    each = plan(model_flops=2e6, hardware_flops=3e6, memory_traffic=4e4, collectives=moved, **changes)
    return each | {"memory": each["memory"] | memory, "seconds": each["seconds"] | seconds}


def test_units_follow_the_size_of_the_model():
    """A report has one unit of memory, of work and of time, in which no figure but 0 is shown as 0."""
    text = "\n".join(report.text(small_plan()))
    for expected in (
        "FITS: 70.00 kB of 10,000,000.00 kB",
        "2.000 MFLOP",
        "3.000 MFLOP",
        "memory traffic        40.00 kB",
        "40.00  <0.01   100  <0.01    <0.01",  # of collectives: moved and sent kB, GB/s, µs in all and exposed
        "10.00 µs by the compiler",
        "<0.01 µs exposed, 0.00 µs overlapped",
    ):
        assert expected in text
    assert not re.search(r"\b(GB|MB|TFLOP|ms)\b(?!/s)", text.split("Assumptions")[0])
    text = "\n".join(report.text(large_plan()))
    for expected in ("7.000 GB of 10.000 GB", "2.204 PFLOP", "15.00 s", "0.50 s compute-bound"):
        assert expected in text
    assert report.units([small_plan(), plan()]) == report.units([plan()])  # plans side by side have the same units


def test_memory_beyond_the_device_is_drawn_past_the_mark():
    too_large = plan(fits=False)
    too_large["memory"] |= {"temporaries": 14e9, "total": 20e9}
    bars = {line[2:26].strip(): line[40:] for line in report.text(too_large) if line.startswith("  ")}
    # 38 columns are 20 GB: the memory that JAX uses ends after 14 of them, the memory of the device after 19.
    assert bars["parameters"] == 8 * "█" + 6 * " " + "┊" + 5 * " " + "│"
    assert bars["optimizer state"] == 8 * " " + 3 * "█" + 3 * " " + "┊" + 5 * " " + "│"
    assert bars["gradients, activations"] == 11 * " " + 3 * "█" + "┊" + 5 * "▒" + "│" + 19 * "▒"


def test_comparison_of_plans_as_text():
    before = plan(config={"model": {"remat": "dots", "num_layers": 8}, "seed": 1})
    after = plan(config={"model": {"remat": "full", "num_layers": 8}, "seed": 1}, memory_traffic=6e9)
    lines = [" ".join(line.split()) for line in report.comparison([before, after, does_not_compile()], price=2)]
    assert "memory of a device 7.00 GB 7.00 GB 1.000 21.00 GB 3.000" in lines
    assert "memory traffic 4.00 GB 6.00 GB 1.500 – –" in lines
    assert "MFU 32.1% 32.1% 1.000 – –" in lines
    assert "price 160.0 160.0 1.000 – –" in lines
    assert "model.remat dots full –" in lines
    assert "MFU – 32.1% –" in [" ".join(line.split()) for line in report.comparison([does_not_compile(), after])]
    lines = [" ".join(line.split()) for line in report.comparison([before, after])]
    assert lines[-2:] == ["differences 1 2", "model.remat dots full"]
    assert [*report.comparison([before, before])][-1] == "The configs do not differ."


@needs_node
def test_one_plan():
    text = shown([plan()], price=2.5).text
    for expected in (
        "1.2 billion parameters on v5e:2x4",
        "8 × v5e, fsdp data=2 fsdp=4, attention dense, remat dots, layers scanned, 2 micro-batches",
        "32 examples of 1,000 tokens per step",
        "Fits: 7.000 GB of 10.000 GB per device, of which JAX uses 75% by default",
        "1.000 scompute-bound (matrix products)",
        "32,0004,000 per device",
        "32.1%",
        "10h00m36,000 steps, 1.2 billion tokens",
        "80.0on 8 devices",
        "200.0at 2.5 per device-hour",
        "optimizer state 2.000 GB",
        "0.824 GB bf16[8,50304]",
        "32 examples / 2 data / 4 fsdp: 4 per device, 2 per micro-batch.",
        "768 embed / 4 fsdp",
        "2 smaller ones",
        "12 in groups of 4: 4.000 GB, 3.000 GB sent at 100 GB/s",
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
    drawn, bytes_text = shown([report]), units([report])["bytes"]
    assert f"Does not fit: {bytes_text(total)} of {bytes_text(10e9)}" in drawn.text
    assert "--search looks for a mesh" in drawn.text
    assert drawn.widths("parameters")[0] == pytest.approx(100 * 4e9 / max(total, 10e9), abs=1e-3)


@needs_node
def test_not_compiled():
    text = shown([does_not_compile()]).text
    for expected in (
        "Does not fit: at least 21.00 GB of 10.00 GB per device",
        "The compiler: Used 20G of 10G hbm.",
        "at least 21.00 of 10.00 GB",
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
            "v5e:2x4 fsdp data=2 fsdp=4, attention dense, remat dots, layers scanned, 2 micro-batches"
            f"--config.mesh.fsdp={i}" in drawn.text
        )
    assert "v5p:2x2x2 fsdp data=2" in drawn.text
    assert "2 more plans are in the table below" in drawn.text
    assert len(drawn.widths("parameters")) == 12
    assert "9.00" in drawn.text  # GB sent


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
    report["memory"]["largest"] = [(1e9, bad)]
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


def test_a_reader_compares_two_plans(browser, tmp_path):
    """The page starts with the unchanged config and the best plan, and compares what the reader selects."""
    configs = [{"model": {"remat": remat}} for remat in ("dots", "none", "<i>")]
    plans = [plan(flags=["--config.model.remat=dots"], config=configs[0], memory_traffic=6e9)]
    plans += [
        plan(flags=[], config=configs[1]),
        does_not_compile(flags=["--config.model.remat=<i>"], config=configs[2]),
    ]
    path = tmp_path / "plan.html"
    path.write_text(written(plans))

    def compared() -> dict[str, list[str]]:
        cells = "row => [...row.children].map(cell => cell.innerText)"
        rows = browser.driver.execute_script(f"return [...document.querySelectorAll('.compared tr')].map({cells})")
        return {name: values for name, *values in rows}

    for width in (1280, 400):
        page = browser.open(path, width=width, dark=width == 400)
        assert page.execute_script("return document.documentElement.scrollWidth") == width
        assert compared()["memory traffic"] == ["4.00 GB", "6.00 GB", "1.500"]
        assert compared()["model.remat"] == ["none", "dots", ""]
        page.find_element("css selector", "#b option[value='2']").click()
        assert compared()["memory of a device"] == ["7.00 GB", "21.00 GB", "3.000"]
        assert compared()[""] == ["fits", "does not fit", ""]
        assert compared()["MFU"] == ["32.1%", "–", "–"]
        assert compared()["model.remat"] == ["none", "<i>", ""]
        page.find_element("css selector", "#a option[value='2']").click()
        assert "The configs do not differ." in page.find_element("id", "compared").text


@needs_node
def test_plans_of_files_have_no_placement():
    drawn = shown([plan(), does_not_compile()], None)
    assert drawn.text.startswith("2 plans")
    assert "Placement" not in drawn.text
    assert "Comparison of two plans" in drawn.text


@needs_node
def test_memory_beyond_the_device_is_hatched():
    too_large = plan(fits=False)
    too_large["memory"] |= {"temporaries": 14e9, "total": 20e9}
    (over,) = [tag["style"] for _, tag in shown([too_large]).tags if tag.get("class") == "over" and "style" in tag]
    assert over == "left:37.500%;width:62.500%"  # the scale ends at 20 GB, of which JAX uses 7.5
    assert not [tag for _, tag in shown([plan()]).tags if tag.get("class") == "over"]
