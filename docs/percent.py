"""Reads a notebook that is kept as text; by itself the text does not say that it is Python."""

import jupytext
from nbformat import NotebookNode


def read(text: str) -> NotebookNode:
    """The notebook of a file in jupytext's py:percent format."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}
    return notebook
