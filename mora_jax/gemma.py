"""Adapters for the models of `gemma`: Gemma 2, 3, 3n and 4; `mora-jax[gemma]`.

Public names::

  register              teach `linen.plan` and `linen.wrap` the layers of these models
  MoRA                  a model with its adapters, as samplers and trainers take it
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import subtract_filters

from mora_jax._flax.layer_rules import register_layer
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._tree.adapters import init
from mora_jax.linen import wrap
from mora_jax.products import ATTEND, Lookup

_KNOWN = "4.0.1"
_PACKAGES = "gemma.gm.nn", "gemma.gm.nn.gemma3n", "gemma.gm.nn.gemma4"
_TABLE = "input_embedding"


def _root(layer: Any) -> jax.Array:
    """The factor of an Embedder's rows, in their dtype."""
    return jnp.sqrt(layer.embed_dim).astype(layer.get_variable("params", _TABLE).dtype)


# Gemma 2 and 3, 3n, and 4 each have an `Einsum` of their own, by which they multiply,
# and an `Embedder`, whose table is also their head.
_EINSUM = {
    "equation": lambda layer, eqn, x: eqn,
    "kernel": lambda layer: layer.weight_name,
    "argument": "x",
    "scale": lambda layer: getattr(layer, "w_scale", None),  # Gemma 3n and 4 have it
}
_ENCODE = {"equation": Lookup(), "kernel": _TABLE, "method": "encode", "scale": _root}
_DECODE = {"equation": ATTEND, "kernel": _TABLE, "method": "decode"}
_LAYERS = {
    "_layers.Einsum": (("eqn", "x", "weight_name"), [_EINSUM]),
    "_modules.Embedder": (("encode", "decode", "embed_dim"), [_ENCODE, _DECODE]),
}
"""{class: (the arguments, fields and methods that its rules read, the rules)}."""


def register() -> None:
    """Teach `mora_jax.linen.plan` and `mora_jax.linen.wrap` the layers of gemma.

    Call this before planning; a second call changes nothing.

    Raises:
      ImportError: gemma is not installed, or its version lacks what the rules need.

    Example: see docs/gemma.md, which also says what is adapted by default.
    """
    try:
        release = version("gemma")
    except PackageNotFoundError as error:
        raise ImportError(
            f"mora_jax.gemma needs gemma {_KNOWN}, which is not installed: "
            "pip install 'mora-jax[gemma]', on Python 3.12 or newer"
        ) from error
    for package in _PACKAGES:
        for path, (needed, rules) in _LAYERS.items():
            cls = _class(f"{package}.{path}", needed, release)
            for rule in rules:
                register_layer(cls, **rule)


def _class(path: str, needed: tuple[str, ...], release: str) -> type:
    """A class of gemma, with all that its rules need."""
    lacking = f"mora_jax.gemma needs {path} as in gemma {_KNOWN}, but {release} has "
    module, _, name = path.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("gemma"):
            raise  # another package is missing
        raise ImportError(f"{lacking}no module {error.name}") from error
    except AttributeError as error:
        raise ImportError(f"{lacking}no such class") from error
    known = {*dir(cls), *cls.__dataclass_fields__}
    known |= inspect.signature(cls.__call__).parameters.keys()
    if missing := [part for part in needed if part not in known]:
        raise ImportError(f"{lacking}it without {', '.join(missing)}")
    return cls


class MoRA(nn.Module):
    """A Linen model with its adapters as one module, as `gm.nn.LoRA` is.

    The samplers of gemma and the trainer of Kauldron take a module and its params. The
    params of this one are `{"base": params, "mora": adapters}`, and
    `kd.optim.select("mora")` selects the adapters. The model's attributes, other
    collections and random streams are as without them. The adapter's dropout is on
    where a call has a key for "dropout". In code of your own `linen.wrap` is simpler.

    Attributes:
      model: The model, which stays as it is.
      plan: The adapters' plan, as `mora_jax.linen.plan` makes it.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax.gemma
      >>> model, x = nn.Dense(8), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> plan = mora_jax.linen.plan(model, {"params": params}, None, x)
      >>> adapted = mora_jax.gemma.MoRA(model=model, plan=plan)
      >>> params = {"base": params, "mora": mora_jax.init(plan)}
      >>> adapted.apply({"params": params}, x).shape
      (1, 8)
    """

    _: dataclasses.KW_ONLY
    model: nn.Module
    plan: Plan

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, with the adapters' deltas in its layers."""
        check_plan(self.plan)
        assert self.scope is not None
        model = self.model.clone(parent=None)
        rngs = {name: self.make_rng(name) for name in self.scope.rngs}
        if self.is_initializing():  # gemma replaces `self.param`, which needs a shape
            output, new = model.init_with_output(rngs, *args, **kwargs)
            adapters = init(self.plan, self.make_rng("params"), params=new["params"])
            self._put({**new, "params": {"base": new["params"], "mora": adapters}})
            return output
        params = self.variables.get("params", {})
        if set(params) != {"base", "mora"}:
            raise ValueError(
                "params must be {'base': the model's params, 'mora': its adapters}, "
                f"got {sorted(params)}"
            )
        # What a call may change except the params, as the caller says by `mutable`.
        mutable = subtract_filters(self.scope.mutable, "params") or False
        variables = {**self.variables, "params": params["base"]}
        settings: Any = {"rngs": rngs, "mutable": mutable}
        settings["adapter_deterministic"] = "dropout" not in rngs
        apply = wrap(model, self.plan)
        result = apply(params["mora"], variables, *args, **settings, **kwargs)
        if mutable is False:
            return result
        output, updated = result
        self._put(updated)
        return output

    def _put(self, variables: Mapping[str, Any]) -> None:
        """Set the variables that a call may change."""
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
