"""A run resumes from a checkpoint bit for bit, by Orbax and by flax.serialization."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from adapter_files import assert_same
from helpers import random, random_like

import mora_jax
from mora_jax import MoRAConfig, linen, load, save

MODEL = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])
X = random(0, 8, 16)
VARIABLES = random_like(jax.eval_shape(MODEL.init, jax.random.key(1), X))
PLAN = linen.plan(MODEL, VARIABLES, MoRAConfig(rank=2, dropout=0.2), X)
TX = optax.adamw(1e-2)


def start():
    adapters, key = mora_jax.init(PLAN), jax.random.key_data(jax.random.key(2))
    state = {"adapters": adapters, "optimizer": TX.init(adapters)}
    return {**state, "step": jnp.zeros((), int), "key": key}


@jax.jit
def step(state):
    """One step of training; all that changes is in `state`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
    settings = {"adapter_deterministic": False, "rngs": {"dropout": key}}

    def loss(adapters):
        y = linen.wrap(MODEL, PLAN)(adapters, VARIABLES, X, **settings)
        return jnp.mean((y - 1) ** 2)

    grads = jax.grad(loss)(state["adapters"])
    updates, opt = TX.update(grads, state["optimizer"], state["adapters"])
    adapters = optax.apply_updates(state["adapters"], updates)
    return {**state, "adapters": adapters, "optimizer": opt, "step": state["step"] + 1}


def by_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.eval_shape(lambda: state))


def by_flax(state, path):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(start(), data)


def by_save(state, path):
    """Ours for the adapters, flax's for the rest."""
    save(path, state["adapters"])
    adapters = load(path, VARIABLES["params"])
    rest = by_flax({**state, "adapters": start()["adapters"]}, path)
    return {**rest, "adapters": adapters}


@pytest.mark.parametrize("way", [by_orbax, by_flax, by_save])
def test_resumes(tmp_path, way):
    state = start()
    for _ in range(3):
        state = step(state)
    resumed = way(state, tmp_path)
    for _ in range(3):
        state, resumed = step(state), step(resumed)
    assert_same(jax.tree.map(jnp.asarray, resumed), state)
    assert float(jnp.abs(state["adapters"]["layers_0"]["kernel_mora"].m).max()) > 0
