"""What every request to the server passes: its size, its password, and what its page may load."""

from __future__ import annotations

import base64
import hmac
import json

# A page may load nothing but what this server sends.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class TooLarge(Exception):
    """More bytes came than may."""


class Guard:
    """ASGI middleware: 401 without the password, 413 beyond `most` bytes, headers on the rest."""

    def __init__(self, app, most: int, auth: str | None = None):
        self.app, self.most = app, most
        self.wanted = auth and b"Basic " + base64.b64encode(auth.encode())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.wanted and not hmac.compare_digest(headers.get(b"authorization", b""), self.wanted):
            await _refuse(send, 401, "wrong user or password")
            return
        length, came, started = headers.get(b"content-length", b"0"), 0, False
        too_large = f"more than {self.most >> 20} MiB; crop the scan, or compress it"
        if not length.isdigit() or int(length) > self.most:
            await _refuse(send, 413, too_large)
            return

        async def counted() -> dict:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise TooLarge
            return message

        async def with_headers(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                names = {name for name, _ in extra}
                kept = [(k, v) for k, v in message["headers"] if k.lower() not in names]
                message = message | {"headers": kept + extra}
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except TooLarge:
            if not started:
                await _refuse(send, 413, too_large)


async def _refuse(send, status: int, error: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="brainseg", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
