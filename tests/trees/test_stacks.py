"""Layers of a stack whose operators have arrays of their own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from adapter_files import assert_same, slow
from cases import in_turns
from flax import nnx
from helpers import close, random, random_like
from jax.sharding import NamedSharding, PartitionSpec

import mora_jax
from mora_jax import MoRAConfig, linen, mixing, remora, serving, sharding
from mora_jax import nnx as mora
from mora_jax._layer.adapter import Adapter
from mora_jax.operators import Damped, Subspace, make_operator

WIDTH, LAYERS, Q = 12, 3, 4
X = np.asarray(random(0, 5, WIDTH))
AUTO = (jax.sharding.AxisType.Auto,) * 2


def orthonormal(seed, count, *stack):
    return np.linalg.qr(random(seed, *stack, WIDTH, count))[0]


def operator(kind, *stack):
    """An operator whose layers in a stack have arrays of their own."""
    name, _, damped = kind.partition("+")
    sizes = WIDTH, WIDTH, Q
    if name == "subspace":
        bases = {f"{k}_basis": orthonormal(n, Q, *stack) for n, k in enumerate(SIDES)}
        inner = Subspace(*sizes, **bases)
    else:
        inner = make_operator(name, *sizes)
    if not damped:
        return inner
    own = stack if damped in ("damped", "scaled") else ()
    f = np.random.default_rng(4).uniform(0.2, 1, (*own, WIDTH, 1))
    if damped == "scaled":
        return Damped(*sizes, inner=inner, diagonal=f)
    v = 0.8 * orthonormal(2, 3, *own)
    return Damped(*sizes, inner=inner, directions=v, diagonal=f)


SIDES = "in", "out"
SUBSPACES = "subspace+damped", "subspace+shared"
KINDS = [
    "block_diagonal+damped",
    "subspace",
    *SUBSPACES,
    slow("rotation+damped"),
    slow("sharing+damped"),
    slow("low_rank+damped"),
    "block_diagonal+scaled",
    slow("rotation+scaled"),
]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH, name="fc")(jnp.tanh(x)), None


class Model(nn.Module):
    """Layers under scan, or scans of them under another one."""

    lengths: tuple = (LAYERS,)
    remat: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        inner = nn.remat(Layer) if self.remat else Layer
        if self.lengths[1:]:
            inner, length = Inner, self.lengths[0]
            block = nn.scan(inner, length=length, **axes)(self.lengths[1:], name="all")
            return block(x, None)
        length = self.lengths[0]
        return nn.scan(inner, length=length, **axes)(name="blocks")(x, None)


class Inner(Model):
    pass


def with_operator(adapters, op):
    """The adapters with an operator, and random M's."""

    def changed(adapter):
        scale = op.fine_tuning_scale
        spec = dataclasses.replace(adapter.spec, operator=op, scale=scale)
        m = random(7, *spec.shape) / WIDTH
        return Adapter(m, spec)

    return jax.tree.map(changed, adapters, is_leaf=lambda x: isinstance(x, Adapter))


def a_model(kind, lengths=(LAYERS,), remat=False):
    """(apply, adapters, variables, the model) with a kind of operator."""
    model = Model(lengths, remat)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), X), scale=0.3)
    apply = linen.wrap(model, MoRAConfig(rank=2), variables, X)
    adapters = mora_jax.init(apply.plan)
    return apply, with_operator(adapters, operator(kind, *lengths)), variables, model


def the_adapter(adapters):
    (found,) = jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, Adapter))
    return found


def delta(adapter, index):
    """Delta of a layer by its definition, in float64: factor * P C M D."""
    op = adapter.operator.at(index)
    eye, damped = np.eye(WIDTH), isinstance(op, Damped)
    inner, p = (op.inner if damped else op), eye
    if damped:
        if op.directions is not None:
            v = np.asarray(op.directions, np.float64)
            p = eye - v @ v.T
        p = p * np.asarray(op.diagonal, np.float64)[:, 0]
    m = jnp.asarray(adapter.m)[index]
    return adapter.spec.factor * p @ np.asarray(inner.delta_weight(m), np.float64)


@pytest.mark.slow
@in_turns("kind, how", KINDS, [((LAYERS,), False), ((2, 2), False), ((LAYERS,), True)])
def test_scanned_layers_compute_with_their_own(kind, how):
    lengths, remat = how
    apply, adapters, variables, model = a_model(kind, lengths, remat)
    adapter = the_adapter(adapters)
    deltas = adapter.delta()
    for index in np.ndindex(lengths):
        close(deltas[index], delta(adapter, index), 1e-4)
    (spots,) = {k for k in ("all", "blocks") if k in variables["params"]}
    merged = mora_jax.merge(variables["params"], adapters)
    assert spots in merged
    y = model.apply({"params": merged}, X)[0]
    close(jax.jit(apply)(adapters, variables, X)[0], y, 1e-4)
    folded = lambda a: model.apply(  # noqa: E731
        {"params": mora_jax.fold(variables["params"], a)}, X
    )[0]
    grads, expected = (
        jax.grad(lambda a, f=f: jnp.sum(jnp.sin(f(a))))(adapters)
        for f in (lambda a: apply(a, variables, X)[0], folded)
    )
    close(the_adapter(grads).m, the_adapter(expected).m, 1e-4)
    xs = jnp.stack([X, -X])
    many = jax.vmap(lambda x: apply(adapters, variables, x)[0])(xs)
    close(many[0], y, 1e-4)
    x = jnp.broadcast_to(X, (*lengths, *X.shape))
    close(adapter(x), jnp.einsum("...bi,...io->...bo", x, deltas), 1e-4)


@pytest.mark.slow
@in_turns("kind, remat", KINDS, [False, True])
def test_nnx(kind, remat):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.fc(jnp.tanh(x))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def create(rngs):
                return Layer(rngs)

            self.layers = create(rngs)

        def __call__(self, x):
            run = lambda x, layer: layer(x)  # noqa: E731
            run = nnx.remat(run) if remat else run
            return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model = mora.wrap(Stack(nnx.Rngs(0)), MoRAConfig(rank=2), X)
    plain, before = mora.unwrap(model), model(X)
    new = mora.adapters(model)
    adapters = with_operator(new, operator(kind, LAYERS))
    mora.set_adapters(model, adapters)
    assert_same(mora.adapters(model), adapters)
    merged = mora.merge_adapters(model)
    close(nnx.jit(lambda m, x: m(x))(model, X), merged(X), 1e-4)
    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    folded = nnx.to_pure_dict(nnx.state(merged, nnx.Param))
    adapter = the_adapter(adapters)
    for k in range(LAYERS):
        kernel = params["layers"]["fc"]["kernel"][k] + delta(adapter, (k,))
        close(folded["layers"]["fc"]["kernel"][k], kernel, 1e-4)

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    wrt = nnx.DiffState(0, mora.MoRAParam)
    grads = nnx.grad(loss, argnums=wrt)(model, X)
    assert jnp.abs(jax.tree.leaves(grads)[0]).min() > 0
    tx = nnx.Optimizer(model, optax.sgd(1e-2), wrt=mora.MoRAParam)
    step = nnx.jit(lambda m, tx, x: tx.update(m, nnx.grad(loss, argnums=wrt)(m, x)))
    step(model, tx, X)
    m = adapter.m - 1e-2 * jax.tree.leaves(grads)[0]
    close(jax.tree.leaves(nnx.state(model, mora.MoRAParam))[0], m, 1e-5)
    close(nnx.clone(model)(X), mora.merge_adapters(model)(X), 1e-4)
    again = mora.unwrap(model)
    assert type(again.layers.fc) is nnx.Linear
    assert vars(again.layers.fc).keys() == vars(plain.layers.fc).keys()
    assert_same(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(plain)))
    mora.set_adapters(model, new)  # and back to arrays that all share
    close(model(X), before, 1e-6)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
        nnx.state(mora.wrap(Stack(nnx.Rngs(0)), MoRAConfig(rank=2), X))
    )


@pytest.mark.parametrize("kind", [slow(kind) for kind in KINDS[:3]])
@pytest.mark.parametrize("spec", [(None, "data", "model"), (None, "model", "data")])
def test_on_a_mesh(kind, spec):
    apply, adapters, variables, _ = a_model(kind)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=AUTO)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    where = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), variables)
    where["params"]["blocks"]["fc"]["kernel"] = place
    x = random(0, 4, WIDTH)

    def loss(adapters, variables, x):
        return jnp.sum(jnp.sin(apply(adapters, variables, x)[0]))

    expected = jax.value_and_grad(loss)(adapters, variables, x)
    laid = sharding.on_mesh(adapters, where["params"], batch_axes="data")
    split = jax.device_put(variables, where)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    got = jax.jit(jax.value_and_grad(loss))(laid, split, x)
    close(got[0], expected[0], 1e-4)
    close(the_adapter(got[1]).m, the_adapter(expected[1]).m, 1e-4)
    merged = mora_jax.merge(split["params"], laid)["blocks"]["fc"]["kernel"]
    for k in range(LAYERS):
        own = variables["params"]["blocks"]["fc"]["kernel"][k]
        close(merged[k], own + delta(the_adapter(adapters), (k,)), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS[:2], *map(slow, SUBSPACES), *KINDS[4:]])
def test_files_and_all_that_takes_adapters(kind, tmp_path):
    apply, adapters, variables, _ = a_model(kind)
    adapter, params = the_adapter(adapters), variables["params"]
    mora_jax.save(tmp_path, adapters)
    assert_same(mora_jax.load(tmp_path, params), adapters)
    assert_same(mora_jax.load(tmp_path), adapters)
    ranks = mora_jax.diagnostics.spectrum(adapters)["blocks/fc/kernel"]
    for k in range(LAYERS):
        close(ranks[k], np.linalg.svd(delta(adapter, (k,)))[1], 1e-3)
    if adapter.operator.linear:
        twice = mixing.weighted_sum([adapters, adapters], [1.0, 1.0])
        close(the_adapter(twice).delta(), 2 * adapter.delta(), 1e-4)
    stacked = serving.stack([jax.tree.map(jnp.zeros_like, adapters), adapters])
    rows = serving.select(stacked, np.array([1, 0]))
    own = lambda adapters, x: apply(adapters, variables, x)[0]  # noqa: E731
    y, _ = jax.vmap(own)(rows, jnp.stack([X, X]))
    close(y, own(adapters, X), 1e-4)
    kernel = params["blocks"]["fc"]["kernel"]
    tensors = {f"layers.{k}.fc.weight": np.array(kernel[k].T) for k in range(LAYERS)}
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "base" / "model.safetensors")
    out = tmp_path / "out"
    names = {"layers.{n}.{name}": "blocks/{name}/kernel[{n}]"}
    mora_jax.io.merge_checkpoint(tmp_path / "base", adapters, out, names)
    merged = safetensors.numpy.load_file(out / "model.safetensors")
    for k in range(LAYERS):
        expected = np.asarray(kernel[k]) + delta(adapter, (k,))
        close(merged[f"layers.{k}.fc.weight"].T, expected, 1e-4)
    mora_jax.io.export(tmp_path / "lora", adapters, "peft", names=names, rank=WIDTH)
    lora = mora_jax.io.load_peft(tmp_path / "lora", apply.plan, names=names)
    close(the_adapter(lora).delta(), adapter.delta(), 1e-3)


@pytest.mark.slow
def test_directions_and_restarts():
    """The same directions as of layers on their own."""
    apply, _, variables, model = a_model("subspace")
    params = variables["params"]
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, X)[0])))
    gradient = grads(params)["blocks"]["fc"]["kernel"]
    for plan in (apply.plan, _damped_plan(apply.plan)):
        spec = mora_jax.gradient_bases(grads(params), plan)["blocks/fc/kernel"]
        old = plan["blocks/fc/kernel"]
        for k in range(LAYERS):
            one = mora_jax.plan({"fc": {"kernel": gradient[k]}}, MoRAConfig(rank=2))
            own = dataclasses.replace(one["fc/kernel"], operator=old.operator.at((k,)))
            one = dataclasses.replace(one, parts={("fc", "kernel"): own})
            (own,) = mora_jax.gradient_bases(
                {"fc": {"kernel": gradient[k]}}, one
            ).values()
            q, given = spec.operator.square_rank, spec.operator.at((k,))
            m = random(9, q, q)
            close(given.delta_weight(m), own.operator.delta_weight(m), 2e-3)

    def loss(adapters, params):
        return jnp.sum(jnp.sin(apply(adapters, {"params": params}, X)[0]))

    adapters = mora_jax.directions(loss, mora_jax.init(apply.plan), [(params,)])
    adapters = random_like(adapters)

    init, _, renew = remora.renewing(loss, optax.sgd(1.0), every=2)
    state = init(params, adapters)
    after = jax.jit(renew)(state)
    fresh = the_adapter(after.adapters)
    assert fresh.operator.in_basis.shape[0] == LAYERS
    sums = params["blocks"]["fc"]["kernel"] + the_adapter(adapters).delta()
    close(after.params["blocks"]["fc"]["kernel"], sums, 1e-5)


def _damped_plan(plan):
    (path,) = plan.specs
    spec = plan.specs[path]
    op = spec.operator
    sizes = op.in_features, op.out_features, op.square_rank
    v = 0.9 * orthonormal(3, 2, LAYERS)
    damped = Damped(*sizes, inner=op, directions=v)
    return dataclasses.replace(
        plan, parts={path: dataclasses.replace(spec, operator=damped)}
    )


def test_a_layer_without_a_gradient_takes_the_directions_of_the_largest():
    params = {"experts": {"kernel": jnp.ones((3, WIDTH, WIDTH))}}
    config = MoRAConfig(rank=1, overrides={"experts/kernel": {"axes": "sio"}})
    plan = mora_jax.plan(params, config)
    gradient = random(1, 3, WIDTH, WIDTH).at[1].set(0).at[2].multiply(3)
    spec = mora_jax.gradient_bases({"experts": {"kernel": gradient}}, plan)
    op = spec["experts/kernel"].operator
    for basis in (op.in_basis, op.out_basis):
        np.testing.assert_array_equal(basis[1], basis[2])
        assert not np.allclose(basis[0], basis[2])
    with pytest.raises(ValueError, match="is zero"):
        mora_jax.gradient_bases({"experts": {"kernel": 0 * gradient}}, plan)


def test_bad_stacks():
    op = operator("subspace+damped", LAYERS)
    for call in (
        lambda: op.compress(X),
        lambda: op.decompress(random(0, Q)),
        lambda: op.apply(random(0, Q, Q), X),
        lambda: op.delta_weight(random(0, Q, Q)),
    ):
        with pytest.raises(ValueError, match="differs from layer to layer: take at"):
            call()
    assert op.at((1,)).apply(random(0, Q, Q), X).shape == X.shape
    _, adapters, variables, model = a_model("subspace")
    spec = the_adapter(adapters).spec
    for stack in ((), (2,)):
        with pytest.raises(ValueError, match="arrays of subspace must be of one"):
            dataclasses.replace(
                spec, kernel_shape=(*stack, WIDTH, WIDTH), axes="s" * len(stack) + "io"
            )
    bad = np.ones((LAYERS, WIDTH, Q), np.float32)
    with pytest.raises(ValueError, match="must be orthonormal"):
        Subspace(WIDTH, WIDTH, Q, in_basis=bad, out_basis=bad)
    with pytest.raises(ValueError, match="directions must be orthogonal"):
        Damped(
            WIDTH,
            WIDTH,
            Q,
            inner=make_operator("sharing", WIDTH, WIDTH, Q),
            directions=bad,
        )
    layer = mora_jax.MoRADense(WIDTH, config=MoRAConfig(rank=2))
    params = layer.init(jax.random.key(0), X)["params"]
    ms = with_operator(mora_jax.split(params)[1], operator("subspace"))
    own = dataclasses.replace(spec, operator=operator("subspace", LAYERS))
    ms = {"kernel_mora": ms["kernel_mora"].replace(spec=own)}  # as in a scan
    with pytest.raises(ValueError, match="taken apart by linen.wrap and nnx.wrap"):
        layer.apply({"params": {**params, **ms}}, X)
