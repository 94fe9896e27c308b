"""A plan as text: what goes in comes out, and nothing that was changed passes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import signed, single
from cases import by_case

from mora_jax import MoRAConfig, init, io, make_operator, plan
from mora_jax.io import AdapterFileError
from mora_jax.operators import Damped


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "a": {"kernel": shape(16, 24), "bias": shape(24)},
    "b": {"kernel": shape(3, 24, 16)},
}


def planned(params=PARAMS, b=(), **settings):
    overrides = {"b/kernel": {"axes": "sio", **dict(b)}}
    settings = {"rank": 2, "overrides": overrides, **settings}
    return plan(params, MoRAConfig(**settings))


@pytest.mark.law
@by_case
def test_round_trip(case):
    settings = {"dropout": 0.5, "init": "gaussian", "alpha": 0.3, "execution": "fold"}
    chosen = single(case.make(12, 20, 6, seed=3), param_dtype="bfloat16", **settings)
    text, arrays = io.plan_to_json(chosen), io.plan_arrays(chosen)
    again = io.plan_from_json(text, arrays=arrays)
    assert again == chosen == io.plan_from_json(text, like=chosen)
    assert io.plan_to_json(again) == text == signed(json.loads(text))
    assert bool(arrays) == bool(case.given)
    if not case.given:
        assert io.plan_from_json(text) == chosen
        return
    # Other directions of the same shapes give an M another meaning.
    other = single(case.make(12, 20, 6, seed=4), param_dtype="bfloat16", **settings)
    others = io.plan_arrays(other)
    renamed = {
        kind: dict(zip(named, others[kind].values(), strict=True))
        for kind, named in arrays.items()
    }
    known = {}, {"like": other}, {"arrays": others}, {"arrays": renamed}
    for given in known:
        with pytest.raises(
            AdapterFileError, match="^a/kernel of the plan: .*direction"
        ):
            io.plan_from_json(text, **given)


def test_a_plan_that_no_text_can_name_is_refused():
    """Before a checkpoint has a text that nobody can read."""
    for name in ("", ".."):
        with pytest.raises(AdapterFileError, match="must have a path of names, got"):
            io.plan_to_json(plan({name: {"kernel": shape(8, 8)}}))


def test_adapters_are_a_plan_of_their_own():
    """No plan knows of damped inputs, so their text is made of adapters."""
    chosen = planned(train="a/bias")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), PARAMS)
    adapters = init(chosen, params=params)
    text = io.plan_to_json(adapters)
    for like in (adapters, chosen):
        assert io.plan_from_json(text, like=like).parts == chosen.parts


INNER = make_operator("truncation", 12, 20, 6)
DAMPED = single(Damped(12, 20, 6, inner=INNER, directions=np.eye(12, 2)))
KIND = "damped"
((NAME, EYE),) = io.plan_arrays(DAMPED)[KIND].items()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        3,
        [EYE],
        "text",
        {NAME: EYE},
        {KIND: {NAME: np.full((12, 2), np.nan)}},
        {KIND: {NAME: np.eye(12, 2, dtype=int)}},
        {KIND: {NAME: np.eye(11, 2)}},
        {KIND: {NAME: "directions"}},
        {KIND: {NAME: jax.ShapeDtypeStruct((12, 2), jnp.float32)}},
    ],
)
def test_what_are_no_arrays_of_a_plan_is_told(wrong):
    with pytest.raises((TypeError, ValueError), match="arrays|directions"):
        io.plan_from_json(io.plan_to_json(DAMPED), arrays=wrong)


def test_directions_that_a_trace_has_are_not_written():
    for function in (io.plan_to_json, io.plan_arrays):
        with pytest.raises(TypeError, match="directions .*must be a concrete array"):
            jax.jit(function)(DAMPED)


def test_how_adapters_are_trained_may_differ():
    text = io.plan_to_json(planned(dropout=0.5))
    found = io.plan_from_json(text, like=planned(param_dtype=jnp.bfloat16))
    assert found["a/kernel"].dropout == 0.5


MADE = "^a/kernel_mora was made for"
MORE = {**PARAMS, "c": {"kernel": shape(8, 8)}}
OTHER = {**PARAMS, "a": {"kernel": shape(16, 20)}}


@pytest.mark.law
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, f"{MADE} operator.seed 2, not 1"),
        ({"alpha": 2.0}, f"{MADE} alpha 2.0, not 1.0"),
        ({"operator": "hadamard"}, "operator.name 'hadamard', not 'orthogonal'"),
        ({"b": {"seed": 3}}, "^b/kernel_mora .* 3"),
        ({"b": {"axes": "soi"}}, "with axes 'soi' at 'b/kernel', the plan .* 'sio'"),
        ({"square_rank": 4, "rank": None}, f"{MADE} square_rank 4, not"),
        ({"exclude": "a/kernel"}, "have nothing at 'a/kernel', the plan a kernel"),
        ({"params": MORE}, "at 'c/kernel', the plan nothing"),
        ({"params": OTHER}, r"a kernel \(16, 20\) .* at 'a/kernel', the plan"),
    ],
)
def test_a_plan_of_another_meaning_is_refused(other, message):
    settings = {"operator": "orthogonal", "seed": 1}
    there = planned(**settings | other)
    with pytest.raises(AdapterFileError, match=message):
        io.plan_from_json(io.plan_to_json(there), like=planned(**settings))


TEXT = io.plan_to_json(planned())
LAYERS = json.loads(TEXT)["layers"]
LACKING = {key: value for key, value in json.loads(TEXT).items() if key != "traced"}


def changed(**entries):
    """The text with other entries, signed as an attacker would."""
    return signed(json.loads(TEXT) | entries)


def unsigned(**entries):
    return json.dumps(json.loads(TEXT) | entries)


def both(**entries):
    """A trained array beside the layers."""
    array = {"shape": [3], "dtype": "float32", "base_dtype": "float32"}
    return changed(trained=[array | entries])


def layer(**entries):
    return changed(layers=[LAYERS[0] | entries, *LAYERS[1:]])


def settings(**entries):
    return layer(settings=LAYERS[0]["settings"] | entries)


def of_width(width, q, **operator):
    """A layer that a file may describe, but of which it has no array."""
    return layer(kernel_shape=[width, width], square_rank=q, operator=operator)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan is not valid JSON"),
        ("[]", "the plan is not of mora_jax: its format must be 'mora_jax plan'"),
        ('{"format": "mora_jax adapter"}', "the plan is not of mora_jax"),
        (TEXT[:-9], "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (TEXT.replace("{", '{"format": "x",', 1), "'format' occurs twice"),
        (json.dumps(LACKING), "the plan lacks 'traced'"),
        (changed(more=1), r"the plan must not hold \['more'\]"),
        (changed(format_version=2), "format_version of the plan must be 1, got 2"),
        (changed(format_version=0), "format_version of the plan must be 1, got 0"),
        (
            changed(format_version=True),
            "format_version .* must be 1, got True",
        ),
        (changed(base_parameters=True), "base_parameters .* type int, got True"),
        (changed(base_parameters=1.0), "base_parameters .* type int, got 1.0"),
        (changed(traced=1), "traced of the plan must be of type bool, got 1"),
        (changed(layers={}), "layers of the plan must be of type list"),
        (changed(layers=[3]), r"layers\[0\] of the plan must be an object, got 3"),
        (changed(layers=LAYERS * 2), "is 'a/kernel', which is there twice"),
        (unsigned(layers=[]), "damaged or edited: its SHA-256 differs"),
        (unsigned(sha256="0" * 64), "damaged or edited: its SHA-256 differs"),
        (unsigned(traced=True), "damaged or edited: its SHA-256 differs"),
        (unsigned(sha256=0), "sha256 of the plan must be of type str, got 0"),
        (settings(alpha="2"), "a/kernel of the plan: alpha .* type float, got '2'"),
        (settings(alpha=True), "a/kernel of the plan: alpha .* type float, got True"),
        (changed(trained={}), "trained of the plan must be of type list"),
        (layer(square_rank=2**40), "a/kernel of the plan: "),
        (layer(dtype="float16"), "dtype must be 'float32', got 'float16'"),
        (layer(operator_check=[1.0] * 4), "is another operator here than where"),
        (layer(more=1), r"layers\[0\] of the plan must not hold \['more'\]"),
        (layer(rank=2**70), r"rank must be integers in \[1, 2\*\*31\)"),
        (layer(rank=0), "rank must be integers"),
        (layer(rank=True), r"rank of layers\[0\] .* type int, got True"),
        (layer(kernel_shape=[16, True]), "kernel_shape must be integers"),
        (layer(kernel_shape=[2**31, 16, 24], axes="sio"), "kernel_shape must be int"),
        (layer(path=["a"] * 101), "must have a path of names"),
        (layer(path=["a/../../b"]), "must have a path of names"),
        (layer(path=["/etc"]), "must have a path of names"),
        (changed(layers=[LAYERS[0], LAYERS[0] | {"path": ["a/kernel"]}]), "twice, or"),
        (
            both(path=["a", "kernel"]),
            r"trained\[0\] .*'a/kernel', which is there twice",
        ),
        (both(path=["a", "kernel_mora"]), "has 'a/kernel_mora' twice, or below"),
        (both(path=["a"]), "has 'a/kernel_mora' twice, or below 'a'"),
        (of_width(2**21, 2**10, name="orthogonal"), "too much memory"),
        (of_width(2**20, 1, name="block_diagonal", seed=0), "too much memory"),
        (of_width(2**21, 2**10, name="low_rank"), "too much memory"),
        (of_width(2**21, 2**10, name="orthogonal", seed=0), "too much memory"),
        (of_width(2**21, 2**20, name="rotation", truncate=False), "too much memory"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_texts_from_strangers(text, message):
    with pytest.raises(AdapterFileError, match=message):
        io.plan_from_json(text)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["rotation", "low_rank"])
def test_a_plan_asks_for_no_more_memory_than_the_model(name):
    settings = {"truncate": False} if name == "rotation" else {"seed": 0}
    text = of_width(24, 2**24, name=name, **settings)
    with pytest.raises(AdapterFileError, match="too much memory"):
        io.plan_from_json(text, like=plan({"a": {"kernel": shape(24, 24)}}))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    for wrong in (TEXT.encode(), json.loads(TEXT), None):
        with pytest.raises(TypeError, match="text must be a str, got"):
            io.plan_from_json(wrong)
    with pytest.raises(TypeError, match="like must be a Plan, got MoRAConfig"):
        io.plan_from_json(TEXT, like=MoRAConfig())


def test_nothing_is_nested_too_deeply():
    """Python may read what is nested more deeply than it can write."""
    for depth in (*range(500, 1100, 100), *range(950, 1000, 5), 100_000):
        text = TEXT.replace('"trained": []', f'"trained": {"[" * depth}{"]" * depth}')
        with pytest.raises(AdapterFileError, match="nested too deeply|SHA-256 differs"):
            io.plan_from_json(text)
