"""The report on a digit model: every metric in one row, beside controls that say what it means.

Judge accuracy alone is worthless: the ten class means score 1.0. A model is good when it beats
the per-class Gaussian on `fd_features` and `one_nn`, and `nn_distance` stays near that of held-out
real scans (2.15, the row "real test" of `controls`): well below, it has memorised.
Differences under .2 in `fd_features` from one sampling seed are noise (sd over seeds .065 to .13).
The training scans, "real train (floor)", score .82: no model can be expected to do better.
"real test" is compared with itself; only its judge_accuracy and nn_distance mean anything.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxsd.data import digits
from jaxsd.errors import JaxsdError
from jaxsd.evaluation import metrics
from jaxsd.evaluation.judge import flatten_scans, judges, real_scans

Row = dict[str, float]
Summary = dict[str, float | tuple[float, float]]  # figures, or (mean, spread over sampling seeds)

# key -> (heading, decimals), in the order of the table.
COLUMNS: dict[str, tuple[str, int]] = {
    "fd_features": ("FD feat", 2),
    "fd_pixels": ("FD pix", 2),
    "swd": ("SWD", 3),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "one_nn": ("1-NN two-sample", 2),
    "judge_accuracy": ("judge acc", 3),
    "cas": ("CAS", 3),
    "nn_distance": ("NN to train", 2),
    "stroke_accuracy": ("stroke acc", 3),
    "background_accuracy": ("background acc", 3),
    "all_right": ("all right", 3),
    "fid": ("FID", 2),
    "kid": ("KID", 5),
    "kid_spread": ("KID sd of subsets", 5),
    "kid_all": ("KID of all", 5),
    "fd": ("FD feat", 2),
    "kd": ("KD feat", 5),
    "kd_spread": ("KD sd of subsets", 5),
    "kd_all": ("KD of all", 5),
    "clip_score": ("CLIP score", 2),
    "rmse_to_teacher": ("RMSE to teacher", 4),
    "rmse_latents": ("RMSE of latents", 4),
    "passes": ("passes", 0),
    "ms_per_image": ("ms/image", 2),
}


def evaluate_scans(samples: np.ndarray, labels: np.ndarray | None = None, seed: int = 0) -> Row:
    """Every metric of samples [n, 8, 8] in [-1, 1] (clipped) against the 450 held-out scans.

    labels [n] are the digits that were asked for, -1 where none was; without them judge_accuracy
    and cas are NaN. Use 2000 samples: the published figures do. seed chooses the subsample of
    the two-sample test. About a second for 2000 samples.

    fd_features, precision and recall (k = 5) live in the judge's feature space; fd_pixels, swd
    (256 projections), one_nn (450 against 450), cas and nn_distance (mean) in pixels.
    Raises JaxsdError for samples of another shape, that are not finite, or labels that do not fit.
    """
    x = flatten_scans(samples)
    train, _ = real_scans("train")
    test, test_labels = real_scans("test")
    features, test_features = judges().features(x), judges().features(test)
    precision, recall = metrics.precision_recall(test_features, features, k=5)
    row = {
        "fd_features": metrics.frechet_distance(features, test_features),
        "fd_pixels": metrics.frechet_distance(x, test),
        "swd": metrics.sliced_wasserstein(x, test),
        "precision": precision,
        "recall": recall,
        "one_nn": metrics.one_nn_two_sample(test, x, seed),
        "judge_accuracy": float("nan"),
        "cas": float("nan"),
        "nn_distance": metrics.nearest_neighbour_distance(x, train),
    }
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(x),):
            raise JaxsdError(f"expected {len(x)} labels, one a sample, got {list(labels.shape)}")
        asked = labels >= 0
        if asked.any():
            right = judges().predict(x[asked]) == labels[asked]
            row["judge_accuracy"] = float(right.mean())
            row["cas"] = metrics.classification_accuracy_score(
                x[asked], labels[asked], test, test_labels
            )
    return row


def controls(seed: int = 0, count: int = 2000) -> dict[str, Row]:
    """Rows of what is no generative model, by name: the scale on which a model is read."""
    sets = control_sets(seed, count)
    return {name: evaluate_scans(x, y, seed) for name, (x, y) in sets.items()}


def control_sets(seed: int, count: int) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """The controls' scans [n, 64] in [-1, 1] and digits [n].

    The real splits, count training scans drawn with replacement, Gaussians fitted to each class,
    the class means, the training scans less the digits 3 and 7, and uniform noise.
    """
    rng = np.random.default_rng(seed)
    train, labels = real_scans("train")
    test, test_labels = real_scans("test")
    drawn = rng.integers(len(train), size=count)
    balanced = np.arange(count) % 10
    means = np.stack([train[labels == digit].mean(axis=0) for digit in range(10)])
    gaussian = np.empty((count, train.shape[1]))
    for digit in range(10):
        # Pixels that never vary within a class make the covariance singular, hence the ridge.
        covariance = np.cov(train[labels == digit], rowvar=False) + 1e-6 * np.eye(64)
        at = balanced == digit
        gaussian[at] = rng.multivariate_normal(means[digit], covariance, size=at.sum())
    kept = ~np.isin(labels, (3, 7))
    return {
        "real test": (test, test_labels),
        "real train (floor)": (train, labels),
        "memorised resample": (train[drawn], labels[drawn]),
        "per-class Gaussian": (gaussian, balanced),
        "class means": (means[balanced], balanced),
        "two classes dropped": (train[kept], labels[kept]),
        "uniform noise": (rng.uniform(-1, 1, size=(count, 64)), None),
    }


def evaluate_pictures(
    pictures: np.ndarray, wanted: Sequence[str | digits.Attributes], seed: int = 0
) -> Row:
    """How well pictures [n, 32, 32, 3] (uint8, or floats in [0, 1]) show what was asked for.

    wanted[i] is the prompt of picture i, or its (digit, stroke, background) with None for what is
    free. Strokes, backgrounds and scans are measured by `digits.recover`; the row is that of
    `evaluate_scans` on the scans (judge_accuracy is the digit accuracy), with stroke_accuracy,
    background_accuracy, and all_right: the share of pictures in which whatever was asked for is
    right. An accuracy nobody asked for is NaN. Raises JaxsdError for prompts that
    `digits.parse_caption` does not know or counts that differ.
    """
    pictures = np.asarray(pictures)
    if len(pictures) != len(wanted):
        raise JaxsdError(f"{len(pictures)} pictures, but {len(wanted)} prompts: expected as many")
    if pictures.dtype == np.uint8:
        pictures = pictures / 255
    asked = [digits.parse_caption(w) if isinstance(w, str) else w for w in wanted]
    scans, strokes, backgrounds = digits.recover(pictures)
    scans = 2 * scans - 1
    seen = (judges().predict(scans), strokes, backgrounds)
    right = np.array(
        [
            [
                np.nan if want is None else float(want == found[i])
                for want, found in zip(a, seen, strict=True)
            ]
            for i, a in enumerate(asked)
        ]
    )
    labels = np.array([-1 if digit is None else digit for digit, _, _ in asked])
    row = evaluate_scans(scans, labels, seed)
    row["stroke_accuracy"] = _mean_of_known(right[:, 1])
    row["background_accuracy"] = _mean_of_known(right[:, 2])
    row["all_right"] = float(np.nanmin(np.c_[right, np.ones(len(right))], axis=1).mean())
    return row


def picture_controls(seed: int = 0, count: int = 1000) -> dict[str, Row]:
    """`evaluate_pictures` of the controls' scans, rendered in random colours.

    "real train (floor)" is what a perfect model would get.
    """
    rows = {}
    for name, (scans, labels) in control_sets(seed, count).items():
        if labels is None:
            continue  # noise has no stroke to give a colour to
        rng = np.random.default_rng(seed)
        scans = (np.clip(scans, -1, 1).reshape(-1, digits.SCAN_SIZE, digits.SCAN_SIZE) + 1) / 2
        drawn = [digits.colour_scan(scan, rng) for scan in scans]
        wanted = [(int(label), s, b) for label, (_, s, b) in zip(labels, drawn, strict=True)]
        pictures = np.stack([picture for picture, _, _ in drawn])
        rows[name] = evaluate_pictures(pictures, wanted, seed)
    return rows


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def summarise(rows: Sequence[Mapping[str, float]]) -> Summary:
    """(mean, standard deviation) of each metric over rows, one a sampling seed.

    The standard deviation is the sample one (n - 1), NaN for a single row.
    """
    summary: Summary = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        summary[key] = (float(values.mean()), sd)
    return summary


def format_table(
    rows: Mapping[str, Mapping[str, float | tuple[float, float]]],
    columns: Mapping[str, tuple[str, int]] = COLUMNS,
) -> str:
    """Rows by name as an aligned Markdown table; cells may be figures or (mean, sd).

    columns: (heading, decimals) by key; those appear that some row has. What is missing or NaN
    shows as –.
    """
    keys = [key for key in columns if any(key in row for row in rows.values())]
    table = [["", *(columns[key][0] for key in keys)]]
    for name, row in rows.items():
        table.append([name, *(_cell(row.get(key), columns[key][1]) for key in keys)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * max(width, 3) for width in widths])
    lines = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table)
    return "\n".join(lines)


def _cell(value: float | tuple[float, float] | None, decimals: int) -> str:
    mean, sd = value if isinstance(value, tuple) else (value, None)
    if mean is None or np.isnan(mean):
        return "–"
    text = f"{mean:.{decimals}f}"
    return text if sd is None or np.isnan(sd) else f"{text} ± {sd:.{decimals}f}"
