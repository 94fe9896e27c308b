"""Adapters for unmodified models."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from mora_jax._common.warnings import warn
from mora_jax._flax.adapted_call import LayerCall, adapt_call
from mora_jax._flax.calls import Call, kind_of_call, proving
from mora_jax._flax.survey import check_call
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.per_row import Selected
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._tree.adapters import with_trained
from mora_jax._tree.combined import split, with_ms
from mora_jax._tree.paths import adapters_in, named_leaves, place_of, replace_leaves
from mora_jax._tree.plan import Plan, refuse_other_kernels
from mora_jax.linen._bound import layer_calls, params_of
from mora_jax.linen._plan import check_model, program
from mora_jax.linen._plan import plan as plan_model


@dataclasses.dataclass(eq=False)
class AdaptedApply:
    """A model's `apply` with adapters, as `wrap` makes it."""

    model: nn.Module
    plan: Plan
    proven: dict[Hashable, str] = dataclasses.field(default_factory=dict, repr=False)
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
        found = adapters_in(adapters, by_row=True)
        refuse_other_kernels(found.specs, self.plan)
        bound, rows, drops = {}, {}, False
        for path, adapter in found.kernels.items():
            spec, m = adapter.spec, adapter.m
            drops |= spec.dropout > 0
            if isinstance(m, Selected):
                rows["/".join(path)] = m.rows
            if spec.base_digest is not None:  # or equal layers would be told apart
                adapter = Adapter(m, dataclasses.replace(spec, base_digest=None))
            bound[place_of(path, spec)] = adapter
        if drops and adapter_deterministic is None:
            rule = "adapter_deterministic must be True or False"
            raise ValueError(f"the adapters have dropout: {rule}, got None")
        base = params_of(variables)
        params = with_trained(base, found)
        given = {**variables, "params": params}, args, kwargs, self.plan
        programs = functools.partial(program, self.model, *given)
        check = check_call, lambda: self.plan, programs, rows, "method" not in kwargs
        kind = kind_of_call(rows, args, kwargs, sorted(variables))
        variables = {**variables, "params": with_ms(params, bound)}
        adapt = functools.partial(_adapting, bool(adapter_deterministic))
        with (
            proving(self.proven, kind, *check),
            nn.intercept_methods(layer_calls(adapt)),
        ):
            result = self.model.apply(variables, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        self._warn_of_updates(sorted(updated.keys() & variables.keys()))
        if "params" in updated:  # with the base's arrays for the trained copies
            new, trained = split(updated["params"])[0], self.plan.trained
            leaves = named_leaves(base) if trained else {}
            old = dict(leaves[name] for name in trained)
            updated = {**updated, "params": replace_leaves(new, old)}
        return output, updated

    def _warn_of_updates(self, names: Sequence[str]) -> None:
        kept = [name for name in names if name not in ("params", "cache")]
        if kept and not self._warned:
            self._warned = True
            warn(
                f"the call updates {', '.join(kept)}, which are part of the base and "
                "neither in the adapters nor in what mora_jax.save and mora_jax.merge "
                f"make. Keep updated[{kept[0]!r}] next to the adapters and pass it in "
                "variables, or freeze it (BatchNorm: use_running_average=True, and "
                "not in mutable)"
            )


def wrap(
    model: nn.Module,
    config_or_plan: MoRAConfig | Plan | None = None,
    variables: Mapping[str, Any] | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> AdaptedApply:
    """The `apply` of an unmodified model, with adapters.

    The model's own code runs. Each planned layer adds its adapter's delta to what its
    methods return, also in `nn.scan`, `nn.remat`, `nn.vmap` and `nn.jit`.

    With `MoRAConfig(dropout=...)` each call must be given `adapter_deterministic=True`,
    or False and `rngs={"dropout": key}` to drop.

    Args:
      model: Any Linen module. It stays as it is.
      config_or_plan: A config, None for the defaults, or a plan of `linen.plan`.
      variables: With a config, as in `linen.plan`.
      *args: With a config, as in `linen.plan`.
      calls: With a config, as in `linen.plan`.
      **kwargs: Further inputs, by name.

    Returns:
      A function `apply(adapters, variables, *args, **kwargs)`: `model.apply` with the
      adapters first, so that `jax.grad` differentiates by them alone. It computes what
      the given adapters say: others of the same kernels, with another operator or
      rank, need no other wrap. Arrays that are trained themselves are read from the
      adapters, and not from `variables`. Its attribute `plan` is for `mora_jax.init`.
      Collections that a call updates, such as BatchNorm's statistics, are not among
      the adapters; a `MoRAWarning` says so.

    Raises:
      TypeError, ValueError: As `linen.plan`; a config without variables, or variables
        with a plan. In a call: adapters of other kernels than the plan's; an adapter on
        a layer class that is not known (see `register_layer`).

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> model, x = nn.Sequential([nn.Dense(16), nn.Dense(16)]), jnp.ones((1, 16))
      >>> variables = model.init(jax.random.key(0), x)
      >>> apply = mora_jax.linen.wrap(model, mora_jax.MoRAConfig(rank=2), variables, x)
      >>> adapters = mora_jax.init(apply.plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    check_model(model)
    if isinstance(config_or_plan, Plan):
        if variables is not None or args or calls or kwargs:
            rule = "variables and inputs must not be given with a plan"
            raise TypeError(f"{rule}: the call is wrap(model, plan)")
        return AdaptedApply(model, config_or_plan)
    if variables is None:
        check_config(config_or_plan, "wrap(model, config, variables, *inputs)")
        raise TypeError(
            "variables must be given with a config, got None: the call is "
            "wrap(model, config, variables, *inputs), or wrap(model, plan)"
        )
    settings: Any = {"calls": calls, **kwargs}
    plan = plan_model(model, variables, config_or_plan, *args, **settings)
    return AdaptedApply(model, plan)


def _adapting(deterministic: bool, call: LayerCall, adapter: Adapter) -> Any:
    """A function that makes the output of a layer's call, with its delta added."""
    path, key = (*call.module.scope.path, call.rule.name(call.module)), None
    if adapter.spec.dropout > 0 and not deterministic:
        key = call.module.make_rng("dropout")
    # Not called here: that would be one more frame between a layer and M.
    return functools.partial(adapt_call, call, "/".join(path), lambda: adapter, key)
