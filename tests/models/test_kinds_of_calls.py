"""Calls that differ in anything that Python sees are checked, and others once."""

import copy
import dataclasses
import enum
import functools
import gc
import pickle
import threading
import types
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import in_turns
from flax import nnx
from flax.core import FrozenDict
from helpers import random

import mora_jax
from mora_jax import MoRAConfig, linen
from mora_jax import nnx as mora_nnx
from mora_jax._flax.proofs import Proofs, content

KEY, X = jax.random.key(0), random(0, 2, 8)
CONFIG = MoRAConfig(rank=2, targets=(r"fc/kernel",))
OUTSIDE = "fc/kernel: the model also reads this kernel outside"


class Mode(enum.Enum):
    TRAIN = 0
    EVAL = 1


@dataclasses.dataclass(frozen=True)
class Record:
    flag: object


@dataclasses.dataclass
class Settings:
    flag: object


@dataclasses.dataclass(slots=True)
class SettingsInSlots:
    flag: object


@dataclasses.dataclass
class HalfInSlots(SettingsInSlots):
    """It has attributes, and a base whose field is none of them."""


def marked(flag):
    def function():
        return None

    vars(function)["flag"] = flag
    return function


class ItsMora:
    """Its attribute is called as ours are."""

    def __init__(self, flag):
        self.use_mora = flag


class Plain:
    def __init__(self, flag):
        self.flag = flag


def closure(flag):
    return lambda: flag


def default(flag):
    def function(flag=flag):
        return flag

    return function


def same(*_, **kwargs):
    return kwargs.get("flag", False)


def mutated():
    """The same object before and after."""
    settings = Plain(False)
    yield settings
    settings.flag = True
    yield settings


def is_true(flag):
    return flag is True


SMALL, LARGE = np.zeros(2, np.float32), np.zeros(3, np.float32)
MANY = np.zeros(1000, np.float32)
MANY_BUT_ONE = np.append(MANY[1:], np.float32(1))
KINDS = {
    "bool": ((False, True), is_true),
    "an int": ((0, 1), bool),
    "1 and True": ((1, True), is_true),
    "a float": ((0.5, 1.5), lambda x: x > 1),
    "-0.0": ((0.0, -0.0), lambda x: str(x)[0] == "-"),
    "a complex": ((1j, 2j), lambda x: abs(x) > 1),
    "a text": (("a", "b"), lambda x: x == "b"),
    "None": ((None, 0), lambda x: x is not None),
    "an enum": (Mode, lambda mode: mode is Mode.EVAL),
    "a type": ((int, float), lambda kind: kind is float),
    "a dtype": ((np.dtype("int8"), np.dtype("int16")), lambda d: d.itemsize > 1),
    "a frozen record": ((Record(0), Record(1)), lambda r: r.flag),
    "a record in a record": (
        (Record(Record(0)), Record(Record(1))),
        lambda r: r.flag.flag,
    ),
    "a record": ((Settings(0), Settings(1)), lambda r: r.flag),
    "slots": ((SettingsInSlots(0), SettingsInSlots(1)), lambda r: r.flag),
    "half in slots": ((HalfInSlots(0), HalfInSlots(1)), lambda r: r.flag),
    "an attribute": ((marked(0), marked(1)), lambda function: function.flag),
    "a name": ((ItsMora(0), ItsMora(1)), lambda r: r.use_mora),
    "an object": ((Plain(0), Plain(1)), lambda r: r.flag),
    "the same object": (mutated(), lambda r: r.flag),
    "a namespace": (
        (types.SimpleNamespace(flag=0), types.SimpleNamespace(flag=1)),
        lambda r: r.flag,
    ),
    "a tuple": (((1, 2), (1, 3)), lambda x: x[1] == 3),
    "a list": (([1, 2], [1, 3]), lambda x: x[1] == 3),
    "a longer list": (([1, 2], [1, 2, 3]), lambda x: len(x) == 3),
    "a set": (({1, 2}, {1, 3}), lambda x: 3 in x),
    "a value in a dict": (({"a": 1}, {"a": 2}), lambda x: x["a"] == 2),
    "a key of a dict": (({"a": 1}, {"b": 1}), lambda x: "b" in x),
    "a FrozenDict": (({"a": 1}, FrozenDict({"a": 1})), lambda x: type(x) is not dict),
    "a callable": ((same, lambda: True), lambda call: call()),
    "a closure": ((closure(False), closure(True)), lambda call: call()),
    "a default": ((default(False), default(True)), lambda call: call()),
    "a method": ((Record(0).__eq__, Record(1).__eq__), lambda m: m(Record(1))),
    "a partial": (
        (functools.partial(same, flag=False), functools.partial(same, flag=True)),
        lambda call: call(),
    ),
    "a compiled function": (
        (jax.jit(closure(False)), jax.jit(closure(True))),
        lambda call: call.__wrapped__(),
    ),
    "NumPy's shape": ((SMALL, LARGE), lambda x: x.size == 3),
    "NumPy's dtype": ((SMALL, SMALL.astype(np.float16)), lambda x: x.itemsize == 2),
    "a NumPy number": ((np.int32(0), np.int32(1)), bool),
    "NumPy's -0.0": ((np.float32(0.0), np.float32(-0.0)), np.signbit),
    "NumPy's numbers": ((SMALL, SMALL + 1), lambda x: x[0] > 0),
    "a number far inside": ((MANY, MANY_BUT_ONE), lambda x: x[-1] > 0),
    "numbers in a tuple": (((SMALL, 1), (SMALL + 1, 1)), lambda x: x[0][0] > 0),
    "numbers in an object": ((Plain(MANY), Plain(MANY_BUT_ONE)), lambda r: r.flag[-1]),
    "numbers in a record": ((Record(SMALL), Record(SMALL + 1)), lambda r: r.flag[0]),
    "numbers in a closure": ((closure(SMALL), closure(SMALL + 1)), lambda f: f()[0]),
    "an array's shape": ((jnp.zeros(2), jnp.zeros(3)), lambda x: x.size == 3),
    "an array's axes": ((jnp.zeros(2), jnp.zeros((2, 1))), lambda x: x.ndim == 2),
    "an array's dtype": (
        (jnp.zeros(2), jnp.zeros(2, jnp.bfloat16)),
        lambda x: x.dtype == jnp.bfloat16,
    ),
    "a weak dtype": ((jnp.zeros(()), jnp.asarray(0.0)), lambda x: x.weak_type),
    "a key": ((KEY, jax.random.PRNGKey(0)), lambda key: key.ndim == 1),
    "NumPy or JAX": ((jnp.zeros(2), SMALL), lambda x: isinstance(x, np.ndarray)),
    "NumPy in JAX's place": ((SMALL, jnp.zeros(2)), lambda x: isinstance(x, jax.Array)),
}


class Switch(nn.Module):
    """It reads its kernel itself where `turns` says so of an input."""

    turns: object

    def setup(self):
        self.fc = nn.Dense(8)

    def __call__(self, x, how):
        y = self.fc(x)
        return y + self.kernel().sum() if self.turns(how) else y

    def kernel(self):
        return self.fc.variables["params"]["kernel"]


class SwitchTwin(nnx.Module):
    def __init__(self, turns):
        self.turns, self.fc = turns, nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x, how):
        y = self.fc(x)
        return y + self.fc.kernel[...].sum() if self.turns(how) else y


def adapted(api, turns, first):
    """A function of a call's last input, which the model was planned with."""
    if api == "nnx":
        model = SwitchTwin(turns)
        model = mora_nnx.wrap(model, mora_nnx.plan(model, CONFIG, X, first))
        return functools.partial(model, X)
    model = Switch(turns)
    variables = model.init(KEY, X, first)
    apply = linen.wrap(model, CONFIG, variables, X, first)
    return functools.partial(apply, mora_jax.init(apply.plan), variables, X)


@pytest.mark.law
@pytest.mark.parametrize("jitted", [False, True])
@in_turns("kind, api", KINDS, ["linen", "nnx"])
def test_another_value_is_another_call(api, kind, jitted):
    values, turns = KINDS[kind]
    values = iter([*values] if kind != "the same object" else mutated())
    first = next(values)
    call = adapted(api, turns, first)

    def run(how):
        return jax.jit(lambda: call(how))() if jitted else call(how)

    run(first)
    second = next(values)
    for _ in range(2):
        with pytest.raises(ValueError, match=OUTSIDE):
            run(second)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_numbers_that_python_does_not_read_are_one_call(api):
    """Token ids, say, of which each batch has others."""

    def decides(x):
        return jnp.take(jnp.zeros(4), x).shape == (1,)

    ids = np.arange(3)
    call = adapted(api, decides, ids)
    model: Any = call.func
    proofs = model.proofs if api == "linen" else model.proofs_mora
    call(ids)
    number = proofs.number
    for k in range(3):
        call(ids + k)
    assert proofs.number == number


def test_arrays_of_objects_are_checked_each_time():
    with pytest.raises(TypeError):
        content((np.array([None, 1]), Plain(np.array([None, 1]))))


PARAMS = {
    "dtype": (
        lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree),
        lambda tree: tree["kernel"].dtype == jnp.bfloat16,
    ),
    "one more": (lambda tree: tree | {"other": jnp.zeros(1)}, lambda t: "other" in t),
}


@pytest.mark.parametrize("change", PARAMS)
def test_other_params_are_another_call(change):
    changed, turns = PARAMS[change]

    class Model(nn.Module):
        def setup(self):
            self.fc = nn.Dense(8)

        def __call__(self, x):
            y = self.fc(x)
            params = self.variables["params"]["fc"]
            return y + params["kernel"].sum() if turns(params) else y

    model = Model()
    params = model.init(KEY, X)["params"]
    apply = linen.wrap(model, CONFIG, {"params": params}, X)
    apply(mora_jax.init(apply.plan), {"params": params}, X)
    others = {"params": {"fc": changed(params["fc"])}}
    with pytest.raises(ValueError, match=OUTSIDE):
        apply(mora_jax.init(apply.plan), others, X)


def test_a_method_is_its_code_and_all_it_holds():
    class Model(nn.Module):
        def setup(self):
            self.fc = nn.Dense(8)

        def __call__(self, x):
            return self.fc(x)

    def method(reads):
        def call(model, x):
            y = model.fc(x)
            kernel = model.fc.variables["params"]["kernel"]
            return y + kernel.sum() if reads else y

        return call

    model = Model()
    variables = model.init(KEY, X)
    apply = linen.wrap(model, CONFIG, variables, X)
    adapters = mora_jax.init(apply.plan)
    apply(adapters, variables, X, method=method(False))
    with pytest.raises(ValueError, match=OUTSIDE):
        apply(adapters, variables, X, method=method(True))


@pytest.mark.parametrize("what", ["dtype", "metadata"])
def test_other_variables_are_another_model(what):
    class Model(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y, kernel = self.fc(x), self.fc.kernel
            reads = kernel.dtype == jnp.bfloat16 or "tag" in kernel.get_metadata()
            return y + kernel[...].sum() if reads else y

    model = mora_nnx.wrap(Model(), CONFIG)
    model(X)
    if what == "dtype":
        params = nnx.state(model, nnx.Param)
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        nnx.update(model, half)
    else:
        model.fc.kernel.set_metadata(tag=1)
    with pytest.raises(ValueError, match=OUTSIDE):
        model(X)


# --- What was checked ---


def test_what_was_checked_is_not_traced_twice():
    runs = []

    def counted(call, *args):
        before = len(runs)
        call(*args)
        return len(runs) - before

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *args):
            runs.append(None)
            return nn.Dense(8, name="fc")(x)

    model = Model()
    variables = model.init(KEY, X)
    apply = linen.wrap(model, linen.plan(model, variables, CONFIG, X))
    call = functools.partial(apply, mora_jax.init(apply.plan), variables)
    assert [counted(call, X), counted(call, X + 1), counted(call, X[:1])] == [3, 1, 3]
    assert [counted(call, X, k) for k in (0, 1, 0)] == [3, 3, 1]
    assert [counted(call, X, closure(k)) for k in (0, 1, 0)] == [3, 3, 1]
    # Others of the same kernels are in the same program of the model.
    other = linen.plan(model, variables, MoRAConfig(operator="sharing", rank=1), X)
    assert counted(apply, mora_jax.init(other), variables, X) == 1
    jitted = jax.jit(lambda x: call(x))
    assert [counted(jitted, X), counted(jitted, X), counted(jitted, X[:1])] == [1, 0, 1]
    assert counted(jitted, jnp.ones((5, 8))) == 3


def test_an_nnx_model_has_its_proofs_in_every_trace():
    runs = []

    class Model(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            runs.append(None)
            return self.fc(x)

    model = mora_nnx.wrap(Model(), CONFIG)
    model(X)
    assert len(runs) == 3
    nnx.jit(lambda model, x: model(x))(model, X)  # checked
    nnx.jit(lambda model, x: model(x) + 1)(nnx.clone(model), X)
    assert len(runs) == 5
    model.train()
    mora_nnx.wrap(Model(), CONFIG)(X)  # has proofs of its own
    assert len(runs) == 8


class Hidden:
    """It has one text and no hash, whatever it holds."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, flag):
        self.flag = flag

    def __eq__(self, other):
        return isinstance(other, Hidden)

    def __repr__(self):
        return "Hidden()"


def test_models_that_look_alike_have_proofs_of_their_own():
    class Model(nnx.Module):
        def __init__(self, flag):
            self.fc, self.config = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), Hidden(flag)

        def __call__(self, x):
            y = self.fc(x)
            return y + self.fc.kernel[...].sum() if self.config.flag else y

    first = mora_nnx.wrap(Model(False), CONFIG)
    first(X)
    with pytest.raises(ValueError, match=OUTSIDE):
        mora_nnx.wrap(Model(True), CONFIG)(X)
    first.config.flag = True  # and the same one is another model
    with pytest.raises(ValueError, match=OUTSIDE):
        first(X)


def test_proofs_go_with_their_model():
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    model = mora_nnx.wrap(nnx.Sequential(layer))
    model(X)
    proofs = weakref.ref(model.proofs_mora)
    assert model.proofs_mora.number == 1
    assert not hasattr(mora_nnx.unwrap(model), "proofs_mora")
    del model
    gc.collect()
    assert proofs() is None


def test_proofs_stay_where_they_are():
    proofs = Proofs()
    proofs.number = 1
    for copied in (pickle.loads(pickle.dumps(proofs)), copy.deepcopy(proofs)):
        assert not copied.number and copied == proofs and hash(copied) == hash(proofs)


class Slots:
    __slots__ = "flag", "lock"


def test_what_cannot_be_compared_is_checked_each_time():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, how):
            y = nn.Dense(8, name="fc")(x)
            kernel = self.variables["params"]["fc"]["kernel"]
            return y + kernel.sum() if how.flag else y

    how = Slots()
    how.flag, how.lock = False, threading.Lock()
    model = Model()
    variables = model.init(KEY, X, how)
    apply = linen.wrap(model, CONFIG, variables, X, how)
    call = functools.partial(apply, mora_jax.init(apply.plan), variables, X)
    call(how)
    how.flag = True
    with pytest.raises(ValueError, match=OUTSIDE):
        call(how)


@pytest.mark.parametrize("value", [(x for x in [1]), threading.Lock()])
def test_incomparable(value):
    with pytest.raises(TypeError, match="cannot pickle"):
        content([value])


def test_what_holds_itself_has_a_content():
    def function():
        return function

    values = [1]
    values.append(values)
    assert content(values) == content(values) and content(function) == content(function)
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert content(deep) == content([deep[0]]) != content([deep])
