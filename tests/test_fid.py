"""FID and KID on given features: streamed, in closed form, against scipy's root, and from files."""

import itertools
import pickle

import numpy as np
import pytest
from scipy.linalg import sqrtm

from jaxsd.data import digits
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import features, metrics, statistics
from jaxsd.evaluation.judge import judges, real_scans

rng = np.random.default_rng(0)


def correlated(count, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


def pytorch_fid(a, b):
    """The formula as pytorch-fid works it out: the root of the product itself."""
    root = sqrtm(a.covariance @ b.covariance).real
    gap = ((a.mean - b.mean) ** 2).sum()
    return gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)


def frechet(a, b):
    return metrics.gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


# --- Statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e6])
def test_batches_of_any_size_give_the_covariance_of_all(offset):
    x = correlated(300, 6) + offset
    parts = np.split(x, [1, 2, 50, 51, 200])
    found = statistics.gather(parts)
    assert found.count == 300
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(found.rows, x.astype(np.float32))


def test_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr(statistics, "KEPT", 25)
    x = correlated(100, 3)
    found = statistics.gather(iter(np.split(x, 10)))
    assert found.rows.shape == (25, 3)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False))


def test_rows_are_kept_from_anywhere(monkeypatch):
    """Folders may be sorted by class: the first rows alone would not be like the others."""
    monkeypatch.setattr(statistics, "KEPT", 500)
    numbers = np.arange(2000.0)[:, None]
    (kept,) = statistics.gather(np.split(numbers, 40)).rows.T
    assert len({*kept}) == 500  # each at most once
    assert abs(kept.mean() - 999.5) < 4 * 577 / 500**0.5 * (3 / 4) ** 0.5
    assert 75 < (kept < 500).sum() < 175


@pytest.mark.parametrize("batches", [[], [np.zeros((1, 4))]])
def test_too_few_pictures_are_refused(batches):
    with pytest.raises(JaxsdError, match="two pictures"):
        statistics.gather(batches)


def test_what_is_not_finite_is_refused():
    with pytest.raises(JaxsdError, match="diverged"):
        statistics.gather([np.array([[0.0, np.nan]])])


# --- Fréchet distance ------------------------------------------------------------------------


@pytest.mark.parametrize("size, count", [(20, 400), (64, 1000)])
def test_frechet_distance_is_pytorch_fids(size, count):
    a, b = (statistics.gather([correlated(count, size, seed)]) for seed in (0, 1))
    assert frechet(a, b) == pytest.approx(pytorch_fid(a, b), rel=1e-9)


def test_fewer_pictures_than_features():
    """Singular covariances, whose root scipy finds with an error of 1e-4: here it is exact."""
    x = correlated(40, 64)
    a, b = statistics.gather([x]), statistics.gather([x + 0.25])
    assert frechet(a, b) == pytest.approx(64 * 0.25**2, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-4)


def test_statistics_of_different_networks_are_not_compared():
    a, b = (statistics.gather([correlated(10, size)]) for size in (3, 4))
    with pytest.raises(JaxsdError, match="different networks"):
        statistics.distances(a, b)


# --- Kernel distance -------------------------------------------------------------------------


def test_squared_mmd_is_its_definition():
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(5, 4)) + 1

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    def among(x):
        return np.mean([kernel(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)])

    between = np.mean([kernel(x, y) for x in a for y in b])
    for block in (1, 2, 100):
        found = metrics.squared_mmd(a, b, block)
        assert found == pytest.approx(among(a) + among(b) - 2 * between, rel=1e-12)


def test_squared_mmd_is_unbiased():
    """Its mean over many draws is 0 for equal distributions, unlike that of the biased estimate."""
    draws = [metrics.squared_mmd(*rng.normal(size=(2, 10, 3))) for _ in range(500)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert np.min(draws) < 0


def test_kernel_distance_over_subsets():
    a, b = rng.normal(size=(400, 5)), rng.normal(size=(300, 5)) + 0.3
    mean, spread = metrics.kernel_distance(a, b, subsets=40, size=100)
    assert (mean, spread) == metrics.kernel_distance(a, b, subsets=40, size=100)
    assert mean != metrics.kernel_distance(a, b, subsets=40, size=100, seed=1)[0]
    whole = metrics.squared_mmd(a, b)
    assert abs(mean - whole) < spread and 0 < spread < whole
    # The subsets cannot be larger than a set: then they are the set itself.
    same, none = metrics.kernel_distance(a[:50], b[:50], subsets=3)
    assert same == pytest.approx(metrics.squared_mmd(a[:50], b[:50])) and none < 1e-12


def test_distances_tell_more_where_rows_were_kept():
    a, b = (statistics.gather([correlated(30, 4, seed)]) for seed in (0, 1))
    assert statistics.distances(a, b).keys() == {"fd", "kd", "kd_spread", "kd_all"}
    names = {"fid", "kid", "kid_spread", "kid_all"}
    assert statistics.distances(a, b, "fid", "kid").keys() == names
    bare = statistics.Statistics(0, b.mean, b.covariance, np.zeros((0, 4)))
    assert statistics.distances(a, bare).keys() == {"fd"}


# --- Files -----------------------------------------------------------------------------------


def test_statistics_come_back_from_their_file(tmp_path):
    kept = statistics.gather([correlated(30, 4)])
    statistics.save(kept, tmp_path / "reference.npz")
    found = statistics.load(tmp_path / "reference.npz")
    assert found.count == 30
    for name in ("mean", "covariance", "rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(kept, name))
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


def test_files_of_pytorch_fid_are_read(tmp_path):
    x = correlated(30, 4)
    np.savez_compressed(tmp_path / "theirs.npz", mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
    found = statistics.load(tmp_path / "theirs.npz")
    assert found.count == 0 and len(found.rows) == 0
    ours = statistics.gather([correlated(30, 4, 1)])
    expected = metrics.frechet_distance(x, correlated(30, 4, 1))
    assert statistics.distances(ours, found) == {"fd": pytest.approx(expected)}


class Loud:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda f: np.savez(f, mu=np.zeros(3)), "sigma"),
        (lambda f: np.savez(f, mu=np.array([Loud()]), sigma=np.eye(1)), "no statistics"),
        (lambda f: f.write(pickle.dumps(Loud())), "no statistics"),
        (lambda f: f.write(b"PK\x03\x04 and no more"), "no statistics"),
        (lambda f: None, "no statistics"),
        (lambda f: np.savez(f, mu=np.zeros(3), sigma=np.eye(4)), "do not belong together"),
        (lambda f: np.savez(f, mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "not finite"),
        (lambda f: np.savez(f, mu=np.array(["a"]), sigma=np.eye(1)), "no statistics"),
    ],
)
def test_broken_files_are_refused_and_nothing_is_executed(tmp_path, write, message):
    with open(tmp_path / "bad.npz", "wb") as stream:
        write(stream)
    with pytest.raises(JaxsdError, match=message):
        statistics.load(tmp_path / "bad.npz")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(JaxsdError, match="cannot read"):
        statistics.load(tmp_path / "none.npz")


# --- The digit judge's features --------------------------------------------------------------


def test_digit_pictures_have_the_features_of_their_scans():
    scans, _ = real_scans("test")
    expected = judges().features(scans[:20])
    pixels = np.uint8(np.rint((scans[:20] + 1) * 127.5)).reshape(-1, 8, 8, 1)
    # Scans have 17 levels: a level is 16 of the 256.
    np.testing.assert_allclose(features.digit_features(pixels), expected, atol=0.15)
    drawn = np.random.default_rng(0)
    coloured = [digits.colour_scan((s.reshape(8, 8) + 1) / 2, drawn)[0] for s in scans[:20]]
    pictures = np.uint8(np.rint(np.stack(coloured) * 255))
    np.testing.assert_allclose(features.digit_features(pictures), expected, atol=0.5)


def test_the_digit_judge_knows_digits_only():
    with pytest.raises(JaxsdError, match="weights of Inception"):
        features.digit_features(np.zeros((2, 64, 64, 3), np.uint8))
