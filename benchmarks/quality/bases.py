"""Claim: the directions of a gradient are found in the time of a few steps.

SmolLM2 gets a gradient of its first batch, 16 random pairs, M's between its leading
directions, and a start along it. You will see the seconds of each, when all is
compiled, and how near the directions of two layers come to the best.

    python -m benchmarks.quality.bases
"""

import functools
import time
from typing import Any

import jax
import numpy as np

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.quality import baselines, language, learners, pairs, teaching
from models.options import positive
from mora_jax import MoRAConfig

SHOWN = "layers_3", "layers_20"
"""The layers whose directions are compared with the singular vectors."""


def share_kept(gradient: Any, op: Any) -> float:
    """Squares of a gradient between its directions, of those between the best."""
    values = np.linalg.svd(np.asarray(gradient, np.float64), compute_uv=False)
    between = op.in_basis.T @ np.asarray(gradient, np.float64) @ op.out_basis
    return float(np.sum(between**2) / np.sum(values[: op.square_rank] ** 2))


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

    row: Row = {"kernels": len(plan)}
    grads, along = {}, plan
    for _ in range(2):  # the first compiles
        times = [time.perf_counter()]
        grads = jax.block_until_ready(gradient(way.start, params))
        times.append(time.perf_counter())
        along = baselines.with_directions(plan, grads)
        times.append(time.perf_counter())
        ms = learners.bare(mora_jax.init(along))
        jax.block_until_ready(start(ms, params, along))
        times.append(time.perf_counter())
        names = "gradient", "directions", "start"
        row |= dict(zip(names, np.diff(times).tolist(), strict=True))
    shown = [path for path in grads if path[0] in SHOWN]
    kept = [share_kept(grads[path], along["/".join(path)].operator) for path in shown]
    row |= {"least": min(kept), "most": max(kept)}
    columns = {
        "kernels": "{kernels}",
        "gradient (s)": "{gradient:.1f}",
        "directions (s)": "{directions:.1f}",
        "start (s)": "{start:.1f}",
        "of the best directions' squares, at least": "{least:.3f}",
        "at most": "{most:.3f}",
    }
    show(columns, [row])
    save([row], args)


if __name__ == "__main__":
    main()
