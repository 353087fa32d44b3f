"""Check the size and the password of every request, and limit what the page may load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

HEADERS = {  # the page may load only what this server sends
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: 401 without the password, 413 beyond `most` bytes, HEADERS on every answer.

    A page of another host or port cannot make its visitor's browser post anything here (403).
    """

    def __init__(self, app, most: int, auth: str | None = None):
        self.app, self.most = app, most
        self.wanted = auth and base64.b64encode(auth.encode())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":  # nothing else passes without a password
            await self.app(scope, receive, send)
            return
        came, more = 0, True

        async def counted() -> dict:
            nonlocal came, more
            message = await receive()
            came += len(message.get("body", b""))
            more = message.get("more_body", False)
            return message

        async def bounded() -> dict:
            message = await counted()
            self._check_size(came)
            return message

        async def rest() -> None:
            while more and came <= 2 * self.most:
                await counted()

        async def answer(message: dict) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if message["status"] >= 400:  # clients read it after they have sent everything
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(rest(), 10)
            await send(message)

        try:
            self._check(scope["method"], Headers(scope=scope))
            await self.app(scope, bounded, answer)
        except HTTPException as error:
            await as_json(error)(scope, receive, answer)

    def _check(self, method: str, headers: Headers) -> None:
        kind, _, sent = headers.get("authorization", "").partition(" ")
        sent = sent.strip().encode("latin-1")
        if self.wanted and not (kind.lower() == "basic" and hmac.compare_digest(sent, self.wanted)):
            asked = {"WWW-Authenticate": 'Basic realm="brainseg", charset="UTF-8"'}
            raise HTTPException(401, "wrong user or password", asked)
        site = headers.get("sec-fetch-site", "none")
        if method == "POST" and site not in ("same-origin", "none"):
            raise HTTPException(
                403, "sent by a page of another host or port; use the page of this server"
            )
        length = headers.get("content-length", "0")
        self._check_size(int(length) if length.isdecimal() else self.most + 1)

    def _check_size(self, size: int) -> None:
        if size > self.most:
            error = f"larger than {self.most >> 20} MiB; crop the scan, or compress it"
            raise HTTPException(413, error)


def as_json(error: HTTPException) -> JSONResponse:
    headers = {"Connection": "close", **(error.headers or {})}
    return JSONResponse({"error": error.detail}, error.status_code, headers)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
