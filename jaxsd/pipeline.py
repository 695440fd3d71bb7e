"""A loaded model: prompts in, pictures out, and every step between open to the caller.

pipe = jaxsd.load("digits")
images = pipe(["a red seven on a white background"], seeds=[0], steps=30)

Each of `encode`, `noise`, `denoise` and `decode` is one compiled program for a given model, shape
and sampler; prompts, seeds, guidance scale and the number of steps go in as values.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsd import weights
from jaxsd.components import COMPONENTS, Component, find, load_component, save_component
from jaxsd.diffusion import samplers
from jaxsd.diffusion.denoise import Conditioning, guided
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.families import latent_shape
from jaxsd.nn import Net, Params
from jaxsd.tokenizer import Tokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Callback = Callable[[int, float, jax.Array], None]


class Pipeline:
    """A model that makes pictures from prompts (latent) or from class names (pixel space)."""

    def __init__(
        self,
        unet: Component,
        schedule: Schedule,
        vae: Component | None = None,
        text_encoder: Component | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if unet.net.config.text_conditional and (text_encoder is None or tokenizer is None):
            raise JaxsdError("a text-conditional UNet needs a text encoder and a tokenizer")
        self.schedule, self.tokenizer = schedule, tokenizer
        self.components = {"unet": unet}
        self.components |= {"vae": vae} if vae else {}
        self.components |= {"text_encoder": text_encoder} if text_encoder else {}
        self._compiled_encode = jax.jit(self._encode, static_argnames="clip_skip")
        self._compiled_noise = jax.jit(self._noise, static_argnames="shape")
        self._compiled_denoise = jax.jit(self._denoise, static_argnames="sampler")
        self._compiled_decode = jax.jit(self._decode)

    # --- What it is made of ---

    @property
    def unet(self) -> Net:
        return self.components["unet"].net

    @property
    def vae(self) -> Net | None:
        return self.components["vae"].net if "vae" in self.components else None

    @property
    def params(self) -> dict[str, Params]:
        """The weights of each component."""
        return {name: component.params for name, component in self.components.items()}

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the model was trained on."""
        side = self.unet.config.sample_size * (self.vae.config.downscale if self.vae else 1)
        return side, side

    @property
    def default_sampler(self) -> str:
        return samplers.DEFAULT_SAMPLER.get(self.schedule.class_name, "ddim")

    # --- Prompts to pictures ---

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 30,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] = "",
        *,
        sampler: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        clip_skip: int = 0,
        height: int | None = None,
        width: int | None = None,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """PIL images, one for each seed.

        prompts: one for all seeds, or one for each. A pixel model takes the names of its classes
        ("7" or "seven"). guidance_scale: 1 follows the prompt as trained, more follows it harder.
        callback(i, t, latents) sees the latents [b, h, w, c] after step i, which began at time t.
        Each image depends on its own seed, not on its neighbours. JaxsdError for arguments that
        cannot be.
        """
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        prompts, negative = (
            _one_each(text, len(seeds), name)
            for text, name in ((prompts, "prompts"), (negative_prompt, "negative prompts"))
        )
        noise = self.noise(seeds, height, width)  # first what can be refused at once
        samplers.make_steps(self.schedule, sampler or self.default_sampler, steps)
        cond = self.encode(prompts, clip_skip=clip_skip)
        uncond = self.encode(negative)  # to the last layer, as in diffusers
        latents = self.denoise(
            noise,
            cond,
            uncond,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
            seeds=seeds,
            callback=callback,
        )
        return self.decode(latents)

    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
        """What the UNet is told: text states [n, 77, d], or one-hot classes [n, k].

        The empty prompt is the unconditional one. A prompt too long for the text tower is cut, with
        a `PromptTruncated` warning.
        """
        if self.tokenizer is None:
            return {"class_labels": self._one_hot(prompts)}
        layers = self.components["text_encoder"].net.config.num_hidden_layers
        if not 0 <= clip_skip < layers:
            raise JaxsdError(f"clip_skip must be from 0 to {layers - 1}, not {clip_skip}")
        length = self.components["text_encoder"].net.config.max_position_embeddings
        unique = list(dict.fromkeys(prompts))  # each is warned about once
        ids = self.tokenizer(unique, length)[[unique.index(prompt) for prompt in prompts]]
        states = self._compiled_encode(self.params["text_encoder"], ids, clip_skip=clip_skip)
        return {"encoder_hidden_states": states}

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> jax.Array:
        """N(0, 1) latents [n, h, w, c]; row i depends on seeds[i] and on nothing else."""
        default = self.default_size
        downscale = self.vae.config.downscale if self.vae else 1
        shape = latent_shape(
            self.unet.config,
            downscale,
            default[0] if height is None else height,
            default[1] if width is None else width,
        )
        return self._compiled_noise(_keys(seeds), shape=shape)

    def denoise(
        self,
        latents: jax.Array,
        cond: Conditioning,
        uncond: Conditioning | None,
        *,
        steps: int = 30,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        eta: float = 0.0,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> jax.Array:
        """Runs the sampler from N(0, 1) `latents` [n, h, w, c] to clean ones.

        Without `uncond` there is no guidance, and half the work. `seeds` (default 0 ... n-1) feed
        the noise that ddpm, and ddim with eta > 0, add on the way. See `__call__` for the rest.
        """
        name = sampler or self.default_sampler
        chosen = samplers.get_sampler(name)
        if not 0 <= eta <= 1:
            raise JaxsdError(f"eta must be from 0 to 1, not {eta}")
        grid = samplers.make_steps(self.schedule, name, steps)
        keys = _keys(range(len(latents)) if seeds is None else seeds)
        x = latents * grid.init_scale
        history = tuple(jnp.zeros_like(x) for _ in range(chosen.remembers))

        def advance(x, history, start, stop):
            return self._compiled_denoise(
                self.params["unet"],
                x,
                history,
                cond,
                uncond,
                keys,
                grid,
                np.int32(start),
                np.int32(stop),
                np.float32(guidance_scale),
                np.float32(guidance_rescale),
                np.float32(eta),
                sampler=name,
            )

        if callback is None:
            return advance(x, history, 0, steps)[0]
        for i in range(steps):  # the same program, a step at a time
            x, history = advance(x, history, i, i + 1)
            callback(i, float(grid.t[i]), x)
        return x

    def decode(self, latents: jax.Array) -> list[Image.Image]:
        """PIL images from latents (from pixels in [-1, 1], for a pixel model)."""
        return [_to_pil(picture) for picture in self.decode_array(latents)]

    def decode_array(self, latents: jax.Array) -> np.ndarray:
        """As `decode`, but a uint8 array [n, h, w, c]."""
        params = self.params["vae"] if self.vae else {}
        return np.asarray(self._compiled_decode(params, latents))

    # --- The compiled parts ---

    def _encode(self, params: Params, ids: jax.Array, clip_skip: int) -> jax.Array:
        return self.components["text_encoder"].net(params, ids, clip_skip=clip_skip)

    def _noise(self, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return samplers.initial_noise(keys, shape)

    def _denoise(
        self,
        params: Params,
        x: jax.Array,
        history: tuple[jax.Array, ...],
        cond: Conditioning,
        uncond: Conditioning | None,
        keys: jax.Array,
        grid: samplers.Steps,
        start: jax.Array,
        stop: jax.Array,
        guidance_scale: jax.Array,
        guidance_rescale: jax.Array,
        eta: jax.Array,
        sampler: str,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        dtype = params["conv_in.weight"].dtype

        def network(x, t, **conditioning):
            conditioning = jax.tree.map(lambda c: c.astype(dtype), conditioning)
            return self.unet(params, x.astype(dtype), t, **conditioning).astype(jnp.float32)

        denoise = guided(network, cond, uncond, guidance_scale, guidance_rescale)
        return samplers.run(
            samplers.SAMPLERS[sampler],
            self.schedule,
            denoise,
            x,
            history,
            keys,
            grid,
            start,
            stop,
            eta,
        )

    def _decode(self, params: Params, latents: jax.Array) -> jax.Array:
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor
            latents = latents.astype(params["decoder.conv_in.weight"].dtype)
            latents = self.vae(params, latents, method="decode").astype(jnp.float32)
        return jnp.round(jnp.clip(latents / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def _one_hot(self, names: Sequence[str]) -> jax.Array:
        count = self.unet.config.projection_class_embeddings_input_dim or 0
        rows = np.zeros((len(names), count), np.float32)
        for row, name in zip(rows, names, strict=True):
            word = name.strip().lower()
            label = DIGITS.index(word) if word in DIGITS else word
            if label == "":
                continue  # no class: all zeros
            if not str(label).isdecimal() or int(label) >= count:
                raise JaxsdError(f"no class {name!r}: this model knows 0 to {count - 1}")
            row[int(label)] = 1
        return jnp.asarray(rows)

    # --- Files ---

    def save(self, folder: str | Path, dtype: Any = None) -> None:
        """Writes a folder that diffusers opens; what stood there under the same names is replaced.

        The folder appears whole: until the last file is written it has another name.
        """
        folder = Path(folder).absolute()  # "." has no name that another could be made of
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            for name, component in self.components.items():
                save_component(partial / name, component.net, component.params, dtype)
            schedule = self.schedule.to_json()
            weights.write_json(partial / "scheduler" / "scheduler_config.json", schedule)
            if self.tokenizer is not None:
                self.tokenizer.save(partial / "tokenizer")
            weights.write_json(partial / "model_index.json", self._index())
            _move_into(partial, folder)
        except OSError as error:
            raise JaxsdError(f"cannot write {folder}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = {"_class_name": "DDIMPipeline", "_diffusers_version": "0.36.0"}
        index |= {
            "scheduler": ["diffusers", self.schedule.class_name],
            "unet": ["diffusers", "UNet2DConditionModel"],
        }
        if self.tokenizer is not None:
            index |= {
                "_class_name": "StableDiffusionPipeline",
                "feature_extractor": [None, None],
                "image_encoder": [None, None],
                "requires_safety_checker": False,
                "safety_checker": [None, None],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        return index


def _keys(seeds: Sequence[int]) -> jax.Array:
    if not len(seeds):
        raise JaxsdError("give at least one seed: there is an image for each")
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise JaxsdError("seeds must be from 0 to 4294967295")
    return jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)))


def _one_each(text: str | Sequence[str], count: int, name: str) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) == 1:
        texts = texts * count
    if len(texts) != count:
        raise JaxsdError(f"{len(texts)} {name} for {count} seeds: give one, or one for each seed")
    return texts


def _to_pil(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _move_into(source: Path, target: Path) -> None:
    """Puts what stands in `source` into `target`, file by file if the folder is there already."""
    if not target.exists():
        source.rename(target)
        return
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


def load(model: str | Path, dtype: Any = jnp.float32, variant: str | None = None) -> Pipeline:
    """Opens a model: the name of one that ships, a diffusers folder, or a Hub id ("owner/name").

    dtype: of the weights and of the computation; None keeps each file's own. variant: "fp16", say:
    which of several files to read, in the components that have it. JaxsdError says what is missing
    or wrong.
    """
    folder = find(model, variant)
    index = weights.read_json(folder / "model_index.json")
    missing = [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and value[0] is not None
        and name in (*COMPONENTS, "scheduler", "tokenizer")
        and not (folder / name).is_dir()
    ]
    if missing:
        raise JaxsdError(f"{folder} lacks {', '.join(f'{name}/' for name in missing)}")
    if "unet" not in index:
        raise JaxsdError(f"{folder}/model_index.json names no unet: not a model that jaxsd knows")
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    parts = {
        name: load_component(folder / name, dtype, variant) for name in COMPONENTS if name in index
    }
    return Pipeline(
        schedule=Schedule.from_json(weights.read_json(schedule_file), str(schedule_file)),
        tokenizer=Tokenizer(folder / "tokenizer") if "tokenizer" in index else None,
        **parts,
    )
