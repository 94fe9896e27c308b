"""Adapters for unmodified models."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mora_jax._adapters import adapter_items, combine, nest, split
from mora_jax._config import MoRAConfig, check_config
from mora_jax._flax.adapted_call import adapt_call
from mora_jax._flax.layer_rules import rules_of, unknown_use
from mora_jax._flax.survey import refuse_untraced
from mora_jax._paths import adapter_path
from mora_jax._plan import Plan
from mora_jax._spec import SUFFIX
from mora_jax._warnings import warn
from mora_jax.linen._bound import Bound, check_model, params_of
from mora_jax.linen._plan import plan as plan_model


def wrap(
    model: nn.Module,
    config_or_plan: MoRAConfig | Plan | None = None,
    variables: Mapping[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Callable[..., Any]:
    """An unmodified model's `apply`, with adapters.

    The model's own code runs; the output of each planned layer gets its update added,
    wherever the layer is: in `nn.scan`, `nn.remat`, `nn.vmap` or `nn.jit`, in
    setup-style or compact modules.

    Args:
      model: Any Linen module.
      config_or_plan: What to adapt, and how: a plan of the model, as `linen.plan` or
        `plan` makes it; or a config, None for the defaults, from which `linen.plan`
        makes one with the arguments that follow.
      variables: The model's variables, arrays or shapes, for a config alone.
      *args: The arguments of a call, arrays or shapes, for a config alone.
      **kwargs: The same.

    Returns:
      `apply(adapters, variables, *args, **kwargs)`: like `model.apply`, with the
      adapters first, so that `jax.grad` differentiates by them alone. Its attribute
      `plan` is the plan, from which `init` makes the adapters. Where the plan has
      dropout, `adapter_deterministic=` must be given; with False, keys come from
      `rngs={"dropout": key}`. The adapters are numbers alone, which cannot tell whether
      they were made for this plan: a checkpoint should hold `io.plan_to_json(plan)`.
      Collections other than params that a call updates, such as the statistics of
      BatchNorm, are not part of the adapters, which a `MoRAWarning` says.

    Raises:
      TypeError: `model` is not a Linen module; a config without variables, or variables
        beside a plan; in a call: an adapter on a layer class that is not known (see
        `register_layer`).
      ValueError: A config that does not fit the model; in a call: adapters that do not
        fit the plan, or a plan that reads a kernel's axes otherwise than the layer.

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, init, linen
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)])
      >>> x = jnp.ones((1, 32))
      >>> variables = model.init(jax.random.key(0), x)
      >>> apply = linen.wrap(model, MoRAConfig(rank=2), variables, x)
      >>> adapters = init(apply.plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    check_model(model)
    plan = _chosen(model, config_or_plan, variables, args, kwargs)
    warned = False
    needs_flag = any(spec.dropout > 0 for spec in plan.specs)

    def apply(
        adapters: Any,
        variables: Mapping[str, Any],
        *args: Any,
        adapter_deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if needs_flag and adapter_deterministic is None:
            raise ValueError(
                "the plan has dropout: adapter_deterministic must be True or False, "
                "got None"
            )
        items = adapter_items(adapters, plan)
        bound = nest({adapter_path(spec): Bound.of(spec, m) for spec, m in items})
        params = combine(params_of(variables), bound)
        interceptor = _Interceptor(plan, bool(adapter_deterministic))
        with nn.intercept_methods(interceptor):
            result = model.apply({**variables, "params": params}, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        nonlocal warned
        kept = sorted(updated.keys() & variables.keys() - {"params", "cache"})
        if kept and not warned:
            warned = True
            _warn_of_statistics(kept)
        if "params" in updated:
            updated = {**updated, "params": split(updated["params"])[0]}
        return output, updated

    apply.plan = plan  # type: ignore[attr-defined]
    return apply


def _chosen(
    model: nn.Module, config_or_plan: Any, variables: Any, args: Any, kwargs: Any
) -> Plan:
    """The plan that `wrap` was given, or was asked to make."""
    if isinstance(config_or_plan, Plan):
        if variables is not None or args or kwargs:
            raise TypeError(
                "variables and inputs are for a config: wrap(model, plan) needs no more"
            )
        return config_or_plan
    if variables is None:
        check_config(config_or_plan, "wrap(model, config, variables, *inputs)")
        raise TypeError(
            "wrap needs the variables of a Linen model to plan by a config, got None: "
            "the call is wrap(model, config, variables, *inputs), or wrap(model, plan)"
        )
    return plan_model(model, variables, config_or_plan, *args, **kwargs)


def _warn_of_statistics(collections: list[str]) -> None:
    """Once for each wrapped model, where training moves more than the adapters."""
    name = collections[0]
    warn(
        f"the call updates {', '.join(collections)}, which are part of the base and "
        "neither in the adapters nor in what mora_jax.save and mora_jax.merge make. "
        f"Keep updated[{name!r}] beside the adapters and pass it in variables, or "
        "freeze it (BatchNorm: use_running_average=True, and not in mutable)"
    )


NORMALISING = (nn.WeightNorm, nn.SpectralNorm)
"""Flax's modules that change the kernels of the layer that they hold."""


class _Interceptor:
    """Adds to the output of each layer what the adapter in its params adds.

    Modules that share a scope (`nn.share_scope`) see each other's adapters. So whether
    one was used is asked when the outermost of them is done.
    """

    def __init__(self, plan: Plan, deterministic: bool) -> None:
        self.traced = plan.traced
        self.deterministic = deterministic
        self.running: list[tuple[nn.Module, Any]] = []
        self.used: set[tuple[Any, str]] = set()

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, name = context.module, context.method_name
        if isinstance(module, NORMALISING):
            _refuse_normalised(module)
        bound = _bound(module)
        again = any(module is other for other, _ in self.running)
        if name == "setup" or module.scope is None or not bound or again:
            return method(*args, **kwargs)
        scope = module.scope.path
        outermost = all(other != scope for _, other in self.running)
        self.running.append((module, scope))
        try:
            y = self._adapt(method, module, name, args, kwargs, bound)
        finally:
            self.running.pop()
        for kernel in bound if outermost else ():
            if (scope, kernel) not in self.used:
                raise unknown_use("/".join((*scope, kernel)), type(module), name)
        return y

    def _adapt(
        self,
        method: Callable[..., Any],
        module: nn.Module,
        name: str,
        args: Any,
        kwargs: Any,
        bound: Mapping[str, Bound],
    ) -> Any:
        assert module.scope is not None
        scope, rules = module.scope.path, rules_of(type(module))
        if name not in rules:
            y = method(*args, **kwargs)
            for rule in rules.values():
                if (kernel := rule.name(module)) in bound:
                    raise unknown_use("/".join((*scope, kernel)), type(module), name)
            return y
        rule = rules[name]
        kernel = rule.name(module)
        if kernel not in bound:
            return method(*args, **kwargs)
        self.used.add((scope, kernel))
        product, x = rule.read(module, args, kwargs)
        if not self.traced:
            refuse_untraced("/".join((*scope, kernel)), product)
        spec, key = bound[kernel].spec, None
        if spec.dropout > 0 and not self.deterministic:
            key = module.make_rng("dropout")
        return adapt_call(
            lambda: method(*args, **kwargs),
            module,
            rule,
            dataclasses.replace(spec, path=(*scope, *spec.path)),
            lambda: bound[kernel].m,
            x,
            product,
            key,
        )


def _refuse_normalised(module: Any) -> None:
    """Raise if the layer inside has an adapter, which would be normalised as well."""
    inside = module.layer_instance
    for kernel in _bound(inside):
        name = "/".join((*inside.scope.path, kernel))
        raise ValueError(
            f"{name}: {type(module).__name__} changes this kernel before its layer "
            "multiplies, so that the adapted and the merged model would differ; "
            "exclude it"
        )


def _bound(module: nn.Module) -> dict[str, Bound]:
    """The adapters in a module's scope, by the names of their kernels."""
    params = {} if module.scope is None else module.scope.variables().get("params", {})
    return {
        key.removesuffix(SUFFIX): value
        for key, value in params.items()
        if isinstance(value, Bound)
    }
