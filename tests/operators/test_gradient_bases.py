"""Bases from a gradient: its leading directions, whatever it is given in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import single, slow
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers import ROUNDED, close, made_for, orthonormal, random, wide

import mora_jax
from mora_jax import MoRAConfig, gradient_bases, io
from mora_jax.io import AdapterFileError
from mora_jax.io._tensors import TensorFile
from mora_jax.operators import Subspace

AXES = {"b/kernel": {"axes": "oi"}, "c/kernel": {"axes": "sio"}}
SHAPES = {"a": (24, 36), "b": (20, 28), "c": (3, 16, 24)}


def params_of(seed):
    return {k: {"kernel": random(seed, *shape)} for k, shape in SHAPES.items()}


def planned(rank=1, **settings):
    settings = {"rank": rank, "operator": "rotation", "overrides": AXES, **settings}
    settings = {"multiple_of": 1, **settings}
    return mora_jax.plan(params_of(0), MoRAConfig(**settings))


def gradients(rank=5):
    """Of little rank, as those of a small batch are, with singular values that fall."""
    values = 0.5 ** np.arange(rank)
    return {
        name: {
            "kernel": jnp.asarray(
                random(1, *shape[:-1], rank) * values @ random(2, rank, shape[-1])
            ),
            "bias": jnp.ones(3),
        }
        for name, shape in SHAPES.items()
    }


def share(matrices, c, d):
    """The share of the squares of matrices that is between the bases of each."""
    kept = c.swapaxes(-2, -1) @ matrices @ d
    return np.sum(kept**2, (-2, -1)) / np.sum(matrices**2, (-2, -1))


def best_share(matrices, width):
    """The same for the leading singular vectors of each."""
    u, _, vt = np.linalg.svd(matrices)
    return share(matrices, u[..., :width], vt.swapaxes(-2, -1)[..., :width])


def check_held(grads, name, spec, least=1 - 2 * 2**-8):
    """Directions hold what the best would, but for rounding to eight bits.

    A column moves by at most 2**-4 of itself, so that each side loses at most the
    square of that.
    """
    op, gradient = spec.operator, np.asarray(grads[name[0]]["kernel"], np.float64)
    gradient = gradient.T if name == "b/kernel" else gradient
    gradient = gradient.reshape(*spec.stack_shape, op.in_features, op.out_features)
    c, d = orthonormal(op.in_basis), orthonormal(op.out_basis)
    best = best_share(gradient, op.square_rank)
    assert (share(gradient, c, d) > least * best).all()
    return c, d


@pytest.mark.slow
def test_directions_hold_most_of_the_gradient():
    plan, grads = planned(), gradients(rank=12)
    found = gradient_bases(grads, plan)
    for name, spec in found.items():
        op, old = spec.operator, plan[name].operator
        assert (op.m_shape, op.name) == (old.m_shape, "subspace")
        check_held(grads, name, spec)
        for basis in wide(op.in_basis), wide(op.out_basis):
            assert basis.shape[:-2] == spec.stack_shape
            products, unit = basis.swapaxes(-2, -1) @ basis, np.eye(op.square_rank)
            close(products, np.broadcast_to(unit, products.shape), ROUNDED)
        ins, outs = op.in_features, op.out_features
        # c = sqrt(in / q) and d = sqrt(q / out) in (in / q) ** 0.75 / (c d).
        scale = (ins / op.square_rank) ** 0.25 * (outs / op.square_rank) ** 0.5
        assert spec.scale == pytest.approx(scale)
    again = gradient_bases(grads, found)  # of a plan that has them already
    assert again == found != plan
    assert gradient_bases(grads, planned(scale="paper"))["a/kernel"].scale == 1


@pytest.mark.slow
def test_blocks_become_a_square_of_the_same_budget():
    blocks = planned(rank=2, operator="block_diagonal", multiple_of=None)
    for name, spec in gradient_bases(gradients(), blocks).items():
        ins, outs = spec.in_features, spec.out_features
        q = mora_jax.square_rank(2, ins, outs, "orthogonal")
        assert spec.shape[-2:] == (q, q) and blocks[name].operator.m_shape != (q, q)
        assert spec.scale == pytest.approx(spec.operator.fine_tuning_scale)


@pytest.mark.slow
def test_directions_beyond_the_rank_of_a_gradient():
    grads = jax.tree.map(jnp.zeros_like, params_of(0))
    grads = jax.tree.map(lambda leaf: leaf.at[..., 3, 5].set(1), grads)
    for spec in gradient_bases(grads, planned()).values():
        op = spec.operator
        places = (5, 3) if spec.axes == "oi" else (3, 5)
        for basis, at in zip((op.in_basis, op.out_basis), places, strict=True):
            one = basis.reshape(-1, *basis.shape[-2:])[-1]
            close(one.T @ one, np.eye(op.square_rank), ROUNDED)
            assert np.sum(orthonormal(one)[at] ** 2) == pytest.approx(1, abs=2**-7)


def test_the_forms_of_gradients():
    plan, grads = planned(), gradients()
    found = gradient_bases(grads, plan)
    state = nnx.State(jax.tree.map(nnx.Param, grads))
    assert gradient_bases(state, plan) == found
    assert gradient_bases(jax.tree.map(np.asarray, grads), plan) == found
    tiny = jax.tree.map(lambda g: 1e-30 * g, grads)
    for name, spec in gradient_bases(tiny, plan).items():
        check_held(grads, name, spec, 0.99)
    half = gradient_bases(jax.tree.map(lambda g: g.astype("bfloat16"), grads), plan)
    assert half["a/kernel"].operator.in_basis.dtype == jnp.bfloat16


@pytest.mark.slow
def test_it_learns_faster_along_the_gradient():
    """Of a low rank: full fine-tuning's rate then moves the loss further."""
    params = {"a": {"kernel": random(0, 24, 36) / 5}}
    x, wanted = random(1, 4, 24), random(2, 4, 36)

    def loss(params):
        return jnp.mean((x @ params["a"]["kernel"] - wanted) ** 2)

    def trained(plan):
        def of_adapters(adapters):
            return loss(mora_jax.fold(params, adapters))

        adapters, tx = mora_jax.init(plan), optax.adam(1e-2)
        state, step = tx.init(adapters), jax.jit(jax.value_and_grad(of_adapters))
        for _ in range(30):
            _, grads = step(adapters)
            updates, state = tx.update(grads, state)
            adapters = optax.apply_updates(adapters, updates)
        return of_adapters(adapters)

    plan = mora_jax.plan(params, MoRAConfig(rank=1, operator="orthogonal"))
    along = gradient_bases(jax.grad(loss)(params), plan)
    assert trained(along) < 0.8 * trained(plan)


class Net(nnx.Module):
    """Two layers of NNX, or with `linen` the same of Linen."""

    def __init__(self, rngs):
        self.up = nnx.Linear(12, 20, rngs=rngs)
        self.down = nnx.Linear(20, 12, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="down")(jnp.tanh(nn.Dense(20, name="up")(x)))


@pytest.mark.slow
def test_linen_and_nnx_train_between_them():
    """To the same adapters, and what is merged computes what was trained."""
    x, net, config = random(0, 5, 12), Net(nnx.Rngs(0)), MoRAConfig(rank=2)
    variables = {"params": nnx.to_pure_dict(nnx.state(net, nnx.Param))}
    grads = jax.grad(
        lambda v: jnp.mean((LinenNet().apply(v, x) - jnp.roll(x, 1)) ** 2)  # pyright: ignore
    )(variables)["params"]
    plan = gradient_bases(grads, mora_jax.linen.plan(LinenNet(), variables, config, x))
    apply = mora_jax.linen.wrap(LinenNet(), plan)
    adapters = jax.tree.map(lambda m: m + 0.1, mora_jax.init(plan))
    merged = mora_jax.merge(variables["params"], adapters)
    y = jax.jit(apply)(adapters, variables, x)
    close(y, LinenNet().apply({"params": merged}, x))
    assert not np.allclose(y, net(x), atol=1e-2)

    nnx_plan = gradient_bases(grads, mora_jax.nnx.plan(net, config, x))
    assert nnx_plan.parts == plan.parts
    wrapped = mora_jax.nnx.wrap(net, nnx_plan)
    state = nnx.state(wrapped, mora_jax.nnx.MoRAParam)
    nnx.update(wrapped, jax.tree.map(lambda m: m + 0.1, state))
    close(nnx.jit(lambda net, x: net(x))(wrapped, x), y)
    close(mora_jax.nnx.merge_adapters(wrapped)(x), y)


@pytest.mark.parametrize(
    "operator", [slow("rotation"), "signed_decoupling", slow("subspace")]
)
def test_a_plan_is_an_argument_of_a_program(operator):
    """So that its arrays are no constants, which XLA limits to 2 GB.

    Bare arrays are the other one: adapters of other directions would be other programs.
    """
    x = random(0, 5, 12)
    model = LinenNet()
    variables = made_for(model, x)
    name = "auto" if operator == "subspace" else operator
    config = MoRAConfig(rank=2, operator=name)
    plan = mora_jax.linen.plan(model, variables, config, x)
    if operator == "subspace":
        plan = gradient_bases(variables["params"], plan)
    adapters = jax.tree.map(lambda m: m + 0.1, mora_jax.init(plan))

    apply, traces = mora_jax.linen.wrap(model, plan), []

    @jax.jit
    def loss(ms, plan, variables, x):
        traces.append(plan)
        return jnp.sum(apply(plan.adapters(ms), variables, x) ** 2)

    ms = jax.tree.map(
        lambda a: a.m, adapters, is_leaf=lambda a: isinstance(a, mora_jax.Adapter)
    )
    for _ in range(2):
        expected = apply(plan.adapters(ms), variables, x)
        close(loss(ms, plan, variables, x), jnp.sum(expected**2))
        if operator == "subspace":  # other directions are the same program
            grads = jax.tree.map(jnp.cos, variables["params"])
            plan = gradient_bases(grads, plan)
    assert len(traces) == 1
    grads = jax.grad(loss)(ms, plan, variables, x)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, ms)
    arrays = [a for spec in plan.values() for a in jax.tree.leaves(spec.operator)]
    assert len(jax.tree.leaves(plan)) == len(arrays)
    same = jax.tree.map(jnp.asarray, plan)
    assert same == plan and list(same) == list(plan)
    after = jax.jit(lambda plan: plan)(plan)
    assert after == plan and after.base_parameters == plan.base_parameters


def test_files_hold_the_bases(tmp_path):
    """And what reads them checks them."""
    plan = gradient_bases(gradients(), planned())
    adapters = jax.tree.map(lambda m: m + 0.5, mora_jax.init(plan))
    params = params_of(0)
    mora_jax.save(tmp_path / "a", adapters)
    again = mora_jax.load(tmp_path / "a", params)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for a, b in zip(
        jax.tree.leaves(mora_jax.merge(params, again)),
        jax.tree.leaves(mora_jax.merge(params, adapters)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert gradient_bases(gradients(rank=3), planned()) != plan
    assert io.plan_from_json(io.plan_to_json(adapters), like=plan).parts == plan.parts


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", slow("bfloat16")])
def test_a_file_has_as_many_bytes_as_the_dtype(dtype, tmp_path):
    """For each number of a direction, and it gives back the same directions."""
    plan = gradient_bases(gradients(), planned(), dtype=dtype)
    mora_jax.save(tmp_path, mora_jax.init(plan))
    tensors = TensorFile(tmp_path / "adapter_model.safetensors").arrays()
    stored = [a for name, a in tensors.items() if name.startswith("subspace/")]
    assert {array.dtype.name for array in stored} == {dtype}
    assert len(stored) == 2 * len(plan)
    for name, adapter in flatten_dict(mora_jax.load(tmp_path), sep="/").items():
        op = plan[name.removesuffix("_mora")].operator
        assert adapter.operator == op
        for side in "in_basis", "out_basis":
            loaded, first = getattr(adapter.operator, side), getattr(op, side)
            assert loaded.dtype == first.dtype == jnp.bfloat16
            np.testing.assert_array_equal(loaded, first)


def test_directions_in_eight_bits_are_near_those_in_sixteen():
    """Each number moves by at most 2**-4 of itself, or the least step of the dtype."""
    few, many = (
        gradient_bases(gradients(), planned(), dtype=dtype)
        for dtype in (jnp.float8_e4m3fn, jnp.bfloat16)
    )
    for name, spec in few.items():
        for side in "in_basis", "out_basis":
            got, exact = (wide(getattr(s.operator, side)) for s in (spec, many[name]))
            assert (np.abs(got - exact) <= 2**-4 * np.abs(exact) + 2**-17).all()
            assert (got != exact).any()


@pytest.mark.usefixtures("unchecked")
def test_bad_gradients():
    plan, grads = planned(), gradients()
    for dtype, error in ("float32", ValueError), ("int8", TypeError):
        with pytest.raises(error, match=f"dtype must .*got {dtype}|'{dtype}'"):
            gradient_bases(grads, plan, dtype=dtype)
    rest = {name: g for name, g in grads.items() if name != "a"}

    def with_a(gradient):
        return {"a": {"kernel": gradient}, **rest}

    one = grads["a"]["kernel"]
    cases = [
        (rest, ValueError, "grads lack the kernel 'a/kernel'"),
        (with_a(one.T), ValueError, r"must have shape \(24, 36\), got \(36, 24\)"),
        (with_a(one.at[0, 0].set(jnp.nan)), ValueError, "holds NaN or infinity"),
        (
            jax.tree.map(jnp.zeros_like, grads),
            ValueError,
            "a/kernel.* is zero, and has",
        ),
        (with_a(one.astype(int)), TypeError, "floating-point dtype, got int32"),
        (jax.eval_shape(gradients), TypeError, "in grads must be an array"),
        ({}, ValueError, "^grads holds no array"),
        (None, ValueError, "^grads holds no array"),
        (one, TypeError, "^grads must be a tree of arrays"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            gradient_bases(given, plan)
    with pytest.raises(TypeError, match="plan must be a Plan"):
        gradient_bases(grads, params_of(0))
    with pytest.raises(TypeError, match="must be a concrete array"):
        jax.jit(lambda g: gradient_bases(g, plan) and g)(grads)


@pytest.mark.usefixtures("unchecked")
def test_bad_bases():
    eye = np.eye(6, 2)

    def made(**bases):
        return Subspace(6, 6, 2, **{"in_basis": eye, "out_basis": eye, **bases})

    cases = [
        ({"in_basis": np.eye(6, 3)}, ValueError, r"in_basis must have shape \(6, 2\)"),
        ({"out_basis": 2 * eye}, ValueError, "columns of out_basis must be orthon"),
        ({"out_basis": np.nan * eye}, ValueError, "columns of out_basis must be orth"),
        ({"in_basis": eye.astype(int)}, TypeError, "in_basis must have a floating-p"),
        ({"in_basis": eye.tolist()}, TypeError, "must be a concrete array, got list"),
    ]
    for bases, error, message in cases:
        with pytest.raises(error, match=message):
            made(**bases)
    assert made() == made() != made(in_basis=eye[::-1])
    assert hash(made()) == hash(made()) and made() != "subspace"
    with pytest.raises(ValueError, match="operator must be one of"):
        MoRAConfig(operator="subspace")
    adapters, tx = mora_jax.init(single(made())), optax.sgd(1.0)
    args = {"a": {"kernel": np.eye(6)}}, adapters, tx.init(adapters), tx
    with pytest.raises(ValueError, match="has the same maps after each restart"):
        mora_jax.remora.restart(*args)


def test_damaged_bases(tmp_path):
    """A file of other bases is not this adapter's."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    plan = single(Subspace(6, 6, 2, in_basis=np.eye(6, 2), out_basis=np.eye(6, 2)))
    mora_jax.save(tmp_path, mora_jax.init(plan))
    file = tmp_path / "adapter_model.safetensors"
    tensors = TensorFile(file).arrays()
    m, name = sorted(tensors)  # both sides are equal, and are stored once
    assert m == "a/kernel_mora" and name.startswith("subspace/")
    tensors[name] = tensors[name][::-1].copy()
    with safe_open(file, "numpy") as whole:
        metadata = whole.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(AdapterFileError, match="damaged"):
        mora_jax.load(tmp_path)
