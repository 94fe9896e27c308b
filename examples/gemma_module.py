"""A Linen model with its adapters as one module, for gemma's samplers and Kauldron.

Copy it into a project of yours; docs/gemma.md shows it at work.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import subtract_filters

import mora_jax


def _is_adapter(node: Any) -> bool:
    return isinstance(node, mora_jax.Adapter)


class MoRA(nn.Module):
    """A Linen model with its adapters as one module, as `gm.nn.LoRA` is.

    The samplers of gemma and the trainer of Kauldron take a module and its params. The
    params of this one are `{"base": params, "mora": adapters}`, where the adapters may
    also be plain arrays, as its own `init` makes them and `plan.adapters` reads them;
    `kd.optim.select("mora")` selects them. The model's attributes, other
    collections and random streams are as without them. The adapter's dropout is on
    where a call has a key for "dropout". In code of your own `linen.wrap` is simpler.

    Attributes:
      model: The model, which stays as it is.
      plan: The adapters' plan, as `mora_jax.linen.plan` makes it.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> model, x = nn.Dense(8), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> plan = mora_jax.linen.plan(model, {"params": params}, None, x)
      >>> adapted = MoRA(model=model, plan=plan)
      >>> params = {"base": params, "mora": mora_jax.init(plan)}
      >>> adapted.apply({"params": params}, x).shape
      (1, 8)
    """

    _: dataclasses.KW_ONLY
    model: nn.Module
    plan: mora_jax.Plan

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, with the adapters' deltas in its layers."""
        assert self.scope is not None
        model = self.model.clone(parent=None)
        rngs = {name: self.make_rng(name) for name in self.scope.rngs}
        if self.is_initializing():  # gemma replaces `self.param`, which needs a shape
            output, new = model.init_with_output(rngs, *args, **kwargs)
            adapters = mora_jax.init(
                self.plan, self.make_rng("params"), params=new["params"]
            )
            # Kauldron's tables of parameters take all but dicts for arrays.
            ms = jax.tree.map(lambda adapter: adapter.m, adapters, is_leaf=_is_adapter)
            self._put({**new, "params": {"base": new["params"], "mora": ms}})
            return output
        params = self.variables.get("params", {})
        if set(params) != {"base", "mora"}:
            raise ValueError(
                f"params must be {{'base': ..., 'mora': ...}}, got {sorted(params)}"
            )
        # What a call may change except the params, as the caller says by `mutable`.
        mutable = subtract_filters(self.scope.mutable, "params") or False
        variables = {**self.variables, "params": params["base"]}
        settings: Any = {"rngs": rngs, "mutable": mutable}
        settings["adapter_deterministic"] = "dropout" not in rngs
        adapters = self.plan.adapters(params["mora"])
        apply = mora_jax.linen.wrap(model, self.plan)
        result = apply(adapters, variables, *args, **settings, **kwargs)
        if mutable is False:
            return result
        output, updated = result
        self._put(updated)
        return output

    def _put(self, variables: Mapping[str, Any]) -> None:
        for collection in filter(self.is_mutable_collection, variables):
            for name, value in variables[collection].items():
                self.put_variable(collection, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in MoRA.__dataclass_fields__:
            return super().__getattr__(name)
        return getattr(self.model, name)

    def __kontext_keys__(self) -> dict[str, str | None]:
        """The keys by which Kauldron finds the model's inputs in a batch."""
        return importlib.import_module("kauldron.kontext").get_keypaths(self.model)
