"""The hardware proof: shows on one accelerator, in under eight minutes, what the tests show on CPUs only.

python tests/benchmarks/accelerator.py --json=proof.json   (torch and transformers, to compare with, are optional)

The parts, each in processes of its own, with a time limit of its own:

- attention: all implementations of attention agree on queries, keys and values of a model that was briefly trained on
  the text of this repository, forward and backward, with windows, grouped queries and document borders. The reference
  is the dense implementation in float32, of the same bfloat16 operands.
- resume: `gpt.main` trains, is killed by SIGKILL and resumes; its parameters and optimizer state equal those of a run
  without interruption, to the bit.
- plan: what `gpt.plan` predicts for the steps below, on a GPU for a topology of this kind of GPU.
- step-SIZE: time, MFU and memory of a training step beside a compiled GPT in PyTorch; see `training.py`. At the end,
  the memory and the time are compared with the plan's.
- decode: tokens per second beside the `generate` of transformers; see `decoding.py`.

`attention`, `resume` and `plan` run at the same time, for they measure no time; the others follow one by one, the most
important first. A part for which the time that is left is too short is skipped. The exit code is 1 if an equality does
not hold or a part fails. Without an accelerator, or with --tiny, everything runs with tiny sizes and at the same time,
as a test of itself.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training import Contestant, alternate, flops, ratios_to_ours, settings, size_of

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "nvidia-cudnn-cu13", "flax", "optax")
PACKAGES += ("orbax-checkpoint", "grain", "numpy", "torch", "triton", "transformers")
TOLERANCE = 0.02  # of ‖x - reference‖/‖reference‖ in bfloat16, whose numbers have a precision of 2⁻⁸ = 0.004
GOAL = 0.1  # a plan's memory should be that of the run within this fraction
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the proof.

    Attributes:
      run: fills a report, which is saved whenever the function `save` is called.
      limit: seconds after which it is stopped.
      least: seconds that have to be left for it to start.
      is_equality: whether it compares values that have to be equal.
    """

    run: Callable[["Task"], None]
    limit: float
    least: float
    is_equality: bool = False


@dataclasses.dataclass
class Task:
    """What the process of a part works with: the machine as `describe_machine` returns it, and the report to fill."""

    name: str
    machine: Report
    tiny: bool
    path: Path
    report: Report = dataclasses.field(default_factory=dict)

    def say(self, line: str) -> None:
        show(line, self.name)

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.report))
        partial.rename(self.path)

    def fail(self, reason: str) -> None:
        self.report |= {"status": "failed", "reason": reason}

    def skip(self, reason: str) -> None:
        self.report |= {"status": "skipped", "reason": reason}


def show(line: str, part: str = "") -> None:
    """Prints a line of at most 80 columns, or several, after the name of the part that it is about."""
    start = f"{part:15} " if part else ""
    indent = " " * len(start)
    print(textwrap.fill(start + line, 80, subsequent_indent=indent, break_on_hyphens=False), flush=True)


def describe_machine() -> Report:
    """Returns the platform, the device and the versions. Uses the accelerator, so it has a process of its own."""
    import jax

    from gpt.runtime import hardware

    device = jax.devices()[0]
    chip = hardware.of_device(device)
    kind = hardware.processor() if device.platform == "cpu" else device.device_kind
    machine = {"platform": device.platform, "device": kind, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    machine |= (
        {"chip": chip.name, "flops": chip.flops, "topology": f"{chip.name}:1" if chip.memory else ""} if chip else {}
    )
    if device.platform == "gpu":
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        try:
            machine["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
        except (OSError, IndexError):
            machine["driver"] = "unknown"
    machine["versions"] = {}
    for name in PACKAGES:
        try:
            machine["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine["without"] = {name: why for name in ("torch", "transformers") if (why := _obstacle(name, device.platform))}
    return machine


def _obstacle(package: str, platform: str) -> str:
    """Returns why there is no comparison with a package, as a sentence; "" if there can be one."""
    needed = ["torch"] if package == "torch" else ["torch", package]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            return f"The package {name} is not installed."
    if platform not in ("cpu", "gpu"):
        return f"PyTorch does not run on a {platform.upper()} here."
    if platform == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "The installed PyTorch finds no GPU."
    return ""


def write_text(path: Path, tiny: bool) -> str:
    """Writes the documents and the code of this repository to a file, and returns the text."""
    folders = (ROOT, *(ROOT / name for name in ("gpt", "configs", "launch", "tests")))
    files = [file for i, folder in enumerate(folders) for file in (folder.glob if i == 0 else folder.rglob)("*.md")]
    files += [file for folder in folders[1:] for file in folder.rglob("*.py")]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(files))
    text = text.encode("ascii", "ignore").decode()[: 50_000 if tiny else None]
    path.write_text(text)
    return text


# Attention.


def attention(task: Task) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gpt import sharding, step
    from gpt.config import Config, TrainConfig
    from gpt.models import kernels
    from gpt.models.gpt import GPTConfig

    shape = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "embed_dim": 512, "block_size": 1024}
    rows, steps = 8, 100
    if task.tiny:
        shape, rows, steps = shape | {"num_layers": 2, "num_heads": 4, "embed_dim": 32, "block_size": 64}, 2, 10
    rates = dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), 0.0)
    how = {"vocab_size": 256, "positions": "rotary", "attention": "dense", "dtype": "bfloat16"}
    config = Config(model=GPTConfig(**shape, **rates, **how), train=TrainConfig(batch_size=rows, steps=steps))
    length = config.model.block_size

    text = write_text(task.path.with_suffix(".txt"), task.tiny)
    characters = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    # A document ends with a blank line.
    ends = np.flatnonzero((characters[1:] == ord("\n")) & (characters[:-1] == ord("\n"))) + 2
    rng = np.random.default_rng(0)
    program = step.build(config, 256, sharding.make_layout(config.mesh, jax.devices()[:1]), steps)
    with program.layout.use():
        state = program.init()
        for i in range(steps):
            first_B = rng.integers(0, len(characters) - length - 1, rows)
            tokens = characters[first_B[:, None] + np.arange(length + 1)]
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
            state, measured = program.train_step(state, jax.device_put(batch, program.layout.batch))
            if i in (0, steps - 1):
                task.report[f"loss_{i + 1}"] = float(measured["loss"])
    losses = task.report["loss_1"], task.report[f"loss_{steps}"]
    task.say(f"loss {losses[0]:.2f} → {losses[1]:.2f} after {steps} steps on {len(text):,} bytes")
    places = first_B[:, None] + np.arange(length)
    starts_BxT = np.maximum(
        ends[np.searchsorted(ends, places, side="right") - 1] * (places >= ends[0]) - first_B[:, None], 0
    )

    seen, dense = [], kernels.ATTENTION["dense"]

    def record(*operands: Any, **options: Any) -> jax.Array:
        seen.append(operands[:3])
        return dense(*operands, **options)

    kernels.ATTENTION["dense"] = record
    program.model.apply({"params": state.params}, tokens[:, :-1])  # without jit: the recorded arrays have values
    kernels.ATTENTION["dense"] = dense

    def both(function: Callable, options: Report) -> Callable:
        def run(q, k, v, starts, cotangent):
            out, backward = jax.vjp(lambda q, k, v: function(q, k, v, starts, **options), q, k, v)
            return {"out": out} | dict(zip(("dq", "dk", "dv"), backward(cotangent.astype(out.dtype)), strict=True))

        return jax.jit(run)

    platform = jax.default_backend()
    names = ["dense", "chunked", *(name for name, where in kernels.KERNELS.items() if where == platform)]
    functions = {name: kernels.ATTENTION[name] for name in names}
    functions["chunked"] = functools.partial(kernels.chunked, query_chunk=length // 8, key_chunk=length // 8)
    cases = {
        "grouped queries": (True, {}, None),
        "with a window": (True, {"window": length // 4}, None),
        "with documents": (True, {}, jnp.asarray(starts_BxT)),
        "ungrouped, with both": (False, {"window": length // 4}, jnp.asarray(starts_BxT)),
    }
    if task.tiny:  # the first and the last case: compiling takes most of the time
        cases = dict([next(iter(cases.items())), cases.popitem()])
    task.report["errors"], problems = [], []
    task.say("case             layer  attention   output     dq     dk     dv")
    for case, (is_grouped, options, starts) in cases.items():
        reference = both(dense, options)
        runs = {name: both(function, options) for name, function in functions.items()}
        for layer in (0, len(seen) - 1):
            q, k, v = seen[layer]
            if not is_grouped:
                k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
            cotangent = jax.random.normal(jax.random.key(layer), q.shape, q.dtype)
            with jax.default_matmul_precision("highest"):
                right = reference(*(x.astype(jnp.float32) for x in (q, k, v)), starts, cotangent.astype(jnp.float32))
            for name, run in runs.items():
                where = {"case": case, "layer": layer, "implementation": name}
                try:
                    found = run(q, k, v, starts, cotangent)
                except Exception as error:  # of any kind: one implementation must not hide the others
                    problems.append(f"{name} {case}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    task.say(problems[-1])
                    continue
                errors = {key: _distance(found[key], right[key]) for key in right}
                task.report["errors"].append(where | errors)
                task.say(f"{case:20} {layer}  {name:9} " + " ".join(f"{error:6.4f}" for error in errors.values()))
                if not max(errors.values()) <= TOLERANCE:
                    problems.append(f"{name} {case} in layer {layer} differs by {max(errors.values()):.4f}")
        task.save()
    if problems:
        task.fail("; ".join(problems))


def _distance(x: Any, reference: Any) -> float:
    import jax.numpy as jnp

    return float(jnp.linalg.norm(x.astype(jnp.float32) - reference) / jnp.linalg.norm(reference))


# Resuming.


def resume(task: Task) -> None:
    steps, every = (1000, 200) if not task.tiny else (120, 40)
    flags = ["--config=configs/char.py", "--config.model.attention=auto", "--config.model.attention_dropout=0.0"]
    if task.tiny:
        sizes = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "block_size": 16}
        flags += [f"--config.model.{name}={size}" for name, size in sizes.items()] + ["--config.train.batch_size=8"]
    flags += [
        f"--config.train.steps={steps}",
        f"--config.train.checkpoint_every={every}",
        "--config.train.eval_every=0",
    ]
    flags += ["--config.train.sample_tokens=0", "--config.train.log_every=1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt", task.tiny)
        runs: dict[str, subprocess.Popen] = {}

        def start(run: str, cache: str, options: str = "") -> None:
            """Starts or resumes a run, with a cache of compiled programs."""
            places = {"XDG_CACHE_HOME": str(folder / cache), "JAX_COMPILATION_CACHE_DIR": str(folder / cache / "xla")}
            places["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {options}".strip()
            command = [sys.executable, "-m", "gpt.main", *flags]
            command += [f"--config.data.path={folder}/text.txt", f"--workdir={folder / run}"]
            with open(folder / f"{run}.log", "a") as log:
                options = {"cwd": ROOT, "env": os.environ | places, "stdout": log, "stderr": log}
                runs[run] = subprocess.Popen(command, **options)

        def finish(run: str) -> dict[str, int]:
            """Returns the digest of each parameter and of each array of the optimizer after the last step."""
            if runs[run].wait():
                raise failure(run)
            return json.loads(_record(folder / run, steps).read_text())["arrays"]

        def failure(run: str) -> RuntimeError:
            """Shows the output of a run that failed, and returns an exception."""
            print((folder / f"{run}.log").read_text(), flush=True)
            return RuntimeError(f"gpt.main ended with code {runs[run].wait()}; its output is above.")

        start("killed", "cache")
        while not _record(folder / "killed", every).exists() and runs["killed"].poll() is None:
            time.sleep(0.01)
        runs["killed"].send_signal(signal.SIGKILL)
        if runs["killed"].wait() != -signal.SIGKILL:
            raise failure("killed")
        saved = [int(path.name) for path in (folder / "killed" / "checkpoints").iterdir() if path.name.isdecimal()]
        if max(saved) >= steps:
            task.fail(f"All {steps} steps were done before the kill.")
            return
        task.report |= {"steps": steps, "killed_with_checkpoint": max(saved)}
        task.say(f"killed with the checkpoint of step {max(saved)} of {steps}")
        start("killed", "cache")
        start("whole", "cache")
        if not task.tiny:
            start("recompiled", "other_cache")
        resumed, whole = finish("killed"), finish("whole")
        task.report |= {"arrays": len(whole), "equal": resumed == whole}
        differing = [name for name in whole if whole[name] != resumed.get(name)]
        task.say(f"{len(whole) - len(differing)} of {len(whole)} arrays equal those of the uninterrupted run")
        task.save()
        if not task.tiny:
            task.report["equal_when_compiled_again"] = is_equal = finish("recompiled") == whole
            task.say(f"a run whose program was compiled again {'is equal' if is_equal else 'differs'}")
        if differing:
            task.fail(f"{len(differing)} of {len(whole)} arrays differ after the resume, {differing[0]} among them.")
            task.save()
            _explain_difference(task, start, finish)


def _explain_difference(task: Task, start: Callable, finish: Callable) -> None:
    """Reports whether two uninterrupted runs differ too, and whether XLA's deterministic operations make them equal."""
    option = "--xla_gpu_exclude_nondeterministic_ops=true"
    start("first", "cache")
    start("second", "cache")
    start("third", "deterministic", option)
    task.report["equal_without_interruption"] = finish("first") == finish("second")
    third = finish("third")
    start("fourth", "deterministic", option)  # with the program that the third compiled
    task.report[f"equal_with_{option}"] = finish("fourth") == third
    task.say(f"two uninterrupted runs are equal: {task.report['equal_without_interruption']}")
    task.say(f"with {option}: {task.report[f'equal_with_{option}']}")


def _record(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step) / "digests" / "metadata"


# Plans and steps.


def plan(task: Task) -> None:
    import gpt
    from gpt.runtime.errors import UserError

    topology = "v5e:1x1" if task.machine["platform"] == "cpu" else task.machine.get("topology")
    if not topology:
        task.skip(f"There is no topology for {task.machine['device']}.")
        return
    for size in sizes(task.tiny):
        try:
            planned = gpt.plan_step(settings(size), topology)
        except UserError as error:
            task.skip(str(error))
            return
        memory, seconds = planned["memory"], planned["seconds"]
        if planned["compiler_message"]:
            task.report[size] = {"topology": topology, "refused": planned["compiler_message"]}
            task.say(f"{size} on {topology}: {planned['compiler_message']}")
            continue
        task.report[size] = {
            "topology": topology,
            "memory": memory,
            "seconds": seconds,
            "attention": planned["attention"],
        }
        task.say(f"{size} on {topology}: {memory['total'] / 1e9:.2f} GB, {seconds['step'] * 1e3:.1f} ms")
        task.save()


def sizes(tiny: bool) -> list[str]:
    return ["tiny"] if tiny else ["gpt2-124m", "gpt2-350m", "gpt2-1558m"]


def training_step(task: Task) -> None:
    size = task.name.partition("-")[2]
    ours = Contestant("ours", f"--size={size}")
    peer = None
    if not (reason := task.machine["without"].get("torch")):
        peer = Contestant("compiled" if task.machine["platform"] == "gpu" else "eager", f"--size={size}")
    # Both compile at the same time: most of it is work of the CPU.
    ours.wait_until_ready()
    try:
        contestants = [ours, *([peer.wait_until_ready()] if peer else [])]
    except SystemExit as error:
        contestants, reason = [ours], f"PyTorch: {error}."
    turns: list[dict[str, float]] = []
    for turn in alternate(contestants, *((2, 0.1) if task.tiny else (7, 1.0))):
        turns.append(turn)
        tokens, peak = size_of(size).rows * size_of(size).length, task.machine.get("flops")
        for contestant in contestants:
            seconds = statistics.median(turn[contestant.name] for turn in turns)
            found = {"seconds": seconds, "tokens_per_second": tokens / seconds} | contestant.facts
            found["mfu"] = flops(size) / seconds / peak if peak else None
            task.report["ours" if contestant is ours else "pytorch"] = found
        if len(contestants) > 1:
            task.report["ratio"] = dict(
                zip(("median", "least", "greatest"), ratios_to_ours(turns, peer.name), strict=True)
            )
        task.report |= {"size": size_of(size)._asdict(), "turns": turns}
        task.save()
    if len(contestants) == 1:
        task.report["without_pytorch"] = reason
        task.say(f"no comparison: {reason}")
    for name in ("ours", "pytorch"):
        if found := task.report.get(name):
            share = "" if found["mfu"] is None else f"MFU {found['mfu']:.1%}, "
            task.say(
                f"{name:8} {found['seconds'] * 1e3:9.2f} ms, {found['tokens_per_second']:9,.0f} tokens/s, {share}"
                f"{found['memory'] / 1e9:.2f} GB"
            )
    if ratio := task.report.get("ratio"):
        task.say(f"ours is {ratio['median']:.2f} × as fast ({ratio['least']:.2f} to {ratio['greatest']:.2f} by turn)")
    for contestant in contestants:
        contestant.close()


def decode(task: Task) -> None:
    import decoding
    import numpy as np

    from gpt.models.gpt import GPTConfig
    from gpt.runtime import backend

    backend.set_xla_options()
    config, many, tokens, repeats = decoding.MODELS["124M"], (1, 16), 128, 2
    if task.tiny:
        config = GPTConfig(vocab_size=256, block_size=64, num_layers=1, num_heads=2, embed_dim=32)
        many, tokens, repeats = (2,), 16, 1
    reason = task.machine["without"].get("transformers")
    peers = {} if reason else {"transformers": decoding.hugging_face}
    if reason:
        task.report["without_transformers"] = reason
        task.say(f"no comparison: {reason}")
    for rows in many:
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, 16), np.int32)
        firsts, speeds = decoding.compare(config, prompts, tokens, repeats, peers)
        task.report[f"batch_{rows}"] = {
            name: {"tokens_per_second": speeds[name], "first_token": firsts[name]} for name in speeds
        }
        ratio = f", {speeds['ours'] / speeds['transformers']:.2f} ×" if peers else ""
        shown = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items())
        task.say(f"batch {rows:2}, {tokens} new tokens: {shown}{ratio}")
        task.save()


def compare_with_plan(parts: dict[str, Report], tiny: bool) -> Iterator[tuple[str, Report]]:
    """Yields for each size what was measured over what was planned."""
    for size in sizes(tiny):
        ours, planned = parts.get(f"step-{size}", {}).get("ours"), parts.get("plan", {}).get(size, {})
        if ours and "memory" in planned:
            used = ours["analysis"]
            compiled = used["argument"] + used["output"] - used["alias"] + used["temp"]
            total = planned["memory"]["total"]
            yield (
                size,
                {
                    "planned_memory": total,
                    "compiled_memory": compiled,
                    "peak_memory": ours["memory"],
                    "compiled_to_planned": compiled / total,
                    "peak_to_planned": ours["memory"] / total,
                    "is_within_goal": abs(compiled / total - 1) <= GOAL and abs(ours["memory"] / total - 1) <= GOAL,
                    "planned_seconds": planned["seconds"]["step"],
                    "seconds": ours["seconds"],
                    "measured_to_roofline": ours["seconds"] / planned["seconds"]["step"],
                },
            )


# The program that starts the parts.

PARTS = {
    "attention": Part(attention, 160, 40, is_equality=True),
    "resume": Part(resume, 160, 60, is_equality=True),
    "plan": Part(plan, 160, 30),
    "step-gpt2-124m": Part(training_step, 120, 60),
    "decode": Part(decode, 90, 45),
    "step-gpt2-350m": Part(training_step, 130, 70),
    "step-gpt2-1558m": Part(training_step, 130, 70),
    "step-tiny": Part(training_step, 120, 5),
}
TOGETHER = ("attention", "resume", "plan")


def stages(chosen: list[str], tiny: bool) -> list[list[str]]:
    """Returns the parts in the order in which they run; those of a stage run at the same time."""
    together = [name for name in chosen if name in TOGETHER or tiny]
    return [together] * bool(together) + [[name] for name in chosen if name not in together]


def run_stage(names: list[str], machine: Report, tiny: bool, folder: Path, deadline: float) -> dict[str, Report]:
    """Runs parts at the same time, and returns their reports."""
    running: dict[str, subprocess.Popen] = {}
    reports: dict[str, Report] = {}
    began = time.monotonic()
    for name in names:
        left = deadline - began
        if left < PARTS[name].least and not tiny:
            reports[name] = {"status": "skipped", "reason": f"{left:.0f} s were left; it needs {PARTS[name].least} s."}
            show(f"skipped: {reports[name]['reason']}", name)
            continue
        command = [sys.executable, __file__, f"--part={name}", f"--machine={json.dumps(machine)}"]
        command += [f"--report={folder / name}.json", *(["--tiny"] if tiny else [])]
        environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if name == "plan" else {})
        running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        while running:
            time.sleep(0.05)
            for name, process in list(running.items()):
                end = deadline if tiny else min(began + PARTS[name].limit, deadline)
                if process.poll() is None and time.monotonic() < end:
                    continue
                is_late = process.poll() is None
                _end(running.pop(name))
                path = folder / f"{name}.json"
                reports[name] = {"status": "ok"} | (json.loads(path.read_text()) if path.exists() else {})
                reports[name]["wall_seconds"] = time.monotonic() - began
                if is_late and reports[name]["status"] == "ok":
                    reports[name] |= {"status": "stopped", "reason": f"It took longer than {end - began:.0f} s."}
                elif process.returncode and not is_late:
                    reason = reports[name].get("reason", f"Its process ended with code {process.returncode}.")
                    reports[name] |= {"status": "error", "reason": reason}
                ended = f"{reports[name]['status']} after {reports[name]['wall_seconds']:.0f} s"
                show(f"{ended}: {reports[name].get('reason', '')}".rstrip(": "), name)
    finally:
        for process in running.values():
            _end(process)
    return reports


def _end(process: subprocess.Popen) -> None:
    """Ends a part and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(name: str, machine: Report, tiny: bool, path: Path) -> int:
    task = Task(name, machine, tiny, path)
    try:
        PARTS[name].run(task)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        task.report |= {"status": "error", "reason": f"{type(error).__name__}: {lines[-1][:300]}"}
    task.save()
    return int(task.report.get("status") == "error")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="new file for all that was found")
    parser.add_argument("--seconds", type=float, default=470, help="time for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as without an accelerator")
    parser.add_argument(
        "--parts", nargs="+", choices=[name for name in PARTS if name != "step-tiny"], help="default: all"
    )
    parser.add_argument("--part", choices=[*PARTS, "machine"], help=argparse.SUPPRESS)
    parser.add_argument("--machine", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if arguments.part == "machine":
        print(json.dumps(describe_machine()))
        return 0
    if arguments.part:
        return run_part(arguments.part, arguments.machine, arguments.tiny, arguments.report)
    try:
        if arguments.json:
            arguments.json.touch(exist_ok=False)
    except OSError as error:
        parser.error(f"--json={arguments.json}: {error.strerror}; name a new file.")
    return prove(arguments)


def prove(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.seconds
    # JAX takes memory as it needs it, as PyTorch does, for several processes share the device.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    command = [sys.executable, __file__, "--part=machine"]
    described = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    machine = json.loads(described.stdout.splitlines()[-1])
    tiny = arguments.tiny or machine["platform"] == "cpu"
    proof = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "tiny": tiny, "machine": machine, "parts": {}}
    show(f"{machine['device']}, driver {machine.get('driver', 'none')}, {machine['cores']} cores, {proof['date']}")
    show(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    chosen = arguments.parts or list(PARTS)
    chosen += ["step-tiny"] * (tiny and any(name.startswith("step-") for name in chosen))
    chosen = [name for name in dict.fromkeys(chosen) if not name.startswith("step-") or name[5:] in sizes(tiny)]
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for names in stages(chosen, tiny):
            proof["parts"] |= run_stage(names, machine, tiny, Path(folder), deadline)
            proof["plans"] = dict(compare_with_plan(proof["parts"], tiny))
            bad = [name for name, report in proof["parts"].items() if is_failure(name, report)]
            proof |= {"passed": not bad, "seconds": arguments.seconds - (deadline - time.monotonic())}
            if arguments.json:  # after each stage, for who runs this may have a limit of time too
                arguments.json.write_text(json.dumps(proof, indent=1) + "\n")
    for size, found in proof["plans"].items():
        memory = [f"{found[name] / 1e9:.2f}" for name in ("planned_memory", "compiled_memory", "peak_memory")]
        goal = "within" if found["is_within_goal"] else "not within"
        show(
            f"plan of {size}: {memory[0]} GB; compiled here {memory[1]} GB, peak {memory[2]} GB: {goal} {GOAL:.0%}; "
            f"the step takes {found['measured_to_roofline']:.2f} × the roofline's time"
        )
    ended = ", ".join(f"{name} {report['status']}" for name, report in proof["parts"].items())
    show(f"{'FAILED' if bad else 'PASSED'} in {proof['seconds']:.0f} s: {ended}")
    return int(bool(bad))


def is_failure(name: str, report: Report) -> bool:
    return report["status"] in ("failed", "error") or (report["status"] == "stopped" and PARTS[name].is_equality)


if __name__ == "__main__":
    sys.exit(main())
