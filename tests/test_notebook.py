"""notebooks/: valid, committed without outputs, free of anyone's paths, and running from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PATHS_OF_A_MACHINE = re.compile(r"""(?<![\w.:/])/(home|Users|root|tmp|work|mnt|content|var|opt)\b|[A-Z]:\\""")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_is_valid_and_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None


def test_names_no_path_of_a_machine(notebook):
    for cell in notebook.cells:
        assert not PATHS_OF_A_MACHINE.search(cell.source), cell.source


@pytest.mark.check
def test_runs_from_top_to_bottom_and_draws_its_plots(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("K2JAX_NOTEBOOK_STEPS", "8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / "muonclip_and_moba.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()  # Raises on an error.
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    pictures = {name for name, shown in outputs.items() if any("image/png" in o.get("data", {}) for o in shown)}
    assert pictures == {"explosion-plot", "moba-plot", "map-plot"}
    for name in ("explosion-says", "moba-says"):
        (said,) = outputs[name]
        assert said["data"]["text/markdown"].startswith("- ")
    printed = [o for shown in outputs.values() for o in shown if o.output_type == "stream"]
    assert [o.text for o in printed if o.name == "stderr"] == []
    assert sum(o.text.count("\n") for o in printed) <= 6
    assert not (tmp_path / "k2jax-clone").exists()
