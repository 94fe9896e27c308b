"""The adapters of a model as a tree: the same that a Linen twin has."""

import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding

from mora_jax._adapters import Tree, adapter_items, nest
from mora_jax._dense import as_jax_array
from mora_jax._paths import Path, adapter_path, unboxed
from mora_jax._plan import Plan, refuse_other_plan
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax.nnx._param import MoRAParam


def layers(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Modules by path, each one once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield tuple(map(str, path)), node


def variables(model: nnx.Module) -> list[tuple[AdapterSpec, MoRAParam]]:
    """Each M of an adapted model, with its spec as of where it is now."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    found = []
    for path, module in layers(model):
        for name, m in vars(module).items():
            if isinstance(m, MoRAParam):
                # By M and not by its kernel, which may be quantized by now.
                stack = tuple(m.shape[: m.ndim - len(m.spec.shape)])
                kernel = (*path, name.removesuffix(SUFFIX))
                found.append((m.spec.stacked(stack, kernel), m))
    if not found:
        raise ValueError("model has no adapters; see mora_jax.nnx.wrap")
    return sorted(found, key=lambda pair: pair[0].path)


def parameters(model: nnx.Module) -> Tree:
    """The base's parameters as nested dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam))))


def named_sharding(variable: nnx.Variable[Any]) -> NamedSharding | None:
    """How a mesh has the array of a variable; None in a trace, and on one device."""
    (value,) = jax.tree.leaves(variable)
    if not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return None
    return value.sharding if isinstance(value.sharding, NamedSharding) else None


def plan_of(model: nnx.Module) -> Plan:
    """The plan that an adapted model follows.

    Raises:
      ValueError: `model` has no adapters.

    Example::

      >>> from flax import nnx
      >>> from mora_jax.nnx import plan, plan_of, wrap
      >>> model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> plan_of(wrap(model)) == plan(model)
      True
    """
    specs = tuple(spec for spec, _ in variables(model))
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))
    return Plan(specs, size, traced=True)  # or it would not have been attached


def adapters(model: nnx.Module) -> Tree:
    """The M's of a model: nested dicts, as `init` makes them and Linen uses them.

    Raises:
      ValueError: `model` has no adapters.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax.nnx import adapters, wrap
      >>> model = wrap(nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0))))
      >>> jax.tree.map(jnp.shape, adapters(model))
      {'layers': {'0': {'kernel_mora': (16, 16)}}}
    """
    return nest({adapter_path(spec): unboxed(m) for spec, m in variables(model)})


def set_adapters(
    model: nnx.Module, adapters: Any, plan: Plan | str | None = None
) -> None:
    """Put M's, from a file, a Linen twin or another model, into an adapted model.

    Args:
      model: as `wrap` makes it; changed in place.
      adapters: nested dicts, as `init` and `nnx.adapters` make them, or another model's
        `nnx.state(other, MoRAParam)`, whose M's say what they were made for. Those that
        are on no device in particular go where the model has its M.
      plan: what the adapters were made for: their plan, or its `digest()`. Nested dicts
        hold numbers alone, so without it one cannot see whether they are for the
        operators, seeds and alphas of this model.

    Raises:
      TypeError: adapters that are no arrays; a plan that is none, nor a digest.
      ValueError: adapters that do not fit the model's plan, or were made for another.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax.nnx import adapters, plan_of, set_adapters, wrap
      >>> model = wrap(nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0))))
      >>> digest = plan_of(model).digest()
      >>> set_adapters(model, jax.tree.map(jnp.ones_like, adapters(model)), digest)
      >>> float(adapters(model)["layers"]["0"]["kernel_mora"].sum())
      256.0
    """
    own = plan_of(model)
    if isinstance(plan, Plan):
        refuse_other_plan(plan, own)
    elif isinstance(plan, str):
        if not re.fullmatch("[0-9a-f]{64}", plan):
            raise ValueError(
                "a digest has 64 hexadecimal digits; mora_jax.io.plan_from_json makes "
                "a plan of its JSON"
            )
        if plan != own.digest():
            raise ValueError(
                "the adapters were made for another plan than the model's: its digest "
                f"is {own.digest()}, got {plan}"
            )
    elif plan is not None:
        raise TypeError(f"plan must be a Plan or its digest, got {type(plan).__name__}")
    new = [
        (spec, as_jax_array(f"{spec.name}{SUFFIX}", m))
        for spec, m in adapter_items(adapters, own)
    ]
    for (_, variable), (_, m) in zip(variables(model), new, strict=True):
        sharding = named_sharding(variable)
        if sharding is not None and not isinstance(m, Tracer) and not m.committed:
            m = jax.device_put(m, sharding)
        variable[...] = m
