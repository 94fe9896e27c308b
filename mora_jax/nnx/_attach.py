"""Adapters beside the kernels of an NNX model, and out of it again."""

from collections.abc import Iterable
from typing import Any, TypeVar

from flax import nnx

from mora_jax._flax.layer_rules import folded_kernels, planning_rules, unknown_use
from mora_jax._flax.survey import refuse_untraced
from mora_jax._layer.ways import check_product
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax.nnx._classes import adapted_class, plain_class, set_class
from mora_jax.nnx._param import DROPOUT, MoRAParam, TrainedParam, hold_adapter
from mora_jax.nnx._state import attributes, named_modules

Model = TypeVar("Model", bound=nnx.Module)


def attached(
    model: Model, plan: Plan, ms: Iterable[tuple[AdapterSpec, Any]], seed: int = 0
) -> Model:
    """A copy of a plain model, in which layers have their M's and add their deltas."""
    model = nnx.clone(model)
    modules = dict(named_modules(model))
    for spec, m in ms:
        module: Any = modules.get(spec.path[:-1])
        kernel = getattr(module, spec.path[-1], None)
        shape = tuple(kernel.shape) if isinstance(kernel, nnx.Variable) else None
        if shape != spec.kernel_shape:
            raise ValueError(
                f"the plan has a kernel of shape {spec.kernel_shape} at {spec.name!r}, "
                f"the model has {shape}"
            )
        _check_layer(module, spec, plan.traced)
        set_class(module, adapted_class(plain_class(module)))
        hold_adapter(module, spec, m, seed)
    return model


def _check_layer(module: nnx.Module, spec: AdapterSpec, traced: bool) -> None:
    """Raise if an adapter would change nothing in a layer, or something else."""
    cls = plain_class(module)
    if (rule := planning_rules(module).get(spec.path[-1])) is None:
        raise unknown_use(spec.name, cls, "__call__")
    product = rule.product(module)
    if not traced:
        refuse_untraced(spec.name, product)
    if product is not None:
        check_product(spec, product)
    if folded_kernels(cls) and spec.dropout > 0:
        raise ValueError(
            f"{spec.name}: dropout must be 0 for a kernel that methods read "
            f"(products.Folded), got {spec.dropout}; say so in overrides"
        )


def detached(model: Model) -> Model:
    """A copy without adapters, in which the numbers of trained arrays stay."""
    model = nnx.clone(model)
    for module, (*_, name), value in attributes(model, MoRAParam | nnx.Dropout):
        if isinstance(value, TrainedParam):
            setattr(module, name, value.plain())
        elif isinstance(value, MoRAParam) or name == DROPOUT:
            delattr(module, name)
    for _, module in named_modules(model):
        set_class(module, plain_class(module))
    return model
