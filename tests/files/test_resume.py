"""A run resumes from a checkpoint bit for bit, by Orbax and by flax.serialization."""

import os
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from test_save import assert_same

import mora_jax
from mora_jax import MoRAConfig, linen, load, save

MODEL = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])
X = jax.random.normal(jax.random.key(0), (8, 16))
VARIABLES = MODEL.init(jax.random.key(1), X)
PLAN = linen.plan(MODEL, VARIABLES, MoRAConfig(rank=2, dropout=0.2), X)
TX = optax.adamw(1e-2)


@jax.jit
def step(state):
    """One step of training; all that changes is in `state`."""
    apply = linen.wrap(MODEL, PLAN)
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

    def loss(adapters):
        rngs = {"dropout": key}
        y = apply(adapters, VARIABLES, X, adapter_deterministic=False, rngs=rngs)
        return jnp.mean((y - 1) ** 2)

    grads = jax.grad(loss)(state["adapters"])
    updates, opt = TX.update(grads, state["optimizer"], state["adapters"])
    adapters = optax.apply_updates(state["adapters"], updates)
    return {**state, "adapters": adapters, "optimizer": opt, "step": state["step"] + 1}


def start():
    adapters = mora_jax.init(PLAN)
    key = jax.random.key_data(jax.random.key(2))
    opt = TX.init(adapters)
    return {
        "adapters": adapters,
        "optimizer": opt,
        "step": jnp.zeros((), int),
        "key": key,
    }


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
    save(path, state["adapters"], PLAN)
    adapters, plan = load(path, VARIABLES["params"])
    assert plan == PLAN
    rest = {k: v for k, v in state.items() if k != "adapters"}
    empty = {k: v for k, v in start().items() if k != "adapters"}
    data = flax.serialization.to_bytes(rest)
    return {**flax.serialization.from_bytes(empty, data), "adapters": adapters}


@pytest.mark.parametrize("way", [by_orbax, by_flax, by_save])
def test_resumes(tmp_path, way):
    state = start()
    for _ in range(3):
        state = step(state)
    resumed = way(state, tmp_path)
    for _ in range(3):
        state, resumed = step(state), step(resumed)
    assert_same(jax.tree.map(jnp.asarray, resumed), state)
    assert float(jnp.abs(state["adapters"]["layers_0"]["kernel_mora"]).max()) > 0


SHARDED = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

import mora_jax

params = {"fc": {"kernel": jnp.ones((4, 32, 32))}}
config = mora_jax.MoRAConfig(square_rank=8, overrides={".*": {"axes": "sio"}})
plan = mora_jax.plan(params, config)
adapters = mora_jax.init(plan)
adapters = jax.tree.map(lambda m: m + jnp.arange(8.0), adapters)
mesh = jax.make_mesh((4, 2), ("layers", "model"))
shardings = [
    NamedSharding(mesh, PartitionSpec("layers")),
    NamedSharding(mesh, PartitionSpec(None, "model")),
]
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], adapters)
    checkpointer.wait_until_finished()
    for sharding in shardings:
        target = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding),
            adapters,
        )
        back = checkpointer.restore(sys.argv[1], target)["fc"]["kernel_mora"]
        assert back.sharding == sharding and len(back.addressable_shards) == 8
        assert back.addressable_shards[0].data.size < back.size
        np.testing.assert_array_equal(back, adapters["fc"]["kernel_mora"])
        mora_jax.save(sys.argv[1] + "-ours", {"fc": {"kernel_mora": back}}, plan)
        again, _ = mora_jax.load(sys.argv[1] + "-ours")
        np.testing.assert_array_equal(back, again["fc"]["kernel_mora"])
"""


def test_adapters_alone_into_a_sharding(tmp_path):
    """What was saved from one device goes to eight, as the target says."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path / "adapters"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr
