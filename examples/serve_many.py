"""Serve a thousand adapters of one model, in OpenAI's protocol.

You will see which kernels are adapted, how long compiling takes, and an address. Each
adapter in the directory is a model there, named as its folder; rows of different
adapters are decoded in one step. This is an example for one machine: it knows its
clients by nothing, and it has one process. After `examples.teach_facts`, whose adapter
is in `out/teach_facts`:

    python -m examples.serve_many --adapters out
    curl http://127.0.0.1:8000/v1/chat/completions -d \
        '{"model": "teach_facts", "messages": [{"role": "user", "content": "Hi"}]}'

Rank, operator and seed must be those of the adapters. `--model tiny` is a small random
model that needs no weights. SIGTERM ends the service when all answers have ended.
docs/serving.md has the protocol, the limits, and what happens when files are damaged.
"""

import argparse
import asyncio
import functools
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import uvicorn

import mora_jax
from examples.serving.adapters import Adapters
from examples.serving.engine import Engine
from examples.serving.http import Limits, Service
from models import bytelevel, decoding, smollm2
from models.options import positive
from mora_jax import MoRAConfig, Plan, linen, serving

MakeEngine = Callable[[argparse.Namespace, smollm2.Llama, Any, Plan], Engine]

CONNECTIONS = 1024
"""The largest number of connections at once."""


def between(kind: Callable[[str], Any], least: float, most: float) -> Any:
    """A number from `least` to `most`, as `type` of an argument of `argparse`."""

    def number(text: str) -> Any:
        if not least <= (found := kind(text)) <= most:
            told = f"must be from {least:g} to {most:g}, got {found}"
            raise argparse.ArgumentTypeError(told)
        return found

    return number


def options() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, or a Llama as a folder")
    add("--adapters", type=Path, default=Path("out"), help="folder of their folders")
    add("--rank", type=positive, default=8, help="that of the adapters")
    add("--operator", default="auto", help="that of the adapters")
    add("--seed", type=int, default=0, help="that of the adapters")
    add("--host", default="127.0.0.1", help="an address of this machine")
    add("--port", type=between(int, 0, 65535), default=8000, help="0 takes a free one")
    add("--slots", type=positive, default=1000, help="adapters in memory")
    add("--rows", type=positive, default=16, help="requests in one step")
    add("--queue", type=positive, default=128, help="requests that wait")
    add("--context", type=positive, default=512, help="tokens of a request and answer")
    add("--max-tokens", type=positive, default=256, help="largest max_tokens")
    add("--max-body", type=positive, default=Limits.body, help="bytes of a request")
    limit = between(float, 0.001, 10**6)
    add("--timeout", type=limit, default=Limits.seconds, help="seconds for a request")
    return parser


def load(name: str) -> tuple[smollm2.Llama, Any, Any]:
    """A model, its params and its tokenizer."""
    if name == "tiny":
        return bytelevel.load()
    return smollm2.load(None if name == "smollm2" else Path(name))


@functools.partial(jax.jit, donate_argnums=0)
def put(stacked: Any, slot: int, adapters: Any) -> Any:
    """The adapters in slots, with others in one slot, in place."""
    return jax.tree.map(lambda slots, m: slots.at[slot].set(m), stacked, adapters)


def make_engine(
    args: argparse.Namespace, model: smollm2.Llama, params: Any, plan: Plan
) -> Engine:
    """The engine, with empty slots."""
    new = mora_jax.init(plan)
    stacked = serving.stack([new], slots=args.slots)
    stacked = put(stacked, 0, new)  # which compiles it
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stacked))
    print(f"{args.slots} slots for adapters: {held / 2**20:,.0f} MiB", flush=True)
    return Engine(
        programs=decoding.Programs(linen.wrap(model, plan), serving.select),
        config=model.config,
        params=params,
        stacked=stacked,
        put=put,
        rows=args.rows,
        size=args.context,
        queue=args.queue,
    )


def make_service(
    args: argparse.Namespace, make_engine: MakeEngine = make_engine
) -> Service:
    """The service, compiled and started."""
    model, params, tokenizer = load(args.model)
    config = MoRAConfig(rank=args.rank, operator=args.operator, seed=args.seed)
    ids = jnp.zeros((1, 8), jnp.int32)
    plan = linen.plan(model, {"params": params}, config, ids)
    print(plan, flush=True)
    engine = make_engine(args, model, params, plan)

    async def change(slot: int, adapters: Any) -> None:
        await asyncio.wrap_future(engine.change(slot, adapters))

    adapters = Adapters(args.adapters, plan, params, args.slots, change)
    limits = Limits(args.max_body, min(args.max_tokens, args.context), args.timeout)
    start = time.perf_counter()
    engine.start()
    seconds, lengths = time.perf_counter() - start, map(str, engine.lengths())
    print(
        f"compiled in {seconds:.0f} s: prompts of {', '.join(lengths)} tokens, "
        f"and a step of {args.rows} rows",
        flush=True,
    )
    return Service(engine, adapters, tokenizer, Path(args.model).name, limits)


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens at an address that is free, and its URL."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    host, port, *_ = listener.getsockname()
    name = f"[{host}]" if ":" in host else host
    return listener, f"http://{name}:{port}"


def main(
    argv: Sequence[str] | None = None, make_engine: MakeEngine = make_engine
) -> None:
    """Serve until SIGTERM or SIGINT comes."""
    parser = options()
    args = parser.parse_args(argv)
    if not args.adapters.is_dir():
        parser.error(f"--adapters must be a directory, got {args.adapters}")
    try:
        listener, address = listen(args.host, args.port)
    except (OSError, UnicodeError) as error:
        parser.error(f"--host and --port must be free on this machine: {error}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # also after the last answer
    service = make_service(args, make_engine)
    config = uvicorn.Config(
        service.app,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(args.timeout) + 1,
    )
    server = uvicorn.Server(config)

    def fail() -> None:
        server.should_exit = True

    service.on_failure = fail
    names = service.adapters.names()
    print(
        f"this is an example for one machine: {len(names)} adapters at {address}/v1",
        flush=True,
    )
    server.run(sockets=[listener])
    if service.engine.error is not None:
        sys.exit("the engine has failed, see above")


if __name__ == "__main__":
    main()
