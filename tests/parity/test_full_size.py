"""Stable Diffusion 1.5, 2.1 and XL at full size, random weights, float32, against PyTorch.

    pytest -m full_size tests/parity/test_full_size.py -s

writes each model with benchmarks/random_model.py (7 GB of files at most) and compares it as
`jaxsd compare` does, with its tolerances: minutes on two CPU cores, and up to 17 GB. What it
printed stands in docs/parity.md.
"""

import shutil

import pytest
from test_compare import random_model

import jaxsd.compare as comparing
from jaxsd.families import get_family

pytestmark = [
    pytest.mark.full_size,
    # Torch's tensors, as diffusers turns them into arrays, are not quite up to NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2-v": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
SIDES = {"sd1": 512, "sd2-v": 512, "sdxl": 256}  # pixels; XL's is for time and memory


@pytest.fixture(params=PARAMETERS)
def family(request, tmp_path):
    """(name, folder); the folder does not outlive the test."""
    folder = tmp_path / request.param
    random_model().write(get_family(request.param), folder, dtype="float16")
    yield request.param, folder
    shutil.rmtree(folder)


def test_every_block_and_step(family):
    name, folder = family
    report = comparing.compare(
        folder,
        dtypes=["float32"],
        height=SIDES[name],
        width=SIDES[name],
        sampled=comparing.Sampled(steps=2),
        progress=print,
    )
    print(report.to_text())
    assert report.agrees and not report.notes
    sections = {section.name: section for section in report.sections}
    assert list(sections) == [*PARAMETERS[name], "trajectory"]
    for part, count in PARAMETERS[name].items():
        assert sections[part].about.startswith(f"{count:,} parameters; ")
        assert not sections[part].unmatched
    assert len(sections["unet"].rows["float32"]) > 100
