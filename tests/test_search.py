"""The search for the fastest mesh: its candidates, their order, and what it learns from compiled programs."""

import dataclasses
import math

import jax
import pytest

from gpt import sharding
from gpt.config import Config, TrainConfig
from gpt.models.gpt import GPTConfig
from gpt.planning import compiling, search
from gpt.runtime import hardware

CHIP = hardware.Chip("x", ("cpu",), flops=1e14, memory=16e9, bandwidth=1e12, link=1e11, network=1e10)
MODEL = GPTConfig(vocab_size=512, num_layers=4, num_heads=4, embed_dim=256, block_size=256, scan_layers=True)
CONFIG = Config(model=MODEL, train=TrainConfig(batch_size=64))


def sizes(config: Config) -> tuple[int, ...]:
    return tuple(config.mesh.shape(len(jax.devices())).values())


def expected(config: Config) -> search.Candidate:
    return search.expect(config, sharding.make_layout(config.mesh), CHIP)


@pytest.mark.parametrize(("number", "parts", "count"), [(8, 4, 20), (12, 3, 18), (1, 4, 1), (7, 2, 2), (1024, 4, 286)])
def test_factorisations(number, parts, count):
    found = list(search.factorisations(number, parts))
    assert len(found) == len(set(found)) == count  # for 2³ into four factors: 3 balls into 4 boxes
    assert all(math.prod(factors) == number for factors in found)


def test_candidates_are_all_changes_that_can_be_built():
    found = search.candidates(CONFIG, jax.devices(), CHIP)
    kinds = {
        (sizes(c.config), c.config.model.attention, c.config.model.remat, c.config.mesh.zero1, c.config.train)
        for c in found
    }
    assert len(kinds) == len(found)
    meshes = {sizes(c.config) for c in found}
    assert meshes == {each for each in search.factorisations(8, 4) if each[3] <= 4}  # heads
    assert {c.config.model.remat for c in found} == set(search.REMAT)
    assert {c.config.model.attention for c in found} == {"auto", "chunked"}  # a CPU has no kernel
    assert {c.config.train.micro_batches for c in found if sizes(c.config) == (8, 1, 1, 1)} == {1, 2, 4, 8}
    assert {c.config.mesh.rules for c in found} == {"dp", "fsdp", "fsdp_tp", "sp"}
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    for candidate in {sizes(c.config): c for c in found}.values():
        compiling.build(candidate.config, jax.devices())  # raises no error


def test_arithmetic_expects_less_memory_where_an_option_saves_it():
    def memory(**changes):
        model = dataclasses.replace(MODEL, remat=changes.pop("remat", "none"))
        train = dataclasses.replace(CONFIG.train, micro_batches=changes.pop("micro_batches", 1))
        mesh = sharding.MeshConfig(**changes)
        return expected(dataclasses.replace(CONFIG, model=model, train=train, mesh=mesh)).memory

    assert memory(remat="full") < memory(remat="dots") < memory()
    assert memory(micro_batches=4) < memory()
    assert memory(rules="fsdp") < memory()
    assert memory(zero1=True) < memory()


def test_expected_memory_is_near_the_compilers():
    """Within a factor of 3 of the CPU compiler's figure, which is enough to decide what is compiled first."""
    for remat in ("none", "full"):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat=remat, dtype="float32"))
        used = compiling.compile_step(config, compiling.build(config, jax.devices())).executable.memory_analysis()
        total = used.argument_size_in_bytes + used.temp_size_in_bytes
        assert 0.3 < expected(config).memory / total < 3  # arithmetic takes bfloat16


class Compiler:
    """Plans configs by functions for memory and time, and keeps the configs."""

    def __init__(self, memory, seconds=lambda config: expected(config).seconds):
        self.memory, self.seconds, self.asked = memory, seconds, []

    def __call__(self, config: Config) -> dict:
        self.asked.append(config)
        total = self.memory(config)
        report = {"memory": {"parameters": 1, "total": total}, "fits": total <= CHIP.memory, "compiler_message": None}
        return report | {"seconds": {"step": self.seconds(config), "mfu": 0.5}}


def run_search(compiler: Compiler, compilations: int, config: Config = CONFIG):
    return search.search(config, jax.devices(), CHIP, compilations, compiler)


def test_search_compiles_the_config_first_and_ranks_all(capsys):
    compiler = Compiler(lambda config: expected(config).memory)
    found = run_search(compiler, 5)
    assert compiler.asked[0] == CONFIG
    assert len(compiler.asked) == len(found) == 1 + 5 + 1  # and the best with unrolled layers
    assert {config.model.scan_layers for config in compiler.asked[:6]} == {True}
    assert compiler.asked[6].model.scan_layers is False
    assert len({(sizes(c), c.model.remat) for c in compiler.asked[1:6]}) == 5
    steps = [report["seconds"]["step"] for _, report in found]
    assert steps == sorted(steps)
    assert capsys.readouterr().out.count("MFU 50.0%") == 7


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_deep_model_is_searched_with_scanned_layers(scan_layers):
    """Only the best is compiled unrolled, and only if the config is."""
    model = dataclasses.replace(MODEL, num_layers=search.LARGEST_UNROLLED + 1, scan_layers=scan_layers)
    compiler = Compiler(lambda config: expected(config).memory)
    found = run_search(compiler, 3, dataclasses.replace(CONFIG, model=model))
    assert len(found) == len(compiler.asked) == 4 + (not scan_layers)
    assert [config.model.scan_layers for config in compiler.asked[:4]] == [True] * 4
    assert compiler.asked[-1].model.scan_layers is scan_layers


def test_search_learns_from_what_does_not_fit():
    """A search finds configs that fit even if the compiler needs twenty times the expected memory."""
    compiler = Compiler(lambda config: 20 * expected(config).memory)
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=1024))
    assert compiler.memory(config) > CHIP.memory
    found = run_search(compiler, 6, config)
    assert found[0][1]["fits"]
    assert not found[-1][1]["fits"]  # the config itself
    fits = [report["fits"] for _, report in found]
    assert fits == sorted(fits, reverse=True)


def test_a_candidate_that_cannot_be_compiled_is_ranked_last(capsys):
    def refuse(config):
        return {"memory": {}, "fits": False, "compiler_message": "no"}

    found = run_search(refuse, 3)
    assert len(found) == 4
    assert capsys.readouterr().out.count("does not fit: no") == 4


def test_flags_are_the_differences():
    mesh = sharding.MeshConfig("fsdp", data=2, fsdp=4)
    changed = dataclasses.replace(CONFIG, mesh=mesh, model=dataclasses.replace(MODEL, remat="full"))
    assert set(search.flags(CONFIG, changed)) == {
        "--config.mesh.rules=fsdp",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=4",
        "--config.model.remat=full",
    }
