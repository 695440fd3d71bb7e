"""What holds of every request and answer, before any route: how large, from where, and for whom."""

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response

from jaxsd.errors import JaxsdError
from jaxsd.serving.limits import TooLarge

# A browser is to fetch nothing from elsewhere for this page, nor show it inside another.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Foreign(JaxsdError):
    """A request that a page of another site has had a visitor's browser send."""


class Guard:
    """ASGI middleware that counts the bytes of bodies, and adds headers to answers.

    names: as `check_site` has them; refuse: makes an answer of its error.
    """

    def __init__(
        self,
        app: Any,
        body_bytes: int,
        names: Collection[str] | None,
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ):
        self._app, self._most, self._names, self._refuse = app, body_bytes, names, refuse
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").startswith("multipart/")
        seen, ended = 0, False

        async def counted() -> Any:
            nonlocal seen, ended
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                said = f"the body has more than {self._most} bytes, the maximum allowed size"
                raise MultiPartException(said) if upload else TooLarge(said)
            if upload and not ended and message["type"] == "http.disconnect":
                # Of an error that is not its own Gradio leaves the files that it has begun
                raise MultiPartException("the upload broke off")
            ended = not message.get("more_body", False)
            return message

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message.get("headers", [])}
                more = [row for row in self._headers if row[0] not in own]
                message = message | {"headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            check_site(headers, self._names)
        except Foreign as error:
            answer = await self._refuse(Request(scope), error)
            await answer(scope, receive, with_headers)
            return
        await self._app(scope, counted, with_headers)


def check_site(headers: Headers, names: Collection[str] | None) -> None:
    """Foreign for what a browser was told to send here by a page that is not ours.

    It then says that page's host as the Origin. (Gradio lets any page read its answers, with the
    visitor's password, unless it is asked for as localhost.) A site whose name was made to lead to
    this machine (DNS rebinding) is of one origin with us to a browser, but the Host is that name:
    names are those that are ours, None for any. An address is nobody's name.
    """
    host = _host("//" + headers.get("host", ""))
    if names is not None and host not in ("", *names) and not _is_address(host):
        raise Foreign(f"nothing here is called {host!r}: jaxsd serve --host-name says what is")
    origin = headers.get("origin")
    if origin is None or headers.get("sec-fetch-site") in ("same-origin", "none"):
        return
    if _host(origin) != host:  # without the port, which proxies leave out of the Host
        raise Foreign("a page of another site cannot ask this server")


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # half an IPv6 address
        return address


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
