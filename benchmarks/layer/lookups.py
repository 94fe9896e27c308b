"""The time in which a call finds that one like it was checked, without `jax.jit`.

    python -m benchmarks.layer.lookups

One line for each number of dense layers and each of Flax's APIs: microseconds of
processor time, the least of several rounds.
"""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import mora_jax
from mora_jax._flax.proofs import Proofs, content

ROUNDS, CALLS = 9, 200


def microseconds(function: Callable[[], Any]) -> float:
    """The processor time of a call, the least of several rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            function()
        rounds.append(time.process_time() - start)
    return min(rounds) / CALLS * 1e6


def lookup(model: Any, call: Any) -> Callable[[], Any]:
    """What `Proofs.proving` does before a call that is like another."""
    proofs = Proofs()
    proofs.found[content(model)] = {content(call): ""}
    return lambda: proofs.found[content(model)][content(call)]


def main() -> None:
    """Print the table."""
    x = jnp.ones((2, 16))
    for count in (2, 24, 210):
        model = nn.Sequential([nn.Dense(16) for _ in range(count)])
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        linen = microseconds(lookup(model, (variables, (x,), {})))
        layers = [nnx.Linear(16, 16, rngs=nnx.Rngs(0)) for _ in range(count)]
        adapted = mora_jax.nnx.wrap(nnx.Sequential(*layers))
        twin = microseconds(lookup(adapted, ("__call__", (x,), {})))
        print(f"{count} layers: Linen {linen:.0f}, NNX {twin:.0f} microseconds")


if __name__ == "__main__":
    main()
