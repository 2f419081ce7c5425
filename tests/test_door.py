"""The Python interface `import gpt`: it does not import JAX, and the notebook that uses it runs in Jupyter kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_no_jax():
    code = "import sys, gpt; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy', 'absl')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.fixture
def notebook(tmp_path, play, monkeypatch):
    """Executes the notebook with few steps and changes, in a new kernel in a folder of a copy of the repository."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "gpt").symlink_to(ROOT / "gpt")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # Jupyter sets none
    # Without a number of devices, so that `gpt` divides the CPU in the kernel as it does for a user.
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(kept))

    def execute(folder, **changes):
        cells = nbformat.read(tmp_path / "configs" / "first_look.ipynb", as_version=4)
        few = {'"train.steps": 200': f'"train.steps": 4, "data.path": "{play}"', **changes}
        for old, new in few.items():
            assert any(old in cell.source for cell in cells.cells)
            for cell in cells.cells:
                cell.source = cell.source.replace(old, new)
        cells.cells.append(nbformat.v4.new_code_cell("assert Path(gpt.__file__).is_relative_to(root)"))
        nbclient.NotebookClient(cells, timeout=400, resources={"metadata": {"path": str(tmp_path / folder)}}).execute()
        return cells.cells

    return execute


def test_the_notebook_runs_in_its_own_folder_and_in_the_root(notebook, tmp_path):
    for folder in ("configs", "."):  # the second kernel finds the finished run
        outputs = [output for cell in notebook(folder) for output in cell.get("outputs", [])]
        printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
        assert "4 steps" in printed
        results = [output["data"] for output in outputs if "data" in output]
        assert any("bits_per_byte" in data.get("text/plain", "") for data in results)
        assert any("(True, " in data.get("text/plain", "") for data in results)  # the plan fits
        assert sum("image/png" in data for data in results) == 2
        assert not [output for output in outputs if output.get("name") == "stderr" and "Error" in output["text"]]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first_look"]


def test_a_cell_of_the_notebook_that_fails_ends_it(notebook):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"model\.num_layers=0"):
        notebook("configs", **{'"model.num_layers": 2': '"model.num_layers": 0'})
