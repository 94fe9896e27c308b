"""Errors as answers: each is one of OpenAI's shape."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from examples.serving.jobs import End, Full
from examples.serving.protocol import Refusal


def checked(end: End) -> End:
    """The end, if it is one that an answer may have."""
    if end is End.LATE:
        raise late()
    if end in (End.FAILED, End.GONE):
        raise Refusal(500, "the engine has failed", "engine_failed")
    return end


def late() -> Refusal:
    """The request has taken longer than it may."""
    return Refusal(504, "the request took too long", "timeout")


def unknown(name: str) -> Refusal:
    """There is no such model."""
    told = f"the model {name[:64]!r} does not exist"
    return Refusal(404, told, "model_not_found", "model")


def full(error: Full) -> Refusal:
    """The engine takes no other job now."""
    return Refusal(503 if error.stopping else 429, str(error), "overloaded")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {}
    if error.status in (429, 503):
        headers = {"retry-after": "1"}
    if error.status in (408, 413):  # the rest of the body is not read
        headers = {"connection": "close"}
    return JSONResponse(error.json(), error.status, headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path[:128]}: {error.detail}"
    refusal = Refusal(error.status_code, told, "not_found")
    return JSONResponse(refusal.json(), error.status_code, error.headers)


async def _nobody_there(*_: Any) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refuse(request, Refusal(500, "the service has failed", "failed"))


HANDLERS: dict[Any, Any] = {
    Refusal: _refuse,
    HTTPException: _no_such_route,
    ClientDisconnect: _nobody_there,
    Exception: _failed,
}
"""What Starlette calls for each exception."""
