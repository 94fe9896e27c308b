r"""Claim: a service of many adapters loses no answer and never mixes two of them up.

32 adapters of one model each say a code word of their own, and 64 clients who know them
ask for all of them at once: first of a healthy service, then while adapters' files are
damaged, replaced and deleted, clients hang up in the middle, and bodies of 100 MB come.
You will see how many answers were right, wrong and lost, latencies and tokens per
second, memory before and after, and what a step costs beside one adapter and beside
merged copies. It takes some minutes on two cores:

    python -m benchmarks.serving.service --requests 10000
    python -m benchmarks.serving.service --model smollm2 --rank 1 --questions 1 \
        --seconds 60

With `--names 1000 --slots 1100` the adapters are there under so many names, and each is
asked once before anything is measured, so that all of them are in memory.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.serving import decoding_steps
from benchmarks.serving.clients import Load, bad_requests, faults, hang_ups
from examples.serve_many import load
from models import codewords
from models.options import positive
from mora_jax import MoRAConfig, linen

FAULTY = "faulty-0", "faulty-1", "faulty-2", "faulty-3"
"""The adapters whose files are damaged under load."""

COLUMNS = {
    "load": "{load}",
    "right": "{right:,}",
    "wrong": "{wrong}",
    "lost": "{lost}",
    "refused": "{refused}",
    "p50": "{p50_ms:,.0f} ms",
    "p99": "{p99_ms:,.0f} ms",
    "first token": "{first_p50_ms:,.0f} ms",
    "tokens/s": "{tokens_per_second:,.0f}",
    "requests/s": "{requests_per_second:.1f}",
    "memory": "{before_MB:,.0f} to {after_MB:,.0f} MB",
}
STEPS = {
    "method": "{method}",
    "rows": "{rows}",
    "step": "{step_ms:.1f} ms",
    "time": "{time:.2f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "weights": "{weights_MB:,.1f} MB",
}


def arguments() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__, "out/service.json")
    add = parser.add_argument
    add("--model", default="tiny", help="tiny or smollm2")
    add("--adapters", type=positive, default=32, help="number of adapters")
    add("--names", type=positive, help="names for them, most of which are copies")
    add("--rank", type=positive, default=4, help="their budget")
    add("--questions", type=positive, default=3, help="number of questions, up to 3")
    add("--rate", type=float, help="learning rate; 1e-2 for tiny, else 1e-3")
    add("--clients", type=positive, default=64, help="requests at once")
    add("--requests", type=positive, default=10**9, help="requests of each load")
    add("--seconds", type=float, default=600.0, help="longest time of each load")
    add("--rows", type=positive, default=16, help="rows of the service")
    add("--slots", type=positive, default=40, help="adapters in memory")
    add("--context", type=positive, default=256, help="tokens of a row")
    add("--rounds", type=positive, default=20, help="steps of each kind")
    add("--copies", type=positive, default=32, help="merged copies to compare with")
    add("--taught", type=Path, help="where adapters are kept, to be taught once")
    add("--quick", action="store_true", help="a few adapters and requests")
    args = parser.parse_args()
    if args.quick:
        args.adapters, args.rounds, args.copies = 4, 2, 2
        args.requests = min(args.requests, 60)
        args.slots, args.rows, args.clients = 3, 4, 8
    args.names = max(args.names or 0, args.adapters)
    args.rate = args.rate or (1e-2 if args.model == "tiny" else 1e-3)
    return args


def asked(args: argparse.Namespace) -> Sequence[str]:
    """The questions."""
    return codewords.QUESTIONS[: args.questions]


def teach(args: argparse.Namespace, directory: Path) -> tuple[Any, ...]:
    """The adapters in `directory`: (model, params, plan, words)."""
    model, params, tokenizer = load(args.model)
    ids = jnp.zeros((1, 8), jnp.int32)
    plan = linen.plan(model, {"params": params}, MoRAConfig(rank=args.rank), ids)
    apply = linen.wrap(model, plan)
    teacher = codewords.Teacher(
        apply, {"params": params}, tokenizer, args.rate, asked(args)
    )
    words = codewords.code_words(args.adapters)
    for number, word in enumerate(words):
        if not (directory / word).exists():
            print(f"teaching {number + 1} of {len(words)}: {word}", flush=True)
            codewords.teach_all(directory, teacher, [word], params)
    return model, params, plan, words


@contextlib.contextmanager
def service(
    args: argparse.Namespace, directory: Path, program: str = "examples.serve_many"
) -> Iterator[tuple[int, int]]:
    """A service in a process of its own: (its port, its process id)."""
    given = f"--model {args.model} --rank {args.rank} --rows {args.rows} --port 0"
    given += (
        f" --slots {args.slots} --queue {2 * args.clients} --context {args.context}"
    )
    command = [sys.executable, "-m", program, *given.split()]
    command += ["--adapters", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"adapters at http://.*:(\d+)/v1", line):
                    yield int(found[1]), process.pid
                    break
            else:
                raise SystemExit("the service did not start")
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise SystemExit(f"the service ended with {process.returncode}")


def resident(pid: int) -> float:
    """The memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def copied(
    taught: Path, directory: Path, words: Sequence[str], count: int
) -> dict[str, list[str]]:
    """Copies under `count` names, which faults may harm: {name: what it says}."""
    names = {}
    for number in range(count):
        word = words[number % len(words)]
        name = word if number < len(words) else f"{word}-{number}"
        shutil.copytree(taught / word, directory / name)
        names[name] = [word]
    return names


async def healthy(
    args: argparse.Namespace, port: int, pid: int, know: Any, what: str = "adapters"
) -> Row:
    """All adapters, and nothing wrong; each was asked before."""
    names, found = list(know), []
    for k in range(0, len(names), args.clients):
        each = [{name: know[name]} for name in names[k : k + args.clients]]
        loads = [Load(port, one, asked(args), (), 1).run(1) for one in each]
        found += await asyncio.gather(*loads)
    if len(know) != (answered := sum(one["right"] for one in found)):
        raise SystemExit(f"of {len(know)} {what} {answered} answered rightly")
    before = resident(pid)
    load = Load(port, know, asked(args), (), args.clients)
    found = await load.run(args.requests, args.seconds)
    return _row(f"{len(know):,} {what}", found, before, resident(pid))


async def single(args: argparse.Namespace, port: int, pid: int, word: str) -> Row:
    """The same load on one adapter."""
    know = Load(port, {word: [word]}, asked(args), (), args.clients)
    before = resident(pid)
    found = await know.run(max(args.requests // 4, 100), args.seconds)
    return _row("1 adapter", found, before, resident(pid))


async def harmed(
    args: argparse.Namespace, port: int, pid: int, know: Any, directory: Path
) -> tuple[Row, Counter[str]]:
    """The same while files change and break, and clients misbehave."""
    names = list(know)
    words = names[:2]
    versions = [directory / word for word in words]
    know = know | dict.fromkeys(FAULTY, words)
    load = Load(port, know, asked(args), FAULTY, args.clients)
    counts: Counter[str] = Counter()
    places = [directory / name for name in FAULTY]
    work = [
        asyncio.create_task(faults(places, versions, counts)),
        asyncio.create_task(bad_requests(port, counts)),
        asyncio.create_task(hang_ups(port, names, counts)),
    ]
    await asyncio.sleep(1)
    before = resident(pid)
    found = await load.run(args.requests, args.seconds)
    after = resident(pid)
    for task in work:
        task.cancel()
    for error in await asyncio.gather(*work, return_exceptions=True):
        if not isinstance(error, asyncio.CancelledError):
            raise SystemExit(f"a fault was not answered as it should be: {error!r}")
    return _row("with faults", found, before, after), counts


def _row(name: str, found: Row, before: float, after: float) -> Row:
    for line in found["odd"]:
        print(f"{name}: {line}", flush=True)
    return {"load": name, "before_MB": before, "after_MB": after} | found


async def loads(
    args: argparse.Namespace, directory: Path, know: Any, port: int, pid: int
) -> tuple[list[Row], Counter[str]]:
    """All loads, one after another."""
    rows = [await healthy(args, port, pid, know)]
    rows.append(await single(args, port, pid, next(iter(know))))
    row, counts = await harmed(args, port, pid, know, directory)
    return [*rows, row], counts


def main() -> None:
    """Teach, load, and compare."""
    args = arguments()
    with contextlib.ExitStack() as stack:
        directory, scratch = (
            Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)
        )
        taught = args.taught or scratch
        model, params, plan, words = teach(args, taught)
        know = copied(taught, directory, words, args.names)
        with service(args, directory) as (port, pid):
            rows, counts = asyncio.run(loads(args, directory, know, port, pid))
        some, merged = words[: args.copies], "benchmarks.serving.merged_copies"
        own = {word: [word] for word in some}
        with service(args, directory, merged) as (port, pid):
            rows.append(asyncio.run(healthy(args, port, pid, own, "merged copies")))
        adapters = [mora_jax.load(taught / word) for word in some]
    show(COLUMNS, rows, f"{args.clients} clients, {args.model}")
    print(f"\nfaults: {dict(sorted(counts.items()))}")
    count = max(args.rows, args.copies) // args.copies * args.copies
    steps = decoding_steps.compare(
        model, params, plan, adapters, count, args.context, args.rounds
    )
    show(STEPS, steps, "a step")
    save(rows, args, ("taught",), faults=dict(counts), steps=steps)
    bad = sum(row["wrong"] + row["lost"] for row in rows)
    grown = max(row["after_MB"] / row["before_MB"] for row in rows[:3])
    odd = [name for name in counts if " got " in name]
    if bad or odd or grown > 1.1:
        raise SystemExit(f"{bad} wrong or lost, memory grew to {grown:.2f}, {odd}")


if __name__ == "__main__":
    main()
