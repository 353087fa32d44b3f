"""What every request to the server passes: its size, its password, and what its page may load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json

# A page may load nothing but what this server sends.
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class TooLarge(Exception):
    """More bytes came than may."""


class Guard:
    """ASGI middleware: 401 without the password, 413 beyond `most` bytes, headers on the rest.

    A page of another host cannot make its visitor's browser send anything here (403).
    """

    def __init__(self, app, most: int, auth: str | None = None):
        self.app, self.most = app, most
        self.wanted = auth and base64.b64encode(auth.encode())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope, receive, send) -> None:
        headers, came, started = dict(scope["headers"]), 0, False
        kind, _, sent = headers.get(b"authorization", b"").partition(b" ")
        right = kind.lower() == b"basic" and hmac.compare_digest(sent.strip(), self.wanted or b"")
        length = headers.get(b"content-length", b"0")
        too_large = f"more than {self.most >> 20} MiB; crop the scan, or compress it"

        async def with_headers(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {name for name, _ in HEADERS}
                kept = [(k, v) for k, v in message["headers"] if k.lower() not in names]
                message = message | {"headers": kept + HEADERS}
            await send(message)

        async def counted() -> dict:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise TooLarge
            return message

        if self.wanted and not right:
            await drain(receive, self.most)
            await refuse(with_headers, 401, "wrong user or password")
        elif headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] == "POST":
            await drain(receive, self.most)
            await refuse(with_headers, 403, "sent by the page of another host")
        elif not length.isdigit() or int(length) > self.most:
            await drain(receive, 2 * self.most)
            await refuse(with_headers, 413, too_large)
        else:
            try:
                await self.app(scope, counted, with_headers)
            except TooLarge:
                if not started:
                    await refuse(with_headers, 413, too_large)


async def drain(receive, most: int, seconds: float = 10) -> None:
    """Take in what a client still sends, within bounds: only then does it read the answer."""

    async def rest() -> None:
        came = 0
        while came <= most:
            message = await receive()
            came += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), seconds)


async def refuse(send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    if status == 405:
        headers.append((b"allow", b"POST"))
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="brainseg", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
