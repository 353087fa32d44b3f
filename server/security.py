"""Check the size and the password of every request, and limit what the page may load."""

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import math
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {  # the page may load only what this server sends
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FREE_ATTEMPTS = 5  # wrong passwords of a client that cost it nothing
LONGEST_WAIT = 64  # seconds
MOST_CLIENTS = 1000  # remembered for their wrong passwords


class Attempts:
    """The wrong passwords of each client; after each, its next one is looked at later."""

    def __init__(self):
        self.wrong: dict[str, tuple[int, float]] = {}  # how many, and the time of the last

    def wait(self, client: str) -> float:
        """Return the seconds before another password of the client may be looked at."""
        count, last = self.wrong.get(client, (0, 0.0))
        if count < FREE_ATTEMPTS:
            return 0.0
        delay = min(2 ** (count - FREE_ATTEMPTS), LONGEST_WAIT)
        return last + delay - time.monotonic()

    def add(self, client: str) -> None:
        count, _ = self.wrong.pop(client, (0, 0.0))
        if len(self.wrong) >= MOST_CLIENTS:
            oldest = next(iter(self.wrong))
            del self.wrong[oldest]
        self.wrong[client] = (count + 1, time.monotonic())


class Body:
    """The body of a request, counted as it comes; HTTPException beyond `most` bytes."""

    def __init__(self, receive: Receive, most: int):
        self.receive, self.most = receive, most
        self.size, self.more = 0, True

    async def bounded(self) -> Message:
        message = await self._next()
        check_size(self.size, self.most)
        return message

    async def drain(self) -> None:
        """Receive the rest, but not much more than is allowed."""
        while self.more and self.size <= 2 * self.most:
            await self._next()

    async def _next(self) -> Message:
        message = await self.receive()
        self.size += len(message.get("body", b""))
        self.more = message.get("more_body", False)
        return message


class Guard:
    """ASGI middleware: 401 without the password, 413 beyond `most` bytes, HEADERS on every answer.

    Wrong passwords make their client wait (429); pages of other hosts or ports get 403.
    """

    def __init__(self, app: ASGIApp, most: int, auth: str | None = None):
        self.app, self.most = app, most
        self.wanted = base64.b64encode((auth or "").encode())
        self.attempts = Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # nothing else passes without a password
            await self.app(scope, receive, send)
            return
        body = Body(receive, self.most)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if message["status"] >= 400:  # clients read it after they have sent everything
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(body.drain(), 10)
            await send(message)

        try:
            headers = Headers(scope=scope)
            if self.wanted:
                self._check_password(client_of(scope), headers)
            site = headers.get("sec-fetch-site", "none")
            if scope["method"] == "POST" and site not in ("same-origin", "none"):
                raise HTTPException(
                    403, "sent by a page of another host or port; use the page of this server"
                )
            length = headers.get("content-length", "0")
            check_size(int(length) if length.isdecimal() else self.most + 1, self.most)
            await self.app(scope, body.bounded, answer)
        except HTTPException as error:
            await as_json(error)(scope, receive, answer)

    def _check_password(self, client: str, headers: Headers) -> None:
        kind, _, sent = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            wait = math.ceil(self.attempts.wait(client))
            if wait > 0:
                error = f"too many wrong passwords; try again in {wait} s"
                raise HTTPException(429, error, {"Retry-After": str(wait)})
            if hmac.compare_digest(sent.strip().encode("latin-1"), self.wanted):
                self.attempts.wrong.pop(client, None)
                return
            self.attempts.add(client)
        asked = {"WWW-Authenticate": 'Basic realm="brainseg", charset="UTF-8"'}
        raise HTTPException(401, "wrong user or password", asked)


def check_size(size: int, most: int) -> None:
    """Raise HTTPException 413 for more than `most` bytes."""
    if size > most:
        error = f"larger than {most >> 20} MiB; crop the scan, or compress it"
        raise HTTPException(413, error)


def as_json(error: HTTPException) -> JSONResponse:
    headers = {"Connection": "close"} | dict(error.headers or {})
    return JSONResponse({"error": error.detail}, error.status_code, headers)


def client_of(scope: Scope) -> str:
    """Return the address that a request came from; of IPv6, the network, which has one owner."""
    if not scope.get("client"):
        return ""
    host = scope["client"][0]
    if ":" in host:
        network = ipaddress.ip_network((host.partition("%")[0], 64), strict=False)
        return str(network)
    return host


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
