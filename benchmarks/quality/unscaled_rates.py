"""Claim: without a scale normalised sharing has the learning rates of other operators.

For each width an MLP is trained on one task, then adapted to another with every
operator and several learning rates (adam, float32, a fixed number of steps), each with
scale="paper"; `one_rate.py` tells how one rate does for all. You will
see a table of final losses relative to the loss without adapters, in which the best of
each row is marked. If a row is the same at all widths, the best learning rate is, too.

    python -m benchmarks.quality.unscaled_rates
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mora_jax
from models.options import positive
from mora_jax import MoRAConfig, linen

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OPERATORS: dict[str, Any] = {
    "rotation": "rotation",
    "sharing, plain": {"name": "sharing", "normalised": False},
    "sharing, normalised": {"name": "sharing", "normalised": True},
    "decoupling": "decoupling",
    "truncation": "truncation",
    "orthogonal": "orthogonal",
    "hadamard": "hadamard",
}


def fit(loss: Any, params: Any, rates: jax.Array, steps: int) -> tuple[Any, jax.Array]:
    """The results of Adam from `params` at each of `rates`, and their losses."""

    def run(rate: jax.Array) -> tuple[Any, jax.Array]:
        tx = optax.adam(1.0)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            updates = jax.tree.map(lambda u: rate * u, updates)
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, steps)
        return after, loss(after)

    return jax.jit(lambda rates: jax.lax.map(run, rates))(rates)


def main() -> None:
    """Print a table for each width and rank."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--widths", type=positive, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[8])
    parser.add_argument("--steps", type=positive, default=60)
    args = parser.parse_args()
    x = jax.random.normal(jax.random.key(0), (256, 32))
    old, new = jnp.sin(2 * x[:, :16]), jnp.cos(2 * x[:, 16:])
    rates = jnp.array(RATES)
    for width in args.widths:
        layers = [nn.Dense(width), nn.gelu, nn.Dense(width), nn.gelu, nn.Dense(16)]
        model = nn.Sequential(layers)
        params = model.init(jax.random.key(1), x)["params"]

        def base_loss(params: Any, model: nn.Module = model) -> jax.Array:
            return jnp.mean((model.apply({"params": params}, x) - old) ** 2)

        params, _ = fit(base_loss, params, jnp.array([1e-3]), 100)
        variables = {"params": jax.tree.map(lambda p: p[0], params)}
        start = jnp.mean((model.apply(variables, x) - new) ** 2)
        for rank in args.ranks:
            print(f"\nwidth {width}, r={rank}: loss after {args.steps} steps / before")
            print(" " * 20, *(f"{rate:>9.0e}" for rate in RATES))
            for label, operator in OPERATORS.items():
                config = MoRAConfig(rank=rank, operator=operator, scale="paper")
                plan = linen.plan(model, variables, config, x)
                apply = linen.wrap(model, plan)

                def loss(
                    adapters: Any, apply: Any = apply, variables: Any = variables
                ) -> jax.Array:
                    return jnp.mean((apply(adapters, variables, x) - new) ** 2)

                _, losses = fit(loss, mora_jax.init(plan), rates, args.steps)
                losses = (losses / start).tolist()
                best = min(losses)
                cells = (f"{v:>8.3f}{'*' if v == best else ' '}" for v in losses)
                print(f"{label:20}", *cells)


if __name__ == "__main__":
    main()
