"""A running service of `examples/serve_many.py`, and what its adapters say alone."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import openai
import uvicorn

import mora_jax
from examples import serve_many
from models import bytelevel
from models.codewords import conversation
from models.smollm2 import generate
from mora_jax import MoRAConfig, linen

QUESTIONS = "Hi", "What is the word that opens the door?"
NAMES = "law", "code", "chat", "v1.2", "a-b", "x"
"""The adapters of seeds 0, 1, ...: more than there are slots."""
TOKENS = 12
"""Of an answer; `wanted` has so many, too."""


HELLO = [{"role": "user", "content": "Hi"}]


def asked(model: Any = "law", **fields: Any) -> bytes:
    """The body of a request."""
    return json.dumps({"model": model, "messages": HELLO} | fields).encode()


class Oracle:
    """Random adapters of the small model, and what each of them says alone.

    It computes whole texts with one adapter: no cache, no rows, no slots.
    """

    def __init__(self, rank: int = 4) -> None:
        self.model, self.params, self.tokenizer = bytelevel.load()
        self.plan = self.plan_of(rank)
        self.apply = jax.jit(linen.wrap(self.model, self.plan))

    def plan_of(self, rank: int) -> mora_jax.Plan:
        """A plan of the model."""
        variables, ids = {"params": self.params}, jnp.zeros((1, 8), jnp.int32)
        return linen.plan(self.model, variables, MoRAConfig(rank=rank), ids)

    def adapters(self, seed: int) -> Any:
        """Adapters that change most answers."""
        key, zeros = jax.random.key(seed), mora_jax.init(self.plan)
        leaves, tree = jax.tree.flatten(zeros)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        noise = [0.2 * jax.random.normal(k, m.shape) for k, m in pairs]
        return jax.tree.unflatten(tree, noise)

    def save(self, directory: Path, seed: int, **settings: Any) -> None:
        """Write the adapters of a seed."""
        mora_jax.save(directory, self.adapters(seed), **settings)

    @functools.cache  # noqa: B019
    def says(self, seed: int | None) -> dict[str, str]:
        """The answer to each question with the adapters of a seed; None for none."""
        adapters = mora_jax.init(self.plan) if seed is None else self.adapters(seed)
        apply = functools.partial(self.apply, adapters, {"params": self.params})
        prompts = [self.tokenizer.encode(conversation(q)) for q in QUESTIONS]
        length = max(map(len, prompts)) + TOKENS
        answers = generate(apply, prompts, TOKENS, length)
        told = [self.tokenizer.decode(ids) for ids in answers]
        return dict(zip(QUESTIONS, told, strict=True))


class Running:
    """A service on a port of this machine."""

    def __init__(self, directory: Path, port: int, service: Any) -> None:
        self.directory, self.port, self.service = directory, port, service
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )

    def ask(self, model: str, question: str = QUESTIONS[0], **settings: Any) -> Any:
        """An answer of the model, greedy and short by default."""
        settings = {"temperature": 0, "max_tokens": TOKENS} | settings
        messages: Any = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(
            model=model, messages=messages, **settings
        )

    def text(self, model: str, question: str = QUESTIONS[0], **settings: Any) -> str:
        """Its text."""
        return self.ask(model, question, **settings).choices[0].message.content

    def post(self, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, Any]:
        """The status and the JSON that a body is answered with."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def health(self) -> Any:
        """What the service says of itself."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Wait until no row is in use, and nothing waits."""
        until(lambda: self.service.engine.busy == (0, 0), seconds)


def until(true: Any, seconds: float = 10) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@contextlib.contextmanager
def running(directory: Path, *options: Any) -> Any:
    """A service of the small model with the adapters in `directory`."""
    given = ["--model", "tiny", "--adapters", directory, "--rank", "4", *options]
    args = serve_many.options().parse_args(list(map(str, given)))
    service = serve_many.make_service(args)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(service.app, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    run = functools.partial(asyncio.run, server.serve([listener]))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: server.started)
        found = Running(directory, listener.getsockname()[1], service)
        yield found
        found.client.close()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
