"""The adapters of a model as a tree, which is the same for a Linen twin."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array
from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected
from mora_jax._plan.plan import Plan, refuse_other_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Items
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.paths import adapter_path, named_leaves, unboxed
from mora_jax.nnx._param import MoRAParam, TrainedParam, named_sharding


def named_modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """The modules inside a model by path, each of them once."""
    if not isinstance(model, nnx.Module):
        is_class = isinstance(model, type)
        got = f"the class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(f"model must be a flax.nnx.Module, got {got}")
    for path, module in nnx.iter_modules(model):
        yield tuple(map(str, path)), module


def attributes(model: nnx.Module, kinds: Any) -> Iterator[tuple[nnx.Module, Path, Any]]:
    """(module, path, value) of each attribute of `kinds` in the modules of a model."""
    # As lists, since the caller may remove an attribute that it is given.
    for path, module in list(named_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, kinds):
                yield module, (*path, name), value


def adapter_variables(model: nnx.Module) -> tuple[list[tuple[AdapterSpec, Any]], Items]:
    """(present spec, variable) of each M, and of each array that trains, by path."""
    ms, copies = [], []
    for _, path, m in attributes(model, MoRAParam):
        if isinstance(m, TrainedParam):
            spec = dataclasses.replace(m.spec, path=path, shape=tuple(m.shape))
            copies.append((spec, m))
        else:
            # The stack is M's and not the kernel's, which may be quantized by now.
            kernel = (*path[:-1], path[-1].removesuffix(SUFFIX))
            ms.append((m.spec.stacked(m.shape, kernel), m))
    if not ms:
        raise ValueError("model has no adapters; see mora_jax.nnx.wrap")
    for pairs in (ms, copies):
        pairs.sort(key=lambda pair: pair[0].path)
    return ms, copies


def traceable(
    model: nnx.Module, method: str = "__call__"
) -> tuple[Callable[[Any, Any, Any], Any], Any]:
    """A method as a function of (state, args, kwargs), and the model's state."""
    graph, state = nnx.split(model)

    def call(state: Any, args: Any, kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, state), method)(*args, **kwargs)

    return call, state


def parameters(model: nnx.Module) -> Tree:
    """The parameters of the base as nested dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam))))


def plan_of(model: nnx.Module) -> Plan:
    """The plan that an adapted model follows.

    Raises:
      ValueError: `model` lacks adapters.

    Example: see `wrap`.
    """
    ms, copies = adapter_variables(model)
    specs, trained = tuple(s for s, _ in ms), tuple(array for array, _ in copies)
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))
    size += sum(array.parameters for array in trained)
    return Plan(specs, size, traced=True, trained=trained)  # `wrap` refused the rest


def adapters(model: nnx.Module) -> Tree:
    """The M's of a model, and the arrays that train themselves, under their own names.

    Returns:
      Nested dicts, as `mora_jax.init` makes them and as `linen.wrap` takes them.

    Raises:
      ValueError: `model` lacks adapters.

    Example: see `wrap`.
    """
    ms, copies = adapter_variables(model)
    arrays = {adapter_path(spec): unboxed(m) for spec, m in ms}
    return nest(arrays | {array.path: unboxed(copy) for array, copy in copies})


def set_adapters(
    model: nnx.Module,
    adapters: Any,
    plan: Plan | str | None = None,
    *,
    any_base: bool = False,
) -> None:
    """Put M's into an adapted model: of a file, a Linen twin or another model.

    Args:
      model: An adapted model, as `wrap` makes it. It is changed in place.
      adapters: Nested dicts, as `mora_jax.init` and `nnx.adapters` make them; or
        `nnx.state(another_model, MoRAParam)`, whose M's say what they were made for; or
        what `serving.select` returns, an adapter for each row of later batches. An M
        that is not committed to a device goes where the model has its M.
      plan: The plan that the adapters were made for, or its `digest()`. Nested dicts
        hold numbers alone, so without it nothing shows whether they are for the
        operators, seeds and alphas of this model. A plan of `load` also knows the base.
      any_base: True to take adapters that were trained on other kernels as well.

    Raises:
      TypeError: The adapters are not arrays, or `plan` is neither a plan nor a digest.
      ValueError: The model lacks adapters; or the new ones do not fit its plan, were
        made for another plan, or were trained on another base and `any_base` is False.

    Example: see `wrap`.
    """
    model_plan = plan_of(model)
    if isinstance(plan, Plan):
        refuse_other_plan(plan, model_plan)
        if not any_base:
            leaves = named_leaves(parameters(model))
            check_base(plan.specs, {name: leaf for name, (_, leaf) in leaves.items()})
    elif isinstance(plan, str) and plan != (digest := model_plan.digest()):
        raise ValueError(
            "the adapters were made for another plan than the model's: its digest is "
            f"{digest}, got {plan[:64]!r} (io.plan_from_json makes a plan of its JSON)"
        )
    elif not isinstance(plan, str | None):
        raise TypeError(f"plan must be a Plan or its digest, got {type(plan).__name__}")
    items = adapter_items(adapters, model_plan, by_row=True)
    named = [(spec.name + SUFFIX, m) for spec, m in items]
    named += [(a.name, copy) for a, copy in trained_items(adapters, model_plan)]
    # All of them are checked before the first is set.
    new = [m if isinstance(m, Selected) else as_jax_array(name, m) for name, m in named]
    ms, copies = adapter_variables(model)
    for (_, variable), m in zip([*ms, *copies], new, strict=True):
        if isinstance(m, Selected) or isinstance(unboxed(variable), Selected):
            variable.copy_from(variable.replace(m))  # `[...]` sets arrays alone
            continue
        sharding = named_sharding(variable)
        if sharding is not None and not isinstance(m, Tracer) and not m.committed:
            m = jax.device_put(m, sharding)
        variable[...] = m
