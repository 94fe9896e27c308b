"""Adapters inside the params of a running model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mora_jax._plan.spec import SUFFIX, AdapterSpec


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["m"], meta_fields=["spec"]
)
@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """M in the params of a running model, with its spec as static metadata.

    So the spec travels wherever Flax carries the parameters: into scanned and vmapped
    layers, and into the cache keys of `nn.jit`, which would otherwise serve a program
    that was traced for another plan. While a plan is made, M is None, and the spec is
    the recorder with the path of the kernel.
    """

    m: Any
    spec: Any

    @classmethod
    def of(cls, spec: AdapterSpec, m: Any) -> "BoundAdapter":
        # Without the path, so that equal layers under nn.jit share one program.
        return cls(m, dataclasses.replace(spec, path=spec.path[-1:]))


def adapters_of(module: nn.Module) -> dict[str, BoundAdapter]:
    """The adapters in a module's scope, by the names of their kernels."""
    params = {} if module.scope is None else module.scope.variables().get("params", {})
    return {
        key.removesuffix(SUFFIX): value
        for key, value in params.items()
        if isinstance(value, BoundAdapter)
    }


def check_model(model: Any) -> None:
    """Raise unless `model` is a Linen module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a flax.linen.Module, got {got}")


def params_of(variables: Any) -> Any:
    """The params collection of `variables`, which must have it."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
        raise ValueError(f"variables must be a mapping with 'params', got {got}")
    return variables["params"]
