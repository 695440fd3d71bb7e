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
SCALE = 7.5  # of guidance
TOLD = 256  # channels of the guidance scale that students are told


class Jaxsd(OnJax):
    def __init__(self, work: Any):
        import jax
        from latents import Latents, objective

        from jaxsd import sharding, training
        from jaxsd.components import load_parts
        from jaxsd.families import get_family
        from jaxsd.training.placement import compile_step, make_mesh, place_state

        self.imported = time.perf_counter()
        super().__init__(jax)
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
        super().__init__(torch, work.threads, work.dtype)
        logging.set_verbosity_error()
        base = UNet2DConditionModel.from_pretrained(work.folder, subfolder="unet")
        distilled = work.recipe != "text-to-image"
        unet = base
        if distilled:
            unet = UNet2DConditionModel.from_config(base.config, time_cond_proj_dim=TOLD)
        last, device = torch.channels_last, self._device
        unet.to(device, memory_format=last).train()
        if work.remat != "none":
            unet.enable_gradient_checkpointing()
        average = copy.deepcopy(unet).eval().requires_grad_(False)
        self._parameters, self._averages = list(unet.parameters()), list(average.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, RATE, (0.9, 0.99), weight_decay=0, fused=True
        )
        dtype = self._dtype
        self._half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        make = torch.compile if compiled else lambda module: module
        self._network, self._average = make(unet), make(average)
        if distilled:  # by a teacher that guides in two passes, or is told the scale as well
            teacher = copy.deepcopy(unet) if work.recipe == "progressive" else base
            teacher = teacher.to(device, dtype, memory_format=last).eval().requires_grad_(False)
            self._teacher = make(teacher)
        self._loss = {
            "text-to-image": self._denoising,
            "progressive": self._progressive,
            "guided": self._of_guidance,
            "consistency": self._consistency,
        }[work.recipe]

        rows, side = work.batch, work.size // work.downscale
        config = unet.config

        def drawn(*shape: int) -> Any:
            return torch.randn(shape, device=device)

        self._x = drawn(rows, config.in_channels, side, side)
        self._told: dict[str, Any] = {
            "encoder_hidden_states": drawn(rows, 77, config.cross_attention_dim)
        }
        if config.addition_embed_type == "text_time":
            ids = torch.full((rows, 6), 1024.0, device=device)
            self._told["added_cond_kwargs"] = {"text_embeds": drawn(rows, 1280), "time_ids": ids}
        self._scale = {"timestep_cond": drawn(rows, TOLD)} if distilled else {}
        self.loaded = time.perf_counter()

    def once(self) -> np.ndarray:
        torch, x = self._torch, self._x
        noise, t = torch.randn_like(x), torch.rand(len(x), device=self._device) * 999
        alpha, sigma = self._level(t)
        loss = self._loss(alpha * x + sigma * noise, t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, 1 - EMA)
        return loss.detach().cpu().numpy()

    def _denoising(self, z: Any, t: Any, noise: Any) -> Any:
        return self._distance(self._ask(self._network, z, t), noise)

    def _progressive(self, z: Any, t: Any, noise: Any) -> Any:
        """One step where the teacher takes two."""
        with self._torch.no_grad():
            middle = self._jump(self._ask(self._teacher, z, t), z, t, 0.75 * t)
            said = self._ask(self._teacher, middle, 0.75 * t)
            target = self._jump(said, middle, 0.75 * t, 0.5 * t)
        return self._distance(self._jump(self._ask(self._network, z, t), z, t, 0.5 * t), target)

    def _of_guidance(self, z: Any, t: Any, noise: Any) -> Any:
        with self._torch.no_grad():
            target = self._guided(z, t)
        return self._distance(self._ask(self._network, z, t), target)

    def _consistency(self, z: Any, t: Any, noise: Any) -> Any:
        """The end as seen from here, and by the average from where the teacher's jump leads."""
        near, end = 0.9 * t, 0 * t
        with self._torch.no_grad():
            nearer = self._jump(self._guided(z, t), z, t, near)
            goal = self._jump(self._ask(self._average, nearer, near), nearer, near, end)
        return self._distance(self._jump(self._ask(self._network, z, t), z, t, end), goal)

    def _ask(self, module: Any, z: Any, t: Any) -> Any:
        with self._half:
            return module(z, t, **self._told, **self._scale, return_dict=False)[0].float()

    def _guided(self, z: Any, t: Any) -> Any:
        """The teacher in two passes that are one batch."""
        torch = self._torch
        twice = _doubled(torch, self._told)
        with self._half:
            both = self._teacher(torch.cat([z, z]), torch.cat([t, t]), **twice, return_dict=False)
        uncond, cond = both[0].float().chunk(2)
        return uncond + SCALE * (cond - uncond)

    def _distance(self, found: Any, wanted: Any) -> Any:
        return self._torch.nn.functional.mse_loss(found, wanted)

    def _level(self, t: Any) -> tuple[Any, Any]:
        angle = t[:, None, None, None] / 1000 * 1.57
        return self._torch.cos(angle), self._torch.sin(angle)

    def _jump(self, said: Any, z: Any, t: Any, goal: Any) -> Any:
        """DDIM from t to goal, by v."""
        (a, b), (c, d) = self._level(t), self._level(goal)
        return c * (a * z - b * said) + d * (b * z + a * said)


def _doubled(torch: Any, told: dict[str, Any]) -> dict[str, Any]:
    """For twice as many rows."""
    return {
        name: _doubled(torch, value) if isinstance(value, dict) else torch.cat([value, value])
        for name, value in told.items()
    }
