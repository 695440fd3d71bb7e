"""The notebooks of docs/notebooks/ run from top to bottom, as a reader has them, and leave nothing.

What they claim in words they assert in code, wherever that can be.
"""

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries about each other
    import jupytext
    import matplotlib
    from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))


def files() -> set[Path]:
    return {path for path in FOLDER.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_it_runs_and_leaves_nothing(path, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # a reader's machine has its own devices, and fast programs
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    # For the cell that waits for a reader's own Stable Diffusion
    model = tiny.save_model(tmp_path / "model", tiny.tokenizer(tmp_path / "words"))
    monkeypatch.setenv("STABLE_DIFFUSION", str(model))
    before = files()
    book = jupytext.read(path)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    client = NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # an error in a cell is raised here, with what the cell printed
    assert files() == before
    assert not [*(tmp_path / "TMPDIR").iterdir()]


def test_tables_that_are_read_from_the_docs_are_there():
    text = (FOLDER.parent / "performance.md").read_text()
    asked = re.findall(r'table\("([^"]+)"\)', (FOLDER / "7-laptop-to-pod.py").read_text())
    assert len(asked) == 4
    for heading in asked:
        assert text.count(f"\n{heading}") == 1, heading


@pytest.fixture
def looking(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "looking", raising=False)
    matplotlib.use("agg")
    import looking

    yield looking
    looking.plt.close("all")


def test_pictures_are_shown_pixel_by_pixel(looking):
    grey = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    looking.show([grey, red, grey[:, :, 0]], ["grey", "red", ""], columns=2, scale=10)
    places = looking.plt.gcf().axes
    assert [axes.get_title() for axes in places] == ["grey", "red", ""]
    shown = [axes.images[0] for axes in places]
    assert np.array_equal(shown[0].get_array(), np.rint((grey[:, :, 0] + 1) * 127.5))
    assert np.array_equal(shown[1].get_array(), red)
    assert {image.get_interpolation() for image in shown} == {"nearest"}
    for axes in places:
        assert np.allclose(axes.get_window_extent().size, 80)
    first, second, third = (axes.get_window_extent() for axes in places)
    assert first.x1 < second.x0 and third.y1 < first.y0 and third.x0 == first.x0


def test_as_many_titles_as_pictures(looking):
    with pytest.raises(ValueError, match="1 titles for 2 pictures"):
        looking.show(np.zeros((2, 8, 8, 3), np.uint8), ["one"])
