"""A function of adapters leaves their delta alone, or refuses them."""

import re
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import single
from cases import CASES, in_turns
from flax import nnx
from helpers import bare, random, random_like, wide
from jax.sharding import AxisType, PartitionSpec

import mora_jax
from mora_jax import remora

INS, OUTS, Q = 12, 20, 4
SETTINGS = [
    {"alpha": 1.0, "scale": "paper"},
    {"alpha": 0.5, "scale": "fine-tuning"},
    {"alpha": 3.0, "scale": "fine-tuning", "stack": 2},
]
"""Factors of the delta, and one kernel or a stack of them."""

MAY_REFUSE = {
    "renewing": "renewing needs directions",
    "renewing under jit": "renewing needs directions",
    "renewed": "renewing needs directions",
    "restart": "same maps|directions",
    "directions": "delta of an adapter must be zero",
    "input_damping": "delta of an adapter must be zero|has damped inputs",
    "gradient_start": "not linear",
}
"""The refusals that are right, by the name of the function."""


def total(params, adapters):
    """The kernel that a base and adapters make together."""
    return mora_jax.fold(params, adapters)["a"]["kernel"]


def some_loss(adapters, params):
    return jnp.sum(jnp.sin(total(params, adapters)))


def renewing(params, adapters, tmp_path):
    init, _, _ = remora.renewing(some_loss, optax.sgd(0.0), 2)
    state = init(params, adapters)
    return total(state.params, state.adapters)


def renewing_under_jit(params, adapters, tmp_path):
    init, _, _ = remora.renewing(some_loss, optax.sgd(0.0), 2, along="random")
    state = jax.jit(init)(params, adapters)
    return total(state.params, state.adapters)


def renewed(params, adapters, tmp_path):
    init, step, _ = remora.renewing(some_loss, optax.sgd(0.0), 1)
    state, _ = jax.jit(step)(init(params, adapters))
    return total(state.params, state.adapters)


def restart(params, adapters, tmp_path):
    tx = optax.sgd(1.0)
    after = remora.restart(params, adapters, tx.init(adapters), tx)
    return total(after.params, after.adapters)


def directions(params, adapters, tmp_path):
    return total(params, mora_jax.directions(some_loss, adapters, [(params,)]))


def input_damping(params, adapters, tmp_path):
    x = random(5, INS)
    shape = adapters["a"]["kernel_mora"].spec.stack_shape

    def call(adapters):
        return adapters["a"]["kernel_mora"](jnp.broadcast_to(x, (*shape, INS)))

    return total(params, mora_jax.input_damping(call, adapters, directions=2))


def gradient_start(params, adapters, tmp_path):
    def no_loss(adapters):
        return 0.0 * some_loss(adapters, params)

    with warnings.catch_warnings(action="ignore"):  # no step lowers the loss
        return total(params, mora_jax.gradient_start(no_loss, adapters))


def plan_adapters(params, adapters, tmp_path):
    plan = mora_jax.Plan({("a", "kernel"): adapters["a"]["kernel_mora"].spec})
    again = plan.adapters(plan.adapters(bare(adapters)))
    return total(params, plan.adapters(again))


def a_file(params, adapters, tmp_path):
    mora_jax.save(tmp_path / "adapters", adapters, params=params)
    return total(params, mora_jax.load(tmp_path / "adapters", params))


def plan_as_text(params, adapters, tmp_path):
    plan = mora_jax.Plan({("a", "kernel"): adapters["a"]["kernel_mora"].spec})
    if adapters["a"]["kernel_mora"].operator.given:
        pytest.skip("a plan as text has no arrays")
    again = mora_jax.io.plan_from_json(mora_jax.io.plan_to_json(plan), plan)
    return total(params, again.adapters(bare(adapters)))


def flax_state(params, adapters, tmp_path):
    state = flax.serialization.to_state_dict(adapters)
    return total(params, flax.serialization.from_state_dict(adapters, state))


def from_lora(params, adapters, tmp_path):
    adapter = adapters["a"]["kernel_mora"]
    u, s, v = np.linalg.svd(wide(adapter.delta()), full_matrices=False)
    factors = {"kernel_lora_a": u * s[..., None, :], "kernel_lora_b": v / 0.25}
    tree = {"a": jax.tree.map(jnp.asarray, factors)}
    plan = mora_jax.Plan({("a", "kernel"): adapter.spec})
    return total(params, mora_jax.from_lora(tree, plan, alpha=0.25))


def scaled(params, adapters, tmp_path):
    half = mora_jax.mixing.scaled(adapters, 0.5)
    return total(params, mora_jax.mixing.scaled(half, 2.0))


def weighted_sum(params, adapters, tmp_path):
    return total(params, mora_jax.mixing.weighted_sum([adapters] * 2, [0.25, 0.75]))


def on_mesh(params, adapters, tmp_path):
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = adapters["a"]["kernel_mora"].spec.axes.replace("o", "m")
    where = {
        "a": {"kernel": PartitionSpec(*["model" if a == "m" else None for a in axes])}
    }
    placed = mora_jax.sharding.on_mesh(adapters, where, batch_axes="data", mesh=mesh)
    shardings = mora_jax.sharding.adapter_shardings(placed, where, mesh=mesh)
    return total(params, jax.device_put(placed, shardings))


def slots(params, adapters, tmp_path):
    stacked = mora_jax.serving.stack([adapters], slots=2)
    row = mora_jax.serving.select(stacked, jnp.array([0]))
    return total(params, jax.tree.map(lambda m: m[0], row))


def one_tree(params, adapters, tmp_path):
    return total(*mora_jax.split(mora_jax.combine(params, adapters)))


def learned(params, adapters, tmp_path):
    merged = mora_jax.merge(params, adapters)
    one, _ = remora.learned(params, merged, adapters, max_error=0)
    return total(params, one)


def a_model_of_nnx(params, adapters, tmp_path):
    spec = adapters["a"]["kernel_mora"].spec
    if spec.stack_shape:
        pytest.skip("nnx.Linear has one kernel")
    plan = mora_jax.Plan({("a", "kernel"): spec})

    class Model(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(INS, OUTS, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.a(x)

    model = Model()
    model.a.kernel[...] = params["a"]["kernel"]
    wrapped = mora_jax.nnx.wrap(model, plan)
    mora_jax.nnx.set_adapters(wrapped, adapters)
    return total(params, mora_jax.nnx.adapters(wrapped))


FUNCTIONS = {
    "renewing": renewing,
    "renewing under jit": renewing_under_jit,
    "renewed": renewed,
    "restart": restart,
    "directions": directions,
    "input_damping": input_damping,
    "gradient_start": gradient_start,
    "plan.adapters": plan_adapters,
    "save and load": a_file,
    "plan_from_json": plan_as_text,
    "flax.serialization": flax_state,
    "from_lora": from_lora,
    "mixing.scaled": scaled,
    "mixing.weighted_sum": weighted_sum,
    "sharding.on_mesh": on_mesh,
    "serving.select": slots,
    "combine and split": one_tree,
    "remora.learned": learned,
    "nnx.set_adapters": a_model_of_nnx,
}
"""Functions from params and adapters to the kernel that they leave, by name."""


def made(case, settings):
    """A base, and adapters that are far from zero."""
    op = case.make(INS, OUTS, Q)
    stack = (settings["stack"],) if "stack" in settings else ()
    scale = 1.0 if settings["scale"] == "paper" else op.fine_tuning_scale
    plan = single(
        op,
        (*stack, INS, OUTS),
        axes="s" * len(stack) + "io",
        alpha=settings["alpha"],
        scale=scale,
    )
    params = {"a": {"kernel": random(0, *stack, INS, OUTS)}}
    shapes = jax.eval_shape(lambda: mora_jax.init(plan, jax.random.key(0)))
    return params, random_like(shapes)


@pytest.mark.law
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@in_turns("name, case", FUNCTIONS, CASES, each=3)
def test_no_function_changes_a_delta(name, case, settings, tmp_path):
    params, adapters = made(case, settings)
    before = wide(total(params, adapters))
    change = before - wide(params["a"]["kernel"])
    assert np.abs(change).max() > 0.05
    try:
        after = wide(FUNCTIONS[name](params, adapters, tmp_path))
    except ValueError as error:
        assert name in MAY_REFUSE and re.search(MAY_REFUSE[name], str(error)), error
        return
    lost = np.linalg.norm(after - before) / np.linalg.norm(change)
    assert lost < 1e-5
