"""Adapters for unmodified models."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mora_jax._common.warnings import warn
from mora_jax._flax.adapted_call import LayerCall, adapt_call
from mora_jax._flax.layer_rules import rules_of, unknown_use
from mora_jax._flax.survey import refuse_untraced
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._tree.adapters import adapter_items, trained_items, with_trained
from mora_jax._tree.combined import split, with_ms
from mora_jax._tree.paths import (
    adapter_path,
    find_part,
    named_leaves,
    replace_leaves,
)
from mora_jax.linen._bound import (
    BoundAdapter,
    adapters_of,
    check_model,
    params_of,
)
from mora_jax.linen._plan import plan as plan_model


@dataclasses.dataclass(eq=False)
class AdaptedApply:
    """A model's `apply` with adapters, as `wrap` makes it.

    Attributes:
      model: The model, which stays as it is.
      plan: The plan of the adapters.
    """

    model: nn.Module
    plan: Plan
    _warned: bool = dataclasses.field(default=False, init=False, repr=False)

    def __call__(
        self,
        adapters: Any,
        variables: Mapping[str, Any],
        *args: Any,
        adapter_deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `apply` with adapters; see `wrap`."""
        plan, drops = self.plan, any(spec.dropout > 0 for spec in self.plan.specs)
        if drops and adapter_deterministic is None:
            raise ValueError(
                "the plan has dropout: adapter_deterministic must be True or False, "
                "got None"
            )
        items = adapter_items(adapters, plan, by_row=True)
        bound = {adapter_path(spec): BoundAdapter.of(spec, m) for spec, m in items}
        base = params_of(variables)
        trained = trained_items(adapters, plan) if plan.trained else []
        params = with_ms(with_trained(base, trained), bound)
        interceptor = _Interceptor(plan, bool(adapter_deterministic))
        with nn.intercept_methods(interceptor):
            result = self.model.apply({**variables, "params": params}, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        kept = sorted(updated.keys() & variables.keys() - {"params", "cache"})
        if kept and not self._warned:
            self._warned = True
            warn(
                f"the call updates {', '.join(kept)}, which are part of the base and "
                "neither in the adapters nor in what mora_jax.save and mora_jax.merge "
                f"make. Keep updated[{kept[0]!r}] next to the adapters and pass it in "
                "variables, or freeze it (BatchNorm: use_running_average=True, and "
                "not in mutable)"
            )
        if "params" in updated:  # with the base's arrays for the trained copies
            leaves = named_leaves(base) if trained else {}
            new = split(updated["params"])[0]
            old = dict(find_part(leaves, array) for array, _ in trained)
            updated = {**updated, "params": replace_leaves(new, old)}
        return output, updated


def wrap(
    model: nn.Module,
    config_or_plan: MoRAConfig | Plan | None = None,
    variables: Mapping[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> AdaptedApply:
    """The `apply` of an unmodified model, with adapters (PEFT's `get_peft_model`).

    The model's own code runs. Each planned layer adds its adapter's delta to what its
    methods return, wherever the layer is: in `nn.scan`, `nn.remat`, `nn.vmap` or
    `nn.jit`, in modules with `setup` or `nn.compact`.

    With `MoRAConfig(dropout=...)` each call says whether it drops:
    `adapter_deterministic=` must be given. With False, the keys come from
    `rngs={"dropout": key}`.

    Args:
      model: Any Linen module. It stays as it is.
      config_or_plan: A config, None for the defaults, or a plan, as `linen.plan` makes
        it.
      variables: With a config, the model's variables, arrays or shapes.
      *args: With a config, the inputs of a call, arrays or shapes.
      **kwargs: Further inputs, by name.

    Returns:
      A function `apply(adapters, variables, *args, **kwargs)`: `model.apply` with the
      adapters first, so that `jax.grad` differentiates by them alone. Arrays that the
      plan trains are read from the adapters, and not from `variables`. Its attribute
      `plan` is the plan, from which `mora_jax.init` makes the adapters. The adapters
      are numbers alone, which cannot tell whether they were made for this plan: a
      checkpoint should hold `io.plan_to_json(plan)` as well. Collections that a call
      updates, such as the statistics of BatchNorm, are not part of the adapters; a
      `MoRAWarning` says so.

    Raises:
      TypeError, ValueError: As `linen.plan`; a config without variables, or variables
        with a plan. In a call: adapters that do not fit the plan; a plan that does not
        fit the model; an adapter on a layer class that is not known (see
        `register_layer`).

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import mora_jax
      >>> layers = [nn.Dense(16) for _ in range(2)]
      >>> model, x = nn.Sequential(layers), jnp.ones((1, 16))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = mora_jax.MoRAConfig(rank=2)
      >>> apply = mora_jax.linen.wrap(model, config, variables, x)
      >>> adapters = mora_jax.init(apply.plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    check_model(model)
    if isinstance(config_or_plan, Plan):
        if variables is not None or args or kwargs:
            raise TypeError(
                "variables and inputs must not be given with a plan: the call is "
                "wrap(model, plan)"
            )
        return AdaptedApply(model, config_or_plan)
    if variables is None:
        check_config(config_or_plan, "wrap(model, config, variables, *inputs)")
        raise TypeError(
            "variables must be given with a config, got None: the call is "
            "wrap(model, config, variables, *inputs), or wrap(model, plan)"
        )
    plan = plan_model(model, variables, config_or_plan, *args, **kwargs)
    return AdaptedApply(model, plan)


NORMALISING = (nn.WeightNorm, nn.SpectralNorm)
"""Flax's modules that change the kernels of the layer that they hold."""


class _Interceptor:
    """Adds each adapter's delta to the output of the layer that has it in its params.

    Modules that share a scope (`nn.share_scope`) see each other's adapters. So it is
    checked when the outermost of them is done that every adapter was used.
    """

    def __init__(self, plan: Plan, deterministic: bool) -> None:
        self.traced, self.deterministic = plan.traced, deterministic
        self.running: list[tuple[nn.Module, Any]] = []
        self.used: set[tuple[Any, str]] = set()

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        if isinstance(context.module, NORMALISING):
            _refuse_normalised(context.module)
        module: Any = context.module
        name = context.method_name
        adapters = adapters_of(module)
        running = any(module is caller for caller, _ in self.running)
        if name == "setup" or not adapters or running:
            return method(*args, **kwargs)
        scope, rules = module.scope.path, rules_of(type(module))
        outermost = all(scope != outer for _, outer in self.running)
        call, rule = functools.partial(method, *args, **kwargs), rules.get(name)
        lacking_rule = {r.name(module) for r in rules.values()} if rule is None else ()
        for kernel in adapters.keys() & lacking_rule:
            raise unknown_use("/".join((*scope, kernel)), type(module), name)
        if rule is not None and (kernel := rule.name(module)) in adapters:
            self.used.add((scope, kernel))
            adapted = LayerCall(rule, module, method, args, kwargs)
            call = self._adapted(adapted, adapters[kernel])
        self.running.append((module, scope))
        try:
            y = call()
        finally:
            self.running.pop()
        for kernel in adapters if outermost else ():
            if (scope, kernel) not in self.used:
                raise unknown_use("/".join((*scope, kernel)), type(module), name)
        return y

    def _adapted(self, call: LayerCall, adapter: BoundAdapter) -> Callable[[], Any]:
        """The call of a method with the adapter of its kernel."""
        path = (*call.module.scope.path, *adapter.spec.path)
        spec, key = dataclasses.replace(adapter.spec, path=path), None
        if not self.traced:
            refuse_untraced(spec.name, call.read()[0])
        if spec.dropout > 0 and not self.deterministic:
            key = call.module.make_rng("dropout")
        return functools.partial(adapt_call, call, spec, lambda: adapter.m, key)


def _refuse_normalised(module: Any) -> None:
    """Raise if the layer inside has an adapter, whose delta would be normalised."""
    inside = module.layer_instance
    for kernel in adapters_of(inside):
        name = "/".join((*inside.scope.path, kernel))
        raise ValueError(
            f"{name}: {type(module).__name__} changes this kernel before its layer "
            "multiplies, so that the adapted and the merged model would differ; "
            "exclude it"
        )
