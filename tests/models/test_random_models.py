"""A law of any model, over models that are drawn at random.

A kernel is refused, left out or listed as not proven, each time by its name; or the
adapted model computes what the merged model does, and so does its gradient. It must
hold of each call. A failure prints the seed and the model, and one command repeats it:
`pytest -m "" "FILE::test_refused_by_name_or_as_merged_for_many[seed-17]"`.
"""

import dataclasses
import functools
import re
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import random_like
from jax.lax import stop_gradient
from random_models import SIMPLE, SWITCHES, Block, RandomModel, draw_model

import mora_jax
from mora_jax import fold, linen
from mora_jax import nnx as mora

NOT_YET: frozenset[str] = frozenset()
"""The faults that are known: no model of the law has a block with one of these."""

TOLERANCES = {"float64": 1e-5, "float32": 1e-3, "coarse": 0.1}
"""The largest difference that passes, of what the adapters change."""

CALLS = {
    "eval": {"train": False},
    "train": {"train": True},
    "other": {"method": "other"},
    "mutable": {"train": False, "mutable": ["losses", "batch_stats"]},
    "train mutable": {"train": True, "mutable": ["losses", "batch_stats"]},
}
OF_NO_KERNEL = "exclude leaves|targets: |the model .* with an M beside "
"""Beginnings of errors that name no single kernel: none is left, or it is not known."""

LIBRARY = Path(mora_jax.__file__).parent


def kwargs_of(model, call):
    """The inputs of a call by name, with the input that says if it trains."""
    kwargs = dict(CALLS[call])
    if "train" in kwargs:
        kwargs["train"] = SWITCHES[model.switch][kwargs["train"]]
    return kwargs


class Refused(Exception):
    """An error of the library, which says why; `kernels` are those that it names."""

    def __init__(self, kernels, text):
        self.kernels = kernels
        super().__init__(text)


@dataclasses.dataclass(repr=False)
class Case:
    """A random model, and what is known of its kernels."""

    model: RandomModel
    refused: dict = dataclasses.field(default_factory=dict)
    listed: dict = dataclasses.field(default_factory=dict)

    def __repr__(self):
        return f"refused: {self.refused}\nlisted: {self.listed}"

    @functools.cached_property
    def params(self):
        if self.model.api == "linen":
            return self.model.variables["params"]
        return nnx.to_pure_dict(nnx.state(self.model.model, nnx.Param))

    @functools.cached_property
    def kernels(self):
        flat = flatten_dict(self.params)
        return ["/".join(path) for path, array in flat.items() if array.ndim > 1]

    def named_in(self, text):
        """The kernels that a text names, by their path or by their layer's."""
        whole = [name for name in self.kernels if name in text]
        layers = [name for name in self.kernels if name.rpartition("/")[0] in text]
        return whole or layers

    def of_library(self, function, *args, **kwargs):
        """The result of a call of the library; `Refused` for an error that it says."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                where = traceback.extract_tb(error.__traceback__)[-1].filename
                text = str(error)
                if not Path(where).is_relative_to(LIBRARY):
                    raise
                whole = re.match(OF_NO_KERNEL, text)
                if not (names := [] if whole else self.named_in(text)) and not whole:
                    raise
                raise Refused(names, text) from error
            finally:
                for warning in caught:
                    if issubclass(warning.category, mora_jax.MoRAWarning):
                        self.list(str(warning.message))

    def list(self, text):
        names = self.named_in(text)
        if not names and not text.startswith("the call updates"):
            names = self.kernels
        self.listed |= dict.fromkeys(names, text)

    def plan(self):
        model, more = self.model, {}
        config = model.config(tuple(self.refused))
        kwargs = kwargs_of(model, model.calls[0])
        if model.all_planned and "calls" not in NOT_YET:
            more_calls = [call for call in model.calls[1:] if in_plans(model, call)]
            calls = [kwargs_of(model, call) for call in more_calls]
            more = {"calls": [mora_jax.Call(*model.inputs, **call) for call in calls]}
        if model.api == "linen":
            given = model.model, model.variables, config, *model.inputs
            return linen.plan(*given, **kwargs, **more)
        return mora.plan(model.model, config, *model.inputs, **kwargs, **more)


def in_plans(model, call):
    """True if a plan can have the call: `nnx.plan` traces `__call__` alone."""
    return model.api == "linen" or "method" not in CALLS[call]


def linen_functions(case, plan):
    """(adapters, call) and (params, call) to outputs."""
    model, apply = case.model, linen.wrap(case.model.model, plan)

    def adapted(ms, call):
        return apply(ms, model.variables, *model.inputs, **kwargs_of(model, call))

    def plain(params, call):
        variables = {**model.variables, "params": params}
        return model.model.apply(variables, *model.inputs, **kwargs_of(model, call))

    return adapted, plain


def nnx_functions(case, plan):
    model, wrapped = case.model, mora.wrap(case.model.model, plan)

    def run(model, arrays, call):
        model = nnx.clone(model)
        nnx.update(model, arrays)
        kwargs = kwargs_of(case.model, call)
        method = getattr(model, kwargs.pop("method", "__call__"))
        outputs = method(*case.model.inputs, **kwargs)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return functools.partial(run, wrapped), functools.partial(run, model.model)


def floats(outputs):
    leaves = jax.tree.leaves(outputs)
    return [y for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact)]


def loss(ys):
    """A sum of outputs with weights."""
    pairs = zip(random_like(ys, 1.0), ys, strict=True)
    return sum(jnp.sum(w * y) for w, y in pairs)


def with_derivatives(function, ms, tangents):
    """Outputs of a function, with the outputs' derivatives or the gradients of M's."""
    if tangents is not None:
        return jax.jvp(function, (ms,), (tangents,))

    def run(ms):
        ys = function(ms)
        return loss(ys), ys

    gradients, ys = jax.grad(run, has_aux=True)(ms)
    return ys, gradients


def largest(ys):
    """The largest absolute value."""
    ys = jax.tree.leaves(ys)
    return max((np.abs(np.asarray(y, float)).max(initial=0) for y in ys), default=0)


def off(left, right, size):
    """The largest difference of two trees, relative to a number."""
    pairs = zip(*map(jax.tree.leaves, (left, right)), strict=True)
    found = [np.asarray(a, float) - np.asarray(b, float) for a, b in pairs]
    return largest(found) / max(size, 1e-3)


def check_call(case, plan, functions, call):
    """Raise AssertionError unless the law holds; else the kernels with an effect.

    Returns as soon as a call lists more kernels.
    """
    adapt, plain = functions
    model, known, moved = case.model, set(case.listed), set()

    def adapted(ms):
        return floats(adapt(ms, call))

    def merged(ms):
        return floats(plain(fold(case.params, ms), call))

    @jax.jit
    def run(ms):
        return [with_derivatives(f, ms, tangents) for f in (adapted, merged)]

    base, after = None, random_ms(case, plan, 0.3)
    tangents = random_ms(case, plan, 1.0) if model.forward else None
    for ms in (jax.tree.map(np.zeros_like, after), after):
        (ys, slopes), (expected, merged_slopes) = case.of_library(run, ms)
        if case.listed.keys() > known:
            return moved
        at, size = f"in call {call!r}", largest(expected)
        if base is None:
            base, at = expected, f"at M = 0 {at}"
        else:
            size = off(expected, base, 1)
        wrong = off(ys, expected, size)
        tolerance = TOLERANCES[model.precision]
        assert wrong <= tolerance, f"outputs are off by {wrong:.2g} {at}"
        if model.forward:
            wrong = off(slopes, merged_slopes, largest(merged_slopes))
            assert wrong <= 10 * tolerance, f"derivatives are off by {wrong:.2g} {at}"
            moved |= plan.keys()
            continue
        for name in plan.keys() - case.listed.keys():
            path = (*name.split("/")[:-1], f"{name.split('/')[-1]}_mora")
            moved |= {name} if np.any(flatten_dict(slopes)[path].m) else set()
            if not model.blocks[int(path[0][1:])].no_gradient:
                check_gradient(model, path, merged, ms, slopes, merged_slopes, at)
    return moved


def check_gradient(model, path, merged, ms, slopes, merged_slopes, at):
    """Raise unless the gradient of one M is that with the merged kernel."""
    size, flat = max(largest(merged_slopes), 1e-3), flatten_dict(ms)
    slope, expected = (flatten_dict(s)[path].m for s in (slopes, merged_slopes))
    text = f"gradient of {'/'.join(path)}"
    if np.any(expected) or model.precision != "float64":
        wrong = off(slope, expected, size)
        assert wrong <= 10 * TOLERANCES[model.precision], (
            f"{text} off by {wrong:.2g} {at}"
        )
        return
    # The model may stop the gradient of its kernel, which is not meant for M. Then a
    # difference of outputs tells what is right.
    step = np.asarray(random_like(flat[path].m, 1.0))

    def loss_at(h):
        moved = flat[path].replace(m=flat[path].m + h * step)
        moved = unflatten_dict({**flat, path: moved})
        return float(loss(merged(moved)))

    expected, got = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6, np.sum(slope * step)
    assert abs(got - expected) <= 1e-4 * size, (
        f"{text} is {got:.3g} along a step {at}, and a difference is {expected:.3g}"
    )


def verdict(model):
    """A line that says what became of each kernel; AssertionError if the law fails."""
    case = Case(model)
    try:
        return outcome(case)
    except Exception as error:
        error.add_note(f"{model}\n{case}")
        raise


def outcome(case):
    plan, done = None, False
    while not done:  # until nothing more is refused: the user excludes what is
        try:
            plan, done = adapted_as_merged(case), True
        except Refused as refusal:
            new = set(refusal.kernels) - case.refused.keys()
            assert new or not refusal.kernels, f"refused twice: {refusal}"
            case.refused |= dict.fromkeys(new or ["the model"], str(refusal))
            case.listed = {}
            done = not refusal.kernels
            if done and all(block.right for block in case.model.blocks):
                raise AssertionError(f"right, and {refusal}") from None
    doubtful = case.refused | (dict(plan.unproven) if plan else {})
    for k, block in enumerate(case.model.blocks):
        names = [name for name in doubtful if name.startswith(f"b{k}/")]
        assert not (block.right and names), f"right, and {doubtful[names[0]]}"
    return f"adapted {sorted(set(plan or ()) - case.listed.keys())}, {case}"


def adapted_as_merged(case):
    """The plan of all that is not refused so far, if the law holds of it."""
    plan = case.of_library(case.plan)
    case.listed |= dict(plan.unproven)
    make = linen_functions if case.model.api == "linen" else nnx_functions
    functions = case.of_library(make, case, plan)
    moved, calls = set(), list(case.model.calls)
    while calls:
        known = set(case.listed)
        moved |= check_call(case, plan, functions, calls[0])
        # What a call lists as not proven has an M of 0, and the law holds of the rest.
        if known >= case.listed.keys():
            del calls[0]
    idle = plan.keys() - moved - case.listed.keys()
    assert not idle, f"no call depends on {sorted(idle)}, and nothing says so"
    return plan


def random_ms(case, plan, scale):
    """M's as after training; 0 for what is listed as not proven."""
    ms = random_like(mora_jax.init(plan), scale)
    flat = flatten_dict(ms)
    for path in flat:
        if "/".join(path).removesuffix("_mora") in case.listed:
            flat[path] = jax.tree.map(np.zeros_like, flat[path])
    return unflatten_dict(flat)


@pytest.mark.law
@pytest.mark.parametrize(
    "seed", [*range(10), *map(slow, range(10, 20))], ids="seed-{}".format
)
def test_refused_by_name_or_as_merged(seed, float64):
    verdict(draw_model(seed, NOT_YET, most=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(500), ids="seed-{}".format)
def test_refused_by_name_or_as_merged_for_many(seed, float64):
    verdict(draw_model(seed, NOT_YET))


def each(change):
    return lambda tree: jax.tree.map(change, tree)


same = each(lambda a: a)
WRONG = {
    "outputs are off by .* in call 'eval'": (each(lambda m: m + 0.1 * m * m), same),
    "outputs are off by .* at M = 0": (same, each(lambda y: 1.01 * y)),
    "gradient of b0/a/kernel_mora off": (each(stop_gradient), same),
}
"""{what the law says: wrong functions of M's, and of outputs}."""


@pytest.mark.parametrize("message", WRONG)
def test_the_law_finds_what_is_wrong(message, float64):
    block = Block("dense", *SIMPLE["dense"])
    model = RandomModel(0, "linen", "float64", (block,), ("eval",), False, {})
    case, (before, after) = Case(model), WRONG[message]
    plan = case.plan()
    adapted, plain = linen_functions(case, plan)

    def wrong(ms, call):
        return after(adapted(before(ms), call))

    assert check_call(case, plan, (adapted, plain), "eval") == {"b0/a/kernel"}
    with pytest.raises(AssertionError, match=message):
        check_call(case, plan, (wrong, plain), "eval")
