"""A plan of a model, by what its layers compute."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr

from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.calls import Call, program_of
from mora_jax._flax.layer_rules import folded_kernels, planning_rules
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.survey import Survey
from mora_jax._jax.traces import split_static
from mora_jax._layer.per_row import Selected
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.paths import named_leaves, unboxed
from mora_jax._tree.plan import Plan
from mora_jax.nnx._classes import derived, detached, plain_class, set_class
from mora_jax.nnx._param import MoRAParam, TrainedParam, held
from mora_jax.nnx._state import attributes, named_modules, parameters, traceable


def plan(
    model: nnx.Module,
    config: MoRAConfig | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for an NNX model, by what each of its layers computes.

    Kernels and default targets are those that `linen.plan` says.

    Args:
      model: Any NNX module, of arrays or (by `nnx.eval_shape`) of shapes.
      config: As in `linen.plan`.
      *args: Inputs of a call to trace, arrays or shapes. It alone tells the equation
        that an `nnx.Einsum` gets in calls, and other uses of embeddings (tied heads).
      calls: As in `linen.plan`.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError, ValueError: As `linen.plan`; a module or kernel that the model holds
        twice; a model with adapters.

    Example::

      >>> import mora_jax
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> {path: spec.axes for path, spec in mora_jax.nnx.plan(model).items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, config, *inputs)")
    classes = {"/".join(path): type(m) for path, m in named_modules(model)}
    params, survey = parameters(model), Survey(classes=classes)
    for module, path, variable in attributes(model, nnx.Variable):
        rules, name = planning_rules(module), "/".join(path)
        if (rule := rules.get(path[-1])) is None:
            if rules and not folded_kernels(type(module)):  # or methods may do anything
                survey.non_kernels.add(name)
        elif not isinstance(variable, nnx.Param):
            survey.no_params[name] = type(variable).__name__
        elif product := rule.product(module):
            survey.products[name] = product
    if args or kwargs:
        calls = (Call(*args, **kwargs), *calls)
    for call in calls:
        own = functools.partial(program, model, "__call__", call.args, call.kwargs)
        survey.trace(own)
    chosen = plan_surveyed(params, config, survey)
    refuse_unfit(model, chosen)
    return chosen


def refuse_unfit(model: nnx.Module, plan: Plan) -> None:
    """Raise if an array of `plan` is at two places of the model."""
    arrays = [*plan, *plan.trained]
    for paths in nnx.find_duplicates(model):
        names = ["/".join(map(str, path)) for path in paths]
        for array in arrays:
            # A shared module has all of its arrays twice.
            if any(array == name or array.startswith(f"{name}/") for name in names):
                raise ValueError(
                    f"{array} is shared: the model holds {names[0]!r} also as "
                    f"{names[1]!r}; exclude it, take it out of train, or copy it"
                )


def check_model(model: Any) -> None:
    """Raise unless `model` is an NNX module without adapters."""
    for _, path, _ in attributes(model, MoRAParam):
        raise ValueError(f"model has adapters already, the first at {'/'.join(path)!r}")


def program(
    model: nnx.Module, method: str, args: Any, kwargs: Any, survey: Survey | None
) -> Jaxpr:
    """The program of a call, whose first inputs are the arrays of the model.

    With a survey, which it fills in, layers are marked: those that have an M, or all of
    a plain model. Without a survey it is the program of the base.
    """
    suffix = SUFFIX if any(attributes(model, MoRAParam)) else ""
    twin = detached(model) if survey is None else nnx.clone(model)
    for path, layer in list(named_modules(twin)) if survey is not None else ():
        names = [name + suffix for name in planning_rules(layer)]
        variables = (getattr(layer, name, None) for name in names)
        set_class(layer, plain_class(layer))
        if survey is not None and any(isinstance(v, nnx.Variable) for v in variables):
            prefix = "".join(f"{key}/" for key in path)
            set_class(layer, _marked_class(type(layer), prefix, survey))
    for module, (*_, key), m in attributes(twin, MoRAParam):
        if isinstance(m, TrainedParam):
            setattr(module, key, m.plain())
        elif isinstance(unboxed(m), Selected):  # one for each row: any will do
            m.copy_from(m.replace(jnp.zeros(m.shape, m.dtype)))
    call, state = traceable(twin, method)
    if survey is not None:
        leaves = named_leaves(nnx.to_pure_dict(state))
        survey.leaves = {name: leaf for name, (_, leaf) in leaves.items()}
        parameters = set(named_leaves(nnx.to_pure_dict(nnx.state(twin, nnx.Param))))
        batched = [False if name in parameters else None for name in leaves]
        inputs, _ = split_static((args, kwargs))
        survey.batched = [*batched, *[True] * len(inputs)]
    return program_of(call, state, args, kwargs)


def _marked_class(cls: type, prefix: str, survey: Survey) -> type:
    """The class of a layer whose calls `survey` records; `prefix` is its path."""

    def run(layer: nnx.Module, call: LayerCall) -> Any:
        name = call.rule.name(call.module)
        adapter = held(layer, name)
        return survey.record_call(prefix + name, call, adapter and adapter.m)

    def read(layer: nnx.Module, name: str, kernel: Any) -> Any:
        adapter = held(layer, name)
        own = prefix + name, folded_kernels(cls)[name], cls.__name__
        return survey.record_read(*own, kernel, adapter and adapter.m)

    return derived(cls, run, read)
