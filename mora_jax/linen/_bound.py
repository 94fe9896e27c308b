"""Adapters inside the params of a running model, and the calls that meet them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.layer_rules import rules_of
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init_adapter
from mora_jax._tree.paths import adapter_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """M in the params of a running model, with its spec as static metadata.

    While a plan is made, M is None, and the spec is a mark with the path of the kernel.
    """

    # As metadata the spec travels wherever Flax carries the parameters: into scanned
    # and vmapped layers, and into the cache keys of `nn.jit`, which would otherwise
    # serve a program that was traced for another plan.
    m: Any
    spec: Any = dataclasses.field(metadata={"static": True})


def layer_calls(
    output_of: Callable[[LayerCall, BoundAdapter], Callable[[], Any]],
    see: Callable[[nn.Module], Any] = lambda module: None,
) -> Callable[..., Any]:
    """A function for `nn.intercept_methods` that finds the adapter of each call.

    `output_of` a call whose kernel has one is a function, and `see` is told of all
    modules that are called.
    """
    running: list[nn.Module] = []

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        # A rule covers all that its method calls of the same layer.
        if module.scope is None or any(module is caller for caller in running):
            return run(*args, **kwargs)
        see(module)
        rule = rules_of(type(module)).get(name)
        params = module.scope.variables().get("params", {})
        adapter = rule and params.get(rule.name(module) + SUFFIX)
        if rule is None or not isinstance(adapter, BoundAdapter):
            return run(*args, **kwargs)
        running.append(module)
        try:
            return output_of(LayerCall(rule, module, run, args, kwargs), adapter)()
        finally:
            running.pop()

    return intercept


def params_of(variables: Any) -> Any:
    """The params collection of `variables`, which must have it."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
        raise ValueError(f"variables must be a mapping with 'params', got {got}")
    return variables["params"]


def running_m(module: nn.Module, spec: AdapterSpec) -> Any:
    """M, or one for each row of a batch; made in the module's `init`."""
    assert module.scope is not None
    name = spec.path[-1] + SUFFIX
    given = module.scope.get_variable("params", name)
    if given is not None:
        return adapter_of(given, spec, by_row=True)
    # Not by `module.param`, which other libraries, such as gemma, replace.
    return module.scope.param(name, lambda key: init_adapter(spec, key))
