"""Bodies with a limit, server-sent events, and clients that hang up."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from examples.serving.protocol import Refusal

BODY_SECONDS = 10.0
"""The time for a body to arrive. A body that is too large is read and dropped as long,
since most clients read no answer before they have sent all."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: It has more than `limit` bytes, or it takes too long.
        ClientDisconnect: The client has hung up.
    """
    found, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    found += chunk
                else:
                    found.clear()
    except TimeoutError:
        if size <= limit:
            told = f"the body must arrive in {BODY_SECONDS:g} seconds"
            raise Refusal(408, told, "timeout") from None
    if size > limit:
        told = f"the body must have at most {limit:,} bytes, got {size:,} or more"
        raise Refusal(413, told, "request_too_large")
    return bytes(found)


async def unless_gone(receive: Any, work: Awaitable[Any]) -> Any:
    """What `work` returns; it is cancelled if the client hangs up.

    Raises:
        ClientDisconnect: The client has hung up.
    """

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.create_task(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Stream(Response):
    """Server-sent events, until they end or the client hangs up.

    Args:
        pieces: Each is a text, or something that JSON can hold.
        seconds: The time for all of it, since a client may stop reading.
        on_end: A function to call after the last one, or when the client has hung up.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncIterator[Any], seconds: float, on_end: Callable[[], None]
    ) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._pieces, self._seconds, self._on_end = pieces, seconds, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all events."""
        try:
            with contextlib.suppress(ClientDisconnect, TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await unless_gone(receive, self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Any) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start"} | start)
        body = {"type": "http.response.body", "more_body": True}
        async for piece in self._pieces:
            data = piece if isinstance(piece, str) else json.dumps(piece)
            await send(body | {"body": f"data: {data}\n\n".encode()})
        await send(body | {"body": b"", "more_body": False})
