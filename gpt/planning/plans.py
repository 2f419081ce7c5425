"""Makes plans, looks up those that were made before, and prints them: what `python -m gpt.plan` does."""

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gpt.config import Config, from_tree
from gpt.planning import compiling, page, report, search
from gpt.runtime import cache, hardware, progress
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.files import new_file
from gpt.runtime.versions import code_digest


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan, and how to show it.

    Attributes:
      batch_per_device: examples of the batch for each device; None: `train.batch_size` over all devices.
      search: look for the mesh, remat policy and micro-batches of the shortest step.
      compilations: how many candidates a search compiles.
      advise: where a config does not fit, look for the nearest change that does.
      price: of a device for an hour.
      html: file for a page of the same report.
      as_json: print a line of JSON for each plan instead of text.
      use_cache: look up what was compiled before, and keep what is compiled now.
    """

    batch_per_device: int | None = None
    search: bool = False
    compilations: int = 8
    advise: bool = True
    price: float | None = None
    html: str | None = None
    as_json: bool = False
    use_cache: bool = True


def run(config: Config, topologies: Sequence[str], options: Options) -> int:
    """Prints the plans of a config for topologies; returns 0 if all fit (of a search, the best), else 1.

    Raises:
      UserError: the config or a topology does not allow it, the compiler refuses it, or the page cannot be written.
    """
    if options.search and len(topologies) > 1:
        raise UsageError("--search takes one --topology at a time.")
    if not options.html:
        return _run(config, topologies, options, None)
    with new_file("html", options.html) as file:
        return _run(config, topologies, options, file)


def _run(config: Config, topologies: Sequence[str], options: Options, file: Any) -> int:
    _use_no_accelerator()
    planned = [each for topology in topologies for each in _plan(config, topology, options)]
    plans = [each | {"flags": search.flags(config, changed)} for changed, each in planned]
    if file:
        placement = compiling.placement(planned[0][0], plans[0]["topology"])
        file.write(page.html(plans, placement, options.price).encode())
    if options.as_json:
        print(*map(json.dumps, plans), sep="\n")
    elif options.search:
        print(*report.table(plans), "", *report.text(plans[0], options.price), sep="\n")
    else:
        for each in plans:
            print(*report.text(each, options.price), "", sep="\n")
        if len(plans) > 1:
            print(*report.table(plans), sep="\n")
    return 0 if all(each["fits"] for each in (plans[:1] if options.search else plans)) else 1


def _use_no_accelerator() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # this machine's accelerators have no part in it
    jax.config.update("jax_enable_compilation_cache", False)  # it could not be read without a TPU


def _plan(config: Config, topology: str, options: Options) -> list[tuple[Config, report.Report]]:
    """Returns the plan of a config for a topology, or of all that a search tried, the best first."""
    chip, devices = hardware.of_topology(topology), hardware.topology_devices(topology)
    if options.batch_per_device:
        train = dataclasses.replace(config.train, batch_size=options.batch_per_device * len(devices))
        config = dataclasses.replace(config, train=train)
    elsewhere = functools.partial(plan_elsewhere, topology=topology, use_cache=options.use_cache)
    shown = progress.Progress(enabled=options.search or not options.as_json, out=sys.stderr)
    if options.search:
        compiling.build(config, devices)  # raises what is wrong with the config
        return search.search(config, devices, chip, options.compilations, elsewhere, shown)
    planned = plan(config, topology, options.use_cache)
    if not planned["fits"] and options.advise:
        found = search.nearest(config, devices, chip, planned, elsewhere, shown)
        nearest = found and {"flags": search.flags(config, found[0]), "total": found[1]["memory"]["total"]}
        planned = planned | {"nearest": nearest}
    return [(config, planned)]


def plan(config: Config, topology: str, use_cache: bool = True) -> report.Report:
    """Returns `compiling.measure`, or what it returned before for the same config, code and compiler.

    Raises:
      UserError: the config or the topology does not allow it, or the compiler refuses it.
    """
    if not use_cache:
        return compiling.measure(config, topology)
    packages = ("jax", "jaxlib", "flax", "optax", hardware.of_topology(topology).compiler)
    versions = {name: importlib.metadata.version(name) for name in packages}
    name = f"plan-{cache.digest(dataclasses.asdict(config), topology, versions, code_digest())}"
    kept = cache.Cache(say=functools.partial(print, file=sys.stderr))
    return kept.entry(name, lambda create: compiling.measure(config, topology)).value


def plan_elsewhere(config: Config, topology: str, use_cache: bool = True) -> report.Report:
    """`plan` in a process of its own, so that several run at once and each gives its memory back.

    Returns:
      The plan; where the config is refused or the compiler died, one that does not fit and says why.
    """
    command = [sys.executable, "-c", "from gpt.planning import plans; plans.serve()"]
    request = json.dumps([dataclasses.asdict(config), topology, use_cache])
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    reason = done.stderr.strip().splitlines()[-1:] or [f"the compiler died with code {done.returncode}"]
    return compiling.refused(config, topology, reason[0].removeprefix("error: "))


def serve() -> None:
    """Prints the plan that standard input asks for: the other end of `plan_elsewhere`."""
    tree, topology, use_cache = json.load(sys.stdin)
    _use_no_accelerator()
    try:
        print(json.dumps(plan(from_tree(tree), topology, use_cache)))
    except UserError as error:
        sys.exit(f"error: {error}")
