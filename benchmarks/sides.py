"""The same work by jaxsd and by diffusers, each in a process that `beside.py` starts.

python benchmarks/sides.py SIDE WORK reads lines from stdin: for each it does the work once and
prints a line of JSON with the seconds. The first is how it started, the last, at the end of stdin,
how much memory it took. SIDE: jaxsd; eager or compile, for diffusers as it is or by torch.compile.
"""

import dataclasses
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from devices import OnJax, OnTorch

PROMPT = "a red seven on a white background"
SCALE = 7.5


@dataclasses.dataclass(frozen=True)
class Work:
    folder: str
    part: str  # text, unet, decode, image or train
    batch: int
    size: int
    steps: int
    dtype: str
    remat: str  # of train
    recipe: str | None  # of train
    threads: int
    out: str  # where the first result is saved, to compare them

    @property
    def downscale(self) -> int:
        """Pixels for each latent, on a side."""
        config = json.loads((Path(self.folder) / "vae" / "config.json").read_text())
        return 2 ** (len(config["block_out_channels"]) - 1)

    def latents(self, channels: int) -> np.ndarray:
        side = self.size // self.downscale
        shape = (self.batch, side, side, channels)
        return np.random.default_rng(0).standard_normal(shape, np.float32)


class Jaxsd(OnJax):
    """A part of jaxsd's pipeline; `once` does it and waits for it."""

    def __init__(self, work: Work):
        import jax
        import jax.numpy as jnp

        import jaxsd

        self.work, self.imported = work, time.perf_counter()
        super().__init__(jax)
        self.pipe = pipe = jaxsd.load(work.folder, dtype=getattr(jnp, work.dtype))
        jax.block_until_ready(pipe.params)
        self.loaded = time.perf_counter()
        prompts = [PROMPT] * work.batch
        channels = pipe.unet.config.out_channels
        x = jnp.asarray(work.latents(channels))
        size = {"height": work.size, "width": work.size}
        ids = (pipe.size_ids((work.size, work.size)),)
        if work.part == "unet":
            cond, uncond = (pipe.encode(p, 0, 1, *ids) for p in (prompts, [None] * work.batch))
            self.once = lambda: self._wait(pipe.predict(x, 500.0, cond, uncond, SCALE))
        else:
            self.once = {
                "text": lambda: self._wait(pipe.encode(prompts)["encoder_hidden_states"]),
                "decode": lambda: pipe.decode_pixels(x),
                "image": lambda: np.stack(
                    pipe(
                        prompts,
                        range(work.batch),
                        steps=work.steps,
                        sampler="ddim",
                        guidance_scale=SCALE,
                        **size,
                    )  # fmt: skip
                ),
            }[work.part]
        self._x = x

    def flops(self) -> float:
        """Of the plain forms, as anyone would count them; of pictures without their prompts."""
        counted = {
            "text": self._text_flops,
            "unet": self._unet_flops,
            "decode": self._decode_flops,
            "image": lambda: self.work.steps * self._unet_flops() + self._decode_flops(),
        }
        return counted[self.work.part]()

    def _text_flops(self) -> float:
        from jaxsd.conditioning import encode_text
        from jaxsd.training.throughput import count_flops

        pipe, towers, jnp = self.pipe, self.pipe._text.towers, self._jax.numpy
        shapes = [(self.work.batch, 1, net.config.max_position_embeddings) for net in towers]
        tokens = [(jnp.zeros(shape, jnp.int32), jnp.ones(shape)) for shape in shapes]
        params = [pipe.params[name] for name in pipe._towers]
        return count_flops(lambda: encode_text(towers, params, tokens, 0, pipe.xl))

    def _unet_flops(self) -> float:
        """Of a step with guidance."""
        from jaxsd.training.throughput import count_flops

        pipe, x = self.pipe, self._x
        cond, uncond = (pipe.encode([PROMPT] * len(x)) for _ in range(2))
        conditions, scales = pipe._chain(cond, uncond, SCALE, len(x))
        none = np.zeros(0, np.float32)  # scales of LoRAs
        told = (pipe.params["unet"], {}, none, conditions, scales, x, np.float32(500))
        predict = functools.partial(pipe._compiled_predict, unet=pipe.unet, split=None)
        return count_flops(predict, *told)

    def _decode_flops(self) -> float:
        from jaxsd.training.throughput import count_flops

        decode = functools.partial(self.pipe._compiled_decode, vae=self.pipe.vae, split=None)
        return count_flops(decode, self.pipe.params["vae"], self._x)

    def _wait(self, array: Any) -> np.ndarray:
        return np.asarray(self._jax.block_until_ready(array))


class Diffusers(OnTorch):
    """The same of diffusers: channels last, attention by torch's own kernels."""

    def __init__(self, work: Work, compiled: bool):
        import diffusers
        import torch

        diffusers.utils.logging.disable_progress_bar()
        self.work, self.imported = work, time.perf_counter()
        super().__init__(torch, work.threads, work.dtype)
        dtype = self._dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(work.folder, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self._device)
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)
        if compiled:
            mode = "max-autotune" if self._device.type == "cuda" else "default"
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
        self.pipe = pipe
        self.loaded = time.perf_counter()
        prompts = [PROMPT] * work.batch
        with torch.inference_mode():
            told = pipe.encode_prompt(prompts, device=self._device, num_images_per_prompt=1,
                                      do_classifier_free_guidance=True)  # fmt: skip
        x = self._tensor(work.latents(pipe.unet.config.in_channels), dtype)
        text, more = torch.cat([told[1], told[0]]), {}
        if len(told) > 2:  # Stable Diffusion XL is told more
            ids = pipe._get_add_time_ids((work.size,) * 2, (0, 0), (work.size,) * 2, dtype,
                                         pipe.text_encoder_2.config.projection_dim)  # fmt: skip
            ids = ids.to(self._device).repeat(2 * work.batch, 1)
            said = {"text_embeds": torch.cat([told[3], told[2]]), "time_ids": ids}
            more = {"added_cond_kwargs": said}
        t = torch.tensor(500, device=self._device)

        def unet() -> np.ndarray:
            said = pipe.unet(torch.cat([x, x]), t, text, return_dict=False, **more)[0]
            uncond, cond = said.chunk(2)
            return self._array(uncond + SCALE * (cond - uncond))

        def decode() -> np.ndarray:
            scaled = x / pipe.vae.config.scaling_factor
            return self._array(pipe.vae.decode(scaled, return_dict=False)[0])

        def image() -> np.ndarray:
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
            generators = [torch.Generator(self._device).manual_seed(i) for i in range(work.batch)]
            return np.stack(
                pipe(prompts, num_inference_steps=work.steps, guidance_scale=SCALE,
                     height=work.size, width=work.size, generator=generators).images
            )  # fmt: skip

        def text_() -> np.ndarray:
            states = pipe.encode_prompt(prompts, device=self._device, num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)[0]  # fmt: skip
            return states.float().cpu().numpy()

        self._do = {"unet": unet, "decode": decode, "image": image, "text": text_}[work.part]

    def once(self) -> np.ndarray:
        with self._torch.inference_mode():
            return self._do()

    def _tensor(self, x: np.ndarray, dtype: Any) -> Any:
        x = self._torch.from_numpy(x).permute(0, 3, 1, 2)
        last = self._torch.channels_last
        return x.to(self._device, dtype).contiguous(memory_format=last)

    def _array(self, x: Any) -> np.ndarray:
        return x.permute(0, 2, 3, 1).float().cpu().numpy()


def serve(make: Callable[[], Any], work: Work, lines: Iterator[str]) -> None:
    begin = time.perf_counter()
    side = make()
    start = {"import": side.imported - begin, "load": side.loaded - side.imported}
    _say(start | {"device": side.device(), "fastest": side.fastest(), "flops": side.flops()})
    for number, _ in enumerate(lines):
        if number == 1:  # from here on the peak is of the work, not of the start
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        result = side.once()
        seconds = time.perf_counter() - start
        if number == 0:
            np.save(work.out, result)
        _say({"seconds": seconds})
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _say({"peak": side.device_peak() or peak})


def _say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    name, told = sys.argv[1:]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    work = Work(**json.loads(told))
    if work.part == "train":
        from training_sides import Diffusers, Jaxsd
    sides = {
        "jaxsd": lambda: Jaxsd(work),
        "eager": lambda: Diffusers(work, compiled=False),
        "compile": lambda: Diffusers(work, compiled=True),
    }
    serve(sides[name], work, iter(sys.stdin))
