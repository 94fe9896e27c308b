"""What `mora_jax.gemma` does without gemma; the rest is in tests/with_gemma."""

import sys
from types import ModuleType

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import close, made_for, random, trained

import mora_jax.gemma
from mora_jax import MoRAConfig, linen
from mora_jax._flax.layer_rules import RULES, rules_of

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
    """Modules in the place of those of gemma 9.9."""
    found = {}
    for path in [key for key in RULES if str(key).startswith("gemma.")]:
        name, _, cls = path.rpartition(".")
        cls = {"Einsum": Einsum, "Embedder": Embedder}[cls]
        found[name] = module = ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)
    assert len(found) == 6
    return found


def test_layers_are_known_by_their_names_and_a_call_changes_nothing(gemma):
    first = [rules_of(cls) for cls in (Einsum, Embedder)]
    mora_jax.gemma.register()
    assert [rules_of(cls) for cls in (Einsum, Embedder)] == first
    assert [list(rules) for rules in first] == [["__call__"], ["encode", "decode"]]


NEEDS = r"mora_jax.gemma needs gemma.gm.nn.{}_layers.Einsum as in gemma 4.0.1: "
INSTALL = "; pip install 'mora-jax.gemma"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda name, module: setattr(module, "Einsum", nn.Dense),
            r"argument must be one of \['inputs'\] of Dense.__call__",
        ),
        (lambda name, module: delattr(module, "Einsum"), "has no attribute 'Einsum'"),
        (lambda name, module: sys.modules.update({name: None}), "import of gemma"),
    ],
)
def test_what_another_version_lacks_is_named(gemma, change, said):
    name = "gemma.gm.nn.gemma4._layers"
    change(name, gemma[name])
    match = f"{NEEDS.format('gemma4.')}.*{said}.*{INSTALL}"
    with pytest.raises(ImportError, match=match):
        mora_jax.gemma.register()


def test_without_gemma_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma", None)
    match = f"{NEEDS.format('')}No module named 'gemma.*{INSTALL}"
    with pytest.raises(ImportError, match=match):
        mora_jax.gemma.register()


@pytest.fixture
def planned(gemma):
    """A feed-forward layer, its params and plan."""
    model = FeedForward()
    params = made_for(model, X)["params"]
    config = MoRAConfig(rank=2, dropout=0.5)
    return model, params, linen.plan(model, {"params": params}, config, X)


def test_one_module_has_the_base_and_the_adapters(planned):
    model, params, plan = planned
    assert {path: spec.axes for path, spec in plan.items()} == {
        "gating_einsum": "ooi",
        "linear": "io",
    }
    adapters = trained(plan)
    adapted = mora_jax.gemma.MoRA(model=model, plan=plan)
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
    one, other = (mora_jax.gemma.MoRA(model=model, plan=plan) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert isinstance(one, nn.Module) and not hasattr(one, "config")
    object.__setattr__(model, "config", "that of the model")
    assert one.config == "that of the model"
