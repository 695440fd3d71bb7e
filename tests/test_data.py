"""Batches are a function of seed and step alone, made of nothing but training scans."""

import itertools

import numpy as np
import pytest

from jaxsd import data
from jaxsd.data import digits
from jaxsd.errors import JaxsdError

NAMES = sorted(data.SOURCES)


def joined(batches):
    """All batches as one, so that runs of different batch size compare."""
    batches = list(batches)
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_the_seed_alone(name):
    first, again, other = (
        joined(data.batches(data.elements(name, "train", seed), 8, 0, 3)) for seed in (5, 5, 6)
    )
    assert_same(first, again)
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize("name", NAMES)
def test_an_element_depends_neither_on_batch_size_nor_on_threads(name):
    dataset = data.elements(name, "train", 0)
    reference = [dataset[i] for i in range(24)]
    for size in (2, 3, 8):
        got = joined(data.batches(dataset, size, 0, 24 // size))
        assert got.keys() == reference[0].keys() - {"caption"}
        for key in got:
            np.testing.assert_array_equal(got[key], [element[key] for element in reference])


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_same_whatever_the_start(name):
    dataset = data.elements(name, "train", 0)
    whole = list(data.batches(dataset, 4, 0, 6))
    for start in (1, 5):
        for got, want in itertools.zip_longest(data.batches(dataset, 4, start, 6), whole[start:]):
            assert_same(got, want)


def test_no_batches_are_left_where_start_is_stop():
    assert list(data.batches(data.elements("digit-scans", "train", 0), 4, 6, 6)) == []


def test_an_epoch_holds_every_training_scan_once_and_the_next_one_is_shuffled_anew():
    scans = digits.load_scans("train")[0]
    dataset = data.elements("digit-scans", "train", 0)
    epochs = [[dataset[e * len(scans) + i] for i in range(len(scans))] for e in range(2)]
    shown = [np.stack([(x["image"][..., 0] + 1) / 2 for x in epoch]) for epoch in epochs]
    for epoch in shown:
        np.testing.assert_array_equal(
            np.unique(epoch.reshape(-1, 64), axis=0), np.unique(scans.reshape(-1, 64), axis=0)
        )
    assert not np.array_equal(*shown)


def test_pictures_show_training_scans_and_none_of_the_others():
    kept, held_out = (digits.load_scans(split)[0].reshape(-1, 64) for split in ("train", "test"))
    batch = joined(data.batches(data.elements("digits", "train", 0), 100, 0, 4))
    seen = digits.recover((batch["image"] + 1) / 2)[0].reshape(-1, 1, 64)
    nearest = [np.linalg.norm(seen - scans, axis=-1).min(1) for scans in (kept, held_out)]
    assert np.all(nearest[0] < nearest[1])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_float32_from_minus_one_to_one(name):
    batch = next(data.batches(data.elements(name, "train", 0), 64, 0, 1))
    assert batch["image"].dtype == np.float32
    assert -1 <= batch["image"].min() < -0.9 and 0.9 < batch["image"].max() <= 1


def test_input_ids_are_the_tokens_of_the_captions():
    def tokenize(caption):
        return np.frombuffer(caption.encode().ljust(80), np.uint8).astype(np.int32)

    dataset = data.elements("digits", "train", 0)
    batch = joined(data.batches(dataset, 4, 2, 5, tokenize))
    assert "caption" not in batch
    want = [tokenize(dataset[i]["caption"]) for i in range(8, 20)]
    np.testing.assert_array_equal(batch["input_ids"], want)


def test_an_unknown_source_is_refused_with_the_names_there_are():
    with pytest.raises(JaxsdError, match="'mnist'.*digit-scans.*digits") as caught:
        data.elements("mnist", "train", 0)
    assert "\n" not in str(caught.value)
