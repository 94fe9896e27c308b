"""A plan of a model, by what its layers compute."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mora_jax._common.types import Path
from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.layer_rules import rules_of
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.survey import Survey
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.combined import with_ms
from mora_jax._tree.paths import named_leaves
from mora_jax.linen._bound import (
    BoundAdapter,
    adapters_of,
    check_model,
    params_of,
)


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, by what each of its layers computes.

    The model is traced with the inputs of a call. Kernels of any number of axes are
    understood, also stacked ones (`nn.scan`, `nn.vmap`). The default targets are the
    kernels of all dense layers, except those whose names say head, classifier,
    embedding and the like.

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

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import mora_jax
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> config = mora_jax.MoRAConfig(rank=2)
      >>> plan = mora_jax.linen.plan(model, variables, config, x)
      >>> {path: spec.axes for path, spec in plan.items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, variables, config, *inputs)")
    params = params_of(variables)
    leaves = named_leaves(params)
    recorder = _Recorder()
    # Each kernel gets a mark next to it that no earlier call had. Otherwise nn.jit
    # would use an earlier trace again, and the recorder would see none of its calls.
    marks = {
        (*path[:-1], path[-1] + SUFFIX): BoundAdapter(None, (recorder, name))
        for name, (path, leaf) in leaves.items()
        if leaf.ndim > 1 and _in_a_module(params, path)
    }

    def call(params: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        variables = {**variables, "params": with_ms(params, marks)}
        with nn.intercept_methods(recorder):
            return model.apply(variables, *args, **kwargs)

    others = {name: value for name, value in variables.items() if name != "params"}
    recorder.survey.trace(call, leaves, params, others, args, kwargs)
    for name, shape in recorder.shapes.items():
        whole = tuple(leaves[name][1].shape)
        if whole[len(whole) - len(shape) :] != shape:
            raise ValueError(
                f"{name} of shape {whole} is used as {shape}: stacked axes must come "
                "first (variable_axes={'params': 0})"
            )
    return plan_surveyed(params, config, recorder.survey)


def _in_a_module(params: Any, path: Path) -> bool:
    """True if `path` leads through modules alone: not into a quantized kernel."""
    for key in path[:-1]:
        params = params.get(key) if isinstance(params, Mapping) else None
    return isinstance(params, Mapping)


class _Recorder:
    """Interceptor that records the product of each layer of a known class."""

    def __init__(self) -> None:
        self.survey = Survey()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.running: list[nn.Module] = []

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        if module.scope is None:
            return method(*args, **kwargs)
        path = "/".join(module.scope.path)
        self.survey.classes.setdefault(path, type(module).__name__)
        rule = rules_of(type(module)).get(context.method_name)
        # A rule covers all that its method calls of the same layer.
        if rule is None or any(module is caller for caller in self.running):
            return method(*args, **kwargs)
        kernel = rule.name(module)
        if (adapter := adapters_of(module).get(kernel)) is None:
            return method(*args, **kwargs)
        _, name = adapter.spec
        self.running.append(module)
        try:
            call = LayerCall(rule, module, method, args, kwargs)
            y = self.survey.record_call(name, call)
        finally:
            self.running.pop()
        array = nn.unbox(module.get_variable("params", kernel))
        self.shapes[name] = tuple(array.shape)
        return y
