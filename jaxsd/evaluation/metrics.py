"""Distances between a set of samples and a set of real data; each states its paper.

Pure numpy and scikit-learn. Sets are arrays [n, d], one row a sample, in any units; what the rows
are (pixels or features) is the caller's choice.
"""

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.svm import SVC


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance between Gaussians fitted to a [n, d] and b [m, d].

    |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; with Inception
    features this is the FID of Heusel et al. 2017, arXiv:1706.08500, eq. 6). Zero is best; biased
    upwards for few samples, so compare only equal counts. NaN for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return gaussian_distance(a.mean(axis=0), cov_a, b.mean(axis=0), cov_b)


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """`frechet_distance` of two Gaussians, means [d] and covariances [d, d].

    Covariances may be singular, as those of fewer samples than features are.
    """
    # Tr (C_a C_b)^(1/2) is the sum of the singular values of A^T B, where C_a = A A^T, C_b = B B^T:
    # no root of an eigenvalue that should be zero, and no complex ones.
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    gap = ((mean_a - mean_b) ** 2).sum()
    return float(max(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A [d, rank] of covariance = A A^T."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(values.dtype).eps * values.max()
    return vectors[:, kept] * np.sqrt(values[kept])


def squared_mmd(a: np.ndarray, b: np.ndarray, block: int = 1000) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of a [n, d] and b [m, d].

    With the kernel (x.y / d + 1)^3: the KID of Bińkowski et al. 2018 (arXiv:1801.01401, sec. 4;
    the estimate is eq. 3 of Gretton et al. 2012) where the rows are Inception features. Zero is
    best, and being unbiased it may fall below. NaN for fewer than two rows. Products are formed
    `block` rows at a time.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def cubes(products: np.ndarray) -> float:
        k = products / a.shape[1] + 1
        return float((k * k * k).sum())  # five times as fast as a power

    def total(x: np.ndarray, y: np.ndarray) -> float:
        return sum(cubes(x[i : i + block] @ y.T) for i in range(0, len(x), block))

    def of_pairs(x: np.ndarray) -> float:
        """The mean over pairs of different rows."""
        return (total(x, x) - cubes((x * x).sum(axis=1))) / (len(x) * (len(x) - 1))

    return float(of_pairs(a) + of_pairs(b) - 2 * total(a, b) / (len(a) * len(b)))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of `squared_mmd` over random subsets: the KID as it is reported.

    Each subset has `size` rows of either set, drawn without replacement: as many as the smaller
    set has, if those are fewer (with equal sets no spread is left then).
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    values = [
        squared_mmd(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, projections: int = 256, seed: int = 0
) -> float:
    """Mean 2-Wasserstein distance between one-dimensional projections of a [n, d] and b [m, d].

    Random unit directions (Rabin et al. 2011; Karras et al. 2018, arXiv:1710.10196, sec. 5), each
    distance taken between min(n, m) quantiles, so that the counts may differ. Zero is best; in
    units of the data.
    """
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    count = min(len(a), len(b))
    levels = (np.arange(count) + 0.5) / count
    quantiles_a = np.quantile(a @ directions, levels, axis=0)
    quantiles_b = np.quantile(b @ directions, levels, axis=0)
    return float(np.sqrt(((quantiles_a - quantiles_b) ** 2).mean(axis=0)).mean())


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    distance = cdist(x, x)
    k = min(k, len(x) - 1)
    return np.partition(distance, k, axis=1)[:, k]  # column 0 is the point itself


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """(precision, recall): how much of fake [m, d] lies on real [n, d], and the reverse.

    A set covers the balls around its points that reach their k-th neighbours (Kynkäänniemi et al.
    2019, arXiv:1904.06991, eq. 1-3). Precision is the share of fakes that the real set covers
    (fidelity), recall the share of reals that the fakes cover (variety); one is best. Repeated
    samples shrink the balls, which lowers recall. Memory grows as m^2.
    """
    distance = cdist(real, fake)
    precision = (distance <= _radii(real, k)[:, None]).any(axis=0).mean()
    recall = (distance <= _radii(fake, k)[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def one_nn_two_sample(real: np.ndarray, fake: np.ndarray, seed: int = 0) -> float:
    """Leave-one-out accuracy of telling real [n, d] from fake [m, d] by the nearest neighbour.

    Lopez-Paz & Oquab 2017, arXiv:1610.06545; Xu et al. 2018, arXiv:1806.07755. One half is best;
    one means the sets lie apart, below one half that the fakes are copies of these reals. The
    larger set is subsampled, since with unequal counts the accuracy means nothing.
    """
    rng = np.random.default_rng(seed)
    count = min(len(real), len(fake))
    both = np.concatenate([rng.permutation(real)[:count], rng.permutation(fake)[:count]])
    is_fake = np.arange(2 * count) >= count
    distance = cdist(both, both)
    np.fill_diagonal(distance, np.inf)
    return float((is_fake[distance.argmin(axis=1)] == is_fake).mean())


def nearest_neighbour_distance(samples: np.ndarray, train: np.ndarray) -> float:
    """Mean Euclidean distance from samples [n, d] to their nearest training example [m, d].

    Read it beside the same figure for held-out real data: far below, the model has memorised; far
    above, it has left the data (van den Burg & Williams 2021, arXiv:2106.03216).
    """
    return float(cdist(samples, train).min(axis=1).mean())


def classification_accuracy_score(
    samples: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """CAS: accuracy on real test data of a classifier trained on labelled samples [n, d].

    Ravuri & Vinyals 2019, arXiv:1905.10887; the classifier is SVC(C=10), as the judge. Low when
    samples miss their class or cover it poorly. NaN when the labels hold fewer than two classes.
    """
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(SVC(C=10).fit(samples, labels).score(test, test_labels))
