"""The patch discriminator, and training a VAE against one, as taming-transformers does in torch."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from perceptual_reference import SMALL, Reference
from torch_reference import nchw, nhwc, randomise, relative_error, to_params

from jaxsd.components import Component
from jaxsd.models import VAEConfig
from jaxsd.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from jaxsd.models.perceptual import LPIPS
from jaxsd.nn import Net
from jaxsd.objectives import Now
from jaxsd.objectives.vae import PREFIX, VAE, Adversary

TOLERANCE = 1e-5  # of values, and of gradients against a network's largest
NOW = Now(jax.random.key(5), step=jnp.int32(7))
KL_WEIGHT, PERCEPTUAL_WEIGHT, WEIGHT = 1e-2, 0.7, 0.5


class Discriminator(torch.nn.Module):
    """taming's NLayerDiscriminator, and the same with group norms."""

    def __init__(self, norm: str, channels: int, layers: int = 3):
        super().__init__()
        main = [torch.nn.Conv2d(3, channels, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            outputs, stride = channels * min(2**i, 8), 2 if i < layers else 1
            main.append(torch.nn.Conv2d(width, outputs, 4, stride, 1, bias=norm == "group"))
            if norm == "batch":
                main.append(torch.nn.BatchNorm2d(outputs, track_running_stats=False))
            else:
                main.append(torch.nn.GroupNorm(min(outputs, 32), outputs))
            main.append(torch.nn.LeakyReLU(0.2))
            width = outputs
        main.append(torch.nn.Conv2d(width, 1, 4, 1, 1))
        self.main = torch.nn.Sequential(*main)

    def forward(self, x):
        return self.main(x)


def pictures(height=24, width=32):
    return np.random.default_rng(0).uniform(-1, 1, (3, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_discriminator(norm, layers, report):
    config = DiscriminatorConfig(4, layers, norm)
    torch.manual_seed(0)
    module = randomise(Discriminator(norm, 4, layers)).train()
    net = Net(PatchDiscriminator(config))
    params = to_params(module, net)
    patches = jax.eval_shape(net, params, jnp.asarray(pictures(32))).shape
    assert patches == ((3, 14, 14, 1) if layers == 1 else (3, 2, 2, 1))
    x = pictures(config.smallest, config.smallest)
    report(relative_error(jax.jit(net)(params, jnp.asarray(x)), nhwc(module(nchw(x)))), TOLERANCE)
    with pytest.raises(RuntimeError, match="[Kk]ernel size|too small"):
        module(nchw(x[:, 1:, 1:]))


def test_taming_has_as_many_parameters():
    assert Net(PatchDiscriminator(DiscriminatorConfig(norm="batch"))).size == 2_765_633
    assert PatchDiscriminator(DiscriminatorConfig()).order == (
        "0",
        "2",
        "3",
        "5",
        "6",
        "8",
        "9",
        "11",
    )


# --- Training against it ---------------------------------------------------------------------


@dataclasses.dataclass
class Both:
    """An objective with its parameters, and the same networks in torch."""

    objective: VAE
    params: dict
    vae: torch.nn.Module
    discriminator: torch.nn.Module
    lpips: torch.nn.Module


@pytest.fixture(scope="module")
def both():
    config = VAEConfig(
        sample_size=24,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL.from_config(config.to_json())
    vae = randomise(vae, 1, 0.1)
    discriminator = randomise(Discriminator("batch", 4), 2, 0.1).train()
    lpips = randomise(Reference(SMALL), 3, 0.2)
    with torch.no_grad():
        # So that among so few channels some are never zero: dividing by the length of features that
        # almost vanish makes rounding, torch's too, 14 millionths of the gradient instead of 3
        for name, value in lpips.named_parameters():
            if name.endswith("bias"):
                value.abs_()
    perceptual = Net(LPIPS(SMALL))
    objective = VAE(
        config,
        pictures(),
        KL_WEIGHT,
        perceptual=Component(perceptual, to_params(lpips, perceptual)),
        perceptual_weight=PERCEPTUAL_WEIGHT,
        adversary=Adversary(DiscriminatorConfig(4, 3, "batch"), start=7, weight=WEIGHT),
    )
    own = to_params(discriminator, objective._discriminator)
    params = to_params(vae, objective.net) | {PREFIX + n: v for n, v in own.items()}
    return Both(objective, params, vae, discriminator, lpips)


@pytest.fixture(scope="module")
def ours(both):
    return jax.jit(jax.value_and_grad(both.objective.loss, has_aux=True))


def in_torch(both, begun=True):
    """taming's two losses by two optimizers, each with the gradients of its own network."""
    x = nchw(pictures())
    posterior = both.vae.encode(x).latent_dist
    eps = jax.random.normal(NOW.key, nhwc(posterior.mean).shape)
    rebuilt = both.vae.decode(posterior.mean + posterior.std * nchw(np.asarray(eps))).sample
    lpips = both.lpips(rebuilt, x).mean()
    error = (rebuilt - x).abs().mean() + PERCEPTUAL_WEIGHT * lpips
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    generator = -both.discriminator(rebuilt).mean()
    last = both.vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, generator)]
    weight = WEIGHT * torch.clamp(norms[0] / (norms[1] + 1e-4), 0, 1e4).detach() * begun
    loss = error + KL_WEIGHT * kl + weight * generator
    values = {"lpips": lpips, "kl": kl, "adversarial": generator, "adversarial_weight": weight}
    named = dict(both.vae.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))

    real, fake = both.discriminator(x), both.discriminator(rebuilt.detach())
    hinge = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    named = dict(both.discriminator.named_parameters())
    found = torch.autograd.grad(hinge * begun, named.values())
    grads |= {PREFIX + n: g for n, g in zip(named, found, strict=True)}
    values |= {"discriminator": hinge, "logits_real": real.mean(), "logits_fake": fake.mean()}
    return loss + hinge * begun, values, grads


def check(ours, theirs, report):
    (loss, logged), gradients = ours
    want, values, grads = theirs
    report(relative_error(loss, want), TOLERANCE)
    for name, value in values.items():
        assert float(logged[name]) == pytest.approx(value.item(), rel=TOLERANCE)
    assert gradients.keys() == grads.keys()
    for mine in (True, False):
        names = [name for name in grads if name.startswith(PREFIX) == mine]
        top = max(float(grads[name].abs().max()) for name in names)
        errors = [np.abs(np.asarray(gradients[n]) - grads[n].numpy()).max() for n in names]
        report(float(max(errors)) / max(top, 1e-30), TOLERANCE)


def test_one_scalar_has_the_gradients_of_two_losses(both, ours, report):
    got = ours(both.params, both.objective.aux, {"image": jnp.asarray(pictures())}, NOW)
    check(got, in_torch(both), report)
    (_, logged), gradients = got
    assert logged["adversarial_weight"] > 0
    for part in ("decoder.conv_in", "encoder.conv_in", PREFIX + "main.0"):
        assert np.abs(gradients[f"{part}.weight"]).max() > 1e-6


def test_before_its_start_the_discriminator_has_no_part(both, ours, report):
    early = NOW._replace(step=jnp.int32(6))
    got = ours(both.params, both.objective.aux, {"image": jnp.asarray(pictures())}, early)
    check(got, in_torch(both, begun=False), report)
    _, gradients = got
    assert not any(np.any(g) for name, g in gradients.items() if name.startswith(PREFIX))
