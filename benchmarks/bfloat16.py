"""Claim: what folding into a bfloat16 kernel does to learning, measured.

A fold rounds kernel + update to bfloat16 in every step, which loses what is small
beside the kernel; the other way adds the update to the layer's output. SmolLM2-135M
learns the same facts three times: in float32, and in bfloat16 both ways. You will see
loss and recall at each step, a JSON file and a plot. `execution="auto"` folds in no
16-bit dtype because of the difference.

    python benchmarks/bfloat16.py --facts 8 --steps 20
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import save

import mora_jax
from mora_jax import MoRAConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import airports
import teach_facts

RUNS = (("float32", "activation"), ("bfloat16", "activation"), ("bfloat16", "fold"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["run"] for row in rows):
        line = [(r["step"], r["loss"]) for r in rows if r["run"] == name]
        axis.plot(*zip(*line, strict=True), "o-", markersize=3, label=name)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train three times, and report."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--operator", default="rotation")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="chooses the facts")
    parser.add_argument("--out", type=Path, default=Path("out/bfloat16.json"))
    args = parser.parse_args()
    config = MoRAConfig(rank=args.rank, operator=args.operator)
    student, tokenizer = teach_facts.load(config)
    base = jax.jit(student.base)
    ask = teach_facts.asker(functools.partial(base, student.variables), tokenizer)
    facts = list(itertools.islice(airports.all_facts(args.seed), args.facts))
    batch = airports.encode(
        tokenizer,
        [*(fact.question for fact in facts), *airports.REHEARSED],
        [*(fact.answer for fact in facts), *ask(airports.REHEARSED)],
    )
    rest = slice(len(facts), None)
    rehearsed = base(student.variables, batch.ids[rest], batch.at[rest])
    rows = []
    for dtype, way in RUNS:
        config = MoRAConfig(rank=args.rank, operator=args.operator, execution=way)
        student, _ = teach_facts.load(config)
        cast = functools.partial(jnp.asarray, dtype=dtype)
        variables = jax.tree.map(cast, student.variables)
        first, run = mora_jax.init(student.plan), f"{dtype}, {way}"
        data = variables, batch, rehearsed, args
        _, history, _ = teach_facts.train(student.apply, first, *data, run)
        for step, (loss, recall) in enumerate(history):
            rows.append({"run": run, "step": step, "loss": loss, "recall": recall})
    names = [", ".join(run) for run in RUNS]
    print(f"| loss at step | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for step in range(max(row["step"] for row in rows) + 1):
        at = {row["run"]: row for row in rows if row["step"] == step}
        cells = [f"{at[n]['loss']:.3f}" if n in at else "" for n in names]
        print(f"| {step} | {' | '.join(cells)} |")
    save(rows, {k: v for k, v in vars(args).items() if k != "out"}, args.out)
    plot(rows, args.out.with_suffix(".png"))
    print(f"\nfigures and plot beside {args.out}")


if __name__ == "__main__":
    main()
