"""A plan of a model, by what its layers compute."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax.extend.core import Jaxpr

from mora_jax._common.suggestions import matching
from mora_jax._common.types import Path
from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.calls import Call, number_of_arrays, program_of
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.survey import Survey, marked_program
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.combined import with_ms
from mora_jax._tree.paths import named_leaves
from mora_jax.linen._bound import BoundAdapter, layer_calls, params_of


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
    excluded = matching("exclude", config.exclude, named_leaves(params))
    for call in calls:
        given = model, variables, call.args, call.kwargs
        own = functools.partial(program, *given, excluded=excluded)
        survey.add(marked_program(own, survey, "its kernels"))
    return plan_surveyed(params, config, survey)


def program(
    model: nn.Module,
    variables: Any,
    args: Any,
    kwargs: Any,
    survey: Survey | None,
    specs: Sequence[AdapterSpec] | None = None,
    excluded: Collection[str] = (),
) -> Jaxpr:
    """The program of a call, whose first inputs are the params, and M's if any.

    With a survey, which it fills in, layers are marked: all that are not `excluded`, or
    the ones that `specs` adapt, which then have an M. Without a survey it is the
    program of the base.
    """
    params = params_of(variables)
    leaves, modules = named_leaves(params), flatten_dict(dict(params))
    ms: dict[Path, Any] = {}
    if survey is not None and specs is None:
        # The parts of a quantized kernel are in no module.
        kernels = (leaves[n] for n in leaves if n not in excluded)
        ms = {path: None for path, leaf in kernels if leaf.ndim > 1 and path in modules}
    elif survey is not None and specs is not None:
        shape_of = jax.ShapeDtypeStruct
        ms = {spec.path: shape_of(spec.shape, spec.param_dtype) for spec in specs}

    def see(module: Any) -> None:
        if survey is not None:
            name = "/".join(module.scope.path)
            survey.classes.setdefault(name, type(module))

    def record(call: LayerCall, adapter: BoundAdapter) -> Any:
        _, name = adapter.spec
        assert survey is not None
        return survey.record_call(name, call, adapter.m)

    def recording(*call: Any) -> Callable[[], Any]:
        return functools.partial(record, *call)

    # A mark that no earlier call had. Otherwise nn.jit would use an earlier trace
    # again, and none of its calls would be recorded.
    mark = object()

    def run(tree: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        params, values = tree
        bound = {
            (*path[:-1], path[-1] + SUFFIX): BoundAdapter(m, (mark, "/".join(path)))
            for path, m in zip(ms, values, strict=True)
        }
        variables = {**variables, "params": with_ms(params, bound)}
        with nn.intercept_methods(layer_calls(recording, see)):
            result = model.apply(variables, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result  # the params in it are not computed
        return output, {k: value for k, value in updated.items() if k != "params"}

    others = {name: value for name, value in variables.items() if name != "params"}
    if survey is not None:
        survey.leaves = {name: leaf for name, (_, leaf) in leaves.items()} | {
            f"{'/'.join(path)}{SUFFIX}": m for path, m in ms.items() if m is not None
        }
        counts = len(survey.leaves), number_of_arrays(others), number_of_arrays(args)
        batched = zip((False, None, True), counts, strict=True)
        survey.batched = [has_rows for has_rows, count in batched for _ in range(count)]
        for name in sorted(kwargs):
            count = number_of_arrays(kwargs[name])
            survey.batched += [name != "rngs"] * count
    return program_of(run, (params, list(ms.values())), others, args, kwargs)


def check_model(model: Any) -> None:
    """Raise unless `model` is a Linen module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a flax.linen.Module, got {got}")
