"""Claim: the directions of a gradient can be left out of what is stored, for a price.

SmolLM2 learns 16 random pairs between the directions of their gradient, which files
hold in 8 or 16 bits, at another rank, and with random directions on one side, which a
seed would give. Then the delta
at r = 8 is cut to LoRAs of the least rank that keep it within an error. You will see
the megabytes of each adapter's file, steps to 99% of the tokens, what is known at the
end, and what is forgotten.

    python -m benchmarks.quality.stored
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.quality import ladders, language, learners, pairs, teaching
from models.lesson import Batch
from mora_jax import MoRAConfig, linen, remora
from mora_jax.operators import Orthogonal, Subspace

STEPS = 60
ERRORS = 0.01, 0.1, 0.3
WAYS: dict[str, tuple[int, float]] = {
    "lora": (8, 4e-3),
    "directions": (8, 4e-4),
    "directions, 16 bits": (8, 4e-4),
    "directions, r=2": (2, 4e-4),
    "inputs' directions": (8, 4e-4),
    "outputs' directions": (8, 8e-4),
}
"""Of each its rank, and its rate."""


def one_sided(adapters: Any, way: str) -> Any:
    """The adapters with random directions on the other side."""
    kept = "in" if way.startswith("inputs'") else "out"

    def one(adapter: mora_jax.Adapter) -> mora_jax.Adapter:
        op: Any = adapter.operator
        random = Orthogonal(op.in_features, op.out_features, op.square_rank)
        bases = {f"{kept}_basis": getattr(op, f"{kept}_basis")}
        other = "out" if kept == "in" else "in"
        bases[f"{other}_basis"] = np.asarray(getattr(random, f"{other}_basis"))
        op = Subspace(op.in_features, op.out_features, op.square_rank, **bases)
        spec = dataclasses.replace(adapter.spec, operator=op)
        return mora_jax.Adapter(adapter.m, spec)

    return jax.tree.map(one, adapters, is_leaf=learners.is_adapter)


def start(way: str, loss: Callable[..., Any], inputs: Any) -> Any:
    """New adapters."""
    model, params, _ = language.base()
    rank, _ = WAYS[way]
    if way == "lora":
        learner = learners.lora(model, params, teaching.TARGETS, rank)
        return learner.frozen(params)[1].adapters(learner.start)
    config = MoRAConfig(operator="orthogonal", rank=rank, scale="fine-tuning")
    plan = learners.plan_of(model, params, teaching.TARGETS, config, *inputs)
    dtype = "bfloat16" if way.endswith("16 bits") else "float8_e4m3fn"
    adapters = mora_jax.directions(loss, mora_jax.init(plan), [(params,)], dtype=dtype)
    return one_sided(adapters, way) if "'" in way else adapters


def megabytes(adapters: Any, params: Any) -> float:
    """Of the adapters' file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters"
        mora_jax.save(path, adapters, params=params)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files) / 1e6


class Learned(NamedTuple):
    """What one way learned, how it is called, and what it took."""

    adapters: Any
    apply: Callable[..., jax.Array]
    row: Row


def learn(way: str, batch: Batch) -> Learned:
    """Train until 99% are known."""
    (_, rate), (model, params, _) = WAYS[way], language.base()
    inputs = batch.ids, batch.at
    # Any plan of these kernels: adapters say themselves what they are.
    config = MoRAConfig(operator="orthogonal")
    plan = learners.plan_of(model, params, teaching.TARGETS, config, *inputs)
    adapted = linen.wrap(model, plan)

    def apply(adapters: Any, params: Any, *inputs: Any) -> jax.Array:
        return adapted(adapters, {"params": params}, *inputs)

    def of(adapters: Any, params: Any) -> Any:
        logits = apply(adapters, params, *inputs)
        return language.loss_and_accuracy(logits, batch)

    warmed = optax.linear_schedule(rate / teaching.WARMUP, rate, teaching.WARMUP - 1)
    tx: Any = optax.adam(warmed)

    @jax.jit
    def step(adapters: Any, state: Any, params: Any) -> Any:
        (_, share), grads = jax.value_and_grad(of, has_aux=True)(adapters, params)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, share

    adapters = start(way, lambda *args: of(*args)[0], inputs)
    state, known = tx.init(adapters), []
    for _ in range(STEPS):
        after, state, share = step(adapters, state, params)
        known.append(float(share))
        if known[-1] >= teaching.KNOWN:
            break
        adapters = after
    row = {"way": way, "rate": rate, "known": known[-1]}
    row["steps"] = ladders.first_above(known, teaching.KNOWN)
    return Learned(adapters, apply, row | ends(adapters, apply, params))


def main() -> None:
    """Train each, and cut what was learned."""
    args = options(__doc__, "out/stored.json").parse_args()
    batch, rows = pairs.pairs(16, seed=0), []
    for way in WAYS:
        found = learn(way, batch)
        rows.append(found.row)
        if way == "directions":
            rows += cuts(found.adapters, found.apply, batch)
        show(COLUMNS, rows)
    save(rows, args)


def ends(adapters: Any, apply: Any, params: Any) -> Row:
    """What is forgotten, the size of the file, and what is in it beside directions."""
    run = jax.jit(functools.partial(apply, adapters, params))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return {
        "MB": megabytes(adapters, params),
        "numbers": numbers,
        "forgotten": language.forgetting(run)["divergence"],
    }


def cuts(adapters: Any, apply: Any, batch: Any) -> list[Row]:
    """What was learned as LoRAs of the least ranks within an error."""
    _, params, _ = language.base()
    merged, rows = mora_jax.merge(params, adapters), []
    for error in ERRORS:
        cut, lost = remora.learned(params, merged, adapters, max_error=error)
        logits = jax.jit(apply)(cut, params, batch.ids, batch.at)
        known = language.loss_and_accuracy(logits, batch)[1]
        ranks = [leaf.shape[-1] for leaf in jax.tree.leaves(cut)]
        way = f"directions, {max(lost.values()):.1%} cut off, rank"
        way = f"{way} {min(ranks)} to {max(ranks)}, {np.mean(ranks):.0f} in the mean"
        row = {"way": way, "steps": None, "known": float(known)}
        rows.append(row | ends(cut, apply, params))
    return rows


COLUMNS = {
    "adapter": "{way}",
    "numbers": "{numbers:,}",
    "MB": "{MB:.1f}",
    "known": "{known:.1%}",
    "steps": "{steps:.1f}",
    "forgotten": "{forgotten:.3f}",
}


if __name__ == "__main__":
    main()
