"""Compiles the training step for devices that are not present, and measures the compiled program."""

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt import parameters, sharding, step
from gpt.config import Config
from gpt.models import kernels
from gpt.planning import hlo, roofline
from gpt.runtime import hardware
from gpt.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step compiled for a topology.

    Attributes:
      executable: the compiled step.
      hlo_text: the optimised program of one device.
      largest: (bytes, shapes) of the largest buffers, shapes in the compiler's notation, if the compiler reports them.
    """

    executable: jax.stages.Compiled
    hlo_text: str
    largest: list[tuple[float, str]]


SIZE = r"[\d.]+[KMGT](?:iB)?\b"  # a size in the compiler's notation, which is binary


def in_bytes(size: str) -> float:
    """Returns a size in the compiler's notation as a number of bytes: "3.07GiB", "15.75G" or "512B"."""
    number = size.rstrip("KMGTiB")
    return float(number) * 1024 ** " KMGT".index(size[len(number) :].strip("iB") or " ")


class DoesNotFit(Exception):
    """Raised if the program needs more memory than a device has. Its text is the compiler's message."""

    @property
    def needed(self) -> float:
        """The bytes that the program needs on a device: the largest size in the compiler's message."""
        return max(map(in_bytes, re.findall(SIZE, str(self))), default=0.0)


def build(config: Config, devices: list[jax.Device]) -> step.Program:
    """Returns the program that `gpt.main` would run on the devices.

    Raises:
      UserError: the config does not allow it.
    """
    vocab_size = config.model.vocab_size or config.data.vocab_size
    if not vocab_size:
        raise UserError("A plan reads neither data nor tokenizer; set model.vocab_size to the size of the vocabulary.")
    layout = sharding.make_layout(config.mesh, devices)
    # The number of steps only sets constants of the learning rate schedule; it does not affect memory or time.
    return step.build(config, vocab_size, layout, config.train.total_steps(config.model.length, 1))


def compile_step(config: Config, program: step.Program) -> Compiled:
    """Compiles the training step of a program that `build` returned for the same config.

    Raises:
      DoesNotFit: a device has too little memory.
      UserError: the compiler rejects the program.
    """
    with program.layout.use():
        lowered = program.train_step.lower(program.abstract_state, batch(config, program))
    is_tpu = program.layout.mesh.devices.flat[0].platform == "tpu"
    with tempfile.TemporaryDirectory() as folder:
        # libtpu writes the program to a file: `as_text` fails for a program with asynchronous collectives of several
        # arrays (a RET_CHECK of libtpu 0.0.52 for v5p).
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if is_tpu else {}
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            memory = r"Ran out of memory (?:on HBM, |in memory space hbm\. )?(.*?)(?:\.\s|$)"
            if match := re.search(memory, str(error)):
                raise DoesNotFit(match[1]) from error
            raise UserError(f"The compiler rejects this program: {str(error).splitlines()[0][:300]}") from error
        dumped = next(Path(folder).glob("*.after_codegen.txt"), None)  # None if JAX's cache had the program
        usage = next(Path(folder).glob("*-memory-usage-report.txt"), None)
        largest = re.findall(r"\); +([\d.]+\w+); +\d+; +\d+; (.*)", usage.read_text() if usage else "")
        hlo_text = dumped.read_text() if dumped else executable.as_text() or ""
    return Compiled(executable, hlo_text, [(in_bytes(size), shapes) for size, shapes in largest[:3]])


def batch(config: Config, program: step.Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape, type and sharding of each array of a batch."""
    example = config.model.example_shapes()
    example |= {name: jax.ShapeDtypeStruct(example["inputs"].shape, jnp.int32) for name in config.data.extras}
    size, sharded = config.train.batch_size, program.layout.batch
    return {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharded) for name, x in example.items()}


def measure(config: Config, topology: str) -> dict[str, Any]:
    """Returns the plan of a config for a topology: values that JSON can hold, as `--json` prints them.

    Bytes, FLOPs and seconds are those of one device and one step.

    Raises:
      UserError: the config or the topology does not allow it, or the compiler rejects the program.
    """
    chip, devices = hardware.of_topology(topology), hardware.topology_devices(topology)
    start = time.perf_counter()
    program = build(config, devices)
    report = _head(config, topology, len(devices)) | {"num_parameters": program.num_parameters()}
    state, mesh = program.abstract_state, program.layout.mesh
    memory = report["memory"]
    memory["parameters"] = sharding.bytes_per_device((state.params, state.frozen))
    memory["optimizer"] = sharding.bytes_per_device((state.opt_state, state.ema))
    memory["batch"] = sharding.bytes_per_device(batch(config, program))
    known = memory["parameters"] + memory["optimizer"] + memory["batch"]
    model_flops = config.train.batch_size * config.model.length * program.model.config.flops_per_token()
    report["model_flops"] = model_flops / len(devices)
    report["attention"] = program.model.config.attention  # what `auto` resolves to on these devices
    try:
        compiled = compile_step(config, program)
    except DoesNotFit as error:
        # A message about temporaries alone does not count what the step is given.
        memory["needed"] = error.needed + ("temporaries" in str(error)) * known
        memory["temporaries"] = max(0, memory["needed"] - known)
        message = re.sub(SIZE, lambda size: f"{in_bytes(size[0]) / 1e9:,.2f} GB", str(error))
        return report | {"compiler_message": message, "compile_seconds": time.perf_counter() - start}
    used = compiled.executable.memory_analysis()
    assert used is not None  # every compiler that a topology can name has it
    memory["padding"] = max(0, used.argument_size_in_bytes - known)  # tiles that are not full, and counters
    memory["temporaries"] = used.temp_size_in_bytes
    memory["output"] = used.output_size_in_bytes - used.alias_size_in_bytes  # beyond the donated arguments
    memory["total"] = known + memory["padding"] + memory["temporaries"] + memory["output"]
    # The compiler's list may be that of another memory, of buffers that are much smaller.
    memory["largest"] = [each for each in compiled.largest if each[0] > 0.01 * memory["total"]]
    share, collectives = kernels.attention_share(program.model.config), hlo.collectives(compiled.hlo_text, mesh)
    operations = [  # the text of the program does not have the windows of attention kernels
        dataclasses.replace(operation, flops=round(share * operation.flops)) if operation.opaque else operation
        for operation in hlo.operations(compiled.hlo_text)
    ]
    return report | {
        "fits": memory["total"] <= memory["usable"],
        "hardware_flops": sum(operation.times * operation.flops for operation in operations),
        "memory_traffic": sum(operation.times * operation.bytes for operation in operations),
        "collectives": [
            {name: getattr(collective, name) for name in ("kind", "axes", "group", "overlaps", "count", "bytes")}
            | {
                "sent": collective.sent,
                "bandwidth": roofline.bandwidth(collective, mesh, chip),
                "seconds": roofline.network_seconds(collective, mesh, chip),
                "exposed": roofline.exposed_seconds(collective, mesh, chip),
            }
            for collective in collectives
        ],
        "seconds": roofline.estimate(operations, collectives, mesh, chip, report["model_flops"]),
        "compile_seconds": time.perf_counter() - start,
    }


def placement(config: Config, topology: str) -> dict[str, Any]:
    """Returns where devices are in a topology, and which mesh axes the batch and the parameters are sharded over.

    Returns:
      {"devices": for each device in the order of the mesh, its position in the topology: [slice, x, y, z] or
      [host, index], "batch_axes", "length_axes": the mesh axes that shard the examples of a batch and the length of
      activations, "parameters": `parameters.of_program` as dictionaries}.
    """
    program = build(config, hardware.topology_devices(topology))
    rules = dict(program.layout.rules)
    return {
        "devices": [hardware.place(device) for device in program.layout.mesh.devices.flat],
        "batch_axes": rules["batch"],
        "length_axes": rules.get("length", ()),
        "parameters": [dataclasses.asdict(parameter) for parameter in parameters.of_program(program)],
    }


def refused(config: Config, topology: str, reason: str) -> dict[str, Any]:
    """Returns the report of a config that cannot be compiled for a topology."""
    return _head(config, topology, len(hardware.topology_devices(topology))) | {"compiler_message": reason}


def _head(config: Config, topology: str, num_devices: int) -> dict[str, Any]:
    """Returns the part of a report that is known before compilation."""
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
        "compiler_message": None,
    }
