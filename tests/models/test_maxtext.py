"""MaxText's layers, built again from what they publish: names, shapes, axis metadata.

Its dense layers were Linen modules first and are NNX modules now. Both take the axes to
contract, and name the axes of their kernels, for which a model holds rules.
"""

from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.linen.spmd import logical_to_mesh_sharding
from helpers import bare, close, made_for, python_blocks, random, random_like, trained
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, make_mesh
from processes import ROOT

import mora_jax
from mora_jax import MoRAConfig, linen, sharding
from mora_jax import nnx as mora

WIDTH, HEADS, HEAD, HIDDEN, LAYERS = 16, 2, 8, 32, 3
CONFIG = MoRAConfig(rank=2, operator="rotation")
X, KEY = random(0, 4, 3, WIDTH), jax.random.key(0)
RULES = ("embed", "data"), ("heads", "model"), ("mlp", "model"), ("layers", None)
PROJECTIONS = {
    "query": ((WIDTH,), (HEADS, HEAD), ("embed", "heads", "kv")),
    "out": ((HEADS, HEAD), (WIDTH,), ("heads", "kv", "embed")),
    "wi": ((WIDTH,), (HIDDEN,), ("embed", "mlp")),
    "wo": ((HIDDEN,), (WIDTH,), ("mlp", "embed")),
}
"""{layer: the features that it contracts, those that it makes, its axes' names}."""


def contract(x, kernel, axis):
    """As MaxText multiplies: axes of the input with the first ones of the kernel."""
    axes = tuple(a % x.ndim for a in axis), tuple(range(len(axis)))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))


class DenseGeneral(nn.Module):
    features: tuple[int, ...]
    axis: tuple[int, ...]
    kernel_axes: tuple[str, ...]

    @nn.compact
    def __call__(self, inputs):
        normal = nn.initializers.normal(0.2)
        init = nn.with_logical_partitioning(normal, self.kernel_axes)
        shape = *(inputs.shape[a] for a in self.axis), *self.features
        return contract(inputs, self.param("kernel", init, shape), self.axis)


class NNXDenseGeneral(nnx.Module):
    def __init__(self, ins, outs, kernel_axes, rngs):
        self.axis, self.out_features_shape = tuple(range(-len(ins), 0)), outs
        values = 0.2 * jax.random.normal(rngs.params(), (*ins, *outs))
        self.kernel = nnx.Param(values, out_sharding=kernel_axes, eager_sharding=False)

    def __call__(self, inputs):
        return contract(inputs, self.kernel[...], self.axis)


page: dict[str, Any] = {}
exec(python_blocks(ROOT / "docs/maxtext-and-keras.md")[0], page)
for dense in (DenseGeneral, NNXDenseGeneral):
    mora_jax.register_layer(dense, equation=page["equation"])


def block(layers, x):
    """A layer without its attention scores: four projections around two ways past."""
    x = x + layers.out(jnp.tanh(layers.query(x)))
    return x + layers.wo(nn.silu(layers.wi(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        dense = {
            name: DenseGeneral(outs, tuple(range(-len(ins), 0)), axes, name=name)
            for name, (ins, outs, axes) in PROJECTIONS.items()
        }
        return block(SimpleNamespace(**dense), x), None


class Decoder(nn.Module):
    scan_axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.scan_axis},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


MODEL = Decoder()


@pytest.fixture(scope="module")
def variables():
    return made_for(MODEL, X)


def test_every_layer_is_found_and_merging_is_exact(variables):
    plan = linen.plan(MODEL, variables, CONFIG, X)
    axes = {path[1]: spec.axes for path, spec in plan.specs.items()}
    assert axes == {"query": "sioo", "out": "siio", "wi": "sio", "wo": "sio"}
    assert "left out" not in str(plan) and "not proven" not in str(plan)
    adapters = trained(plan)
    merged = mora_jax.merge(variables["params"], adapters)
    adapted = linen.wrap(MODEL, plan)(adapters, variables, X)
    close(MODEL.apply({"params": merged}, X), adapted)
    assert jnp.abs(adapted - MODEL.apply(variables, X)).max() > 0.1
    names = merged["layers"]["query"]["kernel"].names
    assert names == ("layers", "embed", "heads", "kv")


@pytest.mark.slow
def test_a_mesh_is_read_from_the_logical_names(variables):
    """A step on it is that of one device, with M's on all of them."""
    mesh, batch = make_mesh(data=2, model=2), "data"
    with nn.logical_axis_rules(RULES):
        places = logical_to_mesh_sharding(
            nn.get_partition_spec(variables), mesh, list(RULES)
        )
        plan = linen.plan(MODEL, variables, CONFIG, X)
        there = sharding.adapter_shardings(plan, variables["params"], mesh=mesh)
        split = sharding.on_mesh(plan, variables["params"], batch_axes=batch, mesh=mesh)
    layout = split["layers/query/kernel"].layout
    assert layout and layout.mesh_axes == ((), ("model",), ("data",), ())
    assert all(place.is_fully_replicated for place in jax.tree.leaves(there))

    def gradient(plan):
        apply = linen.wrap(MODEL, plan)

        def loss(adapters, variables, x):
            return jnp.mean(apply(adapters, variables, x) ** 2)

        return jax.jit(jax.value_and_grad(loss))

    adapters = trained(plan, 0.1)
    expected = gradient(plan)(adapters, nn.unbox(variables), X)
    arrays = jax.device_put(nn.unbox(variables), places)
    x = jax.device_put(X, NamedSharding(mesh, P(batch)))
    got = gradient(split)(jax.device_put(adapters, there), arrays, x)
    assert_close(got, expected)


def test_layers_stacked_on_their_second_axis_are_folded(variables):
    """MaxText's default, param_scan_axis=1: `linen.plan` says what to do instead."""
    second = Decoder(scan_axis=1)
    shapes = jax.eval_shape(second.init, KEY, X)
    with pytest.raises(ValueError, match="stacked axes must come first"):
        linen.plan(second, shapes, CONFIG, X)
    axes = {"query": "isoo", "out": "isio", "wi|wo": "iso"}
    overrides = {f"layers/({k})/kernel": {"axes": v} for k, v in axes.items()}
    config = MoRAConfig(rank=2, operator="rotation", overrides=overrides)
    plan = mora_jax.plan(shapes["params"], config)
    first = linen.plan(MODEL, variables, CONFIG, X)
    adapters = trained(first)
    moved = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), nn.unbox(variables))
    fold = jax.jit(lambda ms, w: mora_jax.fold(w, plan.adapters(ms)))
    folded = fold(bare(adapters), moved["params"])
    adapted = linen.wrap(MODEL, first)(adapters, variables, X)
    close(second.apply({"params": folded}, X), adapted)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        for name, (ins, outs, axes) in PROJECTIONS.items():
            setattr(self, name, NNXDenseGeneral(ins, outs, axes, rngs))

    def __call__(self, x):
        return block(self, x)


class NNXDecoder(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=LAYERS)(
            nnx.vmap(
                NNXBlock,
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
        )
        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(layer, x):
            return layer(x)

        return forward(self.layers, x)


@pytest.mark.slow
def test_the_same_layers_in_nnx():
    base = NNXDecoder(nnx.Rngs(0))
    plan = mora.plan(base, CONFIG, X)
    assert sorted(spec.axes for spec in plan.values()) == ["siio", "sio", "sio", "sioo"]
    model = mora.wrap(base, plan)
    optimizer = mora.adapter_optimizer(model, optax.adam(1e-2))

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = mora.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    mora.set_adapters(model, random_like(mora.adapters(model), 0.05))
    before = step(model, optimizer, X)
    assert jnp.mean(model(X) ** 2) < before
    close(mora.merge_adapters(model)(X), model(X))
