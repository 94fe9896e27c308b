"""What a model of `twins` gives, adapted and merged, in one compiled program."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import random_like, trained
from twins import TWINS, nnx_model, nnx_shapes

from mora_jax import fold, init, linen
from mora_jax import nnx as mora

KEY = jax.random.key(0)


def shapes_of(twin, api):
    """The model, its variables and its parameters, with shapes in place of arrays."""
    if api == "linen":
        model = twin.linen()
        variables = jax.eval_shape(model.init, KEY, twin.x)
        return model, variables, variables["params"]
    model = nnx_shapes(twin)
    return model, None, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def plan_of(model, variables, twin, x):
    if variables is None:
        return mora.plan(model, twin.config, x)
    return linen.plan(model, variables, twin.config, x)


def linen_functions(model, twin, plan):
    apply = linen.wrap(model, plan)

    def base(params, x):
        return model.apply({"params": params}, x)

    def adapted(params, adapters, x):
        return apply(adapters, {"params": params}, x)

    def merged(params, adapters, x):
        return base(fold(params, adapters), x)

    return base, adapted, merged


def nnx_functions(model, twin, plan):
    model = nnx_model(twin)
    wrapped = mora.wrap(model, plan)

    def load(model, params, adapters=None):
        model = nnx.clone(model)
        nnx.update(model, params)
        if adapters is not None:
            mora.set_adapters(model, adapters)
        return model

    def base(params, x):
        return load(model, params)(x)

    def adapted(params, adapters, x):
        return load(wrapped, params, adapters)(x)

    def merged(params, adapters, x):
        return mora.merge_adapters(load(wrapped, params, adapters))(x)

    return base, adapted, merged


@functools.cache
def case_of(name, api, operator=None):
    """A twin with parameters, a plan, adapters as after training, and functions.

    These are `base(params, x)`, and `adapted` and `merged(params, adapters, x)`.
    `operator` takes the place of the twin's own: a name or the settings of one.
    """
    twin = TWINS[name]
    if operator:
        operator = dict(operator) if isinstance(operator, tuple) else operator
        config = dataclasses.replace(twin.config, operator=operator)
        twin = dataclasses.replace(twin, config=config)
    model, variables, shapes = shapes_of(twin, api)
    plan = plan_of(model, variables, twin, twin.x)
    functions = linen_functions if api == "linen" else nnx_functions
    base, adapted, merged = functions(model, twin, plan)
    case = types.SimpleNamespace(base=base, adapted=adapted, merged=merged)
    case.x, case.plan = twin.x, plan
    case.params, case.adapters = random_like(shapes), trained(plan)
    return case


@functools.cache
def results(name, api, operator=None):
    """All that laws speak of.

    Nearly all of the time goes into tracing and compiling, so one program computes it:
    the base's output; loss, output and gradients of the adapted model; and those of the
    merged one. The loss is a sum of outputs with weights.
    """
    case = case_of(name, api, operator)
    traces = []

    @jax.jit
    def run(adapters, params, x):
        traces.append(None)
        y = case.base(params, x)
        weights = random_like(y, 1.0)

        def derivatives(function):
            def loss(adapters):
                y = function(params, adapters, x)
                parts = jax.tree.map(
                    lambda w, y: jnp.sum(w * y, dtype=jnp.float32), weights, y
                )
                return sum(jax.tree.leaves(parts)), y

            return jax.value_and_grad(loss, has_aux=True)(adapters)

        return y, derivatives(case.adapted), derivatives(case.merged)

    return types.SimpleNamespace(
        **vars(case),
        run=lambda adapters: run(adapters, case.params, case.x),
        traces=traces,
        at_zero=run(init(case.plan), case.params, case.x),
        after=run(case.adapters, case.params, case.x),
        # Sums of 16-bit numbers in another order.
        tolerance=0.03 if "bfloat16" in name else 1e-5,
    )
