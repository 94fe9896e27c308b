"""A plan from what a model's layers do."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from mora_jax.config import MoRAConfig
from mora_jax.contraction import Contraction
from mora_jax.layers import find_rule
from mora_jax.linen._bound import Bound, check_model, params_of
from mora_jax.planning import Plan, named_leaves
from mora_jax.planning import plan as plan_params
from mora_jax.spec import SUFFIX
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
      TypeError, ValueError: as `mora_jax.plan`; and a target whose layer class is not
        known (see `register_layer`).

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, linen
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> plan = linen.plan(model, variables, MoRAConfig(rank=2), x)
      >>> {spec.name: spec.axes for spec in plan}  # doctest: +NORMALIZE_WHITESPACE
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    params = params_of(variables)
    recorder = _Recorder()
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(variables: Any, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        merged = [
            next(rest) if is_array else leaf
            for leaf, is_array in zip(leaves, traced, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, merged)
        model.apply(variables, *args, **kwargs)

    arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
    # Beside each kernel a mark of its own that no earlier call had, or nn.jit would
    # take a trace that it remembers, and the recorder would see nothing of it.
    kernels = [path for path, leaf in named_leaves(params).values() if leaf.ndim > 1]
    marks = {
        (*path[:-1], path[-1] + SUFFIX): Bound(None, (recorder, path))
        for path in kernels
    }
    marked = {**variables, "params": combine(params, nest(marks))}
    with nn.intercept_methods(recorder):
        jax.eval_shape(call, marked, arrays)
    return plan_params(params, config, axes=recorder.axes(params))


class _Recorder:
    """Notes the kernel's axes in each layer of a known class."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, rule = context.module, find_rule(type(context.module))
        y = method(*args, **kwargs)
        if rule and context.method_name == rule.method and module.scope is not None:
            equation, x = rule.read(module, args, kwargs)
            contraction = Contraction.parse(equation, x.ndim)
            kernel = module.get_variable("params", rule.kernel)
            mark = module.get_variable("params", rule.kernel + SUFFIX)
            if isinstance(mark, Bound):
                _, path = mark.spec
                self.seen[path] = contraction.axes, tuple(nn.unbox(kernel).shape)
        return y

    def axes(self, params: Any) -> dict[str, str]:
        """{path: axes} with the stack axes that lifted transforms take off."""
        axes = {}
        for path, (inner, shape) in self.seen.items():
            kernel: Any = params
            for key in path:
                kernel = kernel[key]
            whole = tuple(nn.unbox(kernel).shape)
            lead = len(whole) - len(shape)
            if whole[lead:] != shape:
                raise ValueError(
                    f"{'/'.join(path)} of shape {whole} is used as {shape}: stacked "
                    "axes must come first (variable_axes={'params': 0})"
                )
            axes["/".join(path)] = "s" * lead + inner
        return axes
