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
    # Tr (C_a C_b)^(1/2) = Tr (R C_b R)^(1/2) with R = C_a^(1/2): symmetric, so no complex roots.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    gap = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return float(max(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0))


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
