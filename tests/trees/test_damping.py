"""Damped inputs: what ordinary inputs have most of, adapters see least of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from adapter_files import assert_same, slow
from flax import nnx
from helpers import close, random, random_like, wide

import mora_jax
from mora_jax import MoRAConfig, MoRAWarning, input_damping, linen, remora
from mora_jax import nnx as mora
from mora_jax.operators import Damped

WIDTH, DIRECTIONS = 24, 3
CONFIG = MoRAConfig(rank=4, operator="block_diagonal")
SIZES = np.array([9, 5, 3, 2, 1], np.float32)
X = np.asarray(random(0, 40, 5) * SIZES @ random(1, 5, WIDTH) + random(2, 40, WIDTH))


class Block(nn.Module):
    """Two layers with one input, and one with another."""

    @nn.compact
    def __call__(self, x, _=None):
        a = nn.Dense(WIDTH, use_bias=False, name="a")(x)
        b = nn.Dense(16, use_bias=False, name="b")(x)
        y = nn.Dense(WIDTH, use_bias=False, name="c")(jnp.tanh(a))
        return x + y + b.sum(-1, keepdims=True) / 16, None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(block, length=2, **axes)(name="blocks")(x, None)[0]


class Twin(nnx.Module):
    def __init__(self, rngs):
        plain = {"use_bias": False, "rngs": rngs}
        self.a = nnx.Linear(WIDTH, WIDTH, **plain)
        self.b = nnx.Linear(WIDTH, 16, **plain)
        self.c = nnx.Linear(WIDTH, WIDTH, **plain)

    def __call__(self, x):
        y = self.c(jnp.tanh(self.a(x)))
        return x + y + self.b(x).sum(-1, keepdims=True) / 16


def projection(x, count=DIRECTIONS, floor=0.03):
    """What rows of inputs are multiplied by, by its definition, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    width = x.shape[-1]
    p = np.eye(width)
    if count:
        values, vectors = np.linalg.eigh(x.T @ x)
        mean, values = values.mean(), values.clip(0)
        rest = values[:-count].mean() if count < width else 0
        factors = np.ones(width)
        leading = values[-count:] + floor * mean
        factors[-count:] = np.sqrt((rest + floor * mean) / leading).clip(max=1)
        p = (vectors * factors) @ vectors.T
    squares = ((x @ p) ** 2).sum(0)
    factors = (squares + floor * squares.mean()) ** -0.5
    sizes = squares**0.5
    return p * factors * sizes.sum() / (sizes * factors).sum()


def found_of(adapter, layer=()):
    op = adapter.operator
    p = np.eye(op.in_features)
    if op.directions is not None:
        v = np.asarray(op.directions, np.float64)[layer]
        p -= v @ v.T
    return p * np.asarray(op.diagonal, np.float64)[layer][:, 0]


def damped(model, x=X, config=CONFIG, **settings):
    """New adapters of a Linen model, with and without damping, and its variables."""
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), x), scale=0.2)
    apply = linen.wrap(model, config, variables, x)
    run, adapters = jax.jit(apply), mora_jax.init(apply.plan)
    call = lambda adapters: run(adapters, variables, x)  # noqa: E731
    settings = {"directions": DIRECTIONS, **settings}
    return input_damping(call, adapters, **settings), adapters, variables, apply


@pytest.mark.slow
def test_inputs_are_scaled_to_the_mean_of_the_others():
    adapters, old, variables, apply = damped(Block())
    inner = np.tanh(X @ variables["params"]["a"]["kernel"])
    for name, x in (("a", X), ("b", X), ("c", inner)):
        adapter = adapters[name]["kernel_mora"]
        close(found_of(adapter), projection(x), 0.02)
        close(adapter.m, old[name]["kernel_mora"].m)
        assert adapter.operator.inner == old[name]["kernel_mora"].operator
        assert adapter.spec.scale == old[name]["kernel_mora"].spec.scale
    one, other = (adapters[name]["kernel_mora"].operator for name in "ab")
    np.testing.assert_array_equal(one.directions, other.directions)
    assert "block_diagonal, damped (3 + diagonal)" in mora_jax.summary(adapters)
    trained = random_like(adapters)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, X)[0], Block().apply(merged, X)[0], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_stack_have_their_own(remat):
    adapters, _, variables, apply = damped(Stack(remat))
    params, x = variables["params"]["blocks"], X
    for k in range(2):
        one = jax.tree.map(lambda p, k=k: p[k], params)
        close(found_of(adapters["blocks"]["a"]["kernel_mora"], k), projection(x), 0.02)
        x, _ = Block().apply({"params": one}, x)
    trained = random_like(adapters, scale=0.1)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, X), Stack().apply(merged, X), 1e-4)


@pytest.mark.slow
def test_nnx():
    model = Twin(nnx.Rngs(0))
    adapted = mora.wrap(model, CONFIG, X)

    @nnx.jit
    def run(model, adapters):
        mora.set_adapters(model, adapters)
        return model(X)

    new = mora.adapters(adapted)
    adapters = input_damping(
        lambda adapters: run(nnx.clone(adapted), adapters), new, directions=DIRECTIONS
    )
    close(found_of(adapters["a"]["kernel_mora"]), projection(X), 0.02)
    mora.set_adapters(adapted, adapters)
    assert mora.adapters(adapted)["c"]["kernel_mora"].operator.name == "damped"
    close(adapted(X), model(X))


def test_without_directions_each_feature_is_scaled():
    """By one call, with no product in a step, and exactly merged."""
    model = Block()
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), X), scale=0.2)
    apply = linen.wrap(model, CONFIG, variables, X)
    new = mora_jax.init(apply.plan)
    calls = []

    def call(adapters):
        calls.append(None)
        return apply(adapters, variables, X)

    adapters = input_damping(call, new, directions=0)
    assert len(calls) == 1
    for name in "ab":
        adapter = adapters[name]["kernel_mora"]
        assert adapter.operator.directions is None
        close(found_of(adapter), projection(X, 0), 1e-5)
    trained = random_like(adapters)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, X)[0], model.apply(merged, X)[0], 1e-4)

    def products(adapters):
        step = jax.grad(lambda adapters: apply(adapters, variables, X)[0].sum())
        return str(jax.make_jaxpr(step)(adapters)).count("dot_general")

    assert products(adapters) == products(new)


def test_bfloat16():
    model = Block()
    adapters, *_ = damped(model, jnp.asarray(X, jnp.bfloat16))
    close(found_of(adapters["b"]["kernel_mora"]), projection(X), 0.05)


@pytest.mark.slow
def test_few_inputs_and_many_directions():
    adapters, *_ = damped(Block(), X[:2], directions=WIDTH + 5)
    adapter = adapters["a"]["kernel_mora"]
    v = wide(adapter.operator.directions)
    assert np.linalg.eigvalsh(np.eye(WIDTH) - v @ v.T).min() > -0.01
    close(found_of(adapter), projection(X[:2], WIDTH), 0.05)


def test_files_and_restarts(tmp_path):
    adapters, _, variables, _ = damped(Block())
    adapters, params = random_like(adapters), variables["params"]
    mora_jax.save(tmp_path, adapters)
    assert_same(mora_jax.load(tmp_path, params), adapters)
    names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    # a and b have one input, and share its two arrays.
    assert sum(name.startswith("damped/") for name in names) == 4
    tx = optax.adam(1e-3)
    after = remora.restart(params, adapters, tx.init(adapters), tx)
    op = after.adapters["a"]["kernel_mora"].operator
    assert isinstance(op, Damped) and op.inner.seed == 1


@pytest.mark.slow
def test_what_has_no_rows_of_numbers_is_named():
    class Words(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(12, WIDTH, name="words")(ids)
            return nn.Dense(16, use_bias=False, name="head")(x)

    ids = np.arange(12)
    config = MoRAConfig(rank=2, targets=r"words/embedding|head/kernel")
    with pytest.warns(MoRAWarning, match="words/embedding"):
        adapters, *_ = damped(Words(), ids, config)
    assert adapters["head"]["kernel_mora"].operator.name == "damped"
    assert adapters["words"]["embedding_mora"].operator.name != "damped"


class Branches(nn.Module):
    """Layers for all positions, for the first, and one that a call may leave out."""

    @nn.compact
    def __call__(self, x, *, both=True):
        plain = {"use_bias": False}
        y = nn.Dense(16, name="all", **plain)(x)
        first = nn.Dense(16, name="first", **plain)(x[:, 0])
        other = nn.Dense(16, name="other", **plain)
        return y + other(
            0 * x if both is None else x
        ) if both is not False else y, first


MASK = np.arange(10) < np.array([[7], [3], [10], [1]])
PADDED = np.where(MASK[..., None], X.reshape(4, 10, WIDTH), np.float32(30))


@pytest.fixture(scope="module")
def branches():
    """A call of `Branches`, with settings, and new adapters."""
    model = Branches()
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), PADDED))
    apply = linen.wrap(model, CONFIG, variables, PADDED)

    def call(x=PADDED, **settings):
        return lambda adapters: apply(adapters, variables, x, **settings)

    return call, mora_jax.init(apply.plan)


def test_a_mask_leaves_padding_out(branches):
    """As if the batch had no pads; what it does not fit is named, and counts."""
    call, new = branches
    rows = PADDED[MASK]
    for mask in (MASK, MASK.astype(int), jnp.asarray(MASK, "float32")):
        with pytest.warns(
            MoRAWarning, match=r"mask of shape \(4, 10\) .* first/kernel"
        ):
            adapters = input_damping(call(), new, directions=3, mask=mask)
        close(found_of(adapters["all"]["kernel_mora"]), projection(rows), 0.02)
        first = projection(PADDED[:, 0])
        close(found_of(adapters["first"]["kernel_mora"]), first, 0.02)
    with pytest.warns(MoRAWarning, match="first/kernel"):
        nan = call(np.where(MASK[..., None], PADDED, np.float32(np.nan)))
        again = input_damping(nan, new, directions=3, mask=MASK)
    one, other = (a["all"]["kernel_mora"].operator for a in (adapters, again))
    np.testing.assert_array_equal(one.directions, other.directions)
    without = found_of(input_damping(call(), new, directions=3)["all"]["kernel_mora"])
    assert abs(without - projection(rows)).max() > 0.1
    whole = np.arange(4) < 2  # whole examples
    adapters = input_damping(call(), new, directions=3, mask=whole)
    for name, x in (("all", PADDED[:2]), ("first", PADDED[:2, 0])):
        close(found_of(adapters[name]["kernel_mora"]), projection(x), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Block(), Stack(), Stack(remat=True)])
@pytest.mark.parametrize("shape", [(4, 10), (40,)])
def test_a_mask_under_scan_and_of_flat_positions(model, shape):
    x = PADDED.reshape(*shape, WIDTH)
    masked, *_ = damped(model, x, mask=MASK)
    expected, *_ = damped(model, PADDED[MASK])
    paths = jax.tree_util.tree_leaves_with_path(expected, is_leaf=is_adapter)
    for (_, one), other in zip(
        paths, jax.tree.leaves(masked, is_leaf=is_adapter), strict=True
    ):
        v, w = (wide(a.operator.directions) for a in (one, other))
        close(v @ v.swapaxes(-2, -1), w @ w.swapaxes(-2, -1), 0.02)


def is_adapter(node):
    return isinstance(node, mora_jax.Adapter)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "mask, error, got",
    [
        ("mask", TypeError, "str"),
        ([[1, 0]], TypeError, "list"),
        (np.ones(()), ValueError, r"shape \(\)"),
        (0.5 * MASK, ValueError, "0.5"),
        (np.full((4, 10), np.nan), ValueError, "nan"),
        (-1.0 * MASK, ValueError, "-1"),
        (np.zeros((4, 10)), ValueError, "40 zeros"),
        (np.ones((0, 10)), ValueError, "0 zeros"),
        (jax.ShapeDtypeStruct((4, 10), bool), TypeError, "ShapeDtypeStruct"),
    ],
)
def test_bad_masks(branches, mask, error, got):
    call, new = branches
    with pytest.raises(error, match=f"^mask must .*got .*{got}"):
        input_damping(call(), new, mask=mask)


def test_what_a_call_does_not_use_is_named(branches):
    """As such, and an input of zeros as such."""
    call, new = branches
    with pytest.warns(MoRAWarning) as caught:  # the wrapped model has its own
        adapters = input_damping(call(both=False), new)
    said = [str(warning.message) for warning in caught]
    assert sum("call does not use other/kernel" in text for text in said) == 1
    assert adapters["other"]["kernel_mora"] is new["other"]["kernel_mora"]
    assert adapters["all"]["kernel_mora"].operator.name == "damped"
    with pytest.warns(MoRAWarning, match="all inputs of other/kernel are zero"):
        adapters = input_damping(call(both=None), new)
    assert adapters["other"]["kernel_mora"].spec == new["other"]["kernel_mora"].spec


def test_a_second_reading_of_other_inputs_is_refused(branches):
    """Of a loader that shuffles, of the next batch, of none, and under dropout."""
    call, new = branches
    order, batches = np.random.default_rng(0), iter([PADDED[:2], PADDED[2:]])
    several = iter([PADDED])
    calls = [
        lambda a: call(order.permutation(X).reshape(4, 10, WIDTH)[:2])(a),
        lambda a: call(next(batches))(a),
        lambda a: [call(x)(a) for x in several] or jnp.zeros(()),
        lambda a: call(X.reshape(4, 10, WIDTH) * (order.random((4, 10, 1)) > 0.1))(a),
    ]
    for bad in calls:
        with pytest.raises(ValueError, match="^call must .*same inputs .*all/kernel"):
            input_damping(bad, new, directions=3)


IMAGES = 4 * random(7, 6, 1, 1, 4) + random(8, 6, 6, 6, 4)  # as smooth as images are


class Windows(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        groups = {"feature_group_count": self.groups}
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="one", **groups)(x)
        return nn.Conv(8, (1, 1), feature_group_count=2, name="in_groups")(x)


@pytest.mark.parametrize("operator", ["block_diagonal", slow("sharing")])
def test_convolutions_see_damped_windows(operator):
    """The one in groups is named; alone it is an error."""
    config = MoRAConfig(rank=1, operator=operator, targets="(one|in_groups)/kernel")
    with pytest.warns(MoRAWarning, match="in_groups/kernel .*groups of a convolution"):
        adapters, _, variables, apply = damped(Windows(), IMAGES, config)
    padded = np.pad(IMAGES, ((0, 0), (0, 1), (0, 1), (0, 0)))
    windows = [
        padded[:, i : i + 6 : 2, j : j + 6 : 2] for i in range(3) for j in range(3)
    ]
    expected = projection(np.concatenate(windows, -1))
    close(found_of(adapters["one"]["kernel_mora"]), expected, 0.02)
    trained = random_like(adapters)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, IMAGES), Windows().apply(merged, IMAGES), 1e-4)


@pytest.mark.slow
def test_convolutions_in_groups_alone():
    config = MoRAConfig(rank=1, targets="one/kernel")
    with pytest.raises(ValueError, match="got none: call uses one/kernel otherwise"):
        damped(Windows(groups=2), IMAGES, config)
    # And in NNX.
    model = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    adapted = mora.wrap(model, MoRAConfig(rank=1, targets="kernel"), IMAGES)

    def call(adapters):
        clone = nnx.clone(adapted)
        mora.set_adapters(clone, adapters)
        return clone(IMAGES)

    adapters = input_damping(call, mora.adapters(adapted), directions=3)
    assert adapters["kernel_mora"].operator.name == "damped"


def test_bad_calls():
    adapters, new, variables, apply = damped(Block())
    run = lambda adapters: apply(adapters, variables, X)  # noqa: E731
    with pytest.raises(ValueError, match="damped inputs already"):
        input_damping(run, adapters)
    with pytest.raises(ValueError, match="delta of an adapter must be zero"):
        input_damping(run, random_like(new))
    with pytest.raises(TypeError, match="call must be a function .* got dict"):
        input_damping(new, new)
    for bad in (-1, True, 1.5, None):
        with pytest.raises((TypeError, ValueError), match="directions must be"):
            input_damping(run, new, directions=bad)
    with pytest.raises(ValueError, match="floating-point outputs"):
        input_damping(lambda adapters: jnp.argmax(run(adapters)[0], -1), new)
    unused = "adapted kernel, got none: call does not use a/kernel, b/kernel, c/kernel"
    with pytest.raises(ValueError, match=f"^call must multiply .*{unused}"):
        input_damping(lambda adapters: jnp.ones(3), new)
    with pytest.raises(ValueError, match="got none: all inputs of a/kernel, .* zero"):
        input_damping(lambda a: apply(a, variables, 0 * X), new)
    with pytest.raises(ValueError, match="NaN or infinity"):
        input_damping(lambda a: apply(a, variables, np.full_like(X, np.nan)), new)
    with pytest.raises((TypeError, ValueError), match="adapters"):
        input_damping(run, {})
    with pytest.raises(TypeError, match="kernel_mora.* concrete array, got .*Tracer"):
        jax.jit(lambda new: input_damping(run, new))(new)


def test_bad_operators():
    inner = mora_jax.make_operator("rotation", 8, 6, 4)
    good = np.eye(8, 2, dtype=np.float32)
    with pytest.raises(TypeError, match="inner must be an operator"):
        Damped(8, 6, 4, inner="rotation", directions=good)
    with pytest.raises(ValueError, match="inner must have the sizes"):
        Damped(8, 7, 4, inner=inner, directions=good)
    for bad in (2 * good, np.ones((8, 2), np.float32) / 3):
        with pytest.raises(ValueError, match="directions must be orthogonal"):
            Damped(8, 6, 4, inner=inner, directions=bad)
    for bad in (good[:5], good[:, :0], good[:, 0]):
        with pytest.raises(ValueError, match="directions must have shape"):
            Damped(8, 6, 4, inner=inner, directions=bad)
    with pytest.raises(TypeError, match="directions"):
        Damped(8, 6, 4, inner=inner, directions=good.astype(int))
    with pytest.raises(TypeError, match="inner must be"):
        Damped(
            8,
            6,
            4,
            inner=Damped(8, 6, 4, inner=inner, directions=good),
            directions=good,
        )
    for bad, rule in (
        (good[:, :1] - 0.5, "finite numbers that are not negative"),
        (np.full_like(good[:, :1], np.inf), "finite numbers that are not negative"),
        (good[:, :1] * np.nan, "finite numbers that are not negative"),
        (good, "must have shape"),
        (good[:, 0], "must have shape"),
    ):
        with pytest.raises(ValueError, match=f"diagonal .*{rule}"):
            Damped(8, 6, 4, inner=inner, diagonal=bad)
    with pytest.raises(ValueError, match="directions or diagonal .*None twice"):
        Damped(8, 6, 4, inner=inner)
