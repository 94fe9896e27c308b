"""Claim: vLLM holds M's in less memory than the LoRAs that serve the same models.

One vLLM at a time serves SmolLM2-135M with N adapters, whose requests are mixed: M's of
the default as they are, M's of signed sharing as they are and as LoRAs that say exactly
the same, and LoRAs of equal budget. Beside them stand the base without adapters, and
merged models, N engines that have a share of the requests each (one of them is timed,
and N take N times as long). You will see requests a second, the time relative to the
base, and the megabytes of adapters, with the room that vLLM makes for LoRAs; for merged
models these are their weights. It runs in the environment of `make test-vllm`:

    make bench-vllm ARGS=--quick
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import mora_jax
from benchmarks.common import harness
from models import smollm2
from models.options import positive
from mora_jax import MoRAConfig, linen

BASE, MERGED = "the base", "merged models"
WAYS = {
    "M's, the default": ({}, True),
    "M's, signed sharing": ({"operator": "signed_sharing"}, True),
    "the same as LoRAs": ({"operator": "signed_sharing"}, False),
    "LoRAs of equal budget": ({"operator": "low_rank"}, False),
}


def write_adapters(folder: Path, count: int) -> dict[str, tuple[list[str], int]]:
    """Random adapters of each way, and the rank for which a server makes room."""
    model, params, tokenizer = smollm2.load()
    smollm2.save(folder / "base", model, params, tokenizer)
    found = {}
    for way, (settings, native) in WAYS.items():
        config = MoRAConfig(rank=8, **settings)
        ids = jnp.zeros((1, 8), jnp.int32)
        plan = linen.plan(model, {"params": params}, config, ids)
        paths, rank = [], 0
        for number in range(count):
            adapters = harness.random_like(mora_jax.init(plan), 0.01)
            paths.append(str(folder / f"{way} {number}"))
            made = mora_jax.io.export(
                paths[-1], adapters, "vllm", smollm2.NAMES, native=native
            )
            words = shlex.split(made.command)
            rank = int(words[words.index("--max-lora-rank") + 1])
        found[way] = paths, rank
    return found


def bytes_of(model: Any) -> int:
    """Bytes of a vLLM's adapters, and of the room that it makes for LoRAs."""
    manager, arrays = model.lora_manager, []
    for layer in manager.modules.values():
        arrays += getattr(layer, "lora_a_stacked", ())
        arrays += getattr(layer, "lora_b_stacked", ())
    for adapter in manager.list_adapters().values():
        for one in getattr(adapter, "squares", {}).values():
            arrays += [one.m, *one.compress, *one.decompress, *(one.damped or ())]
    held = {a.data_ptr(): a.nbytes for a in arrays if a is not None}
    return sum(held.values())


def engine(file: str) -> None:
    """Serve what a file asks for, and write seconds and bytes into it."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore

    request = Path(file)
    asked = json.loads(request.read_text())
    paths, room = asked["adapters"], {}
    if paths:
        room = {"enable_lora": True, "max_loras": len(paths)}
        room["max_lora_rank"] = asked["rank"]
    llm = LLM(
        asked["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        **room,
    )
    loras = [LoRARequest(p, k, p) for k, p in enumerate(paths, start=1)] or [None]
    random = np.random.default_rng(0)
    shape = asked["requests"], asked["tokens"]
    prompts = random.integers(100, 1000, shape).tolist()
    settings = SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False
    )
    seconds = []
    for _ in range(asked["rounds"] + 1):
        start = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            settings,
            lora_request=[loras[k % len(loras)] for k in range(len(prompts))],
            use_tqdm=False,
        )
        seconds.append(time.perf_counter() - start)
    held = llm.apply_model(bytes_of)[0] if paths else 0
    request.write_text(json.dumps({"seconds": seconds[1:], "bytes": held}))


def main() -> None:
    """Serve in each way, and compare."""
    parser = harness.options(__doc__, "out/vllm_rates.json")
    add = parser.add_argument
    add("--adapters", type=positive, default=4, help="number of adapters, N")
    add("--requests", type=positive, default=32, help="requests at once")
    add("--tokens", type=positive, default=32, help="tokens of a prompt")
    add("--new", type=positive, default=16, help="tokens of an answer")
    add("--rounds", type=positive, default=3, help="times that all is asked")
    add("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    if args.quick:
        args.adapters, args.requests, args.new, args.rounds = 2, 4, 2, 1
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of `bytes_of`, which is sent
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000",
    }
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = write_adapters(folder, args.adapters)
        weights = (folder / "base" / "model.safetensors").stat().st_size
        share = -(-args.requests // args.adapters)
        asked = {BASE: ([], 0), MERGED: ([], 0), **ways}
        for way, (paths, rank) in asked.items():
            request = folder / "request.json"
            content = {
                "base": str(folder / "base"),
                "adapters": paths,
                "rank": rank,
                "requests": share if way == MERGED else args.requests,
                "tokens": args.tokens,
                "new": args.new,
                "rounds": args.rounds,
            }
            request.write_text(json.dumps(content))
            code = "import sys; from benchmarks.serving import vllm_rates as rates; "
            code += "rates.engine(sys.argv[1])"
            command = [sys.executable, "-c", code, request]
            subprocess.run(command, env=environment, check=True)
            done = json.loads(request.read_text())
            seconds, held = float(np.median(done["seconds"])), done["bytes"]
            if way == MERGED:
                seconds, held = seconds * args.adapters, weights * args.adapters
            first = rows[0]["seconds"] if rows else seconds
            rows.append(
                {
                    "method": way,
                    "rank": rank or None,
                    "seconds": seconds,
                    "rate": args.requests / seconds,
                    "time": seconds / first,
                    "megabytes": held / 1e6,
                }
            )
    title = (
        f"{args.requests} requests of {args.tokens} tokens and {args.new} new ones, "
        f"{args.adapters} adapters of SmolLM2-135M, float32"
    )
    columns = {
        "": "{method}",
        "rank of the server": "{rank}",
        "requests/s": "{rate:.2f}",
        "time": "{time:.2f}",
        "MB of adapters": "{megabytes:,.1f}",
    }
    harness.show(columns, rows, title)
    megabytes = {row["method"]: row["megabytes"] for row in rows}
    ours, theirs = megabytes["M's, signed sharing"], megabytes["the same as LoRAs"]
    harness.claim(
        "M's need less memory than the LoRAs that serve the same models",
        ours < theirs,
        f"{ours:.1f} MB for {theirs:.1f} MB",
    )
    harness.save(rows, args)


if __name__ == "__main__":
    main()
