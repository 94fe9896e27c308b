"""A plan from what a model's layers do."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mora_jax.config import MoRAConfig, check_config
from mora_jax.layers import find_rules
from mora_jax.linen._bound import Bound, check_model, params_of
from mora_jax.paths import named_leaves
from mora_jax.planning import Plan, plan_products
from mora_jax.products import Product
from mora_jax.spec import SUFFIX
from mora_jax.tracing import blank, dependencies, note, refuse_half_adapted
from mora_jax.tree import combine, nest


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None,
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, which it traces to see what each layer does.

    So kernels of any number of axes are understood, scanned ones too, and the default
    targets are the kernels of all layers of a known class, but for those whose names
    say head, classifier, embedding and the like.

    Args:
      model: any Linen module.
      variables: its variables, arrays or shapes.
      config: what to adapt, and how.
      *args: arguments of a call, arrays or shapes, as for `model.apply`.
      **kwargs: the same.

    Raises:
      TypeError, ValueError: as `mora_jax.plan`; a target whose layer class is not known
        (see `register_layer`); an embedding that is read outside of its layer.

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, linen
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> plan = linen.plan(model, variables, MoRAConfig(rank=2), x)
      >>> {spec.name: spec.axes for spec in plan.specs}  # doctest: +NORMALIZE_WHITESPACE
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, variables, config, *inputs)")
    params = params_of(variables)
    leaves = named_leaves(params)
    recorder = _Recorder()
    # Beside each kernel a mark of its own that no earlier call had, or nn.jit would
    # take a trace that it remembers, and the recorder would see nothing of it.
    marks = {
        (*path[:-1], path[-1] + SUFFIX): Bound(None, (recorder, name))
        for name, (path, leaf) in leaves.items()
        if leaf.ndim > 1
    }
    rest = {name: value for name, value in variables.items() if name != "params"}

    def call(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        variables = {**rest, "params": combine(params, nest(marks))}
        with nn.intercept_methods(recorder):
            return model.apply(variables, *args, **kwargs)

    elsewhere = dependencies(call, leaves, params, rest, args, kwargs)
    for name, shape in recorder.shapes.items():
        whole = tuple(leaves[name][1].shape)
        if whole[len(whole) - len(shape) :] != shape:
            raise ValueError(
                f"{name} of shape {whole} is used as {shape}: stacked axes must come "
                "first (variable_axes={'params': 0})"
            )
    chosen = plan_products(params, config, recorder.products)
    return refuse_half_adapted(chosen, recorder.products, elsewhere)


class _Recorder:
    """Notes what each layer of a known class computes, and blanks its output."""

    def __init__(self) -> None:
        self.products: dict[str, Product] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, y = context.module, method(*args, **kwargs)
        rule = find_rules(type(module)).get(context.method_name)
        if rule is None or module.scope is None:
            return y
        own = rule.name(module)
        mark = module.get_variable("params", own + SUFFIX)
        if not isinstance(mark, Bound):
            return y
        _, name = mark.spec
        x = note(self.products, name, rule, module, args, kwargs)
        kernel = nn.unbox(module.get_variable("params", own))
        self.shapes[name] = tuple(kernel.shape)
        return blank(y, x)
