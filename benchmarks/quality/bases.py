"""Claim: the directions of a gradient cost what two steps of a LoRA cost.

SmolLM2 gets a gradient of its first batch, 16 random pairs, M's between its leading
directions, and a start along it; and the same directions by two gradients of LoRAs,
which form no gradient of a kernel. You will see the seconds of each, when all is
compiled, how near the directions of all kernels come to the best, and the memory that
XLA plans for, beside a step of a LoRA of the sketches' rank.

    python -m benchmarks.quality.bases
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.quality import baselines, language, learners, pairs, teaching
from models.options import positive
from mora_jax import MoRAConfig, linen
from mora_jax._tree import gradients


def share_kept(gradient: Any, op: Any) -> float:
    """Squares of a gradient between its directions, of those between the best."""
    values = np.linalg.svd(np.asarray(gradient, np.float32), compute_uv=False)
    between = op.in_basis.T @ np.asarray(gradient, np.float64) @ op.out_basis
    best = np.sum(values[: op.square_rank].astype(np.float64) ** 2)
    return float(np.sum(between**2) / best)


def planned_gb(function: Callable[..., Any], *args: Any) -> float:
    """Memory of a program beside what the model's params take."""
    plan: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(args[-1]))
    sizes = plan.argument_size_in_bytes, plan.output_size_in_bytes
    return (sum(sizes) + plan.temp_size_in_bytes - params) / 1e9


def memory(loss: Callable[..., Any], plan: mora_jax.Plan, params: Any) -> Row:
    """Memory for two ways to directions, and for a step of a LoRA."""
    adapters, loras = mora_jax.init(plan), gradients.sketches(plan.specs)
    tx = optax.adam(1e-3)

    def step(loras: Any, state: Any, adapters: Any, params: Any) -> Any:
        grads: Any = gradients.lora_gradient(loss, loras, adapters, params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(loras, updates), state

    passes: Any = functools.partial(gradients.lora_gradient, loss)
    return {
        "sketches_GB": planned_gb(passes, loras, adapters, params),
        "lora_GB": planned_gb(step, loras, tx.init(loras), adapters, params),
    }


def main() -> None:
    """Time a gradient, and its directions, once all is compiled."""
    parser = options(__doc__, "out/bases.json")
    parser.add_argument("--rank", type=positive, default=8)
    args = parser.parse_args()
    model, params, _ = language.base()
    batch = pairs.pairs(16, seed=0)
    inputs = batch.ids, batch.at
    loss = functools.partial(language.mean_loss, batch=batch)
    task = learners.Task(model, params, teaching.TARGETS, inputs, loss)
    plan = baselines.planned(task, MoRAConfig(operator="orthogonal", rank=args.rank))
    way = learners.full(*task[:3])
    gradient = jax.jit(jax.grad(task.loss_of(way)))

    @jax.jit
    def start(ms: Any, params: Any, plan: mora_jax.Plan) -> Any:
        loss = task.loss_of(learners.with_plan(model, plan))

        def one(adapters: Any) -> jax.Array:
            return loss(learners.bare(adapters), (params, plan))

        moved = mora_jax.gradient_start(one, plan.adapters(ms))
        return learners.bare(moved)

    apply = linen.wrap(model, plan)

    def adapted(adapters: Any, params: Any) -> jax.Array:
        return loss(apply(adapters, {"params": params}, *inputs))

    row: Row = {"kernels": len(plan)}
    grads, along, found = {}, plan, plan
    for _ in range(2):  # the first compiles
        times = [time.perf_counter()]
        grads = jax.block_until_ready(gradient(way.start, params))
        times.append(time.perf_counter())
        along = baselines.with_directions(plan, grads)
        times.append(time.perf_counter())
        ms = learners.bare(mora_jax.init(along))
        jax.block_until_ready(start(ms, params, along))
        times.append(time.perf_counter())
        found = mora_jax.directions(adapted, plan, [(params,)])
        times.append(time.perf_counter())
        names = "gradient", "directions", "start", "two_passes"
        row |= dict(zip(names, np.diff(times).tolist(), strict=True))
    for name, of in (("gradient", along), ("passes", found)):
        pairs_of = ((g, of["/".join(p)].operator) for p, g in grads.items())
        kept = [share_kept(*pair) for pair in pairs_of]
        row |= {f"least_{name}": min(kept), f"mean_{name}": float(np.mean(kept))}
    row["gradient_GB"] = planned_gb(jax.grad(task.loss_of(way)), way.start, params)
    row |= memory(adapted, plan, params)
    columns = {
        "kernels": "{kernels}",
        "gradient (s)": "{gradient:.1f}",
        "its directions (s)": "{directions:.1f}",
        "start (s)": "{start:.1f}",
        "two gradients of LoRAs and their directions (s)": "{two_passes:.1f}",
    }
    show(columns, [row])
    columns = {
        "of the best directions' squares, at least": "{least_gradient:.4f}",
        "mean": "{mean_gradient:.4f}",
        "by LoRAs, at least": "{least_passes:.4f}",
        "mean of these": "{mean_passes:.4f}",
        "memory of the gradient (GB)": "{gradient_GB:.2f}",
        "of a LoRA's": "{sketches_GB:.2f}",
        "of that LoRA's step": "{lora_GB:.2f}",
    }
    show(columns, [row])
    save([row], args)


if __name__ == "__main__":
    main()
