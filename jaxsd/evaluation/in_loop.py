"""What is measured of a training on its way: of averaged parameters, on held-out data.

Each function makes a `measure(params, step) -> {name: number or uint8 picture [h, w, 3]}` that
depends on the parameters alone: examples, noise and seeds are the same each time. Params may lie on
the host or on one device; the work is split over the devices of this process.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsd import kernels
from jaxsd.errors import Diverged, JaxsdError
from jaxsd.evaluation import samples, similarity
from jaxsd.evaluation.drawing import Sampling
from jaxsd.evaluation.features import Features
from jaxsd.evaluation.held_out import Batch, HeldOut, cycled
from jaxsd.evaluation.samples import Measures
from jaxsd.evaluation.statistics import Running, distances
from jaxsd.nn import Net, Params
from jaxsd.pictures import tile, to_uint8
from jaxsd.pipeline import Pipeline
from jaxsd.sharding import filled

Arrays = dict[str, Any]  # parameters, in jax's or numpy's arrays
Measure = Callable[[Arrays, int], dict[str, Any]]


def denoising_loss(
    loss_by_bucket: Callable[[Params, Any, Arrays, jax.Array], jax.Array],
    aux: Any,
    held_out: HeldOut,
    seed: int = 0,
) -> Measure:
    """The mean loss, "loss", and that in each bucket of time, "loss_t0" (clean) and so on.

    loss_by_bucket(params, aux, batch, keys [b]) -> [buckets, b]: of each example once in every
    bucket. Example i has the key fold_in(key(seed), i), hence the same times and noise each time.
    """
    rows = _Rows(loss_by_bucket, aux)

    def measure(params: Arrays, step: int) -> dict[str, Any]:
        total: Any = 0.0
        for _, result in rows(params, held_out.batches(), jax.random.key(seed)):
            total = total + np.asarray(result, np.float64).sum(axis=1)
        mean = total / held_out.count
        return {"loss": mean.mean()} | {f"loss_t{i}": value for i, value in enumerate(mean)}

    return measure


def drawn(
    make_pipeline: Callable[[Params], Pipeline],
    held_out: HeldOut,
    how: Sampling,
    measures: Callable[[], Measures],
) -> Measure:
    """Distances and CLIP score of `how.count` pictures, and "grid", the first of them.

    Asked for by the prompts of held-out pictures, from fixed seeds; NaN of what is not finite.
    measures: called once, when it is first needed, since the real pictures' features take a while.
    """
    known: list[Any] = []
    devices = _Devices()
    how = dataclasses.replace(how, batch_size=devices.multiple(how.batch_size))

    def measure(params: Arrays, step: int) -> dict[str, Any]:
        if not known:
            known.extend([cycled(held_out.prompts(), how.count), measures()])
        prompts, by = known
        pipe = make_pipeline(devices.place(params))
        try:
            found, pictures = samples.measure(pipe, prompts, how, by, devices.split)
        except Diverged:  # which the loop deals with, if it lasts
            return by.unknown()
        return found | {"grid": tile(pictures)}

    return measure


def reconstruction(
    net: Net, held_out: HeldOut, features: Features | None = None, shown: int = 8
) -> Measure:
    """How a VAE gives held-out pictures back: PSNR, SSIM, L1 in [-1, 1], and "grid".

    Of the posterior's mean, as pixels (clipped and rounded to 256 levels); with `features` also the
    distances of all reconstructions to all originals (with Inception's, the rFID). SSIM is left out
    for pictures smaller than its window.
    """

    def rebuild(params: Params, aux: Any, batch: Arrays, keys: jax.Array) -> jax.Array:
        mean, _ = net(params, batch["image"], method="encode")
        return net(params, mean, method="decode").transpose(1, 2, 3, 0)

    rows = _Rows(rebuild, ())

    def measure(params: Arrays, step: int) -> dict[str, Any]:
        found: dict[str, list] = {"psnr": [], "ssim": [], "l1": []}
        real, rebuilt, grid = Running(), Running(), None
        for batch, result in rows(params, held_out.batches()):
            image, again = batch["image"], np.moveaxis(np.asarray(result), -1, 0)
            a, b = to_uint8(image), to_uint8(again)
            found["l1"] += list(np.abs(np.clip(again, -1, 1) - image).mean((1, 2, 3)))
            found["psnr"] += list(similarity.psnr(a, b))
            if min(a.shape[1:3]) > 2 * similarity.RADIUS:
                found["ssim"] += list(similarity.ssim(a, b))
            if features is not None:
                real.add(features(a))
                rebuilt.add(features(b))
            if grid is None:
                grid = tile(np.concatenate([a[:shown], b[:shown]]), min(shown, len(a)))
        means = {name: float(np.mean(values)) for name, values in found.items() if values}
        if features is not None:
            names = features.frechet, features.kernel
            means |= distances(rebuilt.result(), real.result(), *names)
        return means | {"grid": grid}

    return measure


def retrieval(towers: Callable[..., tuple[Any, Any, Any]], held_out: HeldOut) -> Measure:
    """How often CLIP picks the right one of all held-out pairs: "text_top1" and "image_top1".

    text_top1: the share of pictures whose nearest caption is (or reads the same as) its own;
    image_top1: of captions whose nearest picture is one that they describe. chance: what guessing
    would score. towers(params, ids, pictures): unit features of both, as `CLIPModel` gives them.
    """

    def features(params: Params, aux: Any, batch: Arrays, keys: jax.Array) -> jax.Array:
        text, image, _ = towers(params, batch["input_ids"], batch["image"])
        return jnp.stack([text, image]).transpose(0, 2, 1).reshape(-1, len(text))

    rows = _Rows(features, ())

    def measure(params: Arrays, step: int) -> dict[str, Any]:
        ids, found = [], []
        for batch, result in rows(params, held_out.batches()):
            ids.append(batch["input_ids"])
            found.append(np.asarray(result))
        text, image = np.split(np.concatenate(found, axis=1), 2)
        _, own = np.unique(np.concatenate(ids), axis=0, return_inverse=True)
        own = own.reshape(-1)
        cosines = image.T @ text  # [pictures, captions]
        same = own[:, None] == own[None, :]
        return {
            "text_top1": float((own[cosines.argmax(axis=1)] == own).mean()),
            "image_top1": float((own[cosines.argmax(axis=0)] == own).mean()),
            "chance": float(same.mean()),
        }

    return measure


class _Devices:
    """Those of this process: the first one measures for all, while the others wait."""

    def __init__(self):
        devices = np.array(jax.local_devices())
        mesh = Mesh(devices, ("rows",), axis_types=(AxisType.Auto,))
        self._count = len(devices)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))

    def place(self, tree: Any) -> Any:
        """On every device."""
        return jax.device_put(tree, self._whole)

    def split(self, tree: Any) -> Any:
        """By rows, `multiple` of them."""
        return jax.device_put(tree, self._rows)

    def multiple(self, rows: int) -> int:
        """The next number that can be split."""
        return -(-rows // self._count) * self._count


class _Rows:
    """A function of (params, aux, batch, keys [b]) -> [..., b], its batches split over devices."""

    def __init__(self, function: Callable[..., jax.Array], aux: Any):
        self._devices, self._aux = _Devices(), aux
        self._program = kernels.jit(function)
        self._keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))

    def __call__(
        self, params: Arrays, batches: Iterable[Batch], key: jax.Array | None = None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each batch and what comes of it. Row i of all has the key fold_in(key, i)."""
        key = jax.random.key(0) if key is None else key
        params, aux = self._devices.place((params, self._aux))  # kept on no device afterwards
        start = length = 0
        for batch in batches:
            rows = len(next(iter(batch.values())))
            length = max(length, self._devices.multiple(rows))
            whole = {name: filled(value, length) for name, value in batch.items()}
            keys = self._keys(key, jnp.arange(start, start + length))
            result = self._program(params, aux, *self._devices.split((whole, keys)))
            yield batch, np.asarray(result)[..., :rows]
            start += rows
        if not start:
            raise JaxsdError("there are no held-out examples to measure on")
