"""What optax makes of adapters is what it makes of their arrays."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from adapter_files import assert_same, slow
from helpers import bare, random, random_like

import mora_jax
from mora_jax import MoRAConfig

OVERRIDES = {"s/kernel": {"axes": "sio"}, "l/kernel": {"operator": "low_rank"}}
PARAMS = {
    "a": {"kernel": random(0, 12, 8), "bias": random(1, 8)},
    "l": {"kernel": random(2, 8, 6)},
    "s": {"kernel": random(3, 3, 8, 12)},
}
PLAN = mora_jax.plan(PARAMS, MoRAConfig(rank=2, overrides=OVERRIDES, train="a/bias"))
ADAPTERS = random_like(mora_jax.init(PLAN, params=PARAMS))
SGD, RATE = optax.sgd(1e-2), 1e-2
ARGUMENTS = (), (RATE,), (SGD,), (SGD, RATE), (SGD, 3), (SGD, SGD), (RATE, 3)
ARGUMENTS += (RATE, RATE), (RATE, RATE, 0), (RATE, 1.0, RATE, 0), (lambda _: RATE,)
ARGUMENTS += (SGD, lambda *_, **__: True), (lambda tree, _: tree,), (jnp.sum, RATE)
ARGUMENTS += (({"all": SGD}, lambda tree: jax.tree.map(lambda _: "all", tree)),)
"""Those with which functions of optax make a transformation, in the order of trial."""


def loss(tree):
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(tree))


def told(value, grads):
    """Further arguments that some updates take or need, in the order of trial."""
    search = {"value": value, "grad": grads, "value_fn": loss}
    return {}, {"value": value}, search, search | {"obj_fn": loss}


def steps(tx, tree, way):
    """All trees and states of two compiled steps, and the gradients."""

    @jax.jit
    def step(tree, state):
        value, grads = jax.value_and_grad(loss)(tree)
        if way == "examples":
            grads, way_told = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads), {}
        else:
            way_told = told(value, grads)[way]
        updates, state = tx.update(grads, state, tree, **way_told)
        return optax.apply_updates(tree, updates), state, grads

    state, history = tx.init(tree), []
    for _ in range(2):
        tree, state, grads = step(tree, state)
        history.append((tree, jax.tree.map(without_keys, state), grads))
    return history


def without_keys(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def of_arrays(function):
    """A transformation of bare arrays that `function` makes, and what it computes."""
    for args in ARGUMENTS:
        for way in (0, 1, 2, 3, "examples"):
            try:
                tx = function(*args)
                return (tx, way), steps(tx, bare(ADAPTERS), way)
            except Exception:  # noqa: S112
                continue
    return None


FUNCTIONS: Any = {
    f"{module.__name__}.{name}": function
    for module in (optax, optax.contrib)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if "GradientTransformation" in str(inspect.signature(function).return_annotation)
    and not name.startswith("_")
}
FUNCTIONS["inject_hyperparams"] = optax.inject_hyperparams(optax.adamw)
COMMON = "adafactor adamw clip_by_global_norm lamb masked sgd".split()
COMMON = ["inject_hyperparams", *(f"optax.{name}" for name in COMMON)]
COMMON += [f"optax.contrib.{name}" for name in ("muon", "prodigy", "schedule_free")]


@pytest.mark.law
@pytest.mark.parametrize(
    "name", [name if name in COMMON else slow(name) for name in FUNCTIONS]
)
def test_optimizers_of_adapters_are_those_of_their_arrays(name):
    """Parameters, states and gradients, bit for bit, of all that optax has."""
    if (made := of_arrays(FUNCTIONS[name])) is None:
        assert name not in COMMON
        pytest.skip("makes no transformation of these arrays")
    found = steps(made[0][0], ADAPTERS, made[0][1])
    assert_same(bare(found), made[1])
    for tree, _, grads in found:
        structure = jax.tree.structure(tree)
        assert structure == jax.tree.structure(ADAPTERS) == jax.tree.structure(grads)
