"""Adapters of one delta mix, wherever each of them comes from."""

import dataclasses
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import by_case
from flax import nnx
from helpers import bare, close, random, random_like
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put

import mora_jax
from mora_jax import Adapter, AdapterSpec, MoRAConfig, sharding
from mora_jax import nnx as mora

PARAMS = {"up": {"kernel": random(0, 16, 24)}, "down": {"kernel": random(1, 24, 16)}}
TX = optax.adam(0.1)


def planned(**settings):
    """Adapters with random numbers, of a plan with other settings of their origin."""
    plan = mora_jax.plan(PARAMS, MoRAConfig(operator="orthogonal", **settings))
    return random_like(mora_jax.init(plan, jax.random.key(0)))


def loaded(tmp_path):
    """As a file gives them that knows the base."""
    mora_jax.save(tmp_path / "adapter", planned(rank=2), params=PARAMS)
    return mora_jax.load(tmp_path / "adapter", PARAMS)


def on_a_mesh(_, **axes):
    """On two devices that share the features of the kernels."""
    mesh = make_mesh(**(axes or {"model": 2}))
    where = {"up": {"kernel": P(None, "model")}, "down": {"kernel": P("model")}}
    params = put(PARAMS, mesh, where)
    adapters = sharding.on_mesh(planned(rank=2), params, batch_axes=())
    return jax.device_put(adapters, sharding.adapter_shardings(adapters, params))


ORIGINS = {
    "rank": lambda _: planned(rank=2),
    "square_rank": lambda _: planned(square_rank=8),
    "gaussian": lambda _: planned(rank=2, init="gaussian"),
    "param_dtype": lambda _: jax.tree.map(
        lambda m: m.astype(jnp.float32), planned(rank=2, param_dtype=jnp.bfloat16)
    ),
    "loaded": loaded,
    "mesh": on_a_mesh,
    "larger mesh": lambda path: on_a_mesh(path, data=2, model=2),
}


def by_orbax(one, other, path):
    """A checkpoint of one, restored as the other is."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", one)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", other)


def scanned(one, other, _):
    """The other is the state of a loop that one leaves."""

    def body(state, _):
        return jax.lax.cond(True, lambda: one, lambda: state), None

    return jax.lax.scan(body, jax.tree.map(jnp.copy, other), length=2)[0]


def updated(one, other, _):
    """Gradients that are one, with the state of an optimizer of the other."""
    updates, _ = TX.update(one, TX.init(other), other)
    plain, _ = TX.update(bare(one), TX.init(bare(other)), bare(other))
    close(bare(updates), plain)
    return one


def through_nnx(one, other, _):
    """A model that holds the other is given one."""
    held = jax.tree.map(
        lambda a: mora.MoRAParam(jnp.copy(a.m), spec=a.spec),
        other,
        is_leaf=lambda leaf: isinstance(leaf, Adapter),
    )
    new = jax.tree.map(
        lambda a: mora.MoRAParam(a.m, spec=a.spec),
        one,
        is_leaf=lambda leaf: isinstance(leaf, Adapter),
    )
    model = nnx.Module()
    model.up, model.down = nnx.Dict(held["up"]), nnx.Dict(held["down"])
    twin = nnx.Module()
    twin.up, twin.down = nnx.Dict(new["up"]), nnx.Dict(new["down"])
    assert nnx.graphdef(model) == nnx.graphdef(twin)
    nnx.update(model, nnx.state(twin))
    twin = nnx.merge(nnx.graphdef(model), nnx.state(twin))
    got = nnx.to_pure_dict(nnx.state(model))
    for name in PARAMS:
        close(got[name]["kernel_mora"], one[name]["kernel_mora"].m)
    return one


FUNCTIONS = {
    "map": lambda one, other, _: jax.tree.map(lambda m, _: m, one, other),
    "structure": lambda one, other, _: jax.tree.unflatten(
        jax.tree.structure(other), jax.tree.leaves(one)
    ),
    "transpose": lambda one, other, _: jax.tree.transpose(
        jax.tree.structure(other),
        jax.tree.structure((0, 0)),
        jax.tree.map(lambda m: (m, m), one),
    )[0],
    "optimizer": updated,
    "apply_updates": lambda one, other, _: optax.apply_updates(
        jax.tree.map(lambda m: 0 * m, other), one
    ),
    "scan": scanned,
    "orbax": by_orbax,
    "flax": lambda one, other, _: flax.serialization.from_bytes(
        other, flax.serialization.to_bytes(one)
    ),
    "nnx": through_nnx,
    "plan": lambda one, other, _: mora_jax.plan(
        PARAMS, MoRAConfig(operator="orthogonal", rank=2)
    ).adapters(one),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]harding")  # of Orbax
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("theirs", ORIGINS)
def test_they_mix(name, theirs, tmp_path):
    """In both orders, with those of a plan by its rank."""
    ours, other = planned(rank=2), ORIGINS[theirs](tmp_path)
    assert jax.tree.structure(ours) == jax.tree.structure(other)
    assert hash(jax.tree.structure(ours)) == hash(jax.tree.structure(other))
    twice = jax.tree.map(lambda m: 2 * m, ours)
    for k, (one, another) in enumerate([(twice, other), (other, twice)]):
        if name in ("scan", "optimizer"):  # programs have one set of devices
            one, another = jax.device_get((one, another))
        (tmp_path / str(k)).mkdir()
        got = FUNCTIONS[name](one, another, tmp_path / str(k))
        close(bare(jax.device_get(got)), bare(jax.device_get(one)))
        close(mora_jax.delta_weight(got), mora_jax.delta_weight(one))


@by_case
def test_adapters_of_all_operators_mix(case, tmp_path):
    """Made, loaded, and on a mesh; the arrays that some operators hold are copies."""
    op = case.make(16, 24, 4)
    spec = AdapterSpec(op, (16, 24), alpha=0.5, rank=1)
    ours = {"up": {"kernel_mora": Adapter(random(0, *op.m_shape), spec)}}
    mora_jax.save(tmp_path, ours, params=PARAMS)
    again = mora_jax.load(tmp_path, PARAMS)
    mesh = make_mesh(model=2)
    where = {"up": {"kernel": P(None, "model")}}
    placed = sharding.on_mesh(again, where, batch_axes=(), mesh=mesh)
    for other in (again, placed, jax.tree.map(jnp.copy, placed)):
        assert jax.tree.structure(ours) == jax.tree.structure(other)
        assert ours == other
        doubled = jax.tree.map(jnp.add, ours, other)
        close(
            mora_jax.delta_weight(doubled),
            mora_jax.delta_weight(jax.tree.map(lambda m: 2 * m, ours)),
        )
        TX.update(ours, TX.init(other), other)


@pytest.mark.parametrize("theirs", ORIGINS)
def test_a_program_serves_all_of_one_device(theirs, tmp_path):
    traces = []

    @jax.jit
    def step(adapters):
        traces.append(None)
        return jax.tree.map(lambda m: m + 1, adapters)

    step(planned(rank=2))
    step(ORIGINS[theirs](tmp_path))
    assert len(traces) == 1 + ("mesh" in theirs)


def test_a_base_that_a_program_never_saw_is_not_the_base_of_its_results(tmp_path):
    """Or the first adapters' base would be that of all later ones."""
    step = jax.jit(lambda adapters: jax.tree.map(lambda m: m + 1, adapters))
    other = jax.tree.map(lambda w: w + 1, PARAMS)
    first = loaded(tmp_path)
    for adapters, params in ((first, PARAMS), (planned(rank=2), other)):
        mora_jax.merge(params, step(adapters))
    # Functions of trees keep it.
    kept = jax.tree.map(lambda m: m + 1, first)
    with pytest.raises(ValueError, match="other weights"):
        mora_jax.merge(other, kept)
    with pytest.raises(ValueError, match="other weights"):
        mora_jax.merge(other, jax.device_put(first))


def test_what_decides_the_delta_does_not_mix():
    ours = planned(rank=2)
    for settings in ({"alpha": 0.5}, {"seed": 1}, {"scale": "paper"}):
        with pytest.raises(ValueError):
            jax.tree.map(jnp.add, ours, planned(rank=2, **settings))


def test_an_adapter_equals_its_copy():
    adapter = planned(rank=2)["up"]["kernel_mora"]
    copy = adapter.replace(m=jnp.copy(adapter.m))
    assert adapter == copy and not adapter != copy
    assert adapter == adapter.replace(m=np.asarray(adapter.m))
    assert adapter != adapter.replace(m=adapter.m + 1)
    assert adapter != adapter.replace(m=adapter.m.astype(jnp.bfloat16))
    assert adapter != adapter.replace(m=adapter.m[:4])
    assert adapter != adapter.replace(spec=dataclasses.replace(adapter.spec, alpha=2.0))
    assert adapter != adapter.replace(m=None)
    shape = jax.eval_shape(lambda: adapter)
    assert shape == jax.eval_shape(lambda: copy) and shape != adapter
    assert planned(rank=2) == planned(rank=2)
    nan = adapter.replace(m=jnp.full_like(adapter.m, jnp.nan))
    assert nan != nan.replace(m=jnp.copy(nan.m))  # as numbers are compared


def test_tracers_cannot_be_compared():
    adapter = planned(rank=2)["up"]["kernel_mora"]
    with pytest.raises(TypeError, match="Adapter.* under jit"):
        jax.jit(lambda one: one == adapter)(adapter)


def held_by_a_model(params, adapters=None):
    """A model of these kernels, with adapters that know them as their base."""
    model = nnx.Sequential(
        nnx.Linear(16, 24, use_bias=False, rngs=nnx.Rngs(0)),
        nnx.Linear(24, 16, use_bias=False, rngs=nnx.Rngs(0)),
    )
    layers: Any = model.layers
    for layer, name in zip(layers, PARAMS, strict=True):
        layer.kernel[...] = params[name]["kernel"]
    wrapped = mora.wrap(model, MoRAConfig(rank=2))
    if adapters is not None:
        mora.set_adapters(wrapped, adapters)
    return wrapped


def saved_of(model, directory):
    """Adapters of a file, which knows the model's base."""
    params = nnx.state(model, nnx.All(nnx.Param, nnx.Not(mora.MoRAParam)))
    mora_jax.save(directory, mora.adapters(model), params=params)
    return mora_jax.load(directory)


def bases(model):
    """The digest of each kernel that the M's in a model are of."""
    state = nnx.state(model, mora.MoRAParam)
    return [
        variable.spec.base_digest
        for variable in jax.tree.leaves(
            state, is_leaf=lambda leaf: isinstance(leaf, mora.MoRAParam)
        )
    ]


def models_of_two_bases(directory):
    others = jax.tree.map(lambda w: w + 1, PARAMS)
    models = []
    for name, params in {"one": PARAMS, "other": others}.items():
        adapters = saved_of(held_by_a_model(params), directory / name)
        models.append(held_by_a_model(params, adapters))
    assert None not in bases(models[0]) and None not in bases(models[1])
    assert bases(models[0]) != bases(models[1])
    return models


def test_nnx_update_brings_the_base_of_the_numbers(tmp_path):
    one, other = models_of_two_bases(tmp_path)
    nnx.update(one, nnx.state(other, mora.MoRAParam))
    assert bases(one) == bases(other)


@pytest.mark.parametrize("way", ["a model", "a state", "gradients"])
def test_a_jitted_program_leaves_each_model_its_base(tmp_path, way):
    models = models_of_two_bases(tmp_path)
    known = [bases(model) for model in models]
    x = random(0, 3, 16)

    @nnx.jit
    def step(model):
        if way == "gradients":
            trained = nnx.DiffState(0, mora.MoRAParam)
            state = nnx.grad(lambda model: model(x).sum(), argnums=trained)(model)
        else:
            state = nnx.state(model, mora.MoRAParam)
        state = jax.tree.map(lambda m: m + 1, state)
        if way == "a model":
            nnx.update(model, state)
        return state

    for model, own in zip(models, known, strict=True):
        state = step(model)
        nnx.update(model, state)
        assert bases(model) == own
