"""M of a Linen module that runs, where another library calls the module."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PRNGKeyArray

from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init_adapter
from mora_jax._tree.paths import adapter_of


def running_m(
    module: nn.Module, spec: AdapterSpec, box: Callable[[jax.Array], Any]
) -> Any:
    """M, or one for each row of a batch; made where the module is initialised.

    Args:
      module: The module that runs.
      spec: The adapter of one of its kernels.
      box: A function of a new M that puts it in the box that it is stored in.

    Raises:
      flax.errors.ScopeParamNotFoundError: The params of a call lack M.
    """
    assert module.scope is not None
    name = spec.path[-1] + SUFFIX
    given = module.scope.get_variable("params", name)
    if given is not None:
        return adapter_of(given, spec, by_row=True)
    return module.scope.param(name, lambda key: box(init_adapter(spec, key)))


def running_dropout_key(
    module: nn.Module, spec: AdapterSpec, m: Any
) -> PRNGKeyArray | None:
    """The key of dropout in a call that was given one; otherwise None."""
    drops = spec.dropout > 0 and module.has_rng("dropout")
    return module.make_rng("dropout") if drops else None
