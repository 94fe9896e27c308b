"""A plan of a model, by what its layers compute."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict

from mora_jax._common.types import Path
from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.survey import Survey
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.combined import with_ms
from mora_jax._tree.paths import named_leaves
from mora_jax.linen._bound import BoundAdapter, layer_calls, params_of


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, by what each of its layers computes.

    A call of the model is traced. Kernels may have any number of axes, and be stacked
    (`nn.scan`, `nn.vmap`). The default targets are the kernels of all dense layers,
    except those whose names say head, classifier, embedding and the like.

    Args:
      model: Any Linen module.
      variables: The model's variables, arrays or shapes.
      config: The kernels to adapt and the settings; None for the defaults.
      *args: The inputs of a call, arrays or shapes, as for `model.apply`.
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
    params = params_of(variables)
    leaves, modules, survey = named_leaves(params), flatten_dict(dict(params)), Survey()

    def see(module: nn.Module, scope: Path, *_: Any) -> None:
        survey.classes.setdefault("/".join(scope), type(module).__name__)

    def record(call: LayerCall, adapter: BoundAdapter) -> Any:
        _, name = adapter.spec
        return survey.record_call(name, call)

    def recording(*call: Any) -> Callable[[], Any]:
        return functools.partial(record, *call)

    # Each kernel gets a mark next to it that no earlier call had. Otherwise nn.jit
    # would use an earlier trace again, and none of its calls would be recorded. The
    # parts of a quantized kernel are in no module, and get none.
    mark = object()
    marks = {
        (*path[:-1], path[-1] + SUFFIX): BoundAdapter(None, (mark, name))
        for name, (path, leaf) in leaves.items()
        if leaf.ndim > 1 and path in modules
    }

    def call(params: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        variables = {**variables, "params": with_ms(params, marks)}
        with nn.intercept_methods(layer_calls(see, recording)):
            return model.apply(variables, *args, **kwargs)

    others = {name: value for name, value in variables.items() if name != "params"}
    survey.trace(call, leaves, params, others, args, kwargs)
    return plan_surveyed(params, config, survey)


def check_model(model: Any) -> None:
    """Raise unless `model` is a Linen module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a flax.linen.Module, got {got}")
