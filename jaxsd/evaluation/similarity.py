"""How close a picture comes to its original: PSNR and SSIM, of uint8 pictures [n, h, w, c]."""

import numpy as np
from scipy.ndimage import correlate1d

from jaxsd.errors import JaxsdError

RADIUS, DEVIATION = 5, 1.5  # of SSIM's Gaussian window, in pixels


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [n] in decibels: 10 log10(255^2 / mean square error).

    Infinite for equal pictures.
    """
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity [n] (Wang et al. 2004, eq. 13), the mean over channels; one is best.

    With the paper's window, an 11x11 Gaussian of deviation 1.5, where it fits into the picture, and
    its constants K1 = .01, K2 = .03; variances are divided by the window's weight, as there.
    JaxsdError for pictures smaller than the window.
    """
    if min(a.shape[1:3]) <= 2 * RADIUS:
        raise JaxsdError(f"SSIM needs pictures of 11x11 pixels, not {a.shape[2]}x{a.shape[1]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean(axis=(1, 2, 3))


def _window(x: np.ndarray) -> np.ndarray:
    """Means under the Gaussian window at all of its places [n, h - 10, w - 10, c]."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / DEVIATION) ** 2)
    for axis in (1, 2):
        x = correlate1d(x, weights / weights.sum(), axis)
    return x[:, RADIUS:-RADIUS, RADIUS:-RADIUS]
