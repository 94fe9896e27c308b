"""Cost of a decoding step with many adapters, with one, and with merged copies."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import mora_jax
from benchmarks.common.harness import Contender, Row, race, ratio
from benchmarks.serving.merged_copies import unadapted
from models import decoding
from models.smollm2 import Llama
from mora_jax import linen, serving


class _Turns:
    """Steps one after another, each with a cache of its own, which they donate."""

    def __init__(
        self, step: Any, cache: decoding.Cache, rows: int, arguments: Sequence[Any]
    ) -> None:
        self.step, self.cache, self.arguments = step, cache, arguments
        zeros = np.zeros(rows, np.int32)
        self.rows = decoding.Rows(
            zeros,
            zeros + 64,
            zeros - 1,
            zeros.astype(np.float32),
            zeros.astype("uint32"),
        )

    def __call__(self) -> Any:
        tokens = None
        for stacked, params, index in self.arguments:
            rows = self.rows._replace(adapters=index)
            tokens, self.cache = self.step(stacked, params, self.cache, rows)
        return tokens


def compare(
    model: Llama,
    params: Any,
    plan: mora_jax.Plan,
    adapters: Sequence[Any],
    rows: int,
    size: int,
    rounds: int,
) -> list[Row]:
    """The time of one token for each of `rows`.

    The rows have as many adapters as there are; merged copies of them are stepped one
    after another, each with its rows.
    """
    count = len(adapters)
    stacked = serving.stack(adapters)
    mixed, one = np.arange(rows, dtype=np.int32) % count, np.zeros(rows, np.int32)
    none = one - 1
    apply = linen.wrap(model, plan)
    cache = functools.partial(decoding.new_cache, model.config)
    many = decoding.Programs(apply, serving.select).step
    alone = decoding.Programs(apply, None).step
    base = decoding.Programs(unadapted(model), None).step
    copies = [mora_jax.merge(params, each) for each in adapters]
    each, share = rows // count, none[: rows // count]
    contenders: dict[str, Any] = {
        "the base": _Turns(base, cache(rows, size), rows, [(None, params, none)]),
        f"{count} adapters, one step": _Turns(
            many, cache(rows, size), rows, [(stacked, params, mixed)]
        ),
        "the same, all rows of one": _Turns(
            many, cache(rows, size), rows, [(stacked, params, one)]
        ),
        "one adapter, not in slots": _Turns(
            alone, cache(rows, size), rows, [(adapters[0], params, none)]
        ),
        f"{count} merged copies, {each} rows each": _Turns(
            base, cache(each, size), each, [(None, copy, share) for copy in copies]
        ),
    }
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = sum(leaf.nbytes for leaf in jax.tree.leaves(stacked))
    memory = [held, held + extra, held + extra, held + extra / count, held * count]
    raced = {name: Contender(run, (), 0.0) for name, run in contenders.items()}
    race(raced, rounds)
    first = next(iter(raced.values()))
    return [
        {
            "method": name,
            "rows": rows,
            "step_ms": float(np.median(found.seconds)) * 1e3,
            "time": ratio(found, first),
            "tokens_per_second": rows / float(np.median(found.seconds)),
            "weights_MB": bytes_held / 1e6,
        }
        for (name, found), bytes_held in zip(raced.items(), memory, strict=True)
    ]
