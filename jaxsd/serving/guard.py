"""What holds of every request and answer, before any route: how large, and from where."""

from typing import Any

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


class Guard:
    """ASGI middleware that counts the bytes of bodies, and adds headers to answers."""

    def __init__(self, app: Any, body_bytes: int):
        self._app, self._most = app, body_bytes
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise TooLarge(f"the body has more than {self._most} bytes, which are the most")
            return message

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message.get("headers", [])}
                more = [row for row in self._headers if row[0] not in own]
                message = message | {"headers": [*message.get("headers", []), *more]}
            await send(message)

        await self._app(scope, counted, with_headers)
