"""A training step on cached latents by jaxsd and by diffusers' UNet in torch, for `sides.py`.

Both: the whole UNet, float32 parameters, averages of the gradient and its square (AdamW), gradients
shortened to a norm of 1, and an average of the parameters; computed in `work.dtype`.
"""

import dataclasses
import time
from typing import Any

import numpy as np
from devices import OnJax, OnTorch

RATE, EMA = 1e-5, 0.999


class Jaxsd(OnJax):
    def __init__(self, work: Any):
        import jax
        from latents import Latents

        from jaxsd import sharding, training
        from jaxsd.components import load_parts
        from jaxsd.families import get_family
        from jaxsd.training.placement import compile_step, make_mesh, place_state

        self._jax = jax
        self.imported = time.perf_counter()
        parts = load_parts(work.folder)
        configs = {name: parts.components[name].net.config for name in ("unet", "vae")}
        family = dataclasses.replace(get_family("sd1"), schedule=parts.schedule, **configs)
        settings = training.Options(
            1000, batch_size=work.batch, learning_rate=RATE, warmup_steps=0, decay="constant",
            ema_decay=EMA, dtype=work.dtype, remat=work.remat,
        )  # fmt: skip
        goal = Latents(family, work.dtype)
        optimizer = training.make_optimizer(settings)
        mesh = make_mesh(settings, jax.devices()[:1])
        self._state, self._aux = place_state(goal, optimizer, settings, mesh)
        self._batch = sharding.split(goal.batch(work.batch, work.size), mesh)
        make = training.make_step(goal, optimizer, settings)
        self._step = compile_step(make, self._state, settings)
        self._goal = goal
        self.loaded = time.perf_counter()

    def once(self) -> np.ndarray:
        self._state, metrics = self._step(self._state, self._aux, self._batch)
        return np.asarray(metrics["loss"])

    def flops(self) -> float:
        """Of the gradient: three times the loss, whatever is computed again."""
        from jaxsd.objectives import Now
        from jaxsd.training.throughput import count_flops

        goal = self._goal
        now = Now(self._jax.random.key(0), self._jax.numpy.int32(0))
        return 3 * count_flops(goal.loss, self._state.params, goal.aux, self._batch, now)


class Diffusers(OnTorch):
    def __init__(self, work: Any, compiled: bool):
        import torch
        from diffusers import UNet2DConditionModel

        self.imported = time.perf_counter()
        super().__init__(torch, work.threads)
        unet = UNet2DConditionModel.from_pretrained(work.folder, subfolder="unet")
        unet.to(self._device, memory_format=torch.channels_last).train()
        if work.remat != "none":
            unet.enable_gradient_checkpointing()
        self._parameters = list(unet.parameters())
        self._average = [p.detach().clone() for p in self._parameters]
        optimizer = torch.optim.AdamW(
            self._parameters, RATE, (0.9, 0.99), weight_decay=0, fused=True
        )
        side, channels = work.size // work.downscale, unet.config.in_channels
        text = (work.batch, 77, unet.config.cross_attention_dim)
        draw = dict(device=self._device)
        shape = (work.batch, channels, side, side)
        x, told = torch.randn(shape, **draw), torch.randn(text, **draw)
        more = {}
        if unet.config.addition_embed_type == "text_time":
            ids = torch.full((work.batch, 6), 1024.0, **draw)
            said = {"text_embeds": torch.randn(work.batch, 1280, **draw), "time_ids": ids}
            more = {"added_cond_kwargs": said}
        network = torch.compile(unet) if compiled else unet
        dtype = getattr(torch, work.dtype)
        half = torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

        def step() -> Any:
            noise, t = torch.randn_like(x), torch.randint(0, 1000, (work.batch,), **draw)
            alpha = torch.cos(t / 1000 * 1.57)[:, None, None, None]
            noisy = alpha * x + (1 - alpha**2) ** 0.5 * noise
            with half:
                said = network(noisy, t, told, return_dict=False, **more)[0]
            loss = torch.nn.functional.mse_loss(said.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 1 - EMA)
            return loss

        self._step = step
        self.loaded = time.perf_counter()

    def once(self) -> np.ndarray:
        return self._step().detach().cpu().numpy()
