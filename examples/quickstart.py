"""Adapt an unmodified Flax model to a shifted task: you will see two losses fall.

The base model is never touched; only the small matrices train, and merge in the end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mora_jax
from mora_jax import MoRAConfig, linen

model = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(256), nn.gelu, nn.Dense(8)])
x = jax.random.normal(jax.random.key(0), (512, 64))
target = jnp.sin(3 * x[:, :8])
variables = model.init(jax.random.key(1), x)

plan = linen.plan(model, variables, MoRAConfig(rank=8), x)  # what to adapt, and how
apply = linen.wrap(model, plan)  # model.apply, with adapters as first argument
adapters = mora_jax.init(plan)
print(plan)

tx = optax.adamw(1e-2)
state = tx.init(adapters)


@jax.jit
def step(adapters, state, variables):
    def loss(adapters):
        return jnp.mean((apply(adapters, variables, x) - target) ** 2)

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


for k in range(201):
    adapters, state, loss = step(adapters, state, variables)
    if k % 50 == 0:
        print(f"step {k}: loss {loss:.4f}")

merged = {"params": mora_jax.merge(variables["params"], adapters, plan)}
print(f"merged: loss {jnp.mean((model.apply(merged, x) - target) ** 2):.4f}")
