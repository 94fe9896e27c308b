"""What the blocks of real models do: experts, and attention with a cache."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import close, random_like, trained
from programs import case_of, results
from twins import CONFIG, EXPERTS, TIME, WIDTH, X

from mora_jax import fold, linen
from mora_jax import nnx as mora

KEY = jax.random.key(0)
CAUSAL = np.tril(np.ones((TIME, TIME), bool))


@pytest.mark.parametrize("api", [slow("linen"), "nnx"])
def test_experts_do_not_share(api):
    """Each has an M of its own, and one that no token goes to gets no gradient."""
    case, run = case_of("experts", api), results("experts", api).run
    _, before = run(case.adapters)[1][0][1]
    leaves, structure = jax.tree.flatten(case.adapters)
    for k, expert in np.ndindex(len(leaves), EXPERTS):
        moved = [*leaves]
        moved[k] = moved[k].at[expert].add(1.0)
        _, after = run(jax.tree.unflatten(structure, moved))[1][0][1]
        changed = np.any(np.asarray(after != before), axis=(1, 2, 3))
        np.testing.assert_array_equal(changed, np.arange(EXPERTS) == expert)

    router = {"kernel": jnp.zeros((WIDTH, EXPERTS)), "bias": jnp.array([3.0, -9, 2])}
    params = {**case.params, "router": router}

    @jax.jit
    @jax.grad
    def gradients(adapters):
        return jnp.sum(case.adapted(params, adapters, X)[0] ** 2)

    for gradient in jax.tree.leaves(gradients(case.adapters)):
        first, unused, last = np.abs(gradient).max(axis=(1, 2))
        assert unused == 0 < min(first, last) and np.isfinite(gradient).all()


@pytest.mark.slow
def test_decoding_with_a_cache():
    """Token by token as all at once, adapted as merged, Linen as NNX."""
    whole = nn.MultiHeadDotProductAttention(num_heads=2)
    cached = whole.copy(decode=True)
    shapes = jax.eval_shape(cached.init, KEY, X)
    params = random_like(shapes["params"])
    cache = {"cache": jax.tree.map(jnp.zeros_like, shapes["cache"])}
    variables = {"params": params, **cache}
    plan = linen.plan(cached, variables, CONFIG, X[:, :1], mutable=["cache"])
    adapters, apply = trained(plan), linen.wrap(cached, plan)

    def decode(apply, params):
        step = jax.jit(functools.partial(apply, mutable=["cache"]))
        ys, state = [], cache
        for x in jnp.split(X, TIME, axis=1):
            y, state = step({"params": params, **state}, x)
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    y, state = decode(functools.partial(apply, adapters), params)
    merged = decode(cached.apply, fold(params, adapters))
    chex.assert_trees_all_equal_structs((y, state), merged, (y, cache))
    close((y, state), merged)
    close(y, linen.wrap(whole, plan)(adapters, {"params": params}, X, mask=CAUSAL))

    model = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    assert mora.plan(model, CONFIG) == plan
    wrapped = mora.wrap(model, plan)
    mora.set_adapters(wrapped, adapters)
    step = nnx.jit(lambda model, x: model(x))
    for twin in (wrapped, mora.merge_adapters(wrapped)):
        twin.init_cache(X.shape)
        ys = [step(twin, x) for x in jnp.split(X, TIME, axis=1)]
        close(jnp.concatenate(ys, axis=1), y)
        close(nnx.to_pure_dict(nnx.state(twin, nnx.Cache)), state["cache"])
        close(twin(X, mask=CAUSAL, decode=False), y)
