"""optax: only what should train moves, by a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, random

from mora_jax import (
    MoRAConfig,
    combine,
    init,
    optimizer,
    plan,
    split,
    trainable_labels,
    trainable_mask,
)


def bits(tree):
    """Every leaf's bytes: -0.0 is not 0.0."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


@pytest.fixture
def both():
    kernel = np.array(random(0, 8, 8))
    kernel[0, :2] = [-0.0, np.nan]
    params = {
        # -0.0 and a NaN: adding 0.0 to either changes what it is, or hides that it is.
        "fc": {"kernel": jnp.asarray(kernel)},
        "half": {"kernel": random(0, 8, 8, dtype=jnp.bfloat16)},
        "norm": {"scale": jnp.full(8, -0.0)},
        "head": {"kernel": random(0, 8, 4)},
        "step": jnp.array(3),
    }
    return combine(params, init(plan(params, MoRAConfig(rank=1))))


def gradients(params, step):
    return jax.tree.map(
        lambda p: 100 * random(step, *np.shape(p), dtype=p.dtype), params
    )


def train(tx, params, steps=5):
    state = tx.init(params)

    @jax.jit
    def step(gradients, params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for k in range(steps):
        params, state = step(gradients(params, k), params, state)
    return params, state


def test_frozen_leaves_stay_bitwise(both):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    after, state = train(optimizer(tx, both), both)
    base, adapters = split(both)
    base_after, adapters_after = split(after)
    assert bits(base_after) == bits(base)
    for old, new in zip(
        jax.tree.leaves(adapters), jax.tree.leaves(adapters_after), strict=True
    ):
        assert not np.array_equal(old, new)
    size = sum(m.size for m in jax.tree.leaves(adapters))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * size


def test_same_as_training_the_adapters_alone(both):
    """A norm to clip by, and all else, sees the M's alone."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    after, _ = train(optimizer(tx, both), both)
    base, adapters = split(both)
    state = tx.init(adapters)
    update = jax.jit(tx.update)
    for k in range(5):
        grads = split(gradients(combine(base, adapters), k))[1]
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    close(split(after)[1], adapters)


def test_chosen_base_leaves_train_too(both):
    tx = optimizer(optax.adam(0.1), both, base=("norm/.*", "head/kernel"))
    after, _ = train(tx, both)
    moved = {
        name
        for name in both
        if bits(split(after)[0][name]) != bits(split(both)[0][name])
    }
    assert moved == {"norm", "head"}


def test_the_whole_base_trains(both):
    both = {name: leaf for name, leaf in both.items() if name != "step"}
    both["fc"]["kernel"] = jnp.ones((8, 8))
    assert all(jax.tree.leaves(trainable_mask(both, ".*")))
    after, _ = train(optimizer(optax.sgd(0.1), both, base=".*"), both)
    for old, new in zip(jax.tree.leaves(both), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


def test_labels(both):
    labels = trainable_labels(both, "norm/scale")
    assert labels["fc"] == {"kernel": "frozen", "kernel_mora": "trainable"}
    assert labels["norm"] == {"scale": "trainable"}
    mask = trainable_mask(both)
    assert mask["norm"] == {"scale": False} and mask["fc"]["kernel_mora"] is True


def test_masked_alone_does_not_freeze(both):
    """Why `optimizer` exists: optax.masked lets raw gradients through."""
    tx = optax.masked(optax.sgd(0.1), trainable_mask(both))
    after, _ = train(tx, both, steps=1)
    assert bits(after["norm"]) != bits(both["norm"])


@pytest.mark.usefixtures("unchecked")
def test_bad_input(both):
    base, _ = split(both)
    for call in (trainable_mask, trainable_labels):
        with pytest.raises(ValueError, match=r"hold no '\*_mora' leaf: pass combine"):
            call(base)
        with pytest.raises(ValueError, match="hold no"):
            call({})
        with pytest.raises(
            ValueError, match="'norms/.*' matches no base leaf; the near"
        ):
            call(both, "norms/.*")
        with pytest.raises(ValueError, match="matches no base leaf"):
            call(both, ".*kernel_mora")
    with pytest.raises(ValueError, match="hold no"):
        optimizer(optax.sgd(0.1), base)
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        optimizer(0.1, both)  # pyright: ignore
    with pytest.raises(ValueError, match="base holds '[(]', which is no regular"):
        trainable_mask(both, "(")
