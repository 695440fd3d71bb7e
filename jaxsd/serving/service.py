"""What the endpoint and the page share: models by name, one worker, and waiting for pictures."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsd import __version__
from jaxsd.errors import JaxsdError
from jaxsd.pictures import png
from jaxsd.serving.batching import OnFrame, Worker
from jaxsd.serving.limits import Limits, Refused
from jaxsd.serving.models import Request, Served


class Late(JaxsdError):
    """The pictures were not there in time."""


class NoModel(Refused):
    """No model of this name is served."""


@dataclasses.dataclass(frozen=True)
class Service:
    """Models, the first of which is meant where none is named, and the worker that draws."""

    models: Mapping[str, Served]
    worker: Worker
    limits: Limits

    @property
    def first(self) -> Served:
        return next(iter(self.models.values()))

    def model(self, name: str | None) -> Served:
        """NoModel if there is none of this name."""
        if name is None:
            return self.first
        if name not in self.models:
            known = ", ".join(self.models)
            raise NoModel(f"there is no model {name!r} here; there are {known}", "model")
        return self.models[name]

    async def draw(
        self, model: Served, requests: Sequence[Request], on_frame: OnFrame | None = None
    ) -> list[np.ndarray]:
        """A picture for each request, uint8 [h, w, c].

        Busy if there is no room, Late after the limits' timeout. Cancelled, it gives up its place.
        on_frame is called from another thread.
        """
        jobs = self.worker.submit(model, requests, on_frame)
        try:
            async with asyncio.timeout(self.limits.timeout):
                pictures = [asyncio.wrap_future(job.picture) for job in jobs]
                return await asyncio.gather(*pictures)
        except TimeoutError:
            raise Late(
                f"the pictures were not there in {self.limits.timeout:g} s: there is much to do, "
                "or they take that long"
            ) from None
        finally:
            for job in jobs:
                job.picture.cancel()


def file_of(model: Served, request: Request, picture: np.ndarray) -> bytes:
    """A PNG that says how it was made, as those of `sample.py` do."""
    notes: dict[str, Any] = {"Software": f"jaxsd {__version__}", "model": model.name}
    notes |= {
        name: value
        for name, value in vars(request).items()
        if value is not None and name not in ("image", "mask")
    }
    return png(picture, notes)
