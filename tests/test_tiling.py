"""Tiles cover the picture once, whatever its size, and blend without seams."""

import numpy as np
import pytest

from jaxsd.tiling import tiled


def double(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, 1).repeat(2, 2)


def halve(x: np.ndarray) -> np.ndarray:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (64, 17), (3, 5)])
def test_what_looks_at_single_places_is_the_same_in_tiles(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    seen = []

    def function(part):
        seen.append(part.shape)
        return double(part)

    np.testing.assert_allclose(tiled(function, x, 8, 2), double(x), rtol=1e-5, atol=1e-6)
    assert len(set(seen)) == 1  # one shape, one program
    assert seen[0][1:3] == tuple(min(8, side) for side in size)


@pytest.mark.parametrize("size", [(40, 24), (54, 62), (16, 8)])
def test_towards_smaller(size):
    x = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    np.testing.assert_allclose(tiled(halve, x, 16, 0.5), halve(x), rtol=1e-5, atol=1e-6)


def test_differing_tiles_blend_gradually():
    """Tiles of constants, each another one: no step between neighbours is as large as theirs."""
    values = iter(range(100))
    out = tiled(
        lambda part: np.full_like(part, next(values)), np.zeros((1, 8, 80, 1), np.float32), 16, 1
    )
    steps = np.abs(np.diff(out[0, 0, :, 0]))
    assert out.max() > 4 and steps.max() < 0.5


def test_a_vae_in_tiles(monkeypatch):
    """As near to the whole as diffusers' tiling of the same network comes."""
    torch = pytest.importorskip("torch")
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=32,
    ).eval()
    latents = torch.randn(1, 4, 48, 40)
    with torch.no_grad():
        whole = vae.decode(latents).sample.numpy()

        def decode(part):
            return np.moveaxis(
                vae.decode(torch.from_numpy(np.moveaxis(part, -1, 1))).sample.numpy(), 1, -1
            )

        ours = tiled(decode, np.moveaxis(latents.numpy(), 1, -1), 16, 2)
        vae.enable_tiling()
        theirs = vae.decode(latents).sample.numpy()
    error = np.abs(np.moveaxis(ours, -1, 1) - whole).mean()
    assert 0 < error <= 1.1 * np.abs(theirs - whole).mean()
