"""`train.py RECIPE`: options as dataclasses, each of which builds its objective and its data."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxsd.errors import JaxsdError


@dataclasses.dataclass(frozen=True)
class Common:
    """Options that every recipe has."""

    workdir: Path
    """Where everything goes. Run the same command again to resume."""
    steps: int = 3000
    """Updates altogether."""
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    """Updates during which the learning rate rises from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after that."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are what is exported."""
    seed: int = 0
    save_every: int = 500
    """Updates between checkpoints."""
    log_every: int = 50
    sample_every: int = 1000
    """Updates between sample grids."""
    dry_run: bool = False
    """Print the resolved options, the parameter count and a memory estimate, and stop."""


@dataclasses.dataclass(frozen=True)
class DDPM(Common):
    """Diffusion in pixel space, class-conditional where the family is."""

    data: str = "digit-scans"
    family: str = "digits-ddpm"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts; by default as the family says."""
    time: Literal["continuous", "discrete"] = "continuous"
    """Whether training times are drawn from an interval or from whole steps."""
    class_dropout: float = 0.1
    """The share of examples whose class is left out, for guidance."""


@dataclasses.dataclass(frozen=True)
class VAE(Common):
    """The autoencoder between pictures and latents."""

    data: str = "digits"
    family: str = "digits"
    batch_size: int = 32
    kl_weight: float = 1e-6
    """Weight of the KL divergence (mean over latents) against reconstruction (mean over pixels)."""
    reconstruction: Literal["l1", "l2"] = "l1"


@dataclasses.dataclass(frozen=True)
class CLIP(Common):
    """The text tower, with a tokenizer of its own, against a picture tower."""

    data: str = "digits-in-groups"
    """digits, digits-in-groups or digits-same-colours: how hard it is to tell captions apart."""
    family: str = "digits"
    initial: Path | None = None
    """Start from the `model` of another CLIP training, instead of from noise."""


@dataclasses.dataclass(frozen=True)
class TextToImage(Common):
    """The UNet of a latent model, from a trained VAE and text tower."""

    vae: Path | None = None
    """A model folder with vae/, such as the `model` of a VAE training."""
    text_encoder: Path | None = None
    """A model folder with text_encoder/ and tokenizer/, such as the `model` of a CLIP training."""
    data: str = "digits"
    family: str = "digits"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    caption_dropout: float = 0.1
    """The share of examples whose caption is left out, for guidance."""


Recipe = (
    Annotated[DDPM, tyro.conf.subcommand("ddpm", prefix_name=False)]
    | Annotated[VAE, tyro.conf.subcommand("vae", prefix_name=False)]
    | Annotated[CLIP, tyro.conf.subcommand("clip", prefix_name=False)]
    | Annotated[TextToImage, tyro.conf.subcommand("text-to-image", prefix_name=False)]
)


def build(recipe: Common) -> tuple[Any, Callable[[int, int], Iterator[Any]]]:
    """The objective of a recipe, and its batches as a function (start, stop)."""
    from jaxsd import data

    dataset = data.elements(recipe.data, "train", recipe.seed)  # pyright: ignore
    objective, tokenize = _OBJECTIVES[type(recipe)](recipe, dataset)
    return objective, lambda start, stop: data.batches(
        dataset, recipe.batch_size, start, stop, tokenize
    )


def _ddpm(recipe: DDPM, dataset: Any):
    from jaxsd import families
    from jaxsd.objectives.ddpm import DDPM as Objective

    family = families.get_family(recipe.family)
    schedule = _with_prediction(family.schedule, recipe.prediction_type)
    continuous = recipe.time == "continuous"
    dropout = _share("class_dropout", recipe.class_dropout)
    return Objective(family.unet, schedule, continuous, dropout), None


def _vae(recipe: VAE, dataset: Any):
    from jaxsd import families
    from jaxsd.objectives.vae import VAE as Objective

    family = families.get_family(recipe.family)
    if family.vae is None:
        raise JaxsdError(f"family {recipe.family!r} has no VAE")
    # Far along the endless data, so that training meets them no sooner than any others
    samples = np.stack([dataset[(1 << 24) + i]["image"] for i in range(1024)])
    return Objective(family.vae, samples, recipe.kl_weight, recipe.reconstruction), None


def _clip(recipe: CLIP, dataset: Any):
    from jaxsd import families, weights
    from jaxsd.data.digits import all_captions
    from jaxsd.objectives.clip import CLIP as Objective
    from jaxsd.tokenizer import Tokenizer, train_tokenizer

    family = families.get_family(recipe.family)
    if family.text_encoder is None or family.image_encoder is None:
        raise JaxsdError(f"family {recipe.family!r} has no pair of CLIP towers")
    if recipe.initial is None:
        size = family.text_encoder.vocab_size
        tokenizer = train_tokenizer(all_captions(), recipe.workdir / "tokenizer", size)
    else:
        tokenizer = Tokenizer(recipe.initial / "tokenizer")
    objective = Objective(family.text_encoder, family.image_encoder, tokenizer)
    if recipe.initial is not None:
        initial = weights.load(recipe.initial / "clip", objective.net)
        objective = dataclasses.replace(objective, initial=initial)
    # The text tower is causal and read at the end token, so padding beyond the longest caption
    # would cost four fifths of its time and change no gradient.
    captions = all_captions()
    used = (tokenizer(captions) != tokenizer.eos_token_id).sum(1).max() + 1
    return objective, _tokenize(tokenizer, int(used))


def _text_to_image(recipe: TextToImage, dataset: Any):
    import jax.numpy as jnp

    from jaxsd import components, families
    from jaxsd.models import UNet2DConfig
    from jaxsd.objectives.text_to_image import TextToImage as Objective
    from jaxsd.tokenizer import Tokenizer

    if recipe.vae is None or recipe.text_encoder is None:
        raise JaxsdError(
            "text-to-image needs --vae and --text-encoder, each a trained model folder"
        )
    family = families.get_family(recipe.family)
    if isinstance(family.unet, UNet2DConfig) or not family.unet.text_conditional:
        raise JaxsdError(f"family {recipe.family!r} reads no text")
    text_encoder = components.load_component(recipe.text_encoder / "text_encoder", jnp.float32)
    tokenizer = Tokenizer(recipe.text_encoder / "tokenizer")
    objective = Objective(
        family.unet,
        _with_prediction(family.schedule, recipe.prediction_type),
        components.load_component(recipe.vae / "vae", jnp.float32),
        text_encoder,
        tokenizer,
        caption_dropout=_share("caption_dropout", recipe.caption_dropout),
        preview_prompts=[dataset[(1 << 24) + i]["caption"] for i in range(8)],
    )
    return objective, _tokenize(tokenizer, text_encoder.net.config.max_position_embeddings)


_OBJECTIVES: dict[type, Callable[[Any, Any], tuple[Any, Any]]] = {
    DDPM: _ddpm,
    VAE: _vae,
    CLIP: _clip,
    TextToImage: _text_to_image,
}


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise JaxsdError(f"{name} must be from 0 to 1, not {value}")
    return value


def _with_prediction(schedule: Any, prediction_type: str | None) -> Any:
    if prediction_type is None:
        return schedule
    return dataclasses.replace(schedule, prediction_type=prediction_type)


def _tokenize(tokenizer: Any, length: int) -> Callable[[str], np.ndarray]:
    """Ids of one caption, remembered: captions repeat, and tokenizing costs more than drawing."""
    known: dict[str, np.ndarray] = {}

    def tokenize(caption: str) -> np.ndarray:
        if caption not in known:
            if len(known) > 100_000:
                known.clear()
            known[caption] = tokenizer([caption], length)[0]
        return known[caption]

    return tokenize


def run(recipe: Common) -> None:
    """Trains, or with `dry_run` says what would be trained."""
    from jaxsd import training

    names = {f.name for f in dataclasses.fields(training.Options)}
    options = training.Options(**{n: v for n, v in vars(recipe).items() if n in names})
    config = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(recipe).items()
        if name not in ("workdir", "dry_run")
    }
    config = {"recipe": type(recipe).__name__, **config}
    if recipe.dry_run:
        with tempfile.TemporaryDirectory() as scratch:  # a CLIP recipe writes its tokenizer
            _describe(build(dataclasses.replace(recipe, workdir=Path(scratch)))[0], config)
        return
    objective, make_batches = build(recipe)
    training.train(objective, make_batches, options, recipe.workdir, config)
    print(f"{recipe.workdir / 'model'}")


def _describe(objective: Any, config: dict[str, Any]) -> None:
    import jax

    for name, value in config.items():
        print(f"{name:18} {value}")
    count = objective.net.size
    frozen = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(objective.aux))
    print(f"{'parameters':18} {count:,}")
    # parameters, their average, Adam's two moments, and the gradients: five float32 copies
    print(f"{'memory':18} {(20 * count + frozen) / 2**20:,.1f} MiB for the state and gradients")
    print(f"{'devices':18} {jax.device_count()} x {jax.devices()[0].device_kind}")


def main(argv: list[str] | None = None) -> None:
    """Parses the options of `train.py` and runs the recipe."""
    run(tyro.cli(Recipe, prog="train.py", description=__doc__, args=argv))  # pyright: ignore
