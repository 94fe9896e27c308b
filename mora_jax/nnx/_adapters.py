"""The adapters of a model as a tree: the same that a Linen twin has."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding

from mora_jax._types import Shape
from mora_jax.nnx._param import MoRAParam
from mora_jax.paths import Path, adapter_path
from mora_jax.planning import Plan
from mora_jax.spec import SUFFIX, AdapterSpec
from mora_jax.tree import Tree, adapter_items, nest


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
                kernel = name.removesuffix(SUFFIX)
                shape = tuple(getattr(module, kernel).shape)
                found.append((_located(m.spec, (*path, kernel), shape), m))
    if not found:
        raise ValueError("model has no adapters; see mora_jax.nnx.wrap")
    return sorted(found, key=lambda pair: pair[0].path)


def _located(spec: AdapterSpec, path: Path, shape: Shape) -> AdapterSpec:
    """`spec` for a layer that is part of a model now, and maybe one of a stack."""
    axes = "s" * (len(shape) - len(spec.kernel_shape)) + spec.axes
    return dataclasses.replace(spec, path=path, kernel_shape=shape, axes=axes)


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
    return nest({adapter_path(spec): m[...] for spec, m in variables(model)})


def set_adapters(model: nnx.Module, adapters: Any) -> None:
    """Put M's, from a file or a Linen twin, into an adapted model.

    Args:
      model: as `wrap` makes it; changed in place.
      adapters: nested dicts, as `init` and `nnx.adapters` make them. Those that are on
        no device in particular go where the model has its M.

    Raises:
      ValueError: adapters that do not fit the model's plan.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax.nnx import adapters, set_adapters, wrap
      >>> model = wrap(nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0))))
      >>> set_adapters(model, jax.tree.map(jnp.ones_like, adapters(model)))
      >>> float(adapters(model)["layers"]["0"]["kernel_mora"].sum())
      256.0
    """
    new = adapter_items(adapters, plan_of(model))
    for (_, variable), (_, m) in zip(variables(model), new, strict=True):
        m, sharding = jnp.asarray(m), named_sharding(variable)
        if sharding is not None and not isinstance(m, Tracer) and not m.committed:
            m = jax.device_put(m, sharding)
        variable[...] = m
