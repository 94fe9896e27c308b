"""The adapters of a model as a tree, which is the same for a Linen twin."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array
from mora_jax._common.types import Path
from mora_jax._common.warnings import warn
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._layer.per_row import Selected
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.paths import (
    Tree,
    adapters_in,
    named_leaves,
    nest,
    place_of,
    unboxed,
)
from mora_jax._tree.plan import Plan, refuse_other_kernels
from mora_jax.nnx._param import (
    DROPOUT,
    MoRAParam,
    hold_dropout,
    named_sharding,
    refuse_dropout,
)


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


HeldAdapter = tuple[nnx.Module, MoRAParam, Adapter]
"""A module, its variable, and the adapter there."""


def held_adapters(model: nnx.Module) -> dict[Path, HeldAdapter]:
    """The adapters in a model by paths of the base's arrays, in the order of these."""
    found: dict[Path, HeldAdapter] = {}
    for module, path, m in attributes(model, MoRAParam):
        own = Adapter(unboxed(m), m.spec)
        kernel = (*path[:-1], path[-1].removesuffix(SUFFIX))
        found[kernel] = module, m, check_adapter("/".join(path), own, by_row=True)
    if not any(isinstance(a.spec, AdapterSpec) for *_, a in found.values()):
        raise ValueError("model has no adapters; see mora_jax.nnx.wrap")
    return dict(sorted(found.items(), key=lambda item: item[0]))


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
    parts = {path: adapter.spec for path, (*_, adapter) in held_adapters(model).items()}
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))
    others = (s for s in parts.values() if not isinstance(s, AdapterSpec))
    size += sum(spec.parameters for spec in others)
    return Plan(parts, size, traced=True)  # `wrap` refused the rest


def adapters(model: nnx.Module) -> Tree:
    """The adapters of a model, also those of arrays that train themselves.

    Returns:
      Nested dicts, as `mora_jax.init` makes them and as `linen.wrap` takes them.

    Raises:
      ValueError: `model` lacks adapters.

    Example: see `wrap`.
    """
    found = held_adapters(model).items()
    return nest({place_of(path, a.spec): a for path, (*_, a) in found})


def set_adapters(
    model: nnx.Module, adapters: Any, *, any_base: bool = False, seed: int = 0
) -> None:
    """Put adapters into an adapted model: of a file, a Linen twin or another model.

    The model computes what they say, also with another operator or rank than before.

    Args:
      model: An adapted model, as `wrap` makes it. It is changed in place.
      adapters: Nested dicts, as `mora_jax.init` and `nnx.adapters` make them; or
        `nnx.state(another_model, MoRAParam)`; or what `serving.select` returns, an
        adapter for each row of later batches. An M that is not committed to a device
        goes where the model has its M.
      any_base: True to take adapters that were trained on other kernels as well.
      seed: As in `wrap`, where the new adapters have dropout and the old had none. The
        model then drops until `model.eval()`, and a `MoRAWarning` says so.

    Raises:
      TypeError: The adapters are not adapters of arrays.
      ValueError: The model lacks adapters; or the new ones are of other kernels, have
        dropout where methods read a kernel, or were trained on another base and
        `any_base` is False.

    Example: see `wrap`.
    """
    there, found = held_adapters(model), adapters_in(adapters, by_row=True)
    refuse_other_kernels(found.specs, plan_of(model))
    if not any_base:
        check_base(found, named_leaves(parameters(model)))
    # All of them are checked before the first is set.
    new = {path: _fitting(path, there[path], a) for path, a in found.items()}
    if any([_set(*there[path], new[path], seed) for path in there]):
        warn(
            "the new adapters have dropout, which the old ones lacked: the model drops "
            "until model.eval()"
        )


def _fitting(path: Path, there: HeldAdapter, adapter: Adapter) -> Adapter:
    """The adapter as its place in a model takes it."""
    (module, variable, old), (m, spec) = there, (adapter.m, adapter.spec)
    if not isinstance(m, Selected):
        m = as_jax_array("/".join(place_of(path, spec)), m)
        if not isinstance(spec, AdapterSpec):  # the model knows its dtypes
            m, spec = m.astype(old.spec.dtype), old.spec
        sharding = named_sharding(variable)
        if sharding is not None and not isinstance(m, Tracer) and not m.committed:
            m = jax.device_put(m, sharding)
    if hasattr(module, "plain_class"):  # qwix drops in another way
        refuse_dropout(module, "/".join(path), spec)
    return Adapter(m, spec)


def _set(
    module: nnx.Module, variable: MoRAParam, old: Adapter, new: Adapter, seed: int
) -> bool:
    """Put an adapter into its variable; True if the module begins to drop."""
    m, spec = new.m, new.spec
    by_row = any(isinstance(one, Selected) for one in (m, old.m))
    if spec == old.spec and not by_row:
        variable[...] = m  # which keeps the variable of a trace
        return False
    # Of one layer where the model has the variable for one.
    spec = spec.with_stack(variable.spec.stack_shape)
    drops = spec.dropout > 0 and not hasattr(module, DROPOUT)
    if drops:
        hold_dropout(module, spec, seed)
    variable.copy_from(variable.replace(m, spec=spec))  # `[...]` sets arrays alone
    return drops
