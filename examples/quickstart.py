"""Adapt an unmodified Flax model: you will see the loss fall, and the merge keep it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mora_jax

model = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(256), nn.gelu, nn.Dense(8)])
x = jax.random.normal(jax.random.key(0), (512, 64))
target = jnp.sin(3 * x[:, :8])
variables = model.init(jax.random.key(1), x)  # or a checkpoint: the base stays frozen

print(plan := mora_jax.linen.plan(model, variables, mora_jax.MoRAConfig(rank=8), x))
apply = mora_jax.linen.wrap(model, plan)  # model.apply, adapters as first argument
adapters = mora_jax.init(plan)
tx = optax.adamw(3e-3)
state = tx.init(adapters)


def loss(adapters, variables):
    return jnp.mean((apply(adapters, variables, x) - target) ** 2)


@jax.jit
def step(adapters, state, variables):
    value, grads = jax.value_and_grad(loss)(adapters, variables)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


for k in range(200):
    adapters, state, value = step(adapters, state, variables)
    if k % 50 == 0:
        print(f"step {k}: loss {value:.4f}")
print(f"adapted: loss {loss(adapters, variables):.4f}")
merged = {"params": mora_jax.merge(variables["params"], adapters)}
print(f"merged:  loss {jnp.mean((model.apply(merged, x) - target) ** 2):.4f}")
