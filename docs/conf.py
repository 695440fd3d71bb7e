"""The site of jaxsd's documentation, made of the pages here and of the package's docstrings.

`python -m sphinx -W --keep-going docs site` builds it. JAXSD_NOTEBOOKS=cache runs the notebooks,
too, those that changed since; =force runs them all.
"""

import os
import re
import sys
from pathlib import Path

import jaxsd
from jaxsd.training import Options

sys.path.insert(0, str(Path(__file__).parent))  # for percent.py

project = "jaxsd"
author = "the authors of jaxsd"
project_copyright = "the authors of jaxsd, Apache-2.0"
release = version = jaxsd.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["*.py", "notebooks/[!0-9]*.py", "site", "_build"]
nitpicky = True
smartquotes = False
# What other libraries call theirs is not ours to resolve, and would need a network
nitpick_ignore_regex = [("py:.*", r"(?!jaxsd\.).*")]
nitpick_ignore_regex += [("py:class", r"jaxsd\..*\.(Aux|T|AnyWords)")]  # type variables
highlight_language = "bash"  # of blocks that name none: commands

html_theme = "furo"
html_title = "jaxsd"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # GitHub's, so that a link to a heading works in both places

# Notebooks are kept as text; .md stays a page
nb_custom_formats = {".py": "percent.read"}
nb_execution_mode = os.environ.get("JAXSD_NOTEBOOKS", "off")
nb_execution_cache_path = str(Path(__file__).parent.parent / ".cache" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
add_module_names = True

# Pages that stand beside docs/ for GitHub's sake, and what they are here
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE |= {"README.md": "index.md"}
GLOB = re.compile(r"^```\{toctree\}\n(?::.*\n)*:glob:\n(?::.*\n)*\n(.*)\n```$", re.MULTILINE)
CODE = re.compile(r"(`[^`]+`)")
EXAMPLE = re.compile(r"\w+(, \w+)* = [\w.]+\(|jaxsd\.\w+\.\w+\(")
NAMED = re.compile(r"(?:^|(?<=\. )|(?<=; ))(\w+(?:, \w+)*)(?=: )", re.MULTILINE)


def as_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain sentences: what they name is set as code, and nothing else is markup.

    Deeper lines, and paragraphs that begin as an example does, stay as they are.
    """
    parameters = set(getattr(getattr(obj, "__code__", None), "co_varnames", ()))
    parameters |= set(getattr(obj, "__dataclass_fields__", ()))

    def named(found: re.Match) -> str:
        words = found[1].split(", ")
        return ", ".join(f"`{w}`" for w in words) if parameters.issuperset(words) else found[1]

    def escaped(text: str) -> str:
        return re.sub(r"([\\*|_`])", r"\\\1", text)

    out, block = [], []

    def end() -> None:
        """What was gathered: code if it is deeper than sentences, or begins as an example."""
        if not block:
            return
        example = EXAMPLE.match(block[0])
        if example or block[0].startswith("  "):
            kind = "python" if example else "text"
            out.extend([f".. code-block:: {kind}", "", *("    " + line for line in block), ""])
        else:
            pieces = CODE.split("\n".join(block))
            pieces = [p if CODE.fullmatch(p) else NAMED.sub(named, p) for p in pieces]
            pieces = CODE.split("".join(pieces))
            text = "".join(f"`{p}`" if CODE.fullmatch(p) else escaped(p) for p in pieces)
            out.extend([*text.splitlines(), ""])
        block.clear()

    for line in lines:
        if not line.strip() or (block and line.startswith("  ") != block[0].startswith("  ")):
            end()
        if line.strip():
            block.append(line)
    end()
    lines[:] = out


def in_the_site(app, docname: str, source: list[str]) -> None:
    """A page's links to what stands beside docs/ lead to the same text in the site.

    Places for pages that are not in this checkout are left out: Sphinx would warn of them.
    """

    def place(found: re.Match) -> str:
        return found[0] if any(Path(app.srcdir).glob(found[1])) else ""

    source[0] = GLOB.sub(place, source[0])
    up = "../" * docname.count("/")
    for name, page in OUTSIDE.items():
        source[0] = source[0].replace(f"](../{up}{name}", f"]({up}{page}")


def with_plain_types(app) -> None:
    """What the command line knows of an option (which words it takes) is no part of its type."""
    for known in (Options.__annotations__, Options.__init__.__annotations__):
        known |= {name: hint.__origin__ for name, hint in known.items() if is_annotated(hint)}


def is_annotated(hint) -> bool:
    return hasattr(hint, "__metadata__")


def setup(app) -> None:
    app.connect("builder-inited", with_plain_types)
    app.connect("source-read", in_the_site)
    app.connect("autodoc-process-docstring", as_text)
