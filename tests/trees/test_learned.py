"""What many restarts have learned, as one adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from helpers import close, random, wide

import mora_jax
from mora_jax import MoRAConfig, gradient_bases, remora

SIZES = {"a": (12, 12), "b": (12, 8), "s": (3, 8, 12)}


def gradients(seed):
    return {name: {"kernel": random(seed, *size)} for name, size in SIZES.items()}


def made(dtype="float32"):
    """Params with biases, and a plan along a gradient."""
    params = jax.tree.map(lambda k: jnp.asarray(k, dtype), gradients(0))
    params["a"]["bias"] = jnp.ones(2)
    overrides = {"s/kernel": {"axes": "sio"}}
    config = MoRAConfig(square_rank=4, operator="orthogonal", overrides=overrides)
    return params, gradient_bases(gradients(1), mora_jax.plan(params, config))


def moved(plan, seed, size=1.0):
    start = mora_jax.init(plan)
    return jax.tree.map(lambda m: jnp.asarray(size * random(seed, *m.shape)), start)


def learned(base, merged, adapters, **settings):
    adapters, lost = remora.learned(base, merged, adapters, **settings)
    return adapters, lost, mora_jax.delta_weight(adapters)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_what_was_learned_is_one_adapter(dtype, tmp_path):
    base, plan = made(dtype)
    params, last = base, moved(plan, 0, 0.1)
    for k in range(2):
        params = mora_jax.merge(params, last)
        last = moved(gradient_bases(gradients(10 + k), plan), 1, 0.1)
    exact = {n: wide(params[n]["kernel"]) - wide(base[n]["kernel"]) for n in SIZES}
    adapters, lost, deltas = learned(base, params, last, max_error=0)
    assert set(lost.values()) == {0.0}
    close({name: d["kernel"] for name, d in deltas.items()}, exact, 1e-5)
    adapters, lost, deltas = learned(base, params, last, max_error=0.3)
    for name, delta in exact.items():
        op = adapters[name]["kernel_mora"].operator
        values = np.linalg.svd(delta, compute_uv=False).reshape(
            -1, min(delta.shape[-2:])
        )
        shares = [
            np.sqrt((v[op.square_rank :] ** 2).sum() / (v**2).sum()) for v in values
        ]
        fewer = [
            np.sqrt((v[op.square_rank - 1 :] ** 2).sum() / (v**2).sum()) for v in values
        ]
        assert lost[f"{name}/kernel"] == pytest.approx(max(shares), abs=1e-5)
        assert max(shares) <= 0.3 < max(fewer)
    mora_jax.save(tmp_path / "a", adapters, params=base)
    again = mora_jax.merge(base, mora_jax.load(tmp_path / "a", base))
    close(
        wide(again["a"]["kernel"]),
        wide(base["a"]["kernel"]) + wide(deltas["a"]["kernel"]),
        2e-2,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_learned_arrays_and_kernels_that_stayed():
    params, _ = made()
    config = MoRAConfig(
        operator="signed_decoupling", square_rank=4, targets="b/kernel", train="a/bias"
    )
    start = mora_jax.init(mora_jax.plan(params, config), params=params)
    merged = {**params, "a": {**params["a"], "bias": jnp.full(2, 3.0)}}
    adapters, lost, deltas = learned(params, merged, start)
    assert lost == {"b/kernel": 0.0} and not deltas["b"]["kernel"].any()
    assert adapters["b"]["kernel_mora"].operator.square_rank == 1
    close(adapters["a"]["bias"].m, jnp.full(2, 3.0))
    both = mora_jax.merge(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, both, merged)
    broken = {**params, "b": {"kernel": params["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    for args, settings, message in (
        ((params, broken, start), {}, "delta of 'b/kernel' .*NaN"),
        ((params, {"a": params["a"]}, start), {}, "lack the kernel 'b/kernel'"),
        ((params, merged, start), {"max_error": 2.0}, "max_error must be from 0 to 1"),
        ((params, merged, start), {"max_error": np.nan}, "max_error must be"),
    ):
        with pytest.raises(ValueError, match=message):
            remora.learned(*args, **settings)
    shapes = jax.eval_shape(lambda: merged)
    for one, name in ((start, "a/bias"), ({"b": start["b"]}, "b/kernel")):
        with pytest.raises(TypeError, match=f"{name} in merged must be"):
            remora.learned(params, shapes, one)
    with pytest.raises(TypeError, match="concrete array"):
        jax.jit(lambda p: remora.learned(params, p, start)[0])(merged)
    with pytest.raises(TypeError, match="adapters must hold adapters, got"):
        remora.learned(params, merged, params)
