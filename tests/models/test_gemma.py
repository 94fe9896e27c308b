"""What `gemma_module.py` does without gemma; the rest is in tests/with_gemma."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import close, made_for, random, trained

import mora_jax
from examples.gemma_module import MoRA
from mora_jax import MoRAConfig, linen
from mora_jax._flax.layer_rules import rules_of

KEY, X = jax.random.key(0), random(0, 4, 16)


class Einsum(nn.Module):
    """As that of Gemma 3n and 4."""

    shape: tuple[int, ...]
    weight_name: str = "w"
    w_scale: float | None = None

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param(self.weight_name, nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(eqn, x, w if self.w_scale is None else w * self.w_scale)


class FeedForward(nn.Module):
    """Two of them in one scope, as in gemma."""

    @nn.compact
    def __call__(self, x):
        up = Einsum((2, 32, 16), "gating_einsum")
        nn.share_scope(self, up)
        gate = up("...F,NHF->...NH", x)
        down = Einsum((32, 16), "linear", w_scale=0.25)
        nn.share_scope(self, down)
        return down("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Embedder(nn.Module):
    """As that of gemma."""

    embed_dim: int = 16

    def setup(self):
        init = nn.initializers.normal()
        self.table = self.param("input_embedding", init, (24, self.embed_dim))

    def encode(self, x):
        return self.table[(x,)] * jnp.sqrt(self.embed_dim).astype(self.table.dtype)

    def decode(self, x):
        return jnp.dot(x, self.table.T)


@pytest.fixture
def gemma(monkeypatch):
    """The classes in the place of those of gemma."""
    for cls, module in ((Einsum, "_layers"), (Embedder, "_modules")):
        monkeypatch.setattr(cls, "__module__", f"gemma.gm.nn.gemma4.{module}")


def test_layers_are_known_by_their_names(gemma):
    rules = [rules_of(cls) for cls in (Einsum, Embedder)]
    assert [list(found) for found in rules] == [["__call__"], ["encode", "decode"]]


def test_a_class_that_another_version_has_is_left_out_by_name():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("w", nn.initializers.normal(), (16, 8))

    Other.__module__, Other.__qualname__ = "gemma.gm.nn.gemma4._layers", "Einsum"
    model = nn.Sequential([nn.Dense(16), Other()])
    variables = model.init(KEY, X)
    with pytest.warns(mora_jax.LeftOutWarning, match="w: .*teach its class Other"):
        plan = linen.plan(model, variables, MoRAConfig(rank=2), X)
    assert list(plan) == ["layers_0/kernel"]
    config = MoRAConfig(rank=2, targets=".*/w")
    with pytest.raises(ValueError, match="Other"):
        linen.plan(model, variables, config, X)


@pytest.fixture
def planned(gemma):
    """A feed-forward layer, its params and plan."""
    model = FeedForward()
    params = made_for(model, X)["params"]
    config = MoRAConfig(rank=2, dropout=0.5)
    return model, params, linen.plan(model, {"params": params}, config, X)


@pytest.mark.slow
def test_one_module_has_the_base_and_the_adapters(planned):
    model, params, plan = planned
    assert {path: spec.axes for path, spec in plan.items()} == {
        "gating_einsum": "ooi",
        "linear": "io",
    }
    adapters = trained(plan)
    adapted = MoRA(model=model, plan=plan)
    both = {"params": {"base": params, "mora": adapters}}
    expected = model.apply({"params": mora_jax.merge(params, adapters)}, X)
    close(adapted.apply(both, X), expected)
    dropped = adapted.apply(both, X, rngs={"dropout": KEY})
    assert jnp.abs(dropped - expected).max() > 0.01
    made = adapted.init(KEY, X)["params"]
    in_adapters = {**made, "mora": plan.adapters(made["mora"])}  # they are arrays
    chex.assert_trees_all_equal_shapes(in_adapters, both["params"])
    close(adapted.apply({"params": made}, X), model.apply({"params": made["base"]}, X))


def test_the_module_is_static_and_has_what_the_model_has(planned):
    model, _, plan = planned
    one, other = (MoRA(model=model, plan=plan) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert isinstance(one, nn.Module) and not hasattr(one, "config")
    object.__setattr__(model, "config", "that of the model")
    assert one.config == "that of the model"
