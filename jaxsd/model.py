"""What a model is made of: its networks, their weights, its words, and what is added to them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxsd import eight_bits, sharding
from jaxsd.components import Component, make_net
from jaxsd.conditioning import TextEncoder
from jaxsd.diffusion import samplers
from jaxsd.diffusion.schedule import Schedule
from jaxsd.errors import JaxsdError
from jaxsd.facts import facts
from jaxsd.nn import Net, Params
from jaxsd.programs import Programs
from jaxsd.tokenizer import Tokenizer
from jaxsd.weights import embeddings, lora, lora_files
from jaxsd.weights.embeddings import Embedding
from jaxsd.weights.lora import Live, LoRA

MOST_AT_A_TIME = 32  # small pictures: more are no faster on two cores, and take more memory


class Model:
    """The parts of a model.

    `schedule` may be replaced at any time: dataclasses.replace(pipe.schedule, ...). `vae_tile`, if
    not 0, is the side of the latent tiles in which larger pictures are encoded and decoded. `rows`
    is how the rows of batches are split over devices, if they are (`spread`).
    """

    def __init__(
        self,
        unet: Component,
        schedule: Schedule,
        vae: Component | None = None,
        text_encoder: Component | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        text_encoder_2: Component | None = None,
        tokenizer_2: Tokenizer | None = None,
        controlnets: Sequence[Component] = (),
        zero_empty_prompt: bool = False,
        vae_tile: int = 0,
    ):
        self.schedule, self.vae_tile, self.programs = schedule, vae_tile, Programs()
        self.rows: NamedSharding | None = None
        parts = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        self.components = {"unet": unet} | {name: c for name, c in parts.items() if c}
        words = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
        self.tokenizers = {name: t for name, t in words.items() if t}
        self.controlnets, self.zero_empty_prompt = tuple(controlnets), zero_empty_prompt
        towers = self._towers
        if len(towers) != len(self.tokenizers) or (unet.net.config.text_conditional and not towers):
            raise JaxsdError(
                "a text-conditional UNet needs a text encoder, and each of those a tokenizer"
            )
        self.loras: list[LoRA] = []
        self.lora_scales: list[float] = []
        self._live: dict[str, Live] = {name: {} for name in self.components}
        self._text = self._text_encoder()
        for component in self.controlnets:
            self._check_controlnet(component.net.config)

    # --- What it is made of ---

    @property
    def unet(self) -> Net:
        """The UNet: code and shapes; its arrays are `params["unet"]`."""
        return self.components["unet"].net

    @property
    def vae(self) -> Net | None:
        """The VAE; None for a model that draws pixels."""
        return self.components["vae"].net if "vae" in self.components else None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The first text encoder's; None without text."""
        return self.tokenizers.get("tokenizer")

    @property
    def params(self) -> dict[str, Params]:
        """The weights of each component."""
        return {name: component.params for name, component in self.components.items()}

    @property
    def xl(self) -> bool:
        """Whether the UNet also takes a pooled text embedding and sizes: Stable Diffusion XL."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the model was trained on."""
        side = self.unet.config.sample_size * self._downscale
        return side, side

    @property
    def default_sampler(self) -> str:
        """The sampler of the scheduler that the model ships with."""
        return samplers.default_sampler(self.schedule)

    @property
    def default_steps(self) -> int:
        """The number of steps where none is asked for: 30, or what a student is made for."""
        return self.schedule.default_steps or 30

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale where none is asked for: 7.5, or what the model is made for."""
        scale = self.schedule.default_guidance_scale
        return 7.5 if scale is None else scale

    @property
    def _towers(self) -> list[str]:
        """The names of the text encoders."""
        return [name for name in self.components if name.startswith("text_encoder")]

    def _text_encoder(self) -> TextEncoder:
        nets = [self.components[name].net for name in self._towers]
        words = [*self.tokenizers.values()]
        return TextEncoder(nets, words, self.xl, self.zero_empty_prompt, self.programs)

    @property
    def _downscale(self) -> int:
        return self.vae.config.downscale if self.vae else 1

    @property
    def takes_prompts(self) -> bool:
        """Whether the UNet is told anything: text, or a class."""
        return bool(self.tokenizers) or self.unet.config.class_conditional

    def chunks(self, prompts: Sequence[str | None]) -> int:
        """How many times the text tower's length the longest of the prompts takes."""
        return self._text.chunks(prompts) if self.tokenizers else 1

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: Stable Diffusion's 4, or those of a pixel model's pictures."""
        return self.unet.config.out_channels // self.schedule.pictures_predicted

    @property
    def guidance_embedded(self) -> bool:
        """Whether the UNet is told the guidance scale (LCM) instead of being called twice."""
        return self.unet.config.time_cond_proj_dim is not None

    def default_batch_size(self, height: int | None = None, width: int | None = None) -> int:
        """As many as have the latents of four pictures of 512 px, but at least 4."""
        (own_height, own_width), side = self.default_size, self.unet.config.sample_size
        height, width = height or own_height, width or own_width
        latents = side * side * height * width // (own_height * own_width)
        return min(MOST_AT_A_TIME, max(4, 4 * 64 * 64 // max(1, latents)))

    @property
    def compiled_for(self) -> dict[str, Any]:
        """What holds of this model and this machine, and must where its programs are run."""
        nets = {name: component.net for name, component in self.components.items()}
        nets |= {f"controlnet_{i}": component.net for i, component in enumerate(self.controlnets)}
        return facts({name: net.config.to_json() for name, net in nets.items()})

    def _check_controlnet(self, config: Any) -> None:
        """A ControlNet speaks to the blocks of the UNet that it was trained for."""
        names = ("block_out_channels", "layers_per_block", "cross_attention_dim")
        names += ("addition_embed_type",)
        own = {name: getattr(self.unet.config, name, None) for name in names}
        own |= {"in_channels": self.latent_channels}
        other = {name: getattr(config, name, None) for name in own}
        if differ := [f"{n} {other[n]} where it has {own[n]}" for n in own if other[n] != own[n]]:
            raise JaxsdError(f"a ControlNet for another model than this: {'; '.join(differ)}")
        downscale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        if downscale != self._downscale:
            raise JaxsdError(
                f"a ControlNet for pictures {downscale} times as large as the latents; this "
                f"model's are {self._downscale} times"
            )

    def spread(self, mesh: Mesh) -> None:
        """From now on each device of this process's mesh computes its share of a batch's rows.

        Each has all weights. Batches whose rows the devices do not divide are computed by one.
        """
        whole = NamedSharding(mesh, sharding.WHOLE)

        def everywhere(part: Component) -> Component:
            return dataclasses.replace(part, params=jax.device_put(part.params, whole))

        self.rows = NamedSharding(mesh, sharding.ROWS)
        self.components = {name: everywhere(part) for name, part in self.components.items()}
        self.controlnets = tuple(map(everywhere, self.controlnets))

    # --- What is added to it ---

    def add_lora(self, source: str | Path | LoRA, scale: float = 1.0) -> None:
        """Adds a LoRA, or its file or folder, to UNet and text encoders.

        `lora_scales` holds the scales; to change one compiles nothing. JaxsdError lists what does
        not fit this model.
        """
        if self.quantised:
            raise JaxsdError("nothing can be added to weights in eight bits: first the LoRAs, "
                             "merge_loras(), then quantize()")  # fmt: skip
        nets = {name: c.net for name, c in self.components.items() if name != "vae"}
        self.loras.append(source if isinstance(source, LoRA) else lora_files.read(source, nets))
        self.lora_scales.append(scale)
        self._live = {name: lora.live(self.loras, name) for name in self.components}

    def add_embedding(self, source: str | Path | Embedding, token: str | None = None) -> None:
        """Teaches the model a new word, from a textual inversion or its file.

        token: the word, if not the file's own. JaxsdError if it does not suit this model.
        """
        new = source if isinstance(source, Embedding) else embeddings.read(source, token)
        taught = {}
        for name in self._towers:
            words, old = name.replace("text_encoder", "tokenizer"), self.components[name]
            tokenizer, params = embeddings.add(new, self.tokenizers[words], old.params, name)
            config = dataclasses.replace(old.net.config, vocab_size=len(tokenizer))
            taught[name] = words, tokenizer, Component(make_net(config), params)
        for name, (words, tokenizer, component) in taught.items():  # all of them, or none
            self.tokenizers[words], self.components[name] = tokenizer, component
        self._text = self._text_encoder()

    @property
    def quantised(self) -> bool:
        """Whether the UNet's weights are in eight bits."""
        return eight_bits.is_quantised(self.components["unet"].params)

    def quantize(self, form: str) -> None:
        """Keeps the matrices and kernels of the UNet's blocks in eight bits, "int8" or "fp8".

        For good, and with the loss that `eight_bits.quantised` tells; computing goes on in the
        dtype of the others. JaxsdError for a model with LoRAs, which are to be merged first.
        """
        if self.loras or self.quantised:
            raise JaxsdError("the UNet's weights are in eight bits already" if self.quantised else
                             "merge the LoRAs first, merge_loras(): nothing can be added to "
                             "weights in eight bits")  # fmt: skip
        unet = self.components["unet"]
        self.components["unet"] = Component(unet.net, eight_bits.quantised(unet.params, form))

    def merge_loras(self) -> None:
        """Adds every LoRA to the weights for good: sampling starts a little sooner."""
        pairs = list(zip(self.loras, self.lora_scales, strict=True))
        for name, params in lora.merge(self.params, pairs).items():
            self.components[name] = Component(self.components[name].net, params)
        self.loras, self.lora_scales = [], []
        self._live = {name: {} for name in self.components}
