"""Pictures written by threads: memory, errors, interruptions."""

import gc
import pathlib
import tracemalloc

import numpy as np
import pytest
from many import Painter, draw, use_devices
from PIL import Image
from test_cli import cache  # noqa: F401

from jaxsd.cli import sample
from jaxsd.cli.sampling import model
from jaxsd.errors import JaxsdError
from jaxsd.writing import Writer, one_ahead


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)

    def held(count: int) -> int:
        """Bytes that are held when the last batch begins."""
        file, found = tmp_path / f"{count}.txt", []

        class Observed(Painter):
            def start(self, prompts, seeds, **others):
                if count - 1 in seeds:
                    gc.collect()
                    # Not Python's table of all names, which grows in jumps when paths are made
                    ours = [tracemalloc.Filter(False, pathlib.__file__)]
                    taken = tracemalloc.take_snapshot().filter_traces(ours)
                    found.append(sum(trace.size for trace in taken.statistics("filename")))
                return super().start(prompts, seeds, **others)

        monkeypatch.setattr(model, "load", lambda options: model.Session(options, Observed()))
        file.write_text("seven\n" * count)
        tracemalloc.start()
        how = {"sampler": "ddim", "steps": 1, "guidance_scale": 1.0}
        assert draw(file, tmp_path / str(count), batch_size=8, **how).images == count
        tracemalloc.stop()
        return found[0]

    held(50)  # what is imported and remembered once
    # 16 pictures that wait and two batches, of 60 kB each with their floats, may be there or not
    assert held(3000) < held(200) + 1_000_000  # 2800 jobs take twice as much, pictures 34 MB


def test_an_error_in_a_thread_is_raised_and_leaves_nothing(tmp_path):
    grey = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JaxsdError, match="cannot write"), Writer(2, 2) as writer:
        for i in range(100):
            writer.write(grey, tmp_path / "file" / f"{i}.png", {})
    with pytest.raises(JaxsdError, match="cannot write"), Writer() as writer:  # at the end, too
        writer.write(grey, tmp_path / "file" / "0.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_interrupted_leaves_whole_files(tmp_path):
    grey = np.zeros((512, 512, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt), Writer(1, 50) as writer:
        for i in range(50):
            writer.write(grey, tmp_path / f"{i}.png", {})
        raise KeyboardInterrupt
    for path in tmp_path.iterdir():
        assert path.suffix == ".png"
        with Image.open(path) as picture:
            picture.load()
    assert len(list(tmp_path.iterdir())) < 50


def test_an_error_drops_no_picture_that_was_handed_over(tmp_path):
    grey = np.zeros((256, 256, 3), np.uint8)
    with pytest.raises(ValueError, match="else"), Writer(1, 50) as writer:
        for i in range(20):
            writer.write(grey, tmp_path / f"{i}.png", {})
        raise ValueError("something else")
    assert len(list(tmp_path.glob("*.png"))) == 20


def test_what_is_held_comes_before_an_error():
    def items():
        yield 0
        yield 1
        raise ValueError("the third")

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match="third"):
        next(ahead)


class Failing(Painter):
    """Which cannot begin what draws seed 4."""

    def start(self, prompts, seeds, **others):
        if 4 in seeds:
            raise JaxsdError("out of memory")
        return super().start(prompts, seeds, **others)


@pytest.mark.parametrize("from_file", [True, False])
def test_what_was_computed_before_an_error_is_written(from_file, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    monkeypatch.setattr(model, "load", lambda options: model.Session(options, Failing()))
    out, how = tmp_path / "out", {"sampler": "ddim", "steps": 1, "batch_size": 2}
    with pytest.raises(JaxsdError, match="out of memory"):
        if from_file:
            file = tmp_path / "a.txt"
            file.write_text("seven\n" * 6)
            draw(file, out, **how)
        else:
            sample.run(sample.Options(("seven",), num_images=6, model="digits", out=out, **how))
    assert len(list(out.glob("*-seed*.png"))) == 4


def test_items_are_asked_for_one_ahead():
    asked = []

    def items():
        for i in range(3):
            asked.append(i)
            yield i

    seen = [(item, len(asked)) for item in one_ahead(items())]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert [*one_ahead([])] == []
