"""Convolutions and embeddings, in Linen and NNX: laws times a registry of models."""

import dataclasses
import functools
import types
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, FEW_SIZES, by_few_cases, by_kind
from flax import nnx
from jax.test_util import check_grads

import mora_jax
from mora_jax import MoRAConfig, fold, init, linen, make_operator, merge
from mora_jax.execution import update
from mora_jax.products import ATTEND, Contraction, Convolution, Lookup
from mora_jax.spec import AdapterSpec

KEY = jax.random.key(0)
ALPHA = 0.5
CONFIG = MoRAConfig(rank=1, alpha=ALPHA, targets=".*(kernel|embedding)")
ZEROS = nnx.initializers.zeros_init()
BF16 = jnp.bfloat16


def random(seed, *shape):
    # NumPy's: jax.random would compile a program for every shape.
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(numbers.astype(np.float32))


def close(got, expected, scale=1e-5):
    scale = 0.03 if jnp.asarray(got).dtype == BF16 else scale
    got, expected = (np.asarray(y, np.float64) for y in (got, expected))
    assert got.shape == expected.shape
    atol = scale * max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


# --- Models: for Linen, for NNX with parameters of the same names, and an input ---


def layer(kind, shape=(2, 6, 5, 3), size: Any = (3, 2), **settings):
    def twin():
        rest = {"kernel_init": ZEROS, "rngs": nnx.Rngs(0), **settings}
        return getattr(nnx, kind)(shape[-1], 6, size, **rest)

    return getattr(nn, kind)(6, size, **settings), twin, random(1, *shape)


class Table(nn.Module):
    """An embedding that is used by index, as a head, or as both."""

    use: str
    vocabulary: int = 11
    dtype: Any = None

    def setup(self):
        self.embed = nn.Embed(self.vocabulary, 6, dtype=self.dtype)

    def __call__(self, x):
        return use_table(self.embed, self.use, x)


class TableTwin(nnx.Module):
    def __init__(self, use, vocabulary=11, init=ZEROS, **settings):
        rest = {"embedding_init": init, "rngs": nnx.Rngs(0), **settings}
        self.embed, self.use = nnx.Embed(vocabulary, 6, **rest), use

    def __call__(self, x):
        return use_table(self.embed, self.use, x)


def use_table(embed, use, x):
    h = x if use == "attend" else embed(x)
    if use == "array":  # a head that no adapter would reach
        return h @ jnp.asarray(embed.embedding).T
    if use == "variables":
        return h @ embed.variables["params"]["embedding"].T
    return h if use == "call" else embed.attend(jnp.tanh(h))


def embed(x, use="call", **settings):
    twin = functools.partial(TableTwin, use, **settings)
    return Table(use, **settings), twin, x


def mask(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), jnp.float32)


conv = functools.partial(layer, "Conv")
transposed = functools.partial(layer, "ConvTranspose")
IDS = jnp.array([0, 3, 10, 3])
TWINS = {
    "1d": conv((2, 7, 3), 3),
    "1d-causal": conv((2, 7, 3), 3, padding="CAUSAL", kernel_dilation=2),
    "2d": conv(),
    "3d-valid": conv((1, 4, 3, 4, 2), (2, 2, 3), padding="VALID", strides=(1, 2, 1)),
    "nones": conv(strides=None, kernel_dilation=None, input_dilation=None),
    "pad-int": conv(padding=2, input_dilation=(2, 3)),
    "pad-ints": conv(padding=(2, 0), kernel_dilation=(1, 2)),
    "pad-pairs": conv(padding=[(0, 2), (3, 1)], strides=(2, 1)),
    "circular": conv(padding="CIRCULAR", strides=2),
    "reflect-no-batch": conv((6, 5, 3), padding="REFLECT", kernel_dilation=(1, 2)),
    "two-batches": conv((2, 2, 6, 5, 3), strides=2, use_bias=False),
    "groups": conv((2, 6, 5, 4), feature_group_count=2),
    "depthwise": conv(feature_group_count=3, strides=2),
    "mask": conv(mask=mask(3, 2, 3, 6), padding="CIRCULAR"),
    "mask-groups": conv(mask=mask(3, 2, 1, 6), feature_group_count=3),
    "bfloat16": conv(dtype=BF16),
    "bfloat16-mask": conv(dtype=BF16, mask=mask(3, 2, 3, 6)),
    "t-1d": transposed((2, 7, 3), 3),
    "t-2d-no-batch": transposed((6, 5, 3), strides=(2, 1), use_bias=False),
    "t-3d": transposed((1, 2, 3, 2, 3), (2, 1, 3), strides=(1, 2, 2), padding="VALID"),
    "t-pad-int": transposed(padding=1, strides=(2, 2)),
    "t-pad-pairs": transposed(padding=((1, 0), (2, 2)), kernel_dilation=(2, 1)),
    "t-kernel": transposed(strides=(2, 3), transpose_kernel=True),
    "t-two-batches": transposed((2, 2, 6, 5, 3), transpose_kernel=True),
    "t-mask": transposed(mask=mask(3, 2, 3, 6)),
    "t-circular": transposed(padding="CIRCULAR", strides=(2, 1)),
    "t-kernel-mask": transposed(mask=mask(3, 2, 6, 3), transpose_kernel=True),
    "t-bfloat16-mask": transposed(mask=mask(3, 2, 3, 6), dtype=BF16),
    "scalar": embed(jnp.array(3)),
    "negative": embed(jnp.array([-1, 4, -11])),
    "uint8": embed(IDS.astype(jnp.uint8)),
    "numpy-2d": embed(np.array([[3], [-2]])),
    "none": embed(IDS[:0]),
    "one": embed(jnp.array([0, 3, -2]), vocabulary=1),
    "attend": embed(random(2, 3, 6), "attend"),
    "tied": embed(IDS, "tied"),
    "tied-negative": embed(-IDS.reshape(2, 2), "tied"),
    "tied-bfloat16": embed(IDS, "tied", dtype=BF16),
}
ONE_OF_EACH = ("sharing", "rotation", "orthogonal")


def by_law(*operators, slow=()):
    laws = [
        pytest.param(name, op, marks=[pytest.mark.slow] * (op in slow))
        for op in operators
        for name in TWINS
        if name != "one" or op == "sharing"  # others need more than one feature
    ]
    # The scope lets all laws of one model follow one another, and share its set-up.
    return pytest.mark.parametrize(("name", "operator"), laws, scope="module")


def twin_of(name, operator):
    return _twin_of(name, dataclasses.replace(CONFIG, operator=operator))


@functools.cache
def _twin_of(name, config):
    """All that laws speak of: both models with and without adapters, and these."""
    module, make_twin, x = TWINS[name]
    shapes = jax.eval_shape(module.init, KEY, x)
    variables = jax.tree.map(lambda leaf: random(leaf.ndim, *leaf.shape), shapes)
    params = variables["params"]
    plan = linen.plan(module, variables, config, x)
    model = make_twin()
    nnx.update(model, params)

    def formed(fold):
        return lambda a, x: module.apply({"params": fold(params, a, plan)}, x)

    return types.SimpleNamespace(
        x=x,
        dtype=BF16 if "bfloat16" in name else jnp.float32,
        plan=plan,
        adapters=jax.tree.map(lambda m: random(5, *m.shape), init(plan)),
        params=params,
        base=module.apply(variables, x),
        apply=lambda a, x: linen.wrap(module, plan)(a, variables, x),
        merged=formed(merge),
        folded=formed(fold),
        model=model,
        adapted=mora_jax.nnx.wrap(model, mora_jax.nnx.plan(model, config, x)),
    )


# --- Laws of both kinds ---


@by_law("sharing", "rotation", slow=["rotation"])
def test_zero_changes_nothing(name, operator):
    twin = twin_of(name, operator)
    zeros = init(twin.plan)
    mora_jax.nnx.set_adapters(twin.adapted, zeros)
    chex.assert_trees_all_equal(twin.apply(zeros, twin.x), twin.base)
    chex.assert_trees_all_equal(twin.adapted(twin.x), twin.model(twin.x))


@by_law(*ONE_OF_EACH, slow=["orthogonal"])
def test_merged_is_adapted(name, operator):
    twin = twin_of(name, operator)
    mora_jax.nnx.set_adapters(twin.adapted, twin.adapters)
    y, again = twin.apply(twin.adapters, twin.x), twin.adapted(twin.x)
    assert y.dtype == again.dtype == twin.base.dtype == twin.dtype
    close(y, again)
    close(y, twin.merged(twin.adapters, twin.x))
    close(again, mora_jax.nnx.merge_adapters(twin.adapted)(twin.x))
    assert not y.size or np.abs(y - twin.base).max() > 0.1


@pytest.mark.parametrize("name", ["groups", "t-kernel"])
@by_few_cases
def test_merged_is_adapted_for_every_operator(name, case):
    test_merged_is_adapted(name, case.spec)


@by_law("sharing", slow=["sharing"])
def test_linen_learns_as_nnx(name, operator):
    """Equal plans and gradients; those of an embedding are the merged model's."""
    twin = twin_of(name, operator)
    assert mora_jax.nnx.plan_of(twin.adapted) == twin.plan
    mora_jax.nnx.set_adapters(twin.adapted, twin.adapters)
    weight = random(3, *twin.base.shape).astype(twin.dtype)

    def loss(apply):
        return lambda *args: jnp.vdot(weight, apply(*args))

    grad = mora_jax.nnx.value_and_grad(loss(lambda model, x: model(x)))
    _, state = grad(twin.adapted, twin.x)
    (m,) = jax.tree.leaves(jax.grad(loss(twin.apply))(twin.adapters, twin.x))
    scale = 0.03 if twin.dtype == BF16 else 1e-5
    close(jax.tree.leaves(state)[0], m, scale)
    if "embed" in twin.params:
        expected = jax.grad(loss(twin.folded))(twin.adapters, twin.x)
        close(m, jax.tree.leaves(expected)[0], scale)


some = pytest.mark.parametrize("name", ["pad-pairs", "t-kernel", "tied"])
both = pytest.mark.parametrize("operator", ["sharing", "rotation"])


@some
@both
def test_gradients(name, operator):
    twin = twin_of(name, operator)
    if name == "tied":
        f, args = lambda a: twin.apply(a, twin.x), (twin.adapters,)
    else:
        f, args = twin.apply, (twin.adapters, twin.x)
    check_grads(f, args, order=1, modes=("fwd", "rev"), rtol=2e-2)


@some
@both
def test_transforms(name, operator):
    """jit = eager, vmap = loop."""
    twin = twin_of(name, operator)
    mora_jax.nnx.set_adapters(twin.adapted, twin.adapters)
    y = twin.apply(twin.adapters, twin.x)
    close(jax.jit(twin.apply)(twin.adapters, twin.x), y)
    close(nnx.jit(lambda model, x: model(x))(twin.adapted, twin.x), y)
    close(jax.vmap(twin.apply, (None, 0))(twin.adapters, twin.x), y)
    close(jnp.stack([twin.apply(twin.adapters, x) for x in twin.x]), y)


# --- Against numpy ---


def exact(case, twin):
    """The adapted kernel, as (in, out)."""
    (spec,), (m,) = twin.plan.specs, jax.tree.leaves(twin.adapters)
    kernel = next(leaf for leaf in jax.tree.leaves(twin.params) if leaf.ndim > 1)
    delta = oracle.update(*case.matrices(spec.operator), m)
    return np.asarray(kernel, np.float64).reshape(delta.shape) + ALPHA * delta


@by_few_cases
def test_convolution_is_the_oracle(case):
    twin = twin_of("pad-pairs", case.spec)
    x = np.pad(np.asarray(twin.x, np.float64), [(0, 0), (0, 2), (3, 1), (0, 0)])
    windows = [
        [x[:, i : i + 3, j : j + 2].reshape(len(x), -1) for j in range(x.shape[2] - 1)]
        for i in range(0, x.shape[1] - 2, 2)
    ]
    y = np.moveaxis(np.array(windows) @ exact(case, twin), 2, 0)
    close(twin.apply(twin.adapters, twin.x), y + twin.params["bias"])


@by_few_cases
def test_embedding_is_the_oracle(case):
    twin = twin_of("tied-negative", case.spec)
    table = exact(case, twin)
    expected = np.tanh(table[np.asarray(twin.x)]) @ table.T
    close(twin.apply(twin.adapters, twin.x), expected)


@pytest.mark.parametrize("size", [*FEW_SIZES, (3, 20, 8)], ids=str)
@by_kind
def test_lookup_and_transpose(case, size):
    ins, outs, _ = size
    q = min(size) if case.bounded else size[-1]
    op, m, y = case.make(ins, outs, q), random(1, q, q), random(2, 3, outs)
    indices = np.random.default_rng(3).integers(0, ins, (2, 5))

    # Nearly all of the time goes into compiling.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def products(op, m, y):
        return op.lookup(m, indices), op.apply_transpose(m, y), op.compress_matrix()

    rows, transposed, compress = products(op, m, y)
    c, d = case.matrices(op)
    delta = oracle.update(c, d, m)
    close(rows, delta[indices])
    close(transposed, y @ delta.T)
    close(compress, c.reshape(ins, -1))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32"])
def test_indices_of_any_integer_type(dtype):
    """A vocabulary may be larger than the type's range."""
    m, ids = random(1, 4, 4), jnp.array([3, 50], dtype)
    for compress in ("strided", "contiguous"):
        op = make_operator({"name": "sharing", "compress_groups": compress}, 302, 6, 4)
        rows = op.delta_weight(m)[np.array([3, 50])]
        close(op.lookup(m, ids), rows)
        close(update(AdapterSpec(op, (302, 6)), m, ids, Lookup(), dtype=m.dtype), rows)


def test_no_indices():
    for case in CASES:
        rows = case.make(12, 10, 4).lookup(random(1, 4, 4), IDS[:0])
        assert rows.shape == (0, 10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_bad_arrays(operator):
    op, m, y = make_operator(operator, 12, 10, 4), random(1, 4, 4), random(0, 3, 12)
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        op.lookup(m, y)
    with pytest.raises(TypeError, match="indices must be an array, got list"):
        op.lookup(m, [1, 2])
    for call in (lambda: op.lookup(m[:3], IDS), lambda: op.apply_transpose(m, y)):
        with pytest.raises(ValueError, match="must have shape"):
            call()


# --- Cost: the update of a kernel is not formed ---


def biggest(spec, product, x):
    """The largest array in the program of an update and of its gradient."""

    def arrays(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            leaves = jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns"))
            for inner in leaves:
                if hasattr(inner, "eqns"):
                    yield from arrays(getattr(inner, "jaxpr", inner))

    def f(m):
        return update(spec, m, x, product, dtype=m.dtype)

    m = random(1, *spec.shape)
    closed = jax.make_jaxpr(lambda m: (f(m), jax.grad(lambda m: f(m).sum())(m)))(m)
    return max([*map(np.size, closed.consts), *arrays(closed.jaxpr)])


@by_few_cases
def test_convolution_does_not_form_the_update(case):
    op = case.make(27, 32, 4)
    product = Convolution.of(nn.Conv(32, (3, 3)))
    spec, x = AdapterSpec(op, (3, 3, 3, 32), "iiio"), random(0, 1, 3, 4, 3)
    size = biggest(spec, product, x)
    assert (size < 27 * 32) == (not op.block)  # blocks have no C of q outputs


@pytest.mark.parametrize("use", ["call", "attend"])
@by_few_cases
def test_embedding_does_not_form_the_update(case, use):
    spec = AdapterSpec(case.make(512, 24, 8), (512, 24))
    product = Lookup() if use == "call" else Contraction.parse(ATTEND, 2)
    x = jnp.array([0, 511, 9]) if use == "call" else random(0, 3, 24)
    assert biggest(spec, product, x) < 512 * 24


# --- What is adapted ---


def make_plan(api, config):
    """Of a model with a layer of each kind."""
    ids, rngs = IDS.reshape(2, 2), nnx.Rngs(0)
    if api == "linen":
        one = nn.ConvTranspose(8, (3,), (1,))
        model = nn.Sequential([nn.Embed(11, 8), nn.Conv(8, (3,)), one, nn.Dense(8)])
        return linen.plan(model, jax.eval_shape(model.init, KEY, ids), config, ids)
    model = nnx.Sequential(
        nnx.Embed(11, 8, rngs=rngs),
        nnx.Conv(8, 8, (3,), rngs=rngs),
        nnx.ConvTranspose(8, 8, (3,), (1,), rngs=rngs),
        nnx.Linear(8, 8, rngs=rngs),
    )
    return mora_jax.nnx.plan(model, config, *[ids] * (api == "nnx"))


APIS = ("linen", "nnx", "nnx-alone")


@pytest.mark.parametrize("api", APIS)
def test_dense_layers_are_the_default_targets(api):
    assert [spec.axes for spec in make_plan(api, None).specs] == ["io"]
    plan = make_plan(api, MoRAConfig(rank=1, targets=".*/kernel"))
    assert [spec.axes for spec in plan.specs] == ["iio", "iio", "io"]
    with pytest.raises(ValueError, match="targets: the default matches no path"):
        mora_jax.nnx.plan(nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_inputs_by_keyword(kind):
    model, x = getattr(nn, kind)(6, (3,)), random(0, 2, 5, 3)
    variables = jax.eval_shape(model.init, KEY, x)
    assert len(linen.plan(model, variables, CONFIG, inputs=x)) == 1


def test_half_adapted_heads_are_refused():
    elsewhere = "embed/embedding: the model also reads this embedding outside of its"
    for use in ("array", "variables"):
        variables = jax.eval_shape(Table(use).init, KEY, IDS)
        with pytest.raises(ValueError, match=elsewhere):
            linen.plan(Table(use), variables, CONFIG, IDS)
    with pytest.raises(ValueError, match=elsewhere):
        mora_jax.nnx.plan(TableTwin("array"), CONFIG, IDS)
    for use in ("array", "call", "tied"):
        with pytest.raises(ValueError, match=r"plan\(model, config, \*inputs\)"):
            mora_jax.nnx.wrap(TableTwin(use), CONFIG)


def test_dropout_drops_whole_rows():
    config = dataclasses.replace(CONFIG, operator="sharing", dropout=0.25)
    ids = jnp.arange(300).reshape(3, 100) % 11
    model, twin = Table("call"), TableTwin("call", init=nnx.initializers.ones)
    variables = {"params": nnx.to_pure_dict(nnx.state(twin, nnx.Param))}
    plan = linen.plan(model, variables, config, ids)
    adapters = {"embed": {"embedding_mora": random(1, *plan.specs[0].shape)}}
    apply = functools.partial(linen.wrap(model, plan), adapters, variables, ids)
    adapted, other = (mora_jax.nnx.wrap(twin, plan, seed=seed) for seed in (0, 1))
    for one in (adapted, other):
        mora_jax.nnx.set_adapters(one, adapters)
    rngs = {"dropout": KEY}
    dropped = apply(adapter_deterministic=False, rngs=rngs)
    samples = [dropped, adapted(ids), other(ids)]
    adapted.eval()
    still = apply(adapter_deterministic=True)
    chex.assert_trees_all_equal(adapted(ids), still)
    adapted.train()
    for y in (*samples, adapted(ids)):
        kept = np.abs(y - 1).max(-1, keepdims=True) > 1e-6
        assert abs(kept.mean() - 0.75) < 0.1
        close(y - 1, np.where(kept, (still - 1) / 0.75, 0))
    assert np.abs(samples[1] - samples[2]).max() > 0.1
