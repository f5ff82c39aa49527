"""The tutorials run from top to bottom, in their fast setting; what is committed was executed."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it lies, beside its scripts and results, of which it leaves each as it was."""
    monkeypatch.setenv("PYRO_VAE_FAST", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = _files(path.parent)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(path.parent))
    assert _files(path.parent) == before


def _files(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_committed_with_the_output_of_one_run(path: Path) -> None:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_there_are_tutorials() -> None:
    assert TUTORIALS, f"no notebook in {os.fspath(Path(__file__).parent.parent / 'tutorials')}"
