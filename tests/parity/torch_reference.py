"""What the parity tests share: random torch modules, their weights as `Params`, errors."""

import jax.numpy as jnp
import numpy as np
import torch

from jaxsd.nn import Net, Params

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> torch.nn.Module:
    """Adds noise to every parameter, so that no norm is left at ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def names_and_shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def to_params(module: torch.nn.Module, net: Net, prefix: str = "") -> Params:
    """A torch module's weights under our names, which must be its own (after `prefix`)."""
    assert names_and_shapes(module, prefix) == net.shapes
    # Copied: jax may otherwise share torch's memory.
    return {
        prefix + name: jnp.array(value.detach().numpy())
        for name, value in module.state_dict().items()
    }


def nchw(x: np.ndarray) -> torch.Tensor:
    """A picture of ours for torch."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative_error(ours, reference) -> float:
    """max |ours - reference| / max |reference|."""
    ours = np.asarray(ours)
    reference = reference.detach().numpy() if torch.is_tensor(reference) else reference
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
