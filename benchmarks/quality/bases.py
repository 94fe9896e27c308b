"""Claim: the directions of a gradient are found in the time of a few steps.

SmolLM2 gets a gradient of its first batch, 16 random pairs, and M's between its leading
directions. You will see the seconds of both, when all is compiled.

    python -m benchmarks.quality.bases
"""

import functools
import time

import jax
import numpy as np

import mora_jax
from benchmarks.harness import options, save, show
from benchmarks.quality import language, learners, pairs, teaching
from models.options import positive


def main() -> None:
    """Time a gradient, and its directions, once all is compiled."""
    parser = options(__doc__, "out/bases.json")
    parser.add_argument("--rank", type=positive, default=8)
    args = parser.parse_args()
    model, params, _ = language.base()
    batch = pairs.pairs(16, seed=0)
    config = mora_jax.MoRAConfig(operator="orthogonal", rank=args.rank)
    inputs = batch.ids, batch.at
    plan = learners.plan_of(model, params, teaching.TARGETS, config, *inputs)
    way = learners.full(model, params, teaching.TARGETS)
    mean_loss = functools.partial(language.mean_loss, batch=batch)

    @jax.jit
    def gradient(kernels, params, *inputs):
        return jax.grad(lambda k: mean_loss(way.apply(k, params, *inputs)))(kernels)

    row = {"kernels": len(plan)}
    for _ in range(2):  # the first compiles
        times = [time.perf_counter()]
        grads = jax.block_until_ready(gradient(way.start, params, *inputs))
        times.append(time.perf_counter())
        found = (("/".join(path), leaf) for path, leaf in grads.items())
        mora_jax.gradient_bases(found, plan)
        times.append(time.perf_counter())
        row |= dict(
            zip(("gradient", "directions"), np.diff(times).tolist(), strict=True)
        )
    columns = {
        "kernels": "{kernels}",
        "gradient (s)": "{gradient:.1f}",
        "directions (s)": "{directions:.1f}",
    }
    show(columns, [row])
    save([row], args)


if __name__ == "__main__":
    main()
