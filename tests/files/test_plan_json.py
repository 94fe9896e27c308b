"""A plan as text: what goes in comes out, and nothing that was changed passes."""

import json

import jax
import jax.numpy as jnp
import pytest
from adapter_files import single
from cases import by_case

from mora_jax import MoRAConfig, io, plan
from mora_jax.io import AdapterFileError


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "a": {"kernel": shape(16, 24), "bias": shape(24)},
    "b": {"kernel": shape(3, 24, 16)},
}
OVERRIDES = {"b/kernel": {"axes": "sio"}}


def planned(params=PARAMS, **settings):
    overrides = {**OVERRIDES, **settings.pop("overrides", {})}
    return plan(params, MoRAConfig(rank=2, **settings, overrides=overrides))


@by_case
def test_round_trip(case):
    chosen = single(
        case.make(12, 20, 6, seed=3), dropout=0.5, init="gaussian", alpha=0.3,
        param_dtype="bfloat16", execution="fold",
    )  # fmt: skip
    text = io.plan_to_json(chosen)
    assert io.plan_from_json(text) == chosen
    assert io.plan_from_json(text, like=chosen) == chosen
    assert io.plan_to_json(io.plan_from_json(text)) == text
    assert json.loads(text)["digest"] == chosen.digest()


def test_how_adapters_are_trained_may_differ():
    text = io.plan_to_json(planned(dropout=0.5))
    found = io.plan_from_json(text, like=planned(param_dtype=jnp.bfloat16))
    assert found["a/kernel"].dropout == 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, "^a/kernel_mora was made for operator.seed 2, not 1"),
        ({"alpha": 2.0}, "^a/kernel_mora was made for alpha 2.0, not 1.0"),
        ({"operator": "hadamard"}, "operator.name 'hadamard', not 'orthogonal'"),
        (
            {"overrides": {"b/kernel": {"seed": 3, "axes": "sio"}}},
            "^b/kernel_mora .* 3",
        ),
        ({"overrides": {"b/kernel": {"axes": "soi"}}}, "^b/kernel_mora .* axes 'soi'"),
        ({"square_rank": 4}, "a/kernel_mora was made for square_rank 4, not"),
        (
            {"exclude": "a/kernel"},
            "made for a plan without 'a/kernel', which this plan",
        ),
        (
            {"params": {**PARAMS, "c": {"kernel": shape(8, 8)}}},
            "c/kernel of the plan: the model has no such kernel",
        ),
        (
            {"params": {**PARAMS, "a": {"kernel": shape(16, 20)}}},
            r"a/kernel of the plan: the model's kernel must have shape \(16, 20\)",
        ),
    ],
)
def test_a_plan_of_another_meaning_is_refused(other, message):
    settings = {"operator": "orthogonal", "seed": 1}
    here = planned(**settings)
    if "square_rank" in other:
        there = plan(PARAMS, MoRAConfig(**settings, **other, overrides=OVERRIDES))
    else:
        there = planned(**settings | other)
    with pytest.raises(AdapterFileError, match=message):
        io.plan_from_json(io.plan_to_json(there), like=here)


TEXT = io.plan_to_json(planned())


def changed(**entries):
    return json.dumps(json.loads(TEXT) | entries)


def changed_layer(**entries):
    layers = json.loads(TEXT)["layers"]
    return changed(layers=[layers[0] | entries, *layers[1:]])


def of_width(width, q, operator):
    """A layer that a file may describe, but of which it has no array."""
    shape = {"kernel_shape": [width, width], "square_rank": q}
    return changed_layer(**shape, operator=operator)


LACKING = {key: value for key, value in json.loads(TEXT).items() if key != "traced"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan is not valid JSON"),
        ("[]", "the text is not a plan: its format must be 'mora_jax plan'"),
        ('{"format": "mora_jax adapter"}', "the text is not a plan"),
        (TEXT[:-9], "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (TEXT.replace("{", '{"format": "x",', 1), "'format' occurs twice"),
        (json.dumps(LACKING), "the plan must hold"),
        (changed(more=1), "the plan must hold"),
        (changed(format_version=2), "format version 2, and this mora_jax reads 1"),
        (
            changed(format_version=True),
            "format_version of the plan must be of type int",
        ),
        (changed(base_parameters=0), "must be a positive integer, got 0"),
        (changed(layers={}), "layers of the plan must be of type list"),
        (changed(layers=[3]), r"layers\[0\] of the plan must hold"),
        (
            changed(layers=json.loads(TEXT)["layers"] * 2),
            "the plan has 'a/kernel' twice",
        ),
        (changed(layers=[]), "damaged or edited: its digest differs"),
        (changed(digest="0" * 64), "damaged or edited: its digest differs"),
        (changed_layer(alpha=2.0), "damaged or edited: its digest differs"),
        (changed_layer(alpha="2"), "a/kernel of the plan: alpha must be a number"),
        (changed_layer(square_rank=2**40), "a/kernel of the plan: "),
        (
            changed_layer(operator_check=[1.0] * 4),
            "is another operator here than where",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_texts_from_strangers(text, message):
    with pytest.raises(AdapterFileError, match=message):
        io.plan_from_json(text)


@pytest.mark.parametrize(
    ("q", "operator"),
    [
        (2**10, {"name": "orthogonal", "seed": 0}),
        (2**20, {"name": "rotation", "truncate": False}),
    ],
)
def test_a_text_alone_cannot_ask_for_much_memory(q, operator):
    with pytest.raises(AdapterFileError, match="takes too much memory for a file"):
        io.plan_from_json(of_width(2**21, q, operator))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    for wrong in (TEXT.encode(), json.loads(TEXT), None):
        with pytest.raises(TypeError, match="text must be a str, got"):
            io.plan_from_json(wrong)
    with pytest.raises(TypeError, match="like must be a Plan, got MoRAConfig"):
        io.plan_from_json(TEXT, like=MoRAConfig())
