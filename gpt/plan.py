"""Compiles the training step of a config for TPUs or GPUs that are not there: will it fit, how fast is it, and why.

    python -m gpt.plan --config=configs/gpt2_124m.py --topology=v5e:4x4
    python -m gpt.plan --config=configs/gpt3_175b.py --topology=v5p:8x8x16 --search --html=plan.html

The program is the one that gpt.main would run there, and the compiler is the TPU's or the GPU's own, which needs
none of them. All figures are those of one device and one step; GB are 10⁹ bytes. 4xv5p:8x8x16 are four slices,
4xh100:8 four hosts.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from gpt import cache, cli, hardware, metrics
from gpt.config import Config, flatten
from gpt.errors import UsageError, UserError
from gpt.planning import page, report, search, step
from gpt.versions import code_digest

_CONFIG = flags.DEFINE_string("config", None, "Config file, like configs/gpt2_124m.py.")
_TOPOLOGY = flags.DEFINE_list("topology", None, "What to compile for: v5e:16x16, 4xv5p:8x8x16, h100:8, … or several.")
_BATCH_PER_DEVICE = flags.DEFINE_integer(
    "batch_per_device",
    None,
    "Rows of the batch for each device. Default: train.batch_size over all.",
    lower_bound=1,
    upper_bound=2**20,
)
_SEARCH = flags.DEFINE_bool("search", False, "Look for the mesh, remat policy and micro-batches of the shortest step.")
_COMPILATIONS = flags.DEFINE_integer("compilations", 8, "How many candidates --search compiles.", lower_bound=1)
_ADVISE = flags.DEFINE_bool("advise", True, "Where it does not fit, look for the nearest change that does.")
_PRICE = flags.DEFINE_float("price", None, "Price of a device for an hour, in whatever currency.", lower_bound=0)
_HTML = flags.DEFINE_string("html", None, "File to write a page of the same report to.")
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each plan instead.")
_CACHE = flags.DEFINE_bool("cache", True, "Look up what was compiled before, and keep what is compiled now.")
_LIST = flags.DEFINE_bool("list_topologies", False, "Print the chips that can be asked for, and their public figures.")


def main() -> int:
    if _LIST.value:
        print(*report.chips(hardware.CHIPS), sep="\n")
        return 0
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UsageError("Name a config file and what to plan for: --config=configs/gpt2_124m.py --topology=v5e:4x4.")
    if _SEARCH.value and len(_TOPOLOGY.value) > 1:
        raise UsageError("--search takes one --topology at a time.")
    if _HTML.value and Path(_HTML.value).exists():
        raise UsageError(f"--html={_HTML.value} exists; name another file.")
    if _HTML.value and not (os.access(folder := Path(_HTML.value).parent, os.W_OK) and folder.is_dir()):
        raise UsageError(f"--html={_HTML.value}: its folder does not exist, or cannot be written to.")
    jax.config.update("jax_platforms", "cpu")  # this machine's accelerators have no part in it
    jax.config.update("jax_enable_compilation_cache", False)  # it could not be read without a TPU
    written = cli.config()
    planned = [each for topology in _TOPOLOGY.value for each in _plan(written, topology)]
    plans = [each | {"flags": search.flags(written, config)} for config, each in planned]
    if _HTML.value:
        placement = step.placement(planned[0][0], plans[0]["topology"])
        try:
            with open(_HTML.value, "x", encoding="utf-8") as file:
                file.write(page.html(plans, placement, _PRICE.value))
        except OSError as error:
            raise UserError(f"Cannot write --html={_HTML.value}: {error.strerror}.") from None
    if _JSON.value:
        print(*map(json.dumps, plans), sep="\n")
    elif _SEARCH.value:
        print(*report.table(plans), "", *report.text(plans[0], _PRICE.value), sep="\n")
    else:
        for each in plans:
            print(*report.text(each, _PRICE.value), "", sep="\n")
        if len(plans) > 1:
            print(*report.table(plans), sep="\n")
    return 0 if all(each["fits"] for each in (plans[:1] if _SEARCH.value else plans)) else 1


def _plan(config: Config, topology: str) -> list[tuple[Config, report.Report]]:
    """The plan of a config for a topology, or with --search those of all that was tried, the best first."""
    chip, devices = hardware.of_topology(topology), hardware.topology_devices(topology)
    if _BATCH_PER_DEVICE.value:
        train = dataclasses.replace(config.train, batch_size=_BATCH_PER_DEVICE.value * len(devices))
        config = dataclasses.replace(config, train=train)
    elsewhere = functools.partial(plan_elsewhere, topology=topology)
    progress = metrics.Progress(enabled=_SEARCH.value or not _JSON.value, out=sys.stderr)
    if _SEARCH.value:
        step.build(config, devices)  # says what is wrong with it, if anything is
        return search.search(config, devices, chip, _COMPILATIONS.value, elsewhere, progress)
    planned = plan(config, topology)
    if not planned["fits"] and _ADVISE.value:
        found = search.nearest(config, devices, chip, planned, elsewhere, progress)
        nearest = found and {"flags": search.flags(config, found[0]), "total": found[1]["memory"]["total"]}
        planned = planned | {"nearest": nearest}
    return [(config, planned)]


def plan(config: Config, topology: str) -> report.Report:
    """`step.measure`, or what it said before of the same config, code and compiler."""
    if not _CACHE.value:
        return step.measure(config, topology)
    packages = ("jax", "jaxlib", "flax", "optax", hardware.of_topology(topology).compiler)
    versions = {name: importlib.metadata.version(name) for name in packages}
    name = f"plan-{cache.digest(dataclasses.asdict(config), topology, versions, code_digest())}"
    kept = cache.Cache(say=functools.partial(print, file=sys.stderr))
    return kept.entry(name, lambda create: step.measure(config, topology)).value


def plan_elsewhere(config: Config, topology: str) -> report.Report:
    """`plan` in a process of its own: several run at once, each gives its memory back, and a compiler that dies is one
    candidate less.

    Raises:
      UserError: the config does not allow it, or the compiler refuses it.
    """
    command = [sys.executable, "-m", "gpt.plan", f"--config={_CONFIG.value}", "--json"]
    command += [f"--config.{key}={value}" for key, value in flatten(dataclasses.asdict(config)).items()]
    command += [f"--topology={topology}", f"--cache={_CACHE.value}", "--noadvise"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stdout:
        return json.loads(done.stdout)
    said = done.stderr.strip().splitlines()[-1:] or [f"the compiler died with code {done.returncode}"]
    return step.refused(config, topology, said[0].removeprefix("error: "))


if __name__ == "__main__":
    cli.run(main, prints_result=True)
