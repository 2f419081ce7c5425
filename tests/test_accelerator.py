"""The hardware proof (tests/benchmarks/accelerator.py), run without an accelerator and with tiny sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "accelerator.py"


def prove(*flags: str) -> subprocess.CompletedProcess:
    # Threads of PyTorch that wait for one another would take most of a busy machine's time.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
    }
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, env=environment, timeout=600
    )


@pytest.mark.process
def test_all_parts_run_without_an_accelerator(tmp_path):
    shown = prove(f"--json={tmp_path / 'proof.json'}", "--seconds=550")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["passed"]
    assert proof["tiny"]
    assert proof["machine"]["platform"] == "cpu"
    assert proof["machine"]["versions"].keys() >= {"jax", "jaxlib", "flax", "numpy"}
    parts = proof["parts"]
    assert parts.keys() == {"attention", "resume", "plan", "decode", "step-tiny"}
    has_compiler = importlib.util.find_spec("libtpu") is not None  # for plans; there is none for some processors
    expected = dict.fromkeys(parts, "ok") | {"plan": "ok" if has_compiler else "skipped"}
    assert {name: part["status"] for name, part in parts.items()} == expected
    compared = {(error["case"], error["implementation"]) for error in parts["attention"]["errors"]}
    cases = "grouped queries", "ungrouped, with both"
    assert compared == {(case, name) for case in cases for name in ("dense", "chunked")}
    assert all(0 < error[name] < 0.02 for error in parts["attention"]["errors"] for name in ("out", "dq", "dk", "dv"))
    assert parts["resume"]["equal"]
    assert 0 < parts["resume"]["killed_with_checkpoint"] < parts["resume"]["steps"]
    assert parts["step-tiny"]["ours"]["seconds"] > 0
    assert parts["decode"]["batch_2"]["ours"]["tokens_per_second"] > 0
    assert ("pytorch" in parts["step-tiny"]) != ("without_pytorch" in parts["step-tiny"])
    assert ("transformers" in parts["decode"]["batch_2"]) != ("without_transformers" in parts["decode"])
    assert list(proof["plans"]) == ["tiny"] * has_compiler
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    path = tmp_path / "proof.json"
    path.write_text("precious")
    shown = prove(f"--json={path}")
    assert shown.returncode == 2
    assert shown.stderr.splitlines()[-1].endswith(f"--json={path}: File exists; name a new file.")
    assert path.read_text() == "precious"
