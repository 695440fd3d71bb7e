"""`train.py vae`."""

import dataclasses
from typing import Annotated, Any

import numpy as np

from jaxsd.cli.recipes.common import Common, MakeBatches
from jaxsd.cli.recipes.evaluation import VAEEvaluation
from jaxsd.cli.recipes.pictures import PictureData
from jaxsd.errors import JaxsdError
from jaxsd.training.options import one_of

# Far along the endless data, so that training meets these no sooner than any others
FAR = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAE(PictureData, VAEEvaluation, Common):
    """The autoencoder between pictures and latents."""

    model: str | None = None
    """Start from this model's VAE: a folder, a file under CompVis' names (of the shapes that the
    family says), the name of a model that ships, or a Hub id. The decoder alone is trained with
    --freeze "encoder.*" "quant_conv.*"."""
    family: str = "digits"
    """Whose VAE's shapes; of a model in a folder its own."""
    batch_size: int = 32
    kl_weight: float = 1e-6
    """Weight of the KL divergence (mean over latents) against reconstruction (mean over pixels)."""
    reconstruction: Annotated[str, one_of("l1", "l2")] = "l1"
    perceptual: str | None = None
    """Adds the LPIPS distance: a file with its weights, or two with a comma between them, such as
    torchvision's vgg16-397923af.pth,vgg.pth of lpips."""
    perceptual_weight: float = 1.0
    discriminator_start: int | None = None
    """The update with which a discriminator begins to be trained and asked; by default never. Its
    optimizer is that of the VAE, usually with --beta1 0.5 --beta2 0.9."""
    discriminator_weight: float = 0.5
    """Of its opinion, which is scaled to the reconstruction's gradient at the last layer."""
    discriminator_layers: int = 3
    """Convolutions with stride but one; the patches that it judges are 70 pixels wide with 3."""
    discriminator_norm: Annotated[str, one_of("group", "batch")] = "group"
    """Over groups of channels of each picture or, as in taming-transformers, over a whole batch."""
    keep_scaling_factor: bool = False
    """Keep the model's own factor on the latents, for a UNet that knows it; do not measure it."""

    def build(self) -> tuple[object, MakeBatches]:
        from jaxsd import data
        from jaxsd.objectives.vae import VAE as Objective

        for name in ("kl_weight", "perceptual_weight", "discriminator_weight"):
            if not getattr(self, name) >= 0:
                raise JaxsdError(f"{name} must be at least 0, not {getattr(self, name)}")
        # Before the pictures, of which many are read
        adversary, perceptual = self._adversary(), _lpips(self.perceptual)
        config, initial = _start(self.model, self.family)
        dataset = self.open_data(self.seed, self.batch_size, self.workdir)
        objective = Objective(
            config,
            _samples(dataset, config.downscale),
            self.kl_weight,
            self.reconstruction,
            initial,
            perceptual,
            self.perceptual_weight,
            adversary,
            self.keep_scaling_factor,
            self.dtype,
        )
        return objective, lambda start, stop: data.batches(
            dataset, self.batch_size, start, stop, None, self.rows(), self.num_workers
        )

    def evaluators(self, objective: Any) -> list[Any]:
        return self.vae_evaluators(objective)

    def _adversary(self) -> Any:
        from jaxsd.models.discriminator import DiscriminatorConfig
        from jaxsd.objectives.vae import Adversary

        if self.discriminator_start is None:
            return None
        if self.accumulate > 1 and self.discriminator_norm == "batch":
            raise JaxsdError(
                "accumulate: --discriminator-norm batch is over a whole batch, not part by part; "
                "take group, or --remat full to save memory"
            )
        if self.discriminator_start < 0:
            raise JaxsdError(
                f"discriminator_start must be at least 0, not {self.discriminator_start}"
            )
        try:
            config = DiscriminatorConfig(
                layers=self.discriminator_layers, norm=self.discriminator_norm
            )
        except ValueError as error:
            raise JaxsdError(f"discriminator_layers: {error}") from None
        return Adversary(config, self.discriminator_start, self.discriminator_weight)


def _start(model: str | None, family: str) -> tuple[Any, Any]:
    """The config of the VAE, and the parameters it starts from, None for new ones."""
    from jaxsd.components import load_component
    from jaxsd.families import get_family
    from jaxsd.hub import find
    from jaxsd.models import VAEConfig

    config = get_family(family).vae
    path = None if model is None else find(model)
    if path is None or path.is_file():
        if config is None:
            raise JaxsdError(f"family {family!r} has no VAE")
        return config, None if path is None else _single(path, config)
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    component = load_component(folder, np.float32, kind="vae")
    if not isinstance(component.net.config, VAEConfig):
        raise JaxsdError(f"{folder} is an AutoencoderTiny, which is not trained here")
    return component.net.config, component.params


def _single(file: Any, config: Any) -> Any:
    """The VAE in a checkpoint of a whole model, or of a VAE alone with whatever trained it."""
    from jaxsd.components import make_net
    from jaxsd.weights import single
    from jaxsd.weights.headers import read_entries
    from jaxsd.weights.tensors import read

    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    entries = {
        name.removeprefix(single.VAE.prefix): entry for name, entry in read_entries(file).items()
    }
    entries = {name: entry for name, entry in entries.items() if name.startswith(parts)}
    net = make_net(config)
    if "encoder.conv_norm_out.weight" not in entries:  # not under diffusers' names
        entries = single.select(entries, single.VAE._replace(prefix=""), net.shapes)
    return read(entries, net, np.float32, None, file)


def _samples(dataset: Any, multiple: int) -> np.ndarray:
    """Pictures of one shape, float32 in [-1, 1], to look at and to measure the latents on.

    1024 of 128x128 pixels or fewer, fewer of larger ones.
    """
    first = dataset[FAR]["image"]
    if any(side % multiple for side in first.shape[:2]):
        raise JaxsdError(
            f"pictures of {first.shape[1]}x{first.shape[0]} pixels do not fit this VAE, whose "
            f"latents are {multiple} times smaller: choose a resolution that divides by {multiple}"
        )
    count = max(8, min(1024, (1 << 24) // (first.shape[0] * first.shape[1])))
    found = [dataset[FAR + i]["image"] for i in range(count)]
    samples = np.stack([image for image in found if image.shape == first.shape])
    return samples / np.float32(127.5) - 1 if samples.dtype == np.uint8 else samples


def _lpips(files: str | None) -> Any:
    from jaxsd.components import Component
    from jaxsd.models.perceptual import LPIPS
    from jaxsd.nn import Net
    from jaxsd.weights.lpips import load_lpips

    if files is None:
        return None
    net = Net(LPIPS())
    return Component(net, load_lpips(files.split(","), net))
