"""The docs are true: whatever a reader is told to type runs, and links lead somewhere."""

import ast
import re
import shlex

import documents
import pytest

QUICK = ("index", "install", "loading", "training")  # the others take longer, up to a minute
WITH_CODE = [
    pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else pytest.mark.slow)
    for page in documents.PAGES
    if any(fence.language not in documents.NOT_CODE for fence in documents.fences(page))
]
ALL = [documents.README, documents.ROOT / "CONTRIBUTING.md", *documents.PAGES]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.usefixtures("at_the_desk")
def test_blocks_run_or_say_what_they_need(page):
    documents.run_page(page)


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_each_block_is_something_that_tests_try_or_says_why_not(page):
    """The same without running anything: known languages, commands that there are."""
    for fence in documents.fences(page):
        if fence.needs is None and fence.language in ("", "bash"):
            for words in documents.commands(fence.text):
                assert documents.kind(words), f"{page}:{fence.line}: {shlex.join(words)}"
        else:
            assert fence.needs or fence.language in ("python", *documents.NOT_CODE), fence


@pytest.mark.slow
def test_commands_that_cannot_run_here_know_their_options():
    found = [words for page in ALL for words in documents.marked_commands(page)]
    assert len(found) > 5
    for words in found:
        if "..." not in words:
            documents.parse(words)


@pytest.mark.slow
def test_commands_in_sentences_know_their_options():
    lines = {line for page in ALL for line in documents.inline_commands(page)}
    assert len(lines) > 30
    for words in map(shlex.split, sorted(lines)):
        blanks = any(re.fullmatch(r"[A-Z]+|\.\.\.", word) for word in words)
        if not blanks and len(words) > 2:  # else it names a command
            documents.parse(documents.without_environment(words))


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    """As GitHub follows them; the site's builder checks them for the site."""
    text = documents.FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page}: {target}"
        if heading:
            assert heading in anchors(file), f"{page}: {target}"


def anchors(page) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = documents.FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


REFERENCE = sorted(
    {
        name
        for page in documents.PAGES
        for name in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize("name", REFERENCE)
def test_what_the_reference_shows_says_what_it_is(name):
    """Sphinx leaves out what has no docstring, and says nothing."""
    place = documents.ROOT / name.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and not silent, f"{name} has no docstring for {silent}"
