"""Placements of attention, and of the rows that XLA multiplies with its kernels."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import made, slow
from helpers import random, random_like
from jax.sharding import PartitionSpec as P
from meshes import assert_close, make_mesh, put

import mora_jax
from mora_jax import MoRAConfig, linen, sharding

MESH = make_mesh(data=2, fsdp=2, model=2)
SAFE, OTHER = ("fsdp", "data"), ("data", "fsdp")
X = random(0, 8, 6, 32)
MODEL = nn.MultiHeadDotProductAttention(4, use_bias=False)
PARAMS = random_like(jax.eval_shape(MODEL.init, jax.random.key(0), X))["params"]
PLAN = linen.plan(
    MODEL,
    {"params": PARAMS},
    MoRAConfig(operator="signed_decoupling", square_rank=8),
    X,
)

COLUMNS = P("fsdp", None, "model")
RIGHT = {
    "fsdp": (P("fsdp"), P(None, None, "fsdp")),
    "heads": (P(None, "model"), P("model")),
}
UNSURE = {
    "heads, fsdp": (P("fsdp", "model"), P("model", None, "fsdp")),
    "head width, fsdp": (COLUMNS, P(None, "model", "fsdp")),
}
WRONG = {
    "heads, then columns": (P("fsdp", "model"), COLUMNS),
    "head width, then columns": (COLUMNS, COLUMNS),
}
PLACEMENTS = RIGHT | UNSURE | WRONG
"""Of query, key and value (in, heads, width), and of out (heads, width, out)."""


def placed(name, rows):
    """The params and the inputs on the mesh."""
    inner, out = PLACEMENTS[name]
    specs = {"query": inner, "key": inner, "value": inner, "out": out}
    specs = {layer: {"kernel": spec} for layer, spec in specs.items()}
    return put(PARAMS, MESH, specs), put(X, MESH, P(rows))


def gradients(apply, trained, x, params=None):
    """The loss, and its gradients by what is trained and by the inputs."""

    @jax.jit
    def run(trained, x, params):
        def loss(trained, x):
            return jnp.mean(apply(trained, {"params": params}, x) ** 2)

        return jax.value_and_grad(loss, (0, 1))(trained, x)

    return run(trained, x, params)


def of_base(params, x):
    """By all kernels, without this library."""
    return gradients(lambda params, _, x: MODEL.apply({"params": params}, x), params, x)


@functools.cache
def on_one_device(adapted):
    """Of the base, or of the adapted model with its adapters."""
    if not adapted:
        return of_base(PARAMS, X)
    return gradients(linen.wrap(MODEL, PLAN), made(PLAN, scale=1 / 8), X, PARAMS)


SHOWN = ("fsdp", "heads, fsdp", "heads, then columns")
"""One of each kind."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SHOWN else slow(name) for name in PLACEMENTS]
)
def test_attention_is_right_if_rows_are_split_by_fsdp_first(name):
    """The base and, without a warning, the adapted model."""
    params, x = placed(name, SAFE)
    assert_close(of_base(params, x), on_one_device(adapted=False))
    adapters = made(PLAN, scale=1 / 8)
    adapters = jax.device_put(adapters, sharding.adapter_shardings(PLAN, params))
    adapters = sharding.on_mesh(adapters, params, batch_axes=SAFE)
    assert_close(
        gradients(linen.wrap(MODEL, PLAN), adapters, x, params),
        on_one_device(adapted=True),
    )


@pytest.mark.law
@pytest.mark.parametrize("name", PLACEMENTS)
def test_xla_is_wrong_only_where_a_plan_warns(name):
    """If this fails since gradients are right, XLA is mended: see docs/meshes.md."""
    (value, got), (expected, right) = (
        of_base(*placed(name, OTHER)),
        on_one_device(adapted=False),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (got, right)), strict=True)
    errors = [np.abs(one - other).max() / np.abs(other).max() for one, other in pairs]
    assert (max(errors) > 0.1) == (name in WRONG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharding.on_mesh(PLAN, placed(name, OTHER)[0], batch_axes=OTHER)
    assert len(caught) == (name not in RIGHT)
    for warning in caught:
        assert warning.category is mora_jax.MoRAWarning
        assert "batch_axes=('fsdp', 'data')" in str(warning.message)


@pytest.mark.parametrize(
    ("kernel", "batch", "safe"),
    [
        (P("f", "m"), "dfr", "frd"),
        (P("m", "f"), "fdr", "frd"),
        (P("f", "m"), "frd", None),
        (P(("d", "f"), "m"), "rdf", "dfr"),
        (P("f", "m"), "f", None),
        (P("f", "m"), "d", None),
        (P("f"), "df", None),
        (P("m"), "df", None),
        (P(None, ("m", "f")), "df", "fd"),
        (P("f", "one"), "df", None),
        (P("f", "m"), ("one", "f"), None),
    ],
)
def test_the_order_that_is_advised(kernel, batch, safe):
    """First the axes that split the kernel, then others as the mesh has them."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 2, 1), ("r", "d", "f", "m", "one"))
    plan = mora_jax.plan({"kernel": jnp.ones((8, 8))})
    place = {"kernel": kernel}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharding.on_mesh(plan, place, batch_axes=tuple(batch), mesh=mesh)
    advised = [f"batch_axes={tuple(safe)}:" in str(w.message) for w in caught]
    assert advised == ([] if safe is None else [True])
