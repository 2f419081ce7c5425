"""Plans for absent TPUs and GPUs: programs that the real compilers return for each mesh preset, and the command."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from model_options import FAMILIES

from gpt import config_files
from gpt.config import Config, TrainConfig
from gpt.models.gpt import GPTConfig
from gpt.planning import compiling, hlo, plans, report
from gpt.runtime import backend, hardware
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UserError
from gpt.sharding import MeshConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "gpt-spmd[plan]"'
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason='no CUDA compiler: pip install "gpt-spmd[plan-cuda]"'
)
# The tests' compilation cache stores programs for absent TPUs, but cannot load them.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

# Widths are multiples of a TPU tile (128), so that nothing is padded.
MODEL = GPTConfig(
    vocab_size=256,
    num_layers=2,
    num_heads=4,
    embed_dim=128,
    block_size=128,
    attention="dense",
    embed_dropout=0.0,
    residual_dropout=0.0,
    attention_dropout=0.0,
    scan_layers=True,
)
GRADIENT_BYTES = 2 * MODEL.num_parameters()  # bfloat16, as the compute dtype


@pytest.fixture(scope="module")
def planned():
    """A function that returns the plan of a small model with a mesh, 4 examples per device; it makes each plan once."""
    done = {}

    def plan(topology="v5e:2x2", **mesh):
        key = topology, *mesh.items()
        if key not in done:
            devices = len(hardware.topology_devices(topology))
            config = Config(model=MODEL, train=TrainConfig(batch_size=4 * devices), mesh=MeshConfig(**mesh))
            done[key] = compiling.measure(config, topology)
        return done[key]

    return plan


def moved(plan, kind, *axes):
    return sum(c["bytes"] for c in plan["collectives"] if c["kind"] == kind and (not axes or c["axes"] == axes))


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "number"), [("v4:2x2x2", 8), ("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("2xv5e:2x2", 8)]
)
def test_topologies_have_a_device_for_each_chip(topology, number):
    devices = hardware.topology_devices(topology)
    assert len(devices) == number
    assert {hardware.of_device(device) for device in devices} == {hardware.of_topology(topology)}
    assert len({tuple(hardware.place(device)) for device in devices}) == number
    assert {hardware.island(device) for device in devices} == set(range(int(topology[0]) if topology[1] == "x" else 1))


def bias_flops(tokens, model=MODEL):
    """FLOPs of the gradients of the biases of queries, keys and values: products with eight rows of ones."""
    return 2 * 8 * tokens * model.num_layers * model.layer_weights["qkv"][1] * model.has_bias("qkv")


@needs_libtpu
@pytest.mark.parametrize("mesh", [{"rules": "dp"}, {"rules": "fsdp"}, {"rules": "fsdp_tp", "model": 2}], ids=str)
def test_figures_of_a_plan_are_consistent(planned, mesh):
    plan = planned(**mesh)
    assert plan["model_flops"] == 4 * MODEL.block_size * MODEL.flops_per_token()
    assert plan["hardware_flops"] == plan["model_flops"] + bias_flops(4 * MODEL.block_size)
    memory, seconds = plan["memory"], plan["seconds"]
    assert memory["total"] == sum(memory[part] for part in report.MEMORY_PARTS)
    assert plan["fits"]
    assert memory["total"] < memory["capacity"]
    assert seconds["step"] == max(seconds["roofline"], seconds["compiler"])
    peak = hardware.of_topology("v5e:2x2").flops
    assert plan["model_flops"] / peak <= seconds["roofline"] <= seconds["compiler"] < 100 * seconds["roofline"]
    assert seconds["mfu"] == pytest.approx(plan["model_flops"] / peak / seconds["step"])
    assert all(c["seconds"] > 0 and c["bandwidth"] < math.inf for c in plan["collectives"])


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_accepts_the_options_of_a_chip_unless_the_user_sets_them(topology, monkeypatch):
    device = hardware.topology_devices(topology)[0]
    options = backend.compiler_options(device)
    array = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jnp.negative, compiler_options=options).lower(array).compile()
    for name in options:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=false")
        assert backend.compiler_options(device) == {key: value for key, value in options.items() if key != name}
    monkeypatch.setattr(backend, "LIBTPU_KNOWN", "another version")
    assert backend.compiler_options(device) == backend.compiler_options(jax.devices()[0]) == {}


@needs_libtpu
def test_a_stored_plan_is_used_only_with_the_same_flags(monkeypatch):
    made, config = [], Config(model=MODEL, seed=12345)
    monkeypatch.setattr(compiling, "measure", lambda config, topology: {"number": made.append(1) or len(made)})
    assert [plans.plan(config, "v5e:2x2")["number"] for _ in range(2)] == [1, 1]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=false")
    assert [plans.plan(config, "v5e:2x2")["number"] for _ in range(2)] == [2, 2]


@needs_cuda
def test_a_plan_for_gpus_has_the_kernels_that_add_in_a_fixed_order(monkeypatch):
    """They sort the tokens of a batch, unless the user says otherwise."""
    config = Config(model=dataclasses.replace(MODEL, block_size=1024), train=TrainConfig(batch_size=16))
    plan = plans.plan_elsewhere(config, "h100:2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
    assert plans.plan_elsewhere(config, "h100:2")["memory_traffic"] < plan["memory_traffic"]


@needs_libtpu
def test_products_of_8_bits_are_counted_apart():
    """Those of the forward pass and of the gradients of activations; splash attention has masks of 8 bits."""
    model = dataclasses.replace(MODEL, attention="auto", products="int8")
    config = Config(model=model, train=TrainConfig(batch_size=4))
    devices = hardware.topology_devices("v5e:2x2")
    operations = hlo.operations(compiling.compile_step(config, compiling.build(config, devices)).hlo_text)
    assert not any(each.flops_8bit for each in operations if each.opaque)
    weights = model.num_layers * 12 * model.embed_dim**2
    assert sum(each.times * each.flops_8bit for each in operations) == 4 * weights * model.block_size


RELEASED = {
    "llama": FAMILIES["llama"] | {"mlp_size": 384},
    "qwen3": FAMILIES["qwen3"] | {"head_size": 128, "bias": "qkv"},
    "gemma": FAMILIES["gemma2"] | {"window": 0},
    "neox": FAMILIES["neox"],
    "adapters": FAMILIES["llama"] | {"lora_rank": 8, "lora_targets": "qkv,out,gate,up,down"},
}


@needs_libtpu
@pytest.mark.parametrize(
    "name", ["gemma", *(pytest.param(name, marks=pytest.mark.slow) for name in RELEASED if name != "gemma")]
)
def test_flops_and_parameters_of_released_models_are_those_of_the_compiled_step(name):
    model = dataclasses.replace(MODEL, **RELEASED[name])
    plan = compiling.measure(Config(model=model, train=TrainConfig(batch_size=16)), "v5e:2x2")
    expected = 4 * model.block_size * model.flops_per_token()
    if model.lora_rank:  # the layers before the first adapter have no gradient, which the formula does not know
        assert expected * 0.95 < plan["hardware_flops"] <= expected * 1.01
    else:
        assert plan["model_flops"] == expected
        assert plan["hardware_flops"] == expected + bias_flops(4 * model.block_size, model)
        # Parameters, the two moments of Adam (float32) and the gradients.
        assert plan["memory"]["total"] > 12 * model.num_parameters()


@needs_libtpu
def test_data_parallelism_reduces_the_gradient_and_gathers_nothing(planned):
    plan = planned(rules="dp")
    assert {(c["kind"], c["axes"]) for c in plan["collectives"]} == {("all-reduce", ("data",))}
    # The gradients of the two uses of the tied embedding are reduced separately, that of the lookup in float32.
    tied = 4 * MODEL.vocab_size * MODEL.embed_dim
    assert moved(plan, "all-reduce") == pytest.approx(GRADIENT_BYTES + tied, rel=0.02)
    state = 4 * MODEL.num_parameters()
    assert plan["memory"]["parameters"] == state
    assert plan["memory"]["optimizer"] == pytest.approx(2 * state, rel=1e-3)


@needs_libtpu
def test_fsdp_gathers_parameters_twice_and_scatters_gradients_once(planned):
    plan = planned(rules="fsdp")
    assert {c["axes"] for c in plan["collectives"]} == {("fsdp",)}
    around = moved(plan, "collective-permute")  # gathers and scatters that the compiler split
    gathered, scattered = moved(plan, "all-gather"), moved(plan, "reduce-scatter")
    assert gathered <= 2.5 * GRADIENT_BYTES  # parameters in the forward and the backward pass, and nothing else
    assert 2 * GRADIENT_BYTES <= gathered + scattered + around <= 4 * GRADIENT_BYTES
    assert plan["memory"]["optimizer"] < planned(rules="dp")["memory"]["optimizer"] / 3.9


@needs_libtpu
def test_tensor_parallelism_gathers_and_scatters_activations_over_model(planned):
    plan = planned(rules="fsdp_tp", model=2)
    # The residual stream, which `model` shards over the length, before and after attention and the MLP in both passes.
    activations = 4 * MODEL.num_layers * 2 * (4 * 2 * MODEL.block_size) * MODEL.embed_dim
    assert moved(plan, "all-gather", "model") >= activations
    scattered = sum(moved(plan, kind, "model") for kind in ("reduce-scatter", "collective-permute"))
    assert scattered >= activations / 2  # a collective-permute moves a shard
    assert moved(plan, "all-reduce", "model") < activations / 4
    assert moved(plan, "all-gather", "fsdp") > 0
    assert moved(plan, "all-gather", "fsdp") < moved(planned(rules="fsdp"), "all-gather")


@needs_libtpu
def test_weak_scaling_keeps_flops_and_memory_per_device(planned):
    small, large = planned(rules="dp"), planned("v5e:4x4", rules="dp")
    assert large["hardware_flops"] == small["hardware_flops"]
    assert large["memory"]["total"] == pytest.approx(small["memory"]["total"], rel=0.05)
    assert moved(large, "all-reduce") == pytest.approx(moved(small, "all-reduce"), rel=0.05)


def plan_of_blocks(topology, block_size, attention, document_borders=False):
    """Returns the plan of 16 examples, with batch and heads sharded."""
    model = dataclasses.replace(MODEL, block_size=block_size, attention=attention)
    data = dataclasses.replace(Config().data, document_borders=document_borders)
    mesh = MeshConfig("fsdp_tp", model=2)
    return compiling.measure(Config(model=model, data=data, train=TrainConfig(batch_size=16), mesh=mesh), topology)


def assert_kernels_are_counted(plan, products):
    """A product of attention has 2·layers·width·length FLOPs per token; the model has 6 products.

    The mask leaves half of a product. Splash attention computes whole blocks: all of one, or three of two by two.
    """
    tokens, length = 16 * plan["block_size"] / plan["devices"], plan["block_size"]
    share = 1 / 2 if plan["attention"] == "cudnn" else {128: 1, 1024: 3 / 4}[length]
    attention = (products * share - 6) * 2 * MODEL.num_layers * MODEL.embed_dim * length * tokens
    bias = 0 if plan["attention"] == "cudnn" else bias_flops(tokens) / 2  # mesh.model=2
    assert plan["hardware_flops"] == pytest.approx(plan["model_flops"] + attention + bias, rel=2e-3)


@needs_libtpu
def test_splash_attention_is_counted():
    plan = plan_of_blocks("v5e:2x2", 128, "auto")
    assert plan["attention"] == "splash"
    assert_kernels_are_counted(plan, 2 + 3 + 4)  # forward; gradients of queries; of keys and values
    assert "attention splash" in "".join(report.text(plan))


@pytest.mark.slow
@needs_libtpu
def test_splash_attention_does_not_store_the_scores():
    splash, dense = (plan_of_blocks("v5e:2x2", 1024, attention) for attention in ("splash", "dense"))
    assert_kernels_are_counted(splash, 2 + 3 + 4)
    assert splash["memory"]["temporaries"] < dense["memory"]["temporaries"] / 2
    assert splash["memory_traffic"] < dense["memory_traffic"] / 2


PEAK_MEMORY = """
import re, sys
from pathlib import Path
import jax, numpy as np
from gpt.config import Config, TrainConfig
from gpt.models.gpt import GPTConfig
from gpt.planning import compiling

model = GPTConfig(vocab_size=8192, num_layers=3, num_heads=4, embed_dim=256, block_size=512, scan_layers=True)
config = Config(model=model, train=TrainConfig(batch_size=16))
program = compiling.build(config, jax.devices())
executable = compiling.compile_step(config, program).executable
planned = executable.memory_analysis()
with program.layout.use():
    state = program.init()
tokens = jax.device_put(np.ones((16, 512), np.int32), program.layout.batch)
jax.block_until_ready((state, tokens))

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
jax.block_until_ready(executable(state, {"inputs": tokens, "targets": tokens}))
allocated = status("VmHWM") - before
print(planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes, allocated)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_planned_memory_is_what_a_run_allocates():
    """Compares on the CPU, with a program of gigabytes, beside which the 100 MB of XLA's threads are small."""
    environment = {"XLA_FLAGS": "", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    planned, allocated = map(int, done.stdout.split())
    assert planned > 1e9
    assert 0.97 * planned < allocated < 1.15 * planned


def test_needed_memory_is_read_from_the_compilers_message():
    assert compiling.in_bytes("3.07GiB") == 3.07 * 2**30
    assert compiling.in_bytes("512B") == 512
    assert compiling.DoesNotFit("Used 110.50G of 95.74G hbm").needed == 110.5 * 2**30
    assert compiling.DoesNotFit("the memory required (2.5T) exceeds available HBM (15.75G)").needed == 2.5 * 2**40


def small_flags(model: GPTConfig = MODEL) -> list[str]:
    default = dataclasses.asdict(GPTConfig())
    changed = {name: value for name, value in dataclasses.asdict(model).items() if value != default[name]}
    return ["--config=configs/char.py"] + [f"--config.model.{name}={value}" for name, value in changed.items()]


@needs_libtpu
def test_command_prints_a_report_and_remembers_it(command, tmp_path):
    cache = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    page = tmp_path / "plan.html"
    flags = ["plan", *small_flags(), "--topology=v5e:2x2", "--batch_per_device=4", "--price=2", f"--html={page}"]
    result = command(*flags, env=cache)
    assert result.returncode == 0
    assert re.fullmatch(r"(compiling for .*\n)*", result.stderr)  # on a busy machine
    for line in (
        r"FITS: \d+\.\d+ MB of 17,179\.\d+ MB per device",
        r"all-reduce .* data\n",
        r"ESTIMATE: (compute|memory|network)-bound",
        r"device-hours, .* at 2",
    ):
        assert re.search(line, result.stdout)
    assert "--config.train.batch_size=16" in page.read_text()
    # An existing file is not overwritten, and nothing is compiled.
    again = command(*flags, env=cache)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "plan.html exists already" in again.stderr
    (kept,) = (tmp_path / "gpt").glob("plan-*")
    entry = Cache(str(tmp_path / "gpt")).entry(kept.stem, lambda create: pytest.fail("not in the cache")).value
    kept.unlink()
    Cache(str(tmp_path / "gpt")).entry(kept.stem, lambda create: entry | {"num_parameters": 7_000_000_000})
    assert "7.0 billion parameters" in command(*flags[:-1], env=cache).stdout  # from the cache


@needs_libtpu
def test_command_reports_what_does_not_fit(command):
    flags = [*small_flags(), "--topology=v5e:2x2", "--batch_per_device=8192"]
    result = command("plan", *flags)
    assert result.returncode == 1
    assert re.search(r"DOES NOT FIT: at least [\d,.]+ GB of 17\.18\d* GB per device", result.stdout)
    assert re.search(r"The compiler: .*16\.91 GB", " ".join(result.stdout.split()))  # it says 15.75G
    assert "▒" in result.stdout
    assert "--search looks for a mesh" in result.stdout
    assert result.stderr == ""


@needs_libtpu
def test_search_prints_the_best_and_its_flags(command):
    flags = [*small_flags(), "--config.train.batch_size=16", "--topology=v5e:2x2"]
    result = command("plan", *flags, "--search", "--compilations=1", "--json")
    assert result.returncode == 0
    plans = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(plans) == 3  # the unchanged config, one candidate, and the better of both with unrolled layers
    steps = [plan["seconds"]["step"] for plan in plans]
    assert steps == sorted(steps)
    assert [] in [plan["flags"] for plan in plans]
    # The flags of the best give the plan of the best.
    best = command("plan", *flags, *plans[0]["flags"], "--json")
    assert json.loads(best.stdout)["seconds"] == plans[0]["seconds"]
    assert "candidates by arithmetic" in result.stderr


@needs_libtpu
def test_plans_in_files_are_compared_without_compilation(command, tmp_path):
    flags = [*small_flags(), "--config.train.batch_size=16", "--topology=v5e:2x2"]
    before, page = tmp_path / "before.json", tmp_path / "page.html"
    before.write_text(command("plan", *flags, "--json").stdout)
    both = command("plan", *flags, "--config.model.remat=full", f"--compare={before}", "--json")
    after = tmp_path / "after.json"
    after.write_text(both.stdout.splitlines()[1])
    assert json.loads(both.stdout.splitlines()[0]) == json.loads(before.read_text())
    result = command("plan", f"--compare={before},{after}", f"--html={page}")
    assert result.returncode == 0
    assert re.fullmatch(r"(compiling for .*\n)*", result.stderr)  # on a busy machine
    assert re.search(r"^1: FITS: .* MB of", result.stdout)
    assert re.search(r"model\.remat +none +full", result.stdout)
    assert re.search(r"compiled FLOPs +\S+ GFLOP +\S+ GFLOP +1\.\d+", result.stdout)
    assert "Comparison" in page.read_text()
    after.write_text('{"chip": "v5e"}')
    for files, says in (
        (f"{before}", "--compare needs two plans"),
        (f"{before},{after}", "after.json is no file of plans"),
        (f"{before},{tmp_path}/none.json", "none.json cannot be read: No such file"),
    ):
        refused = command("plan", f"--compare={files}")
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert says in refused.stderr


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("h100:8", {"rules": "dp"}),
        ("h100:8", {"rules": "fsdp"}),
        ("h100:8", {"rules": "fsdp_tp", "model": 2}),
        ("4xh100:8", {"rules": "fsdp", "fsdp": 8}),
        ("a100:2", {"rules": "fsdp"}),
        ("a100_80gb:2", {"rules": "fsdp"}),
        ("h200:2", {"rules": "fsdp"}),
        ("b200:2", {"rules": "fsdp"}),
    ],
    ids=str,
)
def test_plans_for_gpus(planned, topology, mesh):
    plan = planned(topology, **mesh)
    assert plan["fits"]
    assert plan["hardware_flops"] == pytest.approx(plan["model_flops"], rel=1e-3)
    assert plan["seconds"]["compiler"] is None
    assert 0 < plan["seconds"]["roofline"] == plan["seconds"]["step"]
    kinds = {c["kind"] for c in plan["collectives"]}
    assert kinds >= ({"all-reduce"} if mesh["rules"] == "dp" else {"all-gather", "reduce-scatter"})
    chip = hardware.of_topology(topology)
    for c in plan["collectives"]:  # fsdp within a host, data between hosts, where there are several
        between_hosts = topology.startswith("4x") and c["axes"] == ("data",)
        assert c["bandwidth"] <= chip.link
        assert (c["bandwidth"] == chip.network) == between_hosts


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("borders", [False, True], ids=["gpu", "gpu, borders"])
def test_cudnn_attention_is_counted_and_does_not_store_the_scores(borders):
    cudnn, dense = (plan_of_blocks("h100:4", 1024, attention, borders) for attention in ("auto", "dense"))
    assert cudnn["attention"] == "cudnn"
    assert_kernels_are_counted(cudnn, 2 + 5)
    assert cudnn["memory"]["temporaries"] < dense["memory"]["temporaries"] / 2


@pytest.mark.slow
@needs_cuda
def test_a_gpu_program_that_does_not_fit_is_reported(command):
    """XLA compiles programs of any size for GPUs; the command prints the report and no warning."""
    result = command("plan", *small_flags(), "--topology=a100:1", "--config.train.batch_size=65536")
    assert (result.returncode, result.stderr) == (1, "")
    assert "DOES NOT FIT: " in result.stdout


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ([], 2, "Set a config file and a topology"),
        (["--config=configs/char.py"], 2, "Set a config file and a topology"),
        (["--config=configs/char.py", "--config.model.vocab_size=9", "--topology=v5e"], 2, "has to look like v5e"),
        (["--config=configs/char.py", "--topology=v9:2x2"], 2, "there is no chip 'v9'"),
        (["--config=configs/char.py", "--topology=v5e:2x2,v5e:4x4", "--search"], 2, "one --topology at a time"),
        (["--config=configs/char.py", "--topology=v5e:2x2", "--html=nowhere/plan.html"], 1, "Cannot write --html=nowh"),
        (["--config=configs/char.py", "--topology=v5e:2x2", "--price=-1"], 2, "price"),
        (["--config=configs/char.py", "--topology=h100:16"], 2, "h100 has 1 sizes, up to h100:8"),
        pytest.param(["--config=configs/char.py", "--topology=v5e:2x2"], 1, "model.vocab_size", marks=needs_libtpu),
        pytest.param(["--config=configs/char.py", "--topology=v5e:3x77"], 2, "refused by libtpu", marks=needs_libtpu),
    ],
)  # fmt: skip
def test_refusals(command, flags, code, says):
    result = command("plan", *flags)
    assert result.returncode == code
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


DOOR = """
import gpt, jax
from gpt.runtime.errors import UserError

config = gpt.read_config("configs/char.py", CHANGES)
plan = gpt.plan_step(config, "v5e:2x2")
print(plan["topology"], plan["fits"], plan["compiler_message"])
for topology in ("v9:2x2", "v5e:3x77"):
    try:
        gpt.plan_step(config, topology)
    except UserError as error:
        print(error)
print(jax.config.jax_platforms, jax.config.jax_enable_compilation_cache)
"""


@needs_libtpu
def test_plan_step_compiles_in_another_process(request, tmp_path):
    """The settings of JAX in the process of the caller stay unchanged."""
    changes = dict(flag.removeprefix("--config.").split("=", 1) for flag in small_flags()[1:])
    environment = os.environ | {"GPT_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu,cuda", "XLA_FLAGS": ""}
    code = DOOR.replace("CHANGES", repr(changes))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=request.config.rootpath
    )
    assert done.stderr == ""
    planned, no_chip, no_topology, settings = done.stdout.splitlines()
    assert planned == "v5e:2x2 True None"
    assert no_chip.startswith("--topology=v9:2x2: there is no chip 'v9'")
    assert no_topology.startswith("--topology=v5e:3x77 is refused by libtpu")
    assert settings == "cpu,cuda True"


def test_list_of_topologies(command):
    result = command("plan", "--list_topologies")
    assert result.returncode == 0
    for chip in ("v4", "v5e", "v5p", "v6e", "a100", "a100_80gb", "h100", "h200", "b200"):
        assert re.search(rf"^{chip} .*\d", result.stdout, re.MULTILINE)


def test_gpt2_124m_is_gpt2(request):
    config = config_files.read(str(request.config.rootpath / "configs" / "pretrain.py:gpt2-124m"))
    padding = (config.model.padded_vocab_size - 50_257) * 768
    assert config.model.num_parameters() - padding == 124_439_808
    assert config.train.batch_size * config.model.block_size == 2**19
    assert 570_000 < config.train.total_steps(1024, 1) < 600_000


@pytest.mark.parametrize(
    ("name", "billions", "tokens_per_step"),
    [("gpt2-1558m", 1.5576, 2**20), ("gpt3-7b", 6.65, 2**21), ("gpt3-175b", 174.6, 2**21)],
)
def test_published_sizes(request, name, billions, tokens_per_step):
    config = config_files.read(str(request.config.rootpath / "configs" / f"pretrain.py:{name}"))
    padding = (config.model.padded_vocab_size - 50_257) * config.model.embed_dim
    assert (config.model.num_parameters() - padding) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert config.train.batch_size * config.model.block_size == tokens_per_step


@pytest.mark.parametrize(
    ("topology", "error", "extra"),
    [
        ("v5e:2x4", RuntimeError("JAX TPU support not installed; cannot generate TPU topology."), "plan"),
        ("v5e:2x4", NotImplementedError("topology not implemented for tpu"), "plan"),
        ("h100:8", NotImplementedError("topology not implemented for cuda"), "plan-cuda"),
    ],
)
def test_missing_compiler_is_named(monkeypatch, topology, error, extra):
    from jax.experimental import topologies

    def refuse(**_):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=rf'pip install "gpt-spmd\[{extra}\]"'):
        hardware.topology_devices(topology)
