"""Compiles the training step for devices that are not there, and measures the program."""

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt import sharding, step
from gpt.config import Config
from gpt.planning import hlo, roofline
from gpt.runtime import hardware
from gpt.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step compiled for a topology.

    Attributes:
      hlo_text: the optimised program of one device.
      largest: the largest buffers as the compiler writes them, where it does.
    """

    executable: jax.stages.Compiled
    hlo_text: str
    largest: list[str]


class DoesNotFit(Exception):
    """The compiler gave up because of the memory; the message is in its words."""

    @property
    def needed(self) -> float:
        """Bytes of a device that were wanted: the largest figure that the compiler names."""
        figures = re.findall(r"([\d.]+)([KMGT])", str(self))
        return max((float(number) * 1024 ** ("KMGT".index(unit) + 1) for number, unit in figures), default=0.0)


def build(config: Config, devices: list[jax.Device]) -> step.Program:
    """The program that gpt.main would run on the devices.

    Raises:
      UserError: the config does not allow it.
    """
    vocab_size = config.model.vocab_size or config.data.vocab_size
    if not vocab_size:
        raise UserError("Set model.vocab_size: a plan reads no data and no tokenizer that would tell it.")
    layout = sharding.make_layout(config.mesh, devices)
    # The length of the run is a constant of the learning rate, and costs nothing.
    try:
        return step.build(config, vocab_size, layout, config.train.total_steps(config.model.length, 1))
    except RuntimeError as error:
        if "cuDNN not found" in str(error):
            raise UserError('cuDNN is not installed: pip install "gpt-spmd[plan-cuda]".') from error
        raise


def compile_step(config: Config, program: step.Program) -> Compiled:
    """Compiles the training step of a program of the config.

    Raises:
      DoesNotFit: a device has not enough memory.
      UserError: the compiler refuses it.
    """
    with program.layout.use():
        lowered = program.train_step.lower(program.abstract_state, batch(config, program))
    is_tpu = program.layout.mesh.devices.flat[0].platform == "tpu"
    with tempfile.TemporaryDirectory() as folder:
        # libtpu has to write the program down itself: printed from what it returns, a program fails on asynchronous
        # collectives of several arrays (a RET_CHECK of version 0.0.52 for v5p).
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if is_tpu else {}
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if said := re.search(r"Ran out of memory (?:on HBM, |in memory space hbm\. )?(.*?)(?:\.\s|$)", str(error)):
                raise DoesNotFit(said[1]) from error
            raise UserError(f"The compiler refuses this program: {str(error).splitlines()[0][:300]}") from error
        written = next(Path(folder).glob("*.after_codegen.txt"), None)  # none if it was in JAX's cache
        usage = next(Path(folder).glob("*-memory-usage-report.txt"), None)
        largest = re.findall(r"\); +([\d.]+\w+); +\d+; +\d+; (.*)", usage.read_text() if usage else "")
        hlo_text = written.read_text() if written else executable.as_text()
    return Compiled(executable, hlo_text, [f"{size}: {shapes}" for size, shapes in largest[:3]])


def batch(config: Config, program: step.Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the arrays of a batch."""
    row = config.model.example_shapes()
    row |= {name: jax.ShapeDtypeStruct(row["inputs"].shape, jnp.int32) for name in config.data.extras}
    rows, layout = config.train.batch_size, program.layout
    return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=layout.batch) for name, x in row.items()}


def measure(config: Config, topology: str) -> dict[str, Any]:
    """Plans a config for a topology: a report of plain values, as `--json` prints it.

    All figures are those of one device and one step, bytes and seconds, unless they are named otherwise.

    Raises:
      UserError: the config or the topology does not allow it, or the compiler refuses it.
    """
    chip, devices = hardware.of_topology(topology), hardware.topology_devices(topology)
    began = time.perf_counter()
    program = build(config, devices)
    report = _head(config, topology, len(devices)) | {"num_parameters": program.num_parameters()}
    state, mesh = program.abstract_state, program.layout.mesh
    memory = report["memory"] | {
        "parameters": sharding.bytes_per_device((state.params, state.frozen)),
        "optimizer": sharding.bytes_per_device(state.opt_state),
        "batch": sharding.bytes_per_device(batch(config, program)),
    }
    model_flops = config.train.batch_size * config.model.length * program.model.config.flops_per_token()
    report |= {"memory": memory, "model_flops": model_flops / len(devices)}
    report["attention"] = program.model.config.attention  # what `auto` is there
    try:
        compiled = compile_step(config, program)
    except DoesNotFit as error:
        memory["needed"] = error.needed
        return report | {"compiler_says": str(error), "compile_seconds": time.perf_counter() - began}
    used = compiled.executable.memory_analysis()
    known = memory["parameters"] + memory["optimizer"] + memory["batch"]
    memory["padding"] = max(0, used.argument_size_in_bytes - known)  # tiles that are not full, and counters
    memory["temporaries"] = used.temp_size_in_bytes
    memory["output"] = used.output_size_in_bytes - used.alias_size_in_bytes  # beyond the arguments given up
    memory["total"] = known + memory["padding"] + memory["temporaries"] + memory["output"]
    memory["largest"] = compiled.largest
    operations, collectives = hlo.operations(compiled.hlo_text), hlo.collectives(compiled.hlo_text, mesh)
    return report | {
        "fits": memory["total"] <= memory["usable"],
        "hardware_flops": sum(operation.times * operation.flops for operation in operations),
        "memory_traffic": sum(operation.times * operation.bytes for operation in operations),
        "collectives": [
            dataclasses.asdict(collective)
            | {
                "sent": collective.sent,
                "bandwidth": roofline.ring_bandwidth(collective.axes, collective.group, mesh, chip),
                "seconds": roofline.network_seconds(collective, mesh, chip),
            }
            for collective in collectives
        ],
        "seconds": roofline.estimate(operations, collectives, mesh, chip, report["model_flops"]),
        "compile_seconds": time.perf_counter() - began,
    }


def placement(config: Config, topology: str) -> dict[str, Any]:
    """What lies where.

    Returns:
      {"devices": for each device in the order of the mesh, its place in the topology: [slice or host, x, y, z],
      "parameters": `Program.parameters` as dictionaries}.
    """
    program = build(config, hardware.topology_devices(topology))
    places = [hardware.place(device) for device in program.layout.mesh.devices.flat]
    return {"devices": places, "parameters": [dataclasses.asdict(parameter) for parameter in program.parameters()]}


def refused(config: Config, topology: str, reason: str) -> dict[str, Any]:
    """The report of a config that cannot be compiled."""
    num_devices = len(hardware.topology_devices(topology))
    return _head(config, topology, num_devices) | {"compiler_says": reason}


def _head(config: Config, topology: str, num_devices: int) -> dict[str, Any]:
    """What is known before compiling."""
    chip = hardware.of_topology(topology)
    return {
        "topology": topology,
        "chip": chip.name,
        "devices": num_devices,
        "mesh": config.mesh.shape(num_devices),
        "rules": config.mesh.rules,
        "zero1": config.mesh.zero1,
        "batch_size": config.train.batch_size,
        "micro_batches": config.train.micro_batches,
        "block_size": config.model.length,
        "attention": config.model.attention,
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "steps": None if config.train.epochs else config.train.total_steps(config.model.length, 1),
        "memory": {"capacity": chip.memory, "usable": chip.memory * chip.usable},
        "fits": False,
        "compiler_says": None,
    }
