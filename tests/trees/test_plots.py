"""Pictures show the numbers of the delta."""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import by_case, by_kind
from helpers import random

import mora_jax
from mora_jax import Adapter, AdapterSpec
from mora_jax.diagnostics import plot_delta


@pytest.fixture(autouse=True)
def figures_are_closed():
    matplotlib.use("Agg")
    yield
    plt.close("all")


def shown(ax):
    (image,) = ax.images
    return np.asarray(image.get_array())


@by_case
def test_the_picture_is_the_delta(case):
    op = case.make(13, 7, 4)
    m = random(0, *op.m_shape)
    expected = case.delta(op, m)
    np.testing.assert_allclose(shown(plot_delta(op, m)), expected, 1e-5, 1e-5)
    spec = AdapterSpec(op, (13, 7), alpha=-0.5)
    ax = plot_delta(spec, m)
    np.testing.assert_allclose(shown(ax), spec.factor * expected, 1e-5, 1e-5)
    assert ax.get_title() == op.name
    ax = plot_delta(Adapter(m, spec))
    np.testing.assert_allclose(shown(ax), spec.factor * expected, 1e-5, 1e-5)


@by_kind
def test_a_pattern_reaches_the_kernel(case):
    """Without an M, and in the colours around zero."""
    _, given = plt.subplots()
    ax = plot_delta(case.make(24, 36, 10), ax=given)
    assert ax is given and shown(ax).shape == (24, 36) and shown(ax).any()
    low, high = ax.images[0].get_clim()
    assert low == -high < 0


def test_an_m_of_16_bits_and_one_of_zeros():
    op = mora_jax.make_operator("rotation", 8, 8, 4)
    assert shown(plot_delta(op, jnp.ones((4, 4), jnp.bfloat16))).dtype == np.float32
    assert not shown(plot_delta(op, jnp.zeros((4, 4)))).any()


def test_bad_input_is_refused():
    op = mora_jax.make_operator("sharing", 8, 6, 4)
    for operator, m, kind, message in (
        (
            "rotation",
            None,
            TypeError,
            "operator must be .* AdapterSpec, got 'rotation'",
        ),
        (op, jnp.ones((2, 4, 4)), ValueError, r"m must have shape \(4, 4\)"),
        (op, jnp.ones((4, 4), int), TypeError, "m must have a floating-point dtype"),
        (op, [[1.0]], TypeError, "m must be a concrete array, got list"),
        (op, jax.ShapeDtypeStruct((4, 4), "float32"), TypeError, "concrete array"),
        (op, jnp.full((4, 4), jnp.nan), ValueError, "m holds NaN"),
    ):
        with pytest.raises(kind, match=message):
            plot_delta(operator, m)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_delta(mora_jax.make_operator("sharing", 8, 6, 4))
