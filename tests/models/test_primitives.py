"""A kernel that decides is seen, by whatever primitive of JAX it does so."""

import importlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from deciding import CHOICES, CONTROL, HARMLESS, HIDDEN, MEMORY, WAYS
from flax import nnx
from helpers import made_for, random, random_like
from jax.extend.core import Primitive

import mora_jax
from mora_jax import MoRAConfig, linen, register_layer
from mora_jax import nnx as mora_nnx
from mora_jax._flax.proofs import unchecked
from mora_jax._jax.primitives import KINDS, Kind, kind_of
from mora_jax._jax.walk import inside
from mora_jax.products import Claim, Product

WIDTH = 8
X = random(0, 2, 3, WIDTH)
CONFIG = MoRAConfig(square_rank=4, operator="rotation", targets=".*(kernel|w)")


class Reading(nn.Module):
    """A layer, beside which the model reads the kernel."""

    way: str

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(WIDTH, name="layer")
        y = layer(x)
        return y + (WAYS | HARMLESS)[self.way](layer.variables["params"]["kernel"], x)


class ReadingTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self, way):
        self.way = way
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x) + (WAYS | HARMLESS)[self.way](self.layer.kernel[...], x)


class Inside(nn.Module):
    """A registered layer that reads one of its arrays once more."""

    way: str
    read: str

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (WIDTH, WIDTH))
        y = x @ w
        a = {"kernel": w, "product": y, "input": x}[self.read]
        return y + (WAYS | HARMLESS)[self.way](a, jnp.cos(x))


class After(nn.Module):
    """A layer whose output decides what the model does next."""

    way: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(WIDTH, name="layer")(x)
        return nn.Dense(WIDTH, name="next")(WAYS[self.way](y, jnp.cos(x)))


register_layer(Inside, equation="...i,io->...o", kernel="w")


def variables_of(model):
    return random_like(jax.eval_shape(model.init, jax.random.key(0), X), 0.5)


def plan_of(model):
    if isinstance(model, nnx.Module):
        return mora_nnx.plan(model, CONFIG, X)
    return linen.plan(model, variables_of(model), CONFIG, X)


def is_refused(model, message):
    """True if the plan is refused with `message`; False if its kernel is unproven."""
    try:
        plan = plan_of(model)
    except ValueError as error:
        assert message in str(error)
        return True
    assert plan.unproven, "the plan claims that it is proven"
    return False


def primitives_in(program):
    """The names of all primitives in a program."""
    found = set()
    for eqn in program.eqns:
        found.add(eqn.primitive.name)
        for inner in inside(eqn):
            found |= primitives_in(inner)
    return found


def skip_without_devices(way):
    if "two devices" in way and jax.device_count() < 2:
        pytest.skip("needs two devices")


@pytest.mark.law
@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_that_decides_outside_of_its_layer_is_seen(way):
    skip_without_devices(way)
    for model in (Reading(way), ReadingTwin(way)):
        told = "layer/kernel: the model also reads this kernel outside of its layer"
        refused = is_refused(model, told)
        assert refused == (way in CONTROL | CHOICES)


@pytest.mark.law
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", ["kernel", "product"])
def test_a_kernel_that_decides_in_its_layer_is_seen(way, read):
    skip_without_devices(way)
    is_refused(Inside(way, read), "w: Inside.__call__ ")


@pytest.mark.law
@pytest.mark.parametrize("way", WAYS)
def test_an_output_and_an_input_may_decide(way):
    skip_without_devices(way)
    assert not plan_of(After(way)).unproven
    assert not plan_of(Inside(way, "input")).unproven


@pytest.mark.parametrize("way", HARMLESS)
def test_what_does_not_depend_on_a_kernel_is_right(way):
    for model in (Reading(way), ReadingTwin(way), Inside(way, "kernel")):
        assert not plan_of(model).unproven


@pytest.mark.law
@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_by_its_primitive(way):
    skip_without_devices(way)
    name = way.partition(",")[0]
    a = jnp.ones((WIDTH, WIDTH))
    found = primitives_in(jax.make_jaxpr(WAYS[way])(a, X).jaxpr)
    assert {name, OTHER_NAMES.get(name, name)} & found, found
    kinds = {kind_of(name) for name in found}
    hidden = way in HIDDEN | MEMORY and name != "shard_map"  # which has other shapes
    assert (Kind.UNSEEN in kinds) == hidden


OTHER_NAMES = {"remat2": "checkpoint"}
"""{name of a primitive: its name in another version of JAX}."""


def test_the_sizes_of_groups_count_as_well():
    """A kernel that says which rows each group of a ragged product has."""

    class Ragged(Product):
        axes = "sio"

        @property
        def claim(self):
            return Claim(primitive="ragged_dot_general")

        def delta(self, delta, x):
            raise NotImplementedError

    def layer_by(sizes):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                w = self.param("w", nn.initializers.normal(), (2, WIDTH, WIDTH))
                return jax.lax.ragged_dot(x, w, sizes(w))

        register_layer(Layer, equation=Ragged(), kernel="w")
        return Layer()

    def by_kernel(w):
        first = jnp.sum(w) > 0
        return jnp.stack([1 + first, 2 - first]).astype(jnp.int32)

    for sizes, is_right in ((lambda w: jnp.array([1, 2]), True), (by_kernel, False)):
        model = layer_by(sizes)
        variables = made_for(model, X[0])
        if is_right:
            assert not linen.plan(model, variables, CONFIG, X[0]).unproven
        else:
            with pytest.raises(ValueError, match="^w: Layer.__call__ "):
                linen.plan(model, variables, CONFIG, X[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", CONTROL)
def test_numbers_show_that_a_refusal_is_needed(way):
    """Without the trace adapted and merged model would differ."""
    model = Reading(way)
    variables = variables_of(model)
    params = variables["params"]
    plan = mora_jax.plan(params, CONFIG)
    adapters = random_like(mora_jax.init(plan), 1.0)
    total = jnp.sum(params["layer"]["kernel"])
    delta = jnp.sum(adapters["layer"]["kernel_mora"].delta())
    with unchecked():
        apply = linen.wrap(model, plan)
        # One of the two turns the sign of the sum of the kernel.
        differences = []
        for factor in (2 * total / delta, -2 * total / delta):
            own = jax.tree.map(lambda m, f=factor: f * m, adapters)
            merged = {"params": mora_jax.merge(params, own)}
            difference = apply(own, variables, X) - model.apply(merged, X)
            differences.append(float(jnp.abs(difference).max()))
    assert max(differences) > 0.1


def test_an_m_that_decides_is_seen():
    """Code that maps all arrays but kernels gets the M's too, in the adapted model."""

    def change(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        others = [a for path, a in leaves if "'kernel'" not in str(path[-1])]
        is_positive = sum(jnp.sum(a) for a in others) > 0

        def changed(path, a):
            if "bias" not in str(path[-1]):
                return a
            return jax.lax.cond(is_positive, lambda a: a, lambda a: -a, a)

        return jax.tree_util.tree_map_with_path(changed, params)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.map_variables(nn.Dense, "params", change)(WIDTH, name="layer")(x)

    model = Model()
    variables = {"params": {"layer": made_for(nn.Dense(WIDTH), X)["params"]}}
    apply = linen.wrap(model, CONFIG, variables, X)
    assert not apply.plan.unproven
    told = "layer/kernel: the model reads the M beside this kernel"
    with pytest.raises(ValueError, match=told):
        apply(mora_jax.init(apply.plan), variables, X)


# --- The table ---

MODULES = (
    "jax.custom_batching",
    "jax.experimental.buffer_callback",
    "jax.experimental.checkify",
    "jax.experimental.custom_partitioning",
    "jax.experimental.pallas",
    "jax.experimental.pallas.mosaic_gpu",
    "jax.experimental.pallas.tpu",
    "jax.experimental.pallas.triton",
    "jax.experimental.sparse",
    "jax.export",
    "jax.ffi",
    "jax.scipy.linalg",
)
"""Modules of JAX that define primitives and that `import jax` may leave out."""


def primitives_of_jax():
    """The names of all primitives that JAX's modules define."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:  # for a chip whose library is not here
            continue
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "jax"]
    values = [value for module in modules for value in vars(module).values()]
    return {value.name for value in values if isinstance(value, Primitive)}


def test_the_table_has_all_primitives_of_jax():
    names = primitives_of_jax()
    assert len(names) > 300
    assert not sorted(names - KINDS.keys()), "say in _jax/primitives.py what they do"
