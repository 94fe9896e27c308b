"""Kernels that methods read with their delta; the laws are in test_model_laws.py."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random_like
from merged import merge_errors
from twins import BARE, BareExperts, X, nnx_model

from mora_jax import MoRAConfig, register_layer
from mora_jax import nnx as mora
from mora_jax.products import DENSE, Folded

CONFIG = MoRAConfig(rank=2, operator="sharing")


def trained(model, config=CONFIG):
    model = mora.wrap(model, config)
    mora.set_adapters(model, random_like(mora.adapters(model)))
    return model


class Around(nnx.Module):
    """Experts, and what else a model does with one of their arrays."""

    def __init__(self, experts, use):
        self.experts, self.use = experts, use

    def __call__(self, x):
        return self.use(self.experts, x)


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda e, x: e(x) @ e.up[0], "up: the model also reads this kernel outside"),
        (
            lambda e, x: e(x) + e.down[...].sum(),
            "down: the model also reads .* outside",
        ),
    ],
)
def test_what_else_reads_a_kernel_is_refused(use, match):
    with pytest.raises(ValueError, match=match):
        mora.plan(Around(nnx_model(BARE), use), CONFIG, X)


def test_a_kernel_that_is_changed_before_it_is_read_is_refused():
    def use(experts, x):
        experts.up[...] = jnp.tanh(experts.up[...])
        return experts(x)

    match = "up: BareExperts reads it changed by `tanh`"
    with pytest.raises(ValueError, match=match):
        mora.plan(Around(nnx_model(BARE), use), CONFIG, X)


def test_all_methods_read_the_sum_and_what_they_set_is_kept():
    class Counted(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((16, 16)))

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return self.other(x)

        def other(self, x):
            return x @ self.w[...]

        @staticmethod
        def shift(x):
            return x + 1

    register_layer(Counted, equation=Folded("io"), kernel="w")
    x = jnp.ones((2, 16))
    model = trained(Counted())
    merged = mora.merge_adapters(model)
    for method in ("__call__", "other", "shift"):
        close(getattr(model, method)(x), getattr(merged, method)(x))
    assert np.abs(model(x) - 16).max() > 0.1
    np.testing.assert_array_equal(model.seen[...], x)
    assert type(merged) is Counted and (model.w[...] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_sixteen_bits_are_rounded_as_merging_rounds_them(dtype):
    base = nnx_model(BARE)
    nnx.update(base, jax.tree.map(lambda a: a.astype(dtype), nnx.state(base)))
    model = trained(base)
    x = X.astype(dtype)
    np.testing.assert_array_equal(model(x), mora.merge_adapters(model)(x))
    _, grads = mora.value_and_grad(lambda model: (model(x) ** 2).sum())(model)
    for grad in jax.tree.leaves(grads):
        assert grad.dtype == jnp.float32 and np.abs(grad).max() > 0


def test_one_of_two_kernels():
    config = MoRAConfig(rank=2, targets="down")
    model = trained(nnx_model(BARE), config)
    errors = merge_errors(nnx_model(BARE), None, mora.plan_of(model), X)
    assert list(errors) == ["down"] and errors["down"] < 1e-5


def test_dropout_is_refused():
    model = nnx_model(BARE)
    with pytest.raises(ValueError, match=r"down: dropout must be 0 .* got 0.1"):
        mora.wrap(model, MoRAConfig(rank=2, dropout=0.1))
    zero = {".*": {"dropout": 0.0}}
    adapted = mora.wrap(model, MoRAConfig(rank=2, dropout=0.1, overrides=zero))
    before = mora.adapters(adapted)
    dropping = {
        name: a.replace(spec=dataclasses.replace(a.spec, dropout=0.1))
        for name, a in before.items()
    }
    with pytest.raises(ValueError, match=r"down: dropout must be 0 .* got 0.1"):
        mora.set_adapters(adapted, dropping)
    chex.assert_trees_all_equal(mora.adapters(adapted), before)


def test_what_cannot_be_registered():
    for cls, settings, error, match in [
        (nn.Dense, {"equation": Folded("io")}, TypeError, "NNX, got Dense of Linen"),
        (nnx.Linear, {"equation": Folded("io")}, ValueError, "all kernels of Linear"),
        (BareExperts, {"equation": DENSE, "kernel": "up"}, ValueError, "or for none"),
        (
            BareExperts,
            {"equation": Folded("sio"), "kernel": lambda layer: "up"},
            TypeError,
            "parameter's name with products.Folded",
        ),
    ]:
        with pytest.raises(error, match=re.escape(match)):
            register_layer(cls, **settings)
