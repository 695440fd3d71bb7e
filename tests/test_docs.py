"""The docs are true: whatever a reader is told to type runs, and links lead somewhere."""

import re
import shutil

import desk
import documents
import pytest

from jaxsd.hub import PRETRAINED


@pytest.fixture(scope="session")
def laid(tmp_path_factory):
    """What readers bring, made once."""
    folder = tmp_path_factory.mktemp("desk")
    desk.lay_out(folder)
    return folder


@pytest.fixture
def at_the_desk(laid, tmp_path, monkeypatch):
    """A folder of one's own with all of it, to work in."""
    shutil.copytree(laid, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(laid.parent / "programs"))


WITH_CODE = [
    page
    for page in documents.PAGES
    if any(fence.language not in documents.NOT_CODE for fence in documents.fences(page))
]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_blocks_run_or_say_what_they_need(page, at_the_desk):
    documents.run_page(page)
