"""The endpoints of the service.

They run in one event loop. Decoding runs in the engine's thread, and files are read in
another, so that no request waits for the work of another one in here.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.serving.adapters import Adapters, Held, UnknownAdapter, UnusableAdapter
from examples.serving.engine import Engine
from examples.serving.errors import HANDLERS, checked, full, late, unknown
from examples.serving.jobs import End, Event, Full, Job
from examples.serving.protocol import Answer, Refusal, Wanted, models, parse
from examples.serving.streams import Stream, read_body, unless_gone

READ_SECONDS = 10.0
"""The time for a client to read what is left of a stream whose time is over."""

log = logging.getLogger("uvicorn.error")


class Tokenizer(Protocol):
    """What conversations are written with."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: The largest number of bytes of a body.
        tokens: The largest number of new tokens.
        seconds: The time for one request, with the time that it waits.
    """

    body: int = 256 * 1024
    tokens: int = 256
    seconds: float = 120.0


@dataclass
class Call:
    """A request on its way.

    Attributes:
        answer: What it is answered.
        prompt: Its tokens.
        deadline: When it must have ended, on the clock `time.monotonic`.
        held: Its adapter; None for the base alone.
        job: What the engine does for it.
        events: What the engine has said.
    """

    answer: Answer
    prompt: Sequence[int]
    deadline: float
    held: Held | None = None
    job: Job | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


class Service:
    """The endpoints.

    Args:
        engine: What decodes.
        adapters: The adapters.
        tokenizer: The model's tokenizer.
        base: The name of the base.
        limits: The limits of a request.
        on_failure: A function to call when the engine has failed.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: Adapters,
        tokenizer: Tokenizer,
        base: str,
        limits: Limits,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.adapters, self.tokenizer = engine, adapters, tokenizer
        self.base, self.limits, self.on_failure = base, limits, on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.publish = self.publish
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name}", self.model),
                Route("/health", self.health),
            ],
            exception_handlers=HANDLERS,
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        yield
        self.adapters.close()
        await asyncio.to_thread(self.engine.stop)

    def publish(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Hand the engine's events to those who wait; called in the engine's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._hear, events)

    def _hear(self, events: Sequence[tuple[Job, Event]]) -> None:
        for job, event in events:
            job.on_event(event)
        if self.engine.error is not None:
            log.error("the engine has failed", exc_info=self.engine.error)
            self.on_failure()

    async def health(self, _: Request) -> Response:
        """Whether it works, and how busy it is."""
        running, waiting = self.engine.busy
        told = {
            "status": "failed" if self.engine.error else "ok",
            "running": running,
            "waiting": waiting,
            "loads": self.adapters.loads,
            "programs": self.engine.programs.compiled,
        }
        return JSONResponse(told, 503 if self.engine.error else 200)

    async def models(self, _: Request) -> Response:
        """The base and all adapters in the directory."""
        return JSONResponse(models(self.base, await self._names()))

    async def model(self, request: Request) -> Response:
        """One of them."""
        for entry in models(self.base, await self._names())["data"]:
            if entry["id"] == request.path_params["name"]:
                return JSONResponse(entry)
        raise unknown(request.path_params["name"])

    async def _names(self) -> list[str]:
        try:
            names = await asyncio.to_thread(self.adapters.names)
        except OSError as error:
            told = f"the adapters cannot be listed: {error.strerror}"
            raise Refusal(503, told, "adapters_unreadable") from None
        return [name for name in names if name != self.base]

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        deadline = time.monotonic() + self.limits.seconds
        wanted = parse(await read_body(request, self.limits.body))
        prompt = await asyncio.to_thread(self._encode, wanted)
        call = Call(Answer(wanted.model, len(prompt)), prompt, deadline)
        streams = False
        try:
            pieces = self._pieces(call)
            work = self._begin(call, wanted, pieces)
            first = await unless_gone(request.receive, work)
            if not wanted.stream:
                return JSONResponse(call.answer.whole(*first))
            streams = True
            parts = self._parts(call, first, pieces, wanted.include_usage)
            seconds = deadline - time.monotonic() + READ_SECONDS
            return Stream(parts, seconds, on_end=lambda: self._give_up(call))
        finally:
            if not streams:
                self._give_up(call)

    def _encode(self, wanted: Wanted) -> list[int]:
        """The tokens of a conversation.

        Raises:
            Refusal: There is no room for the answer.
        """
        new, limit, size = wanted.max_tokens or 1, self.limits.tokens, self.engine.size
        if new > limit:
            told = f"max_tokens must be at most {limit}, got {new}"
            raise Refusal(400, told, "invalid_request", "max_tokens")
        prompt = self.tokenizer.encode(wanted.text())
        if len(prompt) + new > size:
            raise Refusal(
                400,
                f"messages and max_tokens must have at most {size} tokens together, "
                f"got {len(prompt)} + {new}",
                "context_length_exceeded",
                "messages",
            )
        return prompt

    async def _begin(self, call: Call, wanted: Wanted, pieces: Any) -> Any:
        """The whole answer as (text, end); of a stream the first piece."""
        if wanted.model != self.base:
            call.held = await self._acquire(wanted.model, call.deadline)
        room = min(self.engine.size - len(call.prompt), self.limits.tokens)
        job = Job(
            prompt=call.prompt,
            slot=-1 if call.held is None else call.held.slot,
            max_tokens=wanted.max_tokens or room,
            temperature=wanted.temperature,
            seed=random.getrandbits(31) if wanted.seed is None else wanted.seed,
            deadline=call.deadline,
            on_event=lambda event: self._hear_of(call, event),
        )
        try:
            self.engine.submit(job)
        except Full as error:
            raise full(error) from None
        call.job = job
        if wanted.stream:
            return await anext(pieces)
        texts = [piece async for piece in pieces]
        return "".join(texts[:-1]), texts[-1]

    async def _acquire(self, name: str, deadline: float) -> Held:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self.adapters.acquire(name)
        except UnknownAdapter:
            raise unknown(name) from None
        except UnusableAdapter as error:
            told = f"the adapter {name} cannot be used: {error}"
            raise Refusal(503, told, "adapter_unusable", "model") from None
        except Full as error:
            raise full(error) from None
        except TimeoutError:
            raise late() from None

    def _hear_of(self, call: Call, event: Event) -> None:
        """Pass an event on; after the last one the adapter may leave its slot."""
        call.events.put_nowait(event)
        if isinstance(event, End) and call.held is not None:
            self.adapters.release(call.held)

    def _give_up(self, call: Call) -> None:
        """Nobody waits for a call any more, if anyone did."""
        if call.job is not None:
            call.job.gone = True  # the engine's last event releases the adapter
        elif call.held is not None:
            self.adapters.release(call.held)

    async def _pieces(self, call: Call) -> AsyncIterator[Any]:
        """Each new text, which no later token can change, and the end of the answer.

        Raises:
            Refusal: The engine has not come to an end.
        """
        pending: list[int] = []
        sent = 0  # of the characters of `pending`
        while True:
            event = await call.events.get()
            ended = isinstance(event, End)
            if not ended:
                pending.append(event)
                call.answer.said += 1
            text = self.tokenizer.decode(pending)
            # The last character may be one of several bytes, of which more will come.
            partial = text.endswith("\ufffd") and not ended
            if new := text[sent : len(text) - partial]:
                sent += len(new)
                yield new
            if not partial:
                pending.clear()
                sent = 0
            if ended:
                yield checked(event)
                return

    async def _parts(
        self, call: Call, first: Any, rest: Any, include_usage: bool
    ) -> AsyncIterator[Any]:
        """The parts of a stream."""
        answer, piece = call.answer, first
        yield answer.piece({"role": "assistant", "content": ""})
        try:
            while not isinstance(piece, End):
                yield answer.piece({"content": piece})
                piece = await anext(rest)
        except Refusal as refusal:
            yield refusal.json()
            return
        yield answer.piece({}, piece)
        if include_usage:
            yield answer.usage()
        yield "[DONE]"
