"""What TensorBoard shows of a training is what the training logged: numbers and pictures."""

import io
import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image
from test_logs import events

from jaxsd.cli import run_command

SHARED = ["--steps", "4", "--batch-size", "8", "--warmup-steps", "1", "--log-every", "2"]
SHARED += ["--sample-every", "2", "--eval-every", "2", "--eval-count", "8", "--no-report"]
DRAWN = ["--eval-samples", "8", "--eval-steps", "2"]


def shown(folder):
    """(numbers, pictures) by name and step, as TensorBoard reads them from its files."""
    numbers, pictures = defaultdict(dict), defaultdict(dict)
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore
            EventAccumulator,
        )
    except ImportError:
        for event in events(folder):
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures[value.tag][event.step] = value.image.encoded_image_string
                else:
                    numbers[value.tag][event.step] = value.simple_value
        return numbers, pictures
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    for tag in reader.Tags()["scalars"]:
        numbers[tag] = {event.step: event.value for event in reader.Scalars(tag)}
    for tag in reader.Tags()["images"]:
        pictures[tag] = {event.step: event.encoded_image_string for event in reader.Images(tag)}
    return numbers, pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "told", "seen"),
    [
        (
            ["ddpm"],
            {"loss", "loss_t0", "loss_t3", "eval/loss", "eval/loss_t3"},
            {"samples/preview"},
        ),
        (
            ["vae"],
            {"loss", "kl", "psnr", "reconstruction/psnr", "reconstruction/l1"},
            {"samples/preview", "reconstruction/grid"},
        ),
        (
            ["text-to-image", "--model", "digits", "--data", "digits", *DRAWN],
            {"loss", "loss_t0", "loss_t3", "eval/loss", "drawn/fd"},
            {"samples/preview", "drawn/grid"},
        ),
    ],
    ids=["ddpm", "vae", "text-to-image"],
)
def test_curves_and_pictures_open_in_tensorboard(recipe, told, seen, tmp_path):
    run_command("train", [*recipe, *SHARED, "--workdir", str(tmp_path)])
    numbers, pictures = shown(tmp_path / "tensorboard")
    told |= {"learning_rate", "grad_norm", "images_per_second", "memory_gib", "skipped"}
    assert told <= numbers.keys()
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    logged = {(row["step"], n): v for row in rows for n, v in row.items() if n != "step"}
    found = {(step, tag): v for tag, values in numbers.items() for step, v in values.items()}
    assert found.keys() == logged.keys()
    for key, value in logged.items():
        value = np.nan if value is None else value
        assert found[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key

    assert pictures.keys() == seen
    for tag, values in pictures.items():
        assert values.keys() == {2, 4}
        for step, data in values.items():
            with Image.open(tmp_path / f"{tag}_{step:07}.png") as file:
                wanted = np.asarray(file)
            with Image.open(io.BytesIO(data)) as picture:
                assert np.array_equal(np.asarray(picture), wanted)
