"""Makes plans, caches them, and prints them: what `python -m gpt.plan` and `gpt.plan_step` do."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.config import Config, from_tree
from gpt.planning import compiling, report, search
from gpt.runtime import backend, cache, hardware, output, progress
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.files import new_file
from gpt.runtime.versions import FLAG_VARIABLES, code_digest


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan, and how to show it.

    Attributes:
      batch_per_device: examples per device and step; None: `train.batch_size` over all devices.
      search: search for the mesh, attention, remat policy and micro-batches of the shortest step.
      compilations: number of candidates that a search compiles.
      price: price of one device for an hour.
      html: file to write a page of the same report to.
      compare: files of plans to compare the plans with.
      as_json: print a line of JSON for each plan instead of text.
    """

    batch_per_device: int | None = None
    search: bool = False
    compilations: int = 8
    price: float | None = None
    html: str | None = None
    compare: Sequence[str] | None = None
    as_json: bool = False


def run(config: Config | None, topologies: Sequence[str], options: Options) -> int:
    """Prints the plans of a config for topologies; returns 0 if all fit (for a search: if the best fits), else 1.

    Args:
      config: None: compares the plans in the files of `options.compare`, and compiles nothing.

    Raises:
      UserError: the config or a topology does not allow it, the compiler rejects the program, a file of plans cannot be
        read, or the page cannot be written.
    """
    if options.search and len(topologies) > 1:
        raise UsageError("--search takes one --topology at a time.")
    plans = [each for file in options.compare or () for each in _read(file)]
    with new_file("html", options.html) if options.html else contextlib.nullcontext() as file:
        planned = []
        if config:
            _use_no_accelerator()
            planned = [pair for topology in topologies for pair in _plan(config, topology, options)]
            for changed, plan in planned:
                plans.append(plan | {"flags": search.flags(config, changed), "config": dataclasses.asdict(changed)})
        if options.compare and len(plans) < 2:
            raise UserError("--compare needs two plans: name another file, or set --config and --topology.")
        if file:
            placement = None if options.compare else compiling.placement(planned[0][0], plans[0]["topology"])
            file.write(report.html(plans, placement, options.price).encode())
    if options.as_json:
        print(*map(json.dumps, plans), sep="\n")
    elif options.compare:
        print(*report.comparison(plans, options.price), sep="\n")
    elif options.search:
        print(*report.table(plans), "", *report.text(plans[0], options.price), sep="\n")
    else:
        for each in plans:
            print(*report.text(each, options.price), "", sep="\n")
        if len(plans) > 1:
            print(*report.table(plans), sep="\n")
    return 0 if all(each["fits"] for each in (plans[:1] if options.search else plans)) else 1


def _read(file: str) -> list[report.Report]:
    """Returns the plans in a file of `--json`. Raises UserError if it cannot be read, or holds something else."""
    try:
        plans = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        for each in plans:
            report.figures(each)
            from_tree(each["config"])
    except OSError as error:
        raise UserError(f"--compare={file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        raise UserError(f"--compare={file} is no file of plans; write it with: gpt.plan … --json > {file}") from None
    return plans


def _use_no_accelerator() -> None:
    import jax

    backend.set_xla_options()  # those of a training
    jax.config.update("jax_platforms", "cpu")  # compilation for absent devices uses no accelerator of this machine
    jax.config.update("jax_enable_compilation_cache", False)  # JAX can read such a program back only on a TPU


def _plan(config: Config, topology: str, options: Options) -> list[tuple[Config, report.Report]]:
    """Returns the config and its plan for a topology, or all configs and plans of a search, the best first."""
    chip, devices = hardware.of_topology(topology), hardware.topology_devices(topology)
    if options.batch_per_device:
        train = dataclasses.replace(config.train, batch_size=options.batch_per_device * len(devices))
        config = dataclasses.replace(config, train=train)

    if not options.search:
        return [(config, plan(config, topology))]

    def plan_or_refuse(changed: Config) -> report.Report:
        try:
            return plan_elsewhere(changed, topology)
        except UserError as error:
            return compiling.refused(changed, topology, str(error))

    compiling.build(config, devices)  # raises UserError if the config itself cannot be built
    return search.search(config, devices, chip, options.compilations, plan_or_refuse)


def plan(config: Config, topology: str) -> report.Report:
    """Returns `compiling.measure`, from the cache if it has the plan for the same config, code and compiler.

    Raises:
      UserError: the config or the topology does not allow it, or the compiler rejects the program.
    """
    options = backend.compiler_options(hardware.topology_devices(topology)[0])
    options |= {variable: os.environ.get(variable) for variable in FLAG_VARIABLES}
    packages = ("jax", "jaxlib", "flax", "optax", hardware.of_topology(topology).compiler)
    versions = {name: importlib.metadata.version(name) for name in packages}
    name = f"plan-{cache.digest(dataclasses.asdict(config), topology, versions, options, code_digest())}"
    stored = cache.Cache()
    with progress.task(f"compiling for {topology}"):
        return stored.entry(name, lambda create: compiling.measure(config, topology)).value


def plan_elsewhere(config: Config, topology: str) -> report.Report:
    """Returns `plan`, made in another process.

    Compilation for absent devices changes JAX's settings and takes gigabytes of memory; a separate process keeps
    both from the caller. Several can run at once.

    Raises:
      UserError: the config or the topology does not allow it, the compiler rejects the program, or it crashes.
    """
    hardware.of_topology(topology)  # raises UsageError for an unknown chip
    command = [sys.executable, "-c", "from gpt.planning import plans; plans.serve()"]
    request = json.dumps([dataclasses.asdict(config), topology])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # a notebook may have changed its sys.path
    process = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if process.returncode == 0:
        return json.loads(process.stdout)
    message = process.stderr.strip().splitlines()[-1:] or [f"the compiler crashed with code {process.returncode}"]
    raise UserError(message[0].removeprefix("error: "))


def serve() -> None:
    """Reads a request of `plan_elsewhere` from standard input, and prints the plan."""
    tree, topology = json.load(sys.stdin)
    output.prints_result = True
    _use_no_accelerator()
    try:
        print(json.dumps(plan(from_tree(tree), topology)))
    except UserError as error:
        sys.exit(f"error: {error}")
