"""One port for the endpoint and the page, from the first compiled program to a clean end."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Sequence

import uvicorn

from jaxsd.errors import JaxsdError
from jaxsd.serving import page
from jaxsd.serving.api import make_app
from jaxsd.serving.batching import Worker
from jaxsd.serving.limits import Limits
from jaxsd.serving.models import Served
from jaxsd.serving.service import Service

CLOSING = 2  # seconds for answers to be read, and open pages to be told, at the end


class Server(uvicorn.Server):
    """Told to stop, it answers what is being drawn, refuses what waits, and closes."""

    def __init__(
        self,
        service: Service,
        ready: Callable[[], None] = lambda: None,
        names: Collection[str] | None = None,
    ):
        self._service, self._ready = service, ready
        app = page.mount(make_app(service, names), service)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=CLOSING, server_header=False
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()  # only now a client is let in

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = threading.Thread(target=self._service.worker.stop, daemon=True)
        stopping.start()
        while stopping.is_alive() and not self.force_exit:  # by a second Ctrl-C
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded."""
    with contextlib.ExitStack() as undo:
        try:
            family, kind, _, _, place = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = undo.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(place)
        except OSError as error:
            said = error.strerror or error
            raise JaxsdError(f"cannot listen on {host} port {port}: {said}") from None
        undo.pop_all()
    return bound


def address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def own_names(bound: socket.socket, names: Sequence[str]) -> set[str] | None:
    """Host names under which requests are taken; None for any: what a network calls this machine
    nobody here can know."""
    if not names and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        return None
    return {"localhost", *(name.lower() for name in names)}


def serve(
    models: Sequence[Served],
    limits: Limits,
    bound: socket.socket,
    say: Callable[[str], None],
    names: Sequence[str] = (),
) -> None:
    """Until Ctrl-C or SIGTERM, of which the first lets what is being drawn come to its end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands it on at its end
    for model in models:
        say(f"{model.name}: compiling for {model.batch_size} pictures at a time")
        model.warm_up(pictures=model is models[0])
    service = Service({model.name: model for model in models}, Worker(limits.waiting), limits)
    ready = f"{address(bound)} (Ctrl-C ends it)"
    try:
        Server(service, lambda: say(ready), own_names(bound, names)).run([bound])
    except KeyboardInterrupt:
        return
