"""What every request to the server passes: its size, its password, and what its page may load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import json
import re
from pathlib import Path

MIB = 2**20
HDF5 = b"\x89HDF\r\n\x1a\n"  # at 0, 512, 1024, 2048 ... of a file: its data may lie in other files
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

    A page of another host or port cannot make its visitor's browser send anything here (403).
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
        site = headers.get(b"sec-fetch-site", b"none")
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
        elif scope["method"] == "POST" and site not in (b"same-origin", b"none"):
            await drain(receive, self.most)
            await refuse(with_headers, 403, "sent by the page of another host or port")
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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_alone(path: Path) -> None:
    """Raise ValueError if a file may keep its voxels in another one, which could be the server's.

    Headers are held to the letter of their format, as readers are more lenient than this is.
    """
    size, name = path.stat().st_size, path.name.lower()
    with open(path, "rb") as file:
        header = file.read(MIB)
        for place in [0, *(512 << k for k in range(60) if 512 << k < size)]:
            file.seek(place)
            if file.read(len(HDF5)) == HDF5:
                raise ValueError(f"{path}: is an HDF5 file; save it as NIfTI")
    if name.endswith(".mhd"):
        raise ValueError(f"{path}: keeps its voxels in a file of its own; save it as .mha or .nrrd")
    if name.endswith(".mha") and not _is_whole_mha(header):
        raise ValueError(f"{path}: keeps its voxels in another file; save it as one file")
    if name.endswith(".nrrd") and not _is_whole_nrrd(header):
        raise ValueError(f"{path}: keeps its voxels in another file; save it as one file")


def _is_whole_mha(header: bytes) -> bool:
    """Whether `name = value` lines lead to ElementDataFile = LOCAL, and nowhere else before."""
    for line in header.replace(b"\r\n", b"\n").split(b"\n"):
        field = re.fullmatch(rb"(\w+) ?= ?([ -~\x80-\xff]*)", line)
        if not field:
            return False
        if field[1].lower() == b"elementdatafile":
            return field[1] == b"ElementDataFile" and field[2].strip() == b"LOCAL"
    return False


def _is_whole_nrrd(header: bytes) -> bool:
    """Whether the header ends within a MiB, in lines of text of which none names a data file."""
    lines, end, _ = header.replace(b"\r\n", b"\n").partition(b"\n\n")
    if not end or not lines.startswith(b"NRRD") or re.search(rb"[^\n\t -~\x80-\xff]", lines):
        return False
    names = (
        re.sub(rb"[^a-z]", b"", line.partition(b":")[0].lower()) for line in lines.split(b"\n")
    )
    return not any(name.endswith(b"datafile") for name in names)
