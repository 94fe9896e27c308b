"""optax: only what should train moves, by a bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same
from helpers import close, random

from mora_jax import MoRAConfig, combine, init, mixing, optimizer, plan, split
from mora_jax import trainable_labels as labels_of
from mora_jax import trainable_mask as mask_of

CLIPPED = optax.chain(optax.clip_by_global_norm(1), optax.adamw(0.1, weight_decay=0.1))


@pytest.fixture
def both():
    """With -0.0 and a NaN: adding 0.0 to either changes it, or hides that it does."""
    params = {
        "fc": {"kernel": random(0, 8, 8).at[0, :2].set(jnp.array([-0.0, jnp.nan]))},
        "half": {"kernel": random(0, 8, 8, dtype=jnp.bfloat16)},
        "norm": {"scale": jnp.full(8, -0.0)},
        "head": {"kernel": random(0, 8, 4)},
        "step": jnp.array(3),
    }
    return combine(params, init(plan(params, MoRAConfig(rank=1))))


def gradients(params, step):
    return jax.tree.map(lambda p: 100 * random(step, *p.shape, dtype=p.dtype), params)


def train(tx, params, steps=5):
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(steps):
        updates, state = update(gradients(params, k), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, state


def assert_all_move(before, after):
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert not np.array_equal(old, new)


def test_frozen_leaves_stay_bitwise_and_adapters_train_as_alone(both):
    """A norm to clip by, and all else, sees the M's alone."""
    after, state = train(optimizer(CLIPPED, both), both)
    (base, adapters), (base_after, adapters_after) = split(both), split(after)
    assert_same(base_after, base)
    assert_all_move(adapters, adapters_after)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(m.size for m in jax.tree.leaves(adapters))
    state, update = CLIPPED.init(adapters), jax.jit(CLIPPED.update)
    for k in range(5):
        grads = split(gradients(combine(base, adapters), k))[1]
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    close(adapters_after, adapters)


def test_labels_and_mask(both):
    labels, mask = labels_of(both), mask_of(both)
    assert labels["fc"] == {"kernel": "frozen", "kernel_mora": "trainable"}
    assert labels["norm"] == {"scale": "frozen"}
    assert mask["norm"] == {"scale": False} and mask["fc"]["kernel_mora"] is True
    # Why `optimizer` exists: optax.masked lets raw gradients through.
    after, _ = train(optax.masked(optax.sgd(0.1), mask), both, steps=1)
    assert_all_move(both["norm"], after["norm"])


@pytest.mark.usefixtures("unchecked")
def test_bad_input(both):
    base, sgd = split(both)[0], optax.sgd(0.1)
    cases = [(lambda: optimizer(sgd, base), "hold no")]
    for call in (mask_of, labels_of):
        cases += [
            (lambda call=call: call(base), r"hold no '\*_mora' leaf: pass combine"),
            (lambda call=call: call({}), "hold no"),
        ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        optimizer(0.1, both)  # pyright: ignore


@pytest.mark.parametrize("combined", [False, True])
def test_scaled_updates_are_lora_plus(combined):
    """B moves faster by it, and A as without; also with weight decay."""
    params = {"fc": {"kernel": jnp.ones((8, 6))}}
    config = MoRAConfig(rank=2, operator="low_rank")
    adapters = init(plan(params, config))
    tree = combine(params, adapters) if combined else adapters
    grads = jax.tree.map(jnp.ones_like, tree)
    moved = []
    adam = optax.adamw(1e-2, weight_decay=0.1)
    plus = optax.stateless(lambda updates, _: mixing.scaled(updates, 16))
    for tx in (adam, optax.chain(adam, plus)):
        tx = optimizer(tx, tree)
        updates, _ = tx.update(grads, tx.init(tree), tree)
        found: Any = updates
        moved.append(np.asarray(found["fc"]["kernel_mora"].m))
    np.testing.assert_allclose(moved[1][:8], moved[0][:8])
    np.testing.assert_allclose(moved[1][8:], 16 * moved[0][8:], rtol=1e-6)
    assert moved[0].all()
