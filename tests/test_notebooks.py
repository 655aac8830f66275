"""Every notebook runs from top to bottom in its small version, and is a notebook that jupytext can open."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = {"PROOFSTONE_QUICK": "1", "PROOFSTONE_FIGURES": str(tmp_path), "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, notebook], env={**os.environ, **small}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("*.png")), "the notebook saved no figure"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens(notebook: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    cells = jupytext.read(notebook).cells
    assert cells[0].cell_type == "markdown"
    assert any(c.cell_type == "code" for c in cells)
