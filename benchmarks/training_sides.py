"""A training step on cached latents by jaxsd and by diffusers' UNet in torch, for `sides.py`.

Both: the whole UNet, float32 parameters, averages of the gradient and its square (AdamW), gradients
shortened to a norm of 1, and an average of the parameters; computed in `work.dtype`, in which
teachers are kept. In torch a distillation is what its formulas ask for, at levels of one schedule.
"""

import copy
import dataclasses
import time
from typing import Any

import numpy as np
from devices import OnJax, OnTorch

RATE, EMA = 1e-5, 0.999
TOLD = 256  # channels of the guidance scale that students are told


class Jaxsd(OnJax):
    def __init__(self, work: Any):
        import jax
        from latents import Latents, objective

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
        goal = objective(work.recipe, family, work.dtype, real=True)
        optimizer = training.make_optimizer(settings)
        mesh = make_mesh(settings, jax.devices()[:1])
        self._state, self._aux = place_state(goal, optimizer, settings, mesh)
        batch = Latents(family).batch(work.batch, work.size)
        self._batch = sharding.split(batch, mesh)
        make = training.make_step(goal, optimizer, settings)
        self._step = compile_step(make, self._state, settings)
        self._goal = goal
        self.loaded = time.perf_counter()

    def once(self) -> np.ndarray:
        self._state, metrics = self._step(self._state, self._aux, self._batch)
        return np.asarray(metrics["loss"])

    def flops(self) -> float:
        """Of the gradient, whatever is computed again."""
        from jaxsd.objectives import Now
        from jaxsd.training.throughput import count_flops

        jax, goal = self._jax, self._goal
        now = Now(jax.random.key(0), jax.numpy.int32(0), self._state.ema)
        gradient = jax.grad(goal.loss, has_aux=True)
        return count_flops(gradient, self._state.params, goal.aux, self._batch, now)


class Diffusers(OnTorch):
    def __init__(self, work: Any, compiled: bool):
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers.utils import logging

        self.imported = time.perf_counter()
        super().__init__(torch, work.threads)
        logging.set_verbosity_error()
        base = UNet2DConditionModel.from_pretrained(work.folder, subfolder="unet")
        told_scale = UNet2DConditionModel.from_config(base.config, time_cond_proj_dim=TOLD)
        text_to_image = work.recipe == "text-to-image"
        unet = base if text_to_image else told_scale
        unet.to(self._device, memory_format=torch.channels_last).train()
        if work.remat != "none":
            unet.enable_gradient_checkpointing()
        parameters = list(unet.parameters())
        averaged = copy.deepcopy(unet).eval().requires_grad_(False)
        averages = list(averaged.parameters())
        optimizer = torch.optim.AdamW(parameters, RATE, (0.9, 0.99), weight_decay=0, fused=True)
        dtype = getattr(torch, work.dtype)
        side, channels = work.size // work.downscale, unet.config.in_channels
        rows, draw = work.batch, dict(device=self._device)
        x = torch.randn((rows, channels, side, side), **draw)
        told: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(
                (rows, 77, unet.config.cross_attention_dim), **draw
            )
        }
        if unet.config.addition_embed_type == "text_time":
            ids = torch.full((rows, 6), 1024.0, **draw)
            told["added_cond_kwargs"] = {
                "text_embeds": torch.randn(rows, 1280, **draw),
                "time_ids": ids,
            }
        scale = {} if text_to_image else {"timestep_cond": torch.randn(rows, TOLD, **draw)}
        make = torch.compile if compiled else lambda module: module
        network, average = make(unet), make(averaged)
        teacher = None
        if not text_to_image:
            teacher = told_scale if work.recipe == "progressive" else base
            teacher = copy.deepcopy(teacher).to(
                self._device, dtype, memory_format=torch.channels_last
            )
            teacher = make(teacher.eval().requires_grad_(False))
        half = torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

        def ask(module: Any, z: Any, t: Any, **more: Any) -> Any:
            with half:
                return module(z, t, **told, **more, return_dict=False)[0].float()

        def guided(z: Any, t: Any) -> Any:
            """The teacher in two passes that are one batch."""
            twice = _doubled(torch, told)
            with half:
                both = teacher(torch.cat([z, z]), torch.cat([t, t]), **twice, return_dict=False)
            uncond, cond = both[0].float().chunk(2)
            return uncond + 7.5 * (cond - uncond)

        def level(t: Any) -> tuple[Any, Any]:
            angle = t[:, None, None, None] / 1000 * 1.57
            return torch.cos(angle), torch.sin(angle)

        def jump(said: Any, z: Any, t: Any, goal: Any) -> Any:
            """DDIM from t to goal, by v."""
            (a, b), (c, d) = level(t), level(goal)
            return c * (a * z - b * said) + d * (b * z + a * said)

        def loss_of(z: Any, t: Any, noise: Any) -> Any:
            mse = torch.nn.functional.mse_loss
            if text_to_image:
                return mse(ask(network, z, t), noise)
            if work.recipe == "guided":
                with torch.no_grad():
                    target = guided(z, t)
                return mse(ask(network, z, t, **scale), target)
            if work.recipe == "progressive":
                with torch.no_grad():
                    middle = jump(ask(teacher, z, t, **scale), z, t, 0.75 * t)
                    said = ask(teacher, middle, 0.75 * t, **scale)
                    target = jump(said, middle, 0.75 * t, 0.5 * t)
                return mse(jump(ask(network, z, t, **scale), z, t, 0.5 * t), target)
            with torch.no_grad():  # consistency
                nearer = jump(guided(z, t), z, t, 0.9 * t)
                goal = jump(ask(average, nearer, 0.9 * t, **scale), nearer, 0.9 * t, 0 * t)
            return mse(jump(ask(network, z, t, **scale), z, t, 0 * t), goal)

        def step() -> Any:
            noise, t = torch.randn_like(x), torch.rand(rows, **draw) * 999
            a, b = level(t)
            loss = loss_of(a * x + b * noise, t, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - EMA)
            return loss

        self._step = step
        self.loaded = time.perf_counter()

    def once(self) -> np.ndarray:
        return self._step().detach().cpu().numpy()


def _doubled(torch: Any, told: dict[str, Any]) -> dict[str, Any]:
    """For twice as many rows."""
    return {
        name: _doubled(torch, value) if isinstance(value, dict) else torch.cat([value, value])
        for name, value in told.items()
    }
