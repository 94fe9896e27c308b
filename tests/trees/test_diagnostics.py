"""Spectra are those of the delta itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import FEW_CASES, SIZES, in_turns
from helpers import close, random, trained, wide

import mora_jax
from models.spectrum import plot_spectrum
from mora_jax import AdapterSpec, MoRAConfig, Plan, diagnostics
from mora_jax.operators import Truncation
from mora_jax.operators._pytree import operator

PARAMS = {
    "enc": {"kernel": random(0, 16, 24), "bias": random(1, 24)},
    "dec": {"kernel": random(2, 3, 24, 8)},
    "out": {"kernel": random(3, 24, 4)},
}
CONFIG = MoRAConfig(rank=2, overrides={"dec/kernel": {"axes": "sio"}})
PLAN = mora_jax.plan(PARAMS, CONFIG)
# In blocks that fill the layer, so that many operators are isometric, and that do not.
FEW_SIZES = {(13, 7, 4), (7, 13, 4)}


@pytest.mark.law
@in_turns(
    "case, size",
    FEW_CASES,
    [size if size in FEW_SIZES else slow(size) for size in SIZES],
)
def test_spectrum(case, size):
    ins, outs, q = size
    spec = AdapterSpec(case.make(ins, outs, q), (2, ins, outs), "sio", alpha=-0.5)
    plan = Plan({("kernel",): spec})
    adapters = trained(plan)
    delta = mora_jax.delta_weight(adapters)["kernel"]
    expected = np.linalg.svd(wide(delta), compute_uv=False)
    (values,) = diagnostics.spectrum(adapters).values()
    assert values.shape == (2, min(ins, outs))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5)


@operator
class Narrow(Truncation):
    """An operator that trains the first two columns of M alone."""

    name = "narrow"

    @property
    def m_shape(self):
        return self.square_rank, 2

    def rows(self, x, m, precision=None):
        return super().rows(x, self.padded(m), precision)

    def matrix(self, m):
        return super().matrix(self.padded(m))

    def padded(self, m):
        return jnp.pad(m, ((0, 0), (0, self.square_rank - 2)))


def test_the_spectrum_of_an_array_that_is_no_square():
    plan = Plan({("kernel",): AdapterSpec(Narrow(12, 16, 4), (12, 16), alpha=2.0)})
    adapters = trained(plan)
    delta = wide(mora_jax.delta_weight(adapters)["kernel"])
    expected = np.linalg.svd(delta, compute_uv=False)
    values = diagnostics.spectrum(adapters)["kernel"]
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert (values > 1e-3).sum() == 2


def test_effective_rank(unchecked):
    values = np.array([[3.0, 3.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0] * 4])
    np.testing.assert_allclose(diagnostics.effective_rank(values), [3, 1, 0])
    assert diagnostics.effective_rank([2.0, 2.0, 0.0]) == pytest.approx(2)
    cases = [([np.nan, 1], "finite"), ([-1.0, 2], "negative"), (2.0, "shape")]
    cases += [
        (bad, "values must be real") for bad in ("a", [1j], {"k": [1]}, [[1], []])
    ]
    for bad, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            diagnostics.effective_rank(bad)


def test_the_norm_of_a_kernel_of_float16_does_not_overflow():
    params = {"kernel": jnp.ones((512, 512), jnp.float16)}
    config = MoRAConfig(operator="truncation", square_rank=8, scale="paper")
    plan = mora_jax.plan(params, config)
    adapters = plan.adapters({"kernel_mora": 512 * jnp.eye(8)})
    found = diagnostics.relative_norm(params, adapters)
    assert found["kernel"] == pytest.approx(8**0.5, rel=1e-5)


def test_relative_norm():
    adapters = trained(PLAN)
    deltas = mora_jax.delta_weight(adapters)
    expected = {
        f"{name}/kernel": np.linalg.norm(delta["kernel"])
        / np.linalg.norm(PARAMS[name]["kernel"])
        for name, delta in deltas.items()
    }
    close(diagnostics.relative_norm(PARAMS, adapters), expected)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert set(diagnostics.relative_norm(zeros, adapters).values()) == {np.inf}


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    adapters = trained(PLAN)
    broken = jax.tree.map(lambda m: m * np.nan, adapters)
    with pytest.raises(ValueError, match="kernel_mora holds NaN or infinity"):
        diagnostics.spectrum(broken)
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match="must be an array, got ShapeDtypeStruct"):
        diagnostics.relative_norm(shapes, adapters)
    wrong = {**PARAMS, "enc": {"kernel": jnp.ones((24, 16))}}
    with pytest.raises(ValueError, match="enc/kernel in params must have shape"):
        diagnostics.relative_norm(wrong, adapters)
    empty = jax.tree.map(lambda leaf: leaf * np.nan, PARAMS)
    for measure in (diagnostics.relative_norm, diagnostics.merge_loss):
        with pytest.raises(ValueError, match="/kernel.* holds NaN or infinity"):
            measure(empty, adapters)
        with pytest.raises(TypeError, match="kernel.* must be a concrete array"):
            jax.jit(measure)(PARAMS, adapters)
    with pytest.raises(TypeError, match="kernel_mora must be a concrete array"):
        jax.jit(diagnostics.spectrum)(adapters)
    with pytest.raises(TypeError, match="values must be concrete"):
        jax.jit(diagnostics.effective_rank)(jnp.ones(3))


def test_plot(tmp_path):
    figure = plot_spectrum(trained(PLAN), tmp_path / "spectrum.png")
    lines, bars = figure.axes
    assert len(lines.lines) == 1 + 3 + 1  # each layer of the stacked kernel too
    assert {line.get_label() for line in bars.lines} == set(PLAN)
    assert (tmp_path / "spectrum.png").stat().st_size > 1000
