"""A plan of a model, by what its layers compute."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax.extend.core import Jaxpr

from mora_jax._common.suggestions import matching
from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.calls import Call, program_of
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.survey import Survey
from mora_jax._jax.traces import split_static
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.combined import with_ms
from mora_jax._tree.paths import named_leaves
from mora_jax._tree.plan import Plan
from mora_jax.linen._bound import layer_calls, params_of


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, by what each of its layers computes.

    A call of the model is traced, or several. Kernels may have any number of axes, and
    be stacked (`nn.scan`, `nn.vmap`). The default targets are the kernels of all dense
    layers, except those whose names say head, classifier, embedding and the like.

    Args:
      model: Any Linen module.
      variables: The model's variables, arrays or shapes.
      config: The kernels to adapt and the settings; None for the defaults.
      *args: The inputs of a call, arrays or shapes, as for `model.apply`.
      calls: More calls to trace, such as of another method or with `train=False`.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError, ValueError: As `mora_jax.plan`; a target whose layer class is not known
        (see `register_layer`), or whose layer computes something that its rule does not
        say; an embedding that is read outside of its layer.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> plan = mora_jax.linen.plan(model, variables, mora_jax.MoRAConfig(rank=2), x)
      >>> {path: spec.axes for path, spec in plan.items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, variables, config, *inputs)")
    if args or kwargs or not calls:
        calls = (Call(*args, **kwargs), *calls)
    params, survey = params_of(variables), Survey()
    leaves, modules = named_leaves(params), flatten_dict(dict(params))
    excluded = matching("exclude", config.exclude, leaves)
    # The parts of a quantized kernel are in no module.
    kernels: dict[str, None] = {
        name: None
        for name, (path, leaf) in leaves.items()
        if name not in excluded and leaf.ndim > 1 and path in modules
    }
    for call in calls:
        given = model, variables, call.args, call.kwargs, kernels
        survey.trace(functools.partial(program, *given))
    return plan_surveyed(params, config, survey)


def program(
    model: nn.Module,
    variables: Any,
    args: Any,
    kwargs: Any,
    kernels: Mapping[str, AdapterSpec | None],
    survey: Survey | None,
) -> Jaxpr:
    """The program of a call, whose first inputs are the params, and M's if any.

    With a survey, which it fills in, the layers of `kernels` are marked, and those that
    have a spec have an M. Without a survey it is the program of the base.
    """
    leaves, shape_of = named_leaves(params_of(variables)), jax.ShapeDtypeStruct
    ms = {} if survey is None else dict(kernels)
    ms = {n: s and shape_of(s.shape, s.param_dtype) for n, s in ms.items()}
    known = survey or Survey()

    def see(module: Any) -> None:
        known.classes.setdefault("/".join(module.scope.path), type(module))

    def record(call: LayerCall, adapter: Adapter) -> Callable[[], Any]:
        _, name = adapter.spec
        return functools.partial(known.record_call, name, call, adapter.m)

    # A mark that no earlier call had. Otherwise nn.jit would use an earlier trace
    # again, and none of its calls would be recorded.
    mark = object()

    def run(tree: Any, others: Any, args: Any, kwargs: Any) -> Any:
        params, values = tree
        bound = {}
        for name, m in zip(ms, values, strict=True):
            *parents, own = leaves[name][0]
            bound[(*parents, own + SUFFIX)] = Adapter(m, (mark, name))
        variables = {**others, "params": with_ms(params, bound)}
        with nn.intercept_methods(layer_calls(record, see)):
            result = model.apply(variables, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result  # the params in it are not computed
        return output, {k: value for k, value in updated.items() if k != "params"}

    others = {name: value for name, value in variables.items() if name != "params"}
    known.leaves = {name: leaf for name, (_, leaf) in leaves.items()} | {
        name + SUFFIX: m for name, m in ms.items() if m is not None
    }
    groups = (False, known.leaves), (None, others), (True, (args, kwargs))
    known.batched = [kind for kind, group in groups for _ in split_static(group)[0]]
    tree = variables["params"], list(ms.values())
    return program_of(run, tree, others, args, kwargs)


def check_model(model: Any) -> None:
    """Raise unless `model` is a Linen module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a flax.linen.Module, got {got}")
