"""Adapters for unmodified models."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mora_jax.layer import update
from mora_jax.layers import find_rules, unknown_use
from mora_jax.linen._bound import Bound, check_model, params_of
from mora_jax.paths import adapter_path
from mora_jax.planning import Plan
from mora_jax.spec import SUFFIX
from mora_jax.tree import adapter_items, combine, nest, split


def wrap(model: nn.Module, plan: Plan) -> Callable[..., Any]:
    """An unmodified model's `apply`, with adapters.

    The model's own code runs; the output of each planned layer gets its update added,
    wherever the layer is: in `nn.scan`, `nn.remat`, `nn.vmap` or `nn.jit`, in
    setup-style or compact modules.

    Args:
      model: any Linen module.
      plan: made from its params, by `linen.plan` or `plan`.

    Returns:
      `apply(adapters, variables, *args, **kwargs)`: like `model.apply`, with the
      adapters first, so that `jax.grad` differentiates by them alone. Where the plan
      has dropout, `adapter_deterministic=` must be given; with False, keys come from
      `rngs={"dropout": key}`.

    Raises:
      TypeError: `model` is no Linen module; in a call: an adapter on a layer class that
        is not known (see `register_layer`).
      ValueError: in a call: adapters that do not fit the plan, or a plan that reads a
        kernel's axes otherwise than the layer.

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import init, linen
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)])
      >>> x = jnp.ones((1, 32))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = linen.plan(model, variables, None, x)
      >>> apply, adapters = linen.wrap(model, plan), init(plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    check_model(model)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    needs_flag = any(spec.dropout > 0 for spec in plan)

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
        with nn.intercept_methods(_Interceptor(bool(adapter_deterministic))):
            result = model.apply({**variables, "params": params}, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        if "params" in updated:
            updated = {**updated, "params": split(updated["params"])[0]}
        return output, updated

    return apply


def _own_params(module: nn.Module) -> Mapping[str, Any]:
    if module.scope is None:
        return {}
    return module.scope.variables().get("params", {})


class _Interceptor:
    """Adds to the output of each layer what the adapter in its params adds."""

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.running: list[nn.Module] = []

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, name = context.module, context.method_name
        if name == "setup":
            return method(*args, **kwargs)
        bound = {
            key.removesuffix(SUFFIX): value
            for key, value in _own_params(module).items()
            if isinstance(value, Bound)
        }
        if not bound or any(module is other for other in self.running):
            return method(*args, **kwargs)
        rule = find_rules(type(module)).get(name)
        for kernel in bound:
            if rule is None or rule.kernel != kernel:
                path = "/".join((*module.path, kernel))
                raise unknown_use(path, type(module), name)
        self.running.append(module)
        try:
            y = method(*args, **kwargs)
        finally:
            self.running.pop()
        assert rule is not None
        product, x = rule.read(module, args, kwargs)
        spec = bound[rule.kernel].spec
        key = None
        if spec.dropout > 0 and not self.deterministic:
            key = module.make_rng("dropout")
        return y + update(
            dataclasses.replace(spec, path=(*module.path, *spec.path)),
            bound[rule.kernel].m,
            x,
            product,
            dtype=y.dtype,
            dropout_key=key,
            precision=getattr(module, "precision", None),
        )
