"""Clients of a service on this machine, and faults in its files.

The clients know what each adapter must say. They speak HTTP by themselves, since two
cores have to do for them and for the service.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HOST = "127.0.0.1"
PATIENCE = 300.0
"""Seconds for one answer; one that takes longer is lost."""


@dataclasses.dataclass
class Found:
    """Answers that clients have got.

    Attributes:
        counts: Numbers of answers that were right, wrong, refused, lost and so on.
        seconds: The time of each right answer.
        first: The time until the first token of each streamed one.
        tokens: The number of tokens of all right answers.
        odd: Some of the answers that should not be.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    odd: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str, odd: Any = None) -> None:
        """Count an answer."""
        self.counts[what] += 1
        if odd is not None and len(self.odd) < 8:
            self.odd.append(f"{what}: {odd}")

    def summary(self, elapsed: float) -> dict[str, Any]:
        """The figures of a run of `elapsed` seconds."""
        p50, p99 = np.percentile(self.seconds or [np.nan], [50, 99]) * 1e3
        return {
            **{name: self.counts[name] for name in ("right", "wrong", "lost")},
            "refused": self.counts["refused"],
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "first_p50_ms": float(np.median(self.first or [np.nan]) * 1e3),
            "tokens_per_second": self.tokens / elapsed,
            "requests_per_second": self.counts["right"] / elapsed,
            "elapsed": elapsed,
        }


class Connection:
    """One connection to the service, which is opened again where it was closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> tuple[int, AsyncIterator[bytes]]:
        """The status of an answer, and its body in pieces."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(HOST, self.port)
        reader, writer = self.streams
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: service\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), self._body(reader, fields)

    async def _body(
        self, reader: asyncio.StreamReader, fields: dict[str, str]
    ) -> AsyncIterator[bytes]:
        if "content-length" in fields:
            yield await reader.readexactly(int(fields["content-length"]))
        else:
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        if fields.get("connection") == "close":
            self.close()

    def close(self) -> None:
        """Hang up."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def body(model: str, question: str, **fields: Any) -> bytes:
    """A request, greedy by default."""
    messages = [{"role": "user", "content": question}]
    asked = {"model": model, "messages": messages, "temperature": 0}
    return json.dumps(asked | {"max_tokens": 16} | fields).encode()


async def ask(
    connection: Connection, model: str, question: str, stream: bool
) -> tuple[int, str, int, float]:
    """(status, text or message, tokens, when the first piece came)."""
    status, pieces = await connection.post(body(model, question, stream=stream))
    received, first = b"", 0.0
    async for piece in pieces:
        first = first or time.perf_counter()
        received += piece
    if status != 200:
        return status, json.loads(received)["error"]["code"], 0, first
    if not stream:
        told = json.loads(received)
        text = told["choices"][0]["message"]["content"]
        return status, text, told["usage"]["completion_tokens"], first
    events = [e.removeprefix("data: ") for e in received.decode().split("\n\n") if e]
    if events[-1] != "[DONE]":
        raise ValueError(f"a stream must end with [DONE], got {events[-1]}")
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return status, "".join(d.get("content", "") for d in deltas), len(deltas) - 2, first


@dataclasses.dataclass
class Load:
    """Clients that know the answers of the adapters that they ask.

    Attributes:
        port: That of the service.
        words: {adapter: the answers that it may give}.
        questions: The questions that are asked.
        may_refuse: The adapters whose files are damaged at times.
        clients: The number of clients.
    """

    port: int
    words: Mapping[str, Sequence[str]]
    questions: Sequence[str]
    may_refuse: Sequence[str] = ()
    clients: int = 64

    async def run(self, requests: int, seconds: float = np.inf) -> dict[str, Any]:
        """Ask until so many requests are answered, or so many seconds are over."""
        found, numbers = Found(), iter(range(requests))
        start = time.perf_counter()
        work = [
            self._client(numbers, found, start + seconds) for _ in range(self.clients)
        ]
        await asyncio.gather(*work)
        summary = found.summary(time.perf_counter() - start)
        return summary | {"clients": self.clients, "odd": found.odd}

    async def _client(self, numbers: Iterator[int], found: Found, end: float) -> None:
        connection, names = Connection(self.port), sorted(self.words)
        for number in numbers:
            if time.perf_counter() > end:
                break
            chosen = random.Random(number)
            name, question = chosen.choice(names), chosen.choice(self.questions)
            await self._once(connection, name, question, bool(number % 2), found)
        connection.close()

    async def _once(
        self, connection: Connection, name: str, question: str, stream: bool, found: Any
    ) -> None:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await ask(connection, name, question, stream)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            connection.close()
            found.note("lost", f"{name}: {error!r}")
            return
        status, text, tokens, first = answer
        if status == 200 and text in self.words[name]:
            found.note("right")
            found.tokens += tokens
            found.seconds.append(time.perf_counter() - start)
            if stream:
                found.first.append(first - start)
        elif status == 200:
            found.note("wrong", f"{name} said {text!r}")
        elif name in self.may_refuse and status in (404, 503):
            found.note("refused")
        else:
            found.note("lost", f"{name}: {status} {text}")


BAD: Sequence[tuple[int, bytes]] = (
    (400, b"\xff\xfe\x00"),
    (400, b"{"),
    (400, b"[" * 50_000),
    (404, body("..", "Hi")),
    (404, body("../../etc", "Hi")),
    (404, body("nobody", "Hi")),
    (400, body("nobody", "Hi", max_tokens=10**9)),
    (400, body("nobody", "\ud800")),
    (413, b"x" * 100_000_000),
)
"""Bodies, and the status that each must be answered with."""


async def bad_requests(port: int, found: Counter[str], pause: float = 0.2) -> None:
    """Send bad requests until it is cancelled."""
    for status, given in itertools.cycle(BAD):
        connection = Connection(port)
        with contextlib.closing(connection):
            got, pieces = await connection.post(given)
            told = json.loads(b"".join([piece async for piece in pieces]))
        right = got == status and told["error"]["message"]
        found["bad requests" if right else f"{given[:40]!r} got {got}"] += 1
        await asyncio.sleep(pause)


async def hang_ups(
    port: int, names: Sequence[str], found: Counter[str], pause: float = 0.05
) -> None:
    """Open streams and leave them after the first piece, until it is cancelled."""
    for name in itertools.cycle(names):
        connection = Connection(port)
        with contextlib.closing(connection):
            _, pieces = await connection.post(body(name, "Hi", stream=True))
            await anext(pieces)
        found["hang-ups"] += 1
        await asyncio.sleep(pause)


def damage(path: Path, how: str) -> None:
    """Do to an adapter's file what happens to files."""
    tensors = path / "adapter_model.safetensors"
    with contextlib.suppress(FileNotFoundError):
        whole = tensors.read_bytes()
        if how == "corrupted":
            tensors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        elif how == "half-written":
            tensors.write_bytes(whole[: len(whole) // 2])
        elif how == "half a config":
            tensors.write_bytes(whole[:999] + whole[1099:])
        elif how == "deleted":
            shutil.rmtree(path)


async def faults(
    places: Sequence[Path],
    versions: Sequence[Path],
    found: Counter[str],
    pause: float = 0.03,
) -> None:
    """Damage adapters and mend them by other versions, until it is cancelled."""
    ways = "corrupted", "half-written", "half a config", "deleted", "replaced"
    for number in itertools.count():
        place, how = places[number % len(places)], random.choice(ways)
        await asyncio.to_thread(damage, place, how)
        found[how] += 1
        await asyncio.sleep(pause)
        version = random.choice(versions)
        # Not at once and file by file, as a copy that somebody makes.
        await asyncio.to_thread(shutil.copytree, version, place, dirs_exist_ok=True)
        await asyncio.sleep(pause)
