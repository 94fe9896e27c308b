"""Adapters in NNX modules whose classes stay as they are: all that `qwix` needs of NNX.

`wrap` gives a layer a class that adds the delta. A model that qwix intercepts keeps its
classes: M is beside its kernel all the same, and the provider adds the delta.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init_adapter
from mora_jax.nnx._classes import DROPOUT
from mora_jax.nnx._param import MoRAParam as MoRAParam
from mora_jax.nnx._param import is_m, value_of
from mora_jax.nnx._state import adapters as adapters
from mora_jax.nnx._state import named_modules as named_modules
from mora_jax.nnx._state import plan_of as plan_of
from mora_jax.nnx._wrap import hold_adapter


def hold(
    model: nnx.Module, specs: Iterable[AdapterSpec], rngs: nnx.Rngs | None
) -> None:
    """Put new M's beside their kernels, on the meshes of the kernels.

    Raises:
      ValueError: The model has an M there, or multiplies a part of the kernel.
    """
    modules = dict(named_modules(model))
    for spec in specs:
        module, name = modules[spec.path[:-1]], spec.path[-1]
        kernel = getattr(module, name)
        if hasattr(module, name + SUFFIX):
            raise ValueError(
                f"{spec.name}: model has an M there already: give qwix a model without "
                "adapters, such as the base or what mora_jax.qwix.merge_adapters makes"
            )
        if tuple(kernel.shape) != spec.kernel_shape:
            raise ValueError(
                f"{spec.name} of shape {kernel.shape} is multiplied as "
                f"{spec.kernel_shape}: qwix knows no kernels inside nnx.scan and "
                "nnx.vmap; leave it out of module_path"
            )
        key = rngs.params() if rngs and spec.init == "gaussian" else None
        hold_adapter(module, spec, init_adapter(spec, key), 0)


def release(model: nnx.Module, plan: Plan) -> None:
    """Remove the M's of a plan, and the dropout of their modules."""
    modules = dict(named_modules(model))
    for spec in plan.specs:
        module = modules[spec.path[:-1]]
        for own in (spec.path[-1] + SUFFIX, DROPOUT):
            if hasattr(module, own):
                delattr(module, own)


def parameters_of(module: nnx.Module, kinds: Any) -> dict[str, Any]:
    """The attributes of a module that are of certain classes, without M's."""
    named = vars(module).items()
    return {
        name: value
        for name, value in named
        if isinstance(value, kinds) and not name.endswith(SUFFIX)
    }


def named_parameters(model: nnx.Module, kinds: Any) -> dict[str, Any]:
    """{slash-joined path: parameter} of a model and of all its modules, without M's."""
    return {
        "/".join((*path, name)): parameter
        for path, module in named_modules(model)
        for name, parameter in parameters_of(module, kinds).items()
    }


def set_parameters(model: nnx.Module, params: Mapping[str, Any]) -> None:
    """Give a model other parameters: {slash-joined path: parameter}."""
    modules = {"/".join(path): module for path, module in named_modules(model)}
    for name, parameter in params.items():
        path, _, own = name.rpartition("/")
        setattr(modules[path], own, parameter)


def held(module: nnx.Module, path: Path) -> tuple[AdapterSpec, Any] | None:
    """The adapter of the kernel at `path`, and M; None if `module` lacks M for it.

    M may come from another model, whose adapter it was made for.
    """
    m: Any = getattr(module, path[-1] + SUFFIX, None)
    return (dataclasses.replace(m.spec, path=path), value_of(m)) if is_m(m) else None


def dropout_key(module: nnx.Module, spec: AdapterSpec, m: Any) -> PRNGKeyArray | None:
    """The key of a call's dropout; None where nothing is dropped."""
    dropout = getattr(module, DROPOUT, None)
    if dropout is None or dropout.deterministic:
        return None
    return dropout.key(m, getattr(module, spec.path[-1]))


def traceable(model: nnx.Module, method: str) -> tuple[Callable[..., Any], Any]:
    """A method as a function of the model's state and its arguments, and that state."""
    graph, state = nnx.split(model)

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, state), method)(*args, **kwargs)

    return call, state
