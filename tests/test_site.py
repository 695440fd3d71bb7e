"""The site of the docs builds, without a warning."""

import subprocess
import sys

import documents
import pytest

pytestmark = pytest.mark.slow  # half a minute, whatever is asked of it

PAGES = ("index", "install", "migration", "architecture", "api/pipeline", "contributing")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, notebooks not executed."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command += ["-d", str(folder / "read"), str(documents.ROOT / "docs"), str(folder / "html")]
    where = {"cwd": documents.ROOT, "env": documents.environment(JAXSD_NOTEBOOKS="off")}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_there(site, page):
    assert "<h1>" in (site / f"{page}.html").read_text(encoding="utf-8")


def test_marks_of_tests_are_not_seen(site):
    for page in site.rglob("*.html"):
        shown = page.read_text(encoding="utf-8").replace("<!-- needs:", "")
        assert "needs: a network" not in shown


def test_links_to_what_stands_beside_the_docs_stay_inside(site):
    assert 'href="contributing.html"' in (site / "architecture.html").read_text(encoding="utf-8")


def test_the_reference_has_signatures_and_sentences(site):
    shown = (site / "api" / "pipeline.html").read_text(encoding="utf-8")
    assert 'id="jaxsd.load"' in shown and "negative_prompt" in shown
    assert "Each image depends on its own seed" in shown
