"""The notebooks of docs/notebooks/ run from top to bottom, as a reader has them, and leave nothing.

What they claim in words they assert in code, wherever that can be.
"""

import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries about each other
    import jupytext
    from nbclient import NotebookClient

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))


def files() -> set[Path]:
    return {path for path in FOLDER.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_it_runs_and_leaves_nothing(path, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # a reader's machine has its own devices, and fast programs
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    before = files()
    book = jupytext.read(path)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    client = NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # an error in a cell is raised here, with what the cell printed
    assert files() == before
    assert not [*(tmp_path / "TMPDIR").iterdir()]
