"""Claim: merged into bfloat16 with a dither, a model computes what its adapters do.

Rounding to nearest loses deltas that are small beside their kernels, as they are in the
first steps of training. SmolLM2-135M in bfloat16 learns some facts. After several steps
its adapters are merged in both ways, and the logits of all questions are compared with
the adapted model's. You will see how far they are from those, relative to what the
adapters change, and the share of the deltas that rounding lost.

    python -m benchmarks.quality.merging --operators sharing rotation
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.quality import bfloat16
from models import lesson, smollm2
from models.options import positive
from mora_jax import diagnostics
from mora_jax._layer.rounding import Rounding

COLUMNS = {
    "operator": "{operator}",
    "after step": "{step}",
    "rounding": "{rounding}",
    "error of the logits": "{error:.2%}",
    "lost of the deltas": "{lost:.2%}",
}


def main() -> None:
    """Train for each operator, merge both ways, and report."""
    parser = options(__doc__, "out/merging.json")
    parser.add_argument("--operators", nargs="+", default=["sharing", "rotation"])
    parser.add_argument("--facts", type=positive, default=8)
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--at", type=positive, nargs="+", default=[1, 2, 4, 8, 14])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="number that chooses facts")
    args = parser.parse_args()
    args.steps = max(args.at)
    model, params, tokenizer = smollm2.load()
    base = functools.partial(jax.jit(model.apply), {"params": params})
    lesson.check_model(base)
    taught = lesson.choose_lesson(base, tokenizer, args.facts, args.seed)
    params = optax.tree_utils.tree_cast(params, jnp.bfloat16)

    @jax.jit
    def logits(params: Any) -> Any:
        # In float32, or rounded activations would hide how kernels were rounded.
        params = optax.tree_utils.tree_cast(params, jnp.float32)
        return model.apply({"params": params}, taught.batch.ids, taught.batch.at)

    before, rows = np.asarray(logits(params)), []

    def compare(step: int, adapters: Any) -> None:
        if step not in args.at:
            return
        adapted = mora_jax.merge(params, adapters, jnp.float32)  # rounds nothing
        expected = np.asarray(logits(adapted))
        for rounding in get_args(Rounding):
            merged = mora_jax.merge(params, adapters, rounding=rounding)
            off = np.linalg.norm(np.asarray(logits(merged)) - expected)
            found = diagnostics.merge_loss(params, adapters, rounding=rounding)
            row: Row = {"operator": args.operator, "step": step, "rounding": rounding}
            row["error"] = float(off / np.linalg.norm(expected - before))
            row["lost"] = float(np.mean(list(found.values())))
            rows.append(row)

    for operator in args.operators:
        args.operator, variables = operator, {"params": params}
        bfloat16.learn(model, variables, taught, args, "auto", operator, compare)
    show(COLUMNS, rows)
    save(rows, args, leave_out=["operator", "steps"])


if __name__ == "__main__":
    main()
