"""Adapters inside the params of a running model, and the calls that meet them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Float, Shaped

from mora_jax._common.types import ArrayLike
from mora_jax._flax.calls import LayerCall, adapt_call
from mora_jax._flax.layer_rules import rules_of
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX, AdapterSpec

# An adapter in the params of a running model travels wherever Flax carries parameters:
# into scanned and vmapped layers, and, by its static part, into the cache keys of
# `nn.jit`, which would otherwise serve a program that was traced for another operator.


def layer_calls(
    output_of: Callable[[LayerCall, Adapter], Callable[[], Any]],
    see: Callable[[nn.Module], Any] = lambda module: None,
) -> Callable[..., Any]:
    """A function for `nn.intercept_methods` that finds the adapter of each call.

    `output_of` a call with an adapter is a function; `see` is told of called modules.
    """
    running: set[int] = set()  # by their ids: modules with equal fields are equal

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        # A rule covers all that its method calls of the same layer.
        if module.scope is None or id(module) in running:
            return run(*args, **kwargs)
        see(module)
        rule = rules_of(type(module)).get(name)
        params = module.scope.variables().get("params", {})
        adapter = rule and params.get(rule.name(module) + SUFFIX)
        if rule is None or not isinstance(adapter, Adapter):
            return run(*args, **kwargs)
        running.add(id(module))
        try:
            call = LayerCall(rule, module, run, args, kwargs)
            # In a stack M may come with arrays that its operator has for each layer.
            m, *given = adapter.m if isinstance(adapter.m, tuple) else (adapter.m,)
            return output_of(call, Adapter.of_model(m, adapter.spec, given))()
        finally:
            running.remove(id(module))

    return intercept


def params_of(variables: Any) -> Any:
    """The params collection of `variables`, which must have it."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
        raise ValueError(f"variables must be a mapping with 'params', got {got}")
    return variables["params"]


def running_adapter(module: nn.Module, kernel: str, spec: AdapterSpec) -> Adapter:
    """A module's own adapter, made in `init`; plain arrays of params get `spec` too."""
    assert module.scope is not None
    path, name = (*module.path, kernel), kernel + SUFFIX
    if (given := module.scope.get_variable("params", name)) is None:
        # Not by `module.param`, which other libraries, such as gemma, replace.
        return module.scope.param(name, lambda k: Adapter(spec.start(path, k), spec))
    adapter = given if isinstance(given, Adapter) else Adapter(given, spec)
    return check_adapter("/".join(path) + SUFFIX, adapter)


class MoRADense(nn.Dense):
    """`nn.Dense` with an adapter: the same fields and parameters, and `kernel_mora`.

    It loads the parameters of an `nn.Dense`. Train it with `mora_jax.optimizer`, or
    take the M's out of its parameters with `mora_jax.split`.

    Attributes:
      config: The adapter's settings; `targets`, `exclude` and `overrides` mean nothing
        here, and `train` must be empty.
      deterministic: True to turn the adapter's dropout off. It must be given, here or
        in the call, if `config.dropout` is not zero. The stream of keys is "dropout".

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> layer = mora_jax.MoRADense(features=16, config=mora_jax.MoRAConfig(rank=2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
      >>> variables["params"]["kernel_mora"]
      Adapter(block_diagonal, float32[4, 4, 4])
    """

    config: MoRAConfig = MoRAConfig()
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.use_bias, MoRAConfig):
            raise TypeError("give it by name: write MoRADense(features, config=config)")
        check_config(self.config, "MoRADense(features, config=config)")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Shaped[ArrayLike, "*batch features"],
        deterministic: bool | None = None,
    ) -> Float[jax.Array, "*batch out"]:
        """The output of `nn.Dense` for (..., in_features), with the delta added."""
        own = self.config, (inputs.shape[-1], self.features)
        name = "/".join((*self.path, "kernel"))
        spec = AdapterSpec.from_config(*own, name=name, kernel_dtype=self.param_dtype)
        key, given = None, (self.deterministic, deterministic)
        if spec.dropout > 0 and not nn.merge_param("deterministic", *given):
            key = self.make_rng("dropout")
        rule, method = rules_of(nn.Dense)["__call__"], super().__call__
        call = LayerCall(rule, self, method, (inputs,), {})
        adapter = functools.partial(running_adapter, self, "kernel", spec)
        return adapt_call(call, name, adapter, key)
