"""Pictures over HTTP, as OpenAI's clients ask for them; errors in their form, each a sentence."""

import asyncio
import base64
import dataclasses
import secrets
import time
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTP
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxsd.errors import JaxsdError
from jaxsd.seeds import SEEDS
from jaxsd.serving import schema, uploads
from jaxsd.serving.guard import Foreign, Guard
from jaxsd.serving.kept import SECONDS, Kept
from jaxsd.serving.limits import Busy, Refused, TooLarge
from jaxsd.serving.models import Request, Served
from jaxsd.serving.service import Late, NoModel, Service, file_of

READING = 60.0  # seconds for a body to arrive
DECODING = 2  # large pictures at a time
# (status, type, code) of OpenAI's errors, for those of ours; the first that fits
ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    Foreign: (403, "invalid_request_error", "foreign_site"),
    NoModel: (404, "invalid_request_error", "model_not_found"),
    TooLarge: (413, "invalid_request_error", "too_large"),
    Busy: (503, "server_error", "server_overloaded"),
    Late: (504, "server_error", "timeout"),
    JaxsdError: (400, "invalid_request_error", "invalid_value"),
    Exception: (500, "server_error", "internal_error"),
}


def make_app(service: Service, names: Collection[str] | None = None) -> FastAPI:
    """The endpoint, without a page. The interactive documentation of FastAPI, which a browser
    would fetch from elsewhere, is left out. names: of this host, as `guard.check_site` has them."""
    app = FastAPI(title="jaxsd", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, body_bytes=service.limits.body_bytes, names=names, refuse=refuse)
    endpoint = Endpoint(service)
    app.add_api_route("/health", endpoint.health, methods=["GET"])
    app.add_api_route("/v1/models", endpoint.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", endpoint.show_model, methods=["GET"])
    app.add_api_route("/v1/images/generations", endpoint.generate, methods=["POST"])
    app.add_api_route("/v1/images/{name}.png", endpoint.picture, methods=["GET"], name="picture")
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    app.add_api_route("/v1/{rest:path}", endpoint.unknown, methods=methods)
    for kind in ERRORS:
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(HTTPException, refuse)
    return app


async def refuse(http: HTTP, error: Exception) -> JSONResponse:
    """OpenAI's form of an error."""
    if isinstance(error, HTTPException):
        status, kind = error.status_code, "invalid_request_error"
        code = HTTPStatus(status).name.lower()
    else:
        status, kind, code = next(row for cls, row in ERRORS.items() if isinstance(error, cls))
    said = str(getattr(error, "detail", error))
    if status == 500:
        said = "the server failed at this; its log says why"
    headers = getattr(error, "headers", None)  # of a method that is not allowed: those that are
    if isinstance(error, Busy):
        headers = {"retry-after": str(error.retry_after)}
    body = {"message": said, "type": kind, "param": getattr(error, "param", None), "code": code}
    return JSONResponse({"error": body}, status, headers)


class Endpoint:
    """The routes."""

    def __init__(self, service: Service):
        self._service, self._kept = service, Kept()
        self._decoding = asyncio.Semaphore(DECODING)

    async def health(self) -> JSONResponse:
        """200 while requests are taken, else 503; how many pictures are drawn and how many wait."""
        worker = self._service.worker
        status = "ok" if worker.alive else "stopping"
        body = {
            "status": status,
            "drawing": worker.drawing,
            "waiting": worker.waiting,
            "models": [*self._service.models],
        }
        return JSONResponse(body, 200 if worker.alive else 503)

    async def list_models(self) -> JSONResponse:
        models = [_describe(model) for model in self._service.models.values()]
        return JSONResponse({"object": "list", "data": models})

    async def show_model(self, name: str) -> JSONResponse:
        return JSONResponse(_describe(self._service.model(name)))

    async def picture(self, name: str) -> Response:
        data = self._kept.find(name)
        if data is None:
            raise HTTPException(404, f"there is no such picture: each is kept for {SECONDS} s")
        return Response(data, media_type="image/png", headers={"cache-control": "no-store"})

    async def unknown(self, http: HTTP, rest: str) -> None:
        raise HTTPException(
            404,
            f"there is no {http.method} /v1/{rest} here: there are GET /v1/models and "
            "POST /v1/images/generations",
        )

    async def generate(self, http: HTTP) -> Response:
        body = schema.parse(await self._read(http))
        model = self._service.model(body.model)
        requests = await self._requests(model, body)
        drawing = asyncio.ensure_future(self._service.draw(model, requests))
        watching = asyncio.ensure_future(_cancel_when_gone(http, drawing))
        try:
            pictures = await drawing
        except asyncio.CancelledError:
            if not http.scope.get("gone"):
                raise  # the server's own end
            return Response(status_code=499)  # nobody reads it
        finally:
            watching.cancel()
        data = []
        for request, picture in zip(requests, pictures, strict=True):
            # In a thread: to compress a large one takes long, and the others' answers would wait
            file = await asyncio.to_thread(file_of, model, request, picture)
            if body.response_format == "url":
                where = {"url": str(http.url_for("picture", name=self._kept.add(file)))}
            else:
                where = {"b64_json": base64.b64encode(file).decode()}
            data.append(where | {"seed": request.seed})
        width, height = requests[0].width, requests[0].height
        said = {"model": model.name, "size": f"{width}x{height}", "output_format": "png"}
        return JSONResponse({"created": int(time.time()), "data": data, **said})

    async def _read(self, http: HTTP) -> bytes:
        """The body; of JSON alone, which no page of another site can send without being asked."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused("the body must be JSON: send content-type: application/json")
        try:
            async with asyncio.timeout(READING):
                return await http.body()
        except TimeoutError:
            raise Late(f"the body did not arrive in {READING:g} s") from None

    async def _requests(self, model: Served, body: schema.Body) -> list[Request]:
        count, limits = 1 if body.n is None else body.n, self._service.limits
        most = min(limits.count, limits.waiting)  # there would never be room for more
        if not 1 <= count <= most:
            raise Refused(f"n must be from 1 to {most}, not {count}", "n")
        seed = secrets.randbelow(SEEDS - count) if body.seed is None else body.seed
        shown = {"image": body.image, "mask": body.mask}
        asked: dict[str, Any] = {}
        for param, text in shown.items():
            if text is not None:
                async with self._decoding:
                    asked[param] = await asyncio.to_thread(uploads.read_base64, text, limits, param)
        asked |= {
            name: getattr(body, name)
            for name in ("negative_prompt", "steps", "guidance_scale", "sampler", "strength")
        }
        size = None if body.size in (None, "auto") else schema.parse_size(body.size)
        asked |= {"seed": seed, "size": size}
        first = await asyncio.to_thread(model.request, body.prompt, **asked)
        if seed + count > SEEDS:
            raise Refused(f"{count} pictures take seeds from {seed} on, and {SEEDS - 1} is the "
                          "last", "seed")  # fmt: skip
        return [dataclasses.replace(first, seed=seed + i) for i in range(count)]


async def _cancel_when_gone(http: HTTP, drawing: asyncio.Future) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)
    http.scope["gone"] = True
    drawing.cancel()


def _describe(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "jaxsd",
        "sizes": [f"{width}x{height}" for width, height in model.sizes],
        "samplers": model.samplers,
        "default_sampler": model.pipe.default_sampler,
        "default_steps": model.pipe.default_steps,
        "default_guidance_scale": model.pipe.default_guidance_scale,
        "negative_prompt": model.takes_negative_prompts,
        "batch_size": model.batch_size,
    }
