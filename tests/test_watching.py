"""`jaxsd.watch`: in a notebook in one place, in a terminal, or nowhere."""

import base64
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from refusals import refused
from screens import Kitty

import jaxsd
from jaxsd import watching
from jaxsd.pictures import enlarged, tile
from jaxsd.terminal.screen import Screen

CELL = """
import jaxsd
pipe = jaxsd.load("digits-ddpm")
watch = jaxsd.watch(pipe, every=2)
for seed in range(2):
    images = pipe("7", [seed, seed + 2], steps=4, guidance_scale=1, callback=watch)
"""


def test_each_call_has_a_place_of_its_own():
    stream, terminal = io.StringIO(), Kitty()
    look = watching._callback(Screen(stream, "kitty"), 2, np.asarray)
    calls = np.random.default_rng(0).integers(0, 256, (2, 5, 1, 8, 8, 3), np.uint8)
    for latents in calls:
        for i in range(5):
            look(i, 0.0, jnp.asarray(latents[i]))
    terminal.write(stream.getvalue())
    wanted = [enlarged(tile(latents[i]), 400, 400) for latents in calls for i in (1, 3)]
    assert len(terminal.seen) == 4 and all(map(np.array_equal, terminal.seen, wanted))
    assert len(terminal.shown) == 2


def test_where_nothing_can_be_shown_nothing_is_decoded(capsys):
    pipe = jaxsd.load("digits-ddpm")
    seen = []
    pipe.decode_array = lambda latents: seen.append(latents)
    look = jaxsd.watch(pipe)
    pipe.denoise(pipe.noise([0]), pipe.encode(["7"]), None, steps=2, callback=look)
    assert not seen and capsys.readouterr().out == ""


def test_what_is_refused():
    pipe = jaxsd.load("digits-ddpm")
    assert "every must be at least 1, not 0" in refused(jaxsd.watch, pipe, every=0)
    assert "not 'iterm'" in refused(jaxsd.watch, pipe, show="iterm")


def test_in_a_notebook(tmp_path):
    """In a kernel, as a front end sees it: two outputs, each of which was brought up to date."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cell = nbformat.v4.new_code_cell(CELL)
    book = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    pipe = jaxsd.load("digits-ddpm")
    outputs = book.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"] * 2
    for seed, output in enumerate(outputs):
        images = pipe("7", [seed, seed + 2], steps=4, guidance_scale=1.0)
        wanted = enlarged(tile([np.asarray(image)[..., None] for image in images]), 256, 256)
        with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as image:
            got = np.asarray(image).astype(int)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= 1  # in another process, of other compiler flags
