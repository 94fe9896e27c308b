"""Adapted and merged models, compared by their numbers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax._adapters import Tree, nest
from mora_jax._compute.delta import delta_kernel
from mora_jax._merge import merge
from mora_jax._paths import adapter_path, named_leaves
from mora_jax._plan import Plan, check_plan
from mora_jax._spec import AdapterSpec

Outputs = Callable[[Any], list[jax.Array]]
"""Adapters to the floating-point outputs of a model."""


def check(
    model: nn.Module | nnx.Module,
    variables: Mapping[str, Any] | None,
    plan: Plan,
    *inputs: Any,
    tolerance: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, float]:
    """Compare the adapted and the merged model, layer by layer, on real inputs.

    `linen.plan` and `nnx.plan` with inputs prove from a trace that both compute the
    same. This needs no trace, so it also serves plans that were made from shapes alone,
    and kernels of which a trace proves nothing. Each layer in turn gets a random M
    whose update is as large as the kernel, and all others none.

    Args:
      model: a Linen or an NNX module without adapters.
      variables: the variables of a Linen model; None for an NNX model.
      plan: the plan to check.
      *inputs: arguments of a call of the model.
      tolerance: the largest difference that passes. By default four times the square
        root of the machine epsilon of the outputs, 0.0014 for float32.
      seed: the seed of the random M's.
      **kwargs: further arguments of the call.

    Returns:
      {path: norm(adapted - merged) / norm(adapted - base)}, all norms over the model's
      floating-point outputs; NaN for a layer that has no effect on them.

    Raises:
      TypeError: `model` is no Flax module, or `plan` no plan.
      ValueError: layers whose difference is above `tolerance`, each with its figure; a
        model whose outputs are not finite; variables of a Linen model without params.

    Example::

      >>> import flax.linen as nn
      >>> from mora_jax import diagnostics, plan
      >>> model, x = nn.Dense(8), jnp.ones((2, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> found = diagnostics.check(model, variables, plan(variables["params"]), x)
      >>> found["kernel"] < 1e-3
      True
    """
    check_plan(plan)
    if isinstance(model, nnx.Module):
        params, adapted, merged = _of_nnx(model, plan, inputs, kwargs)
    elif isinstance(model, nn.Module):
        params, adapted, merged = _of_linen(model, variables, plan, inputs, kwargs)
    else:
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    base = adapted(_alone(None, plan, None, None))
    if not base or not all(jnp.isfinite(y).all() for y in base):
        raise ValueError(
            "the model must give finite floating-point outputs for these inputs, got "
            + ("NaN or infinity" if base else "no floating-point output")
        )
    kernels = {name: leaf for name, (_, leaf) in named_leaves(params).items()}
    found = {}
    for number, (name, spec) in enumerate(plan.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        adapters = _alone(spec, plan, kernels[name], key)
        one, other = adapted(adapters), merged(adapters)
        moved = _norm(a - b for a, b in zip(one, base, strict=True))
        apart = _norm(a - b for a, b in zip(one, other, strict=True))
        # If the merged model alone moves, the difference is all there is.
        moved = moved or _norm(b - a for a, b in zip(base, other, strict=True))
        found[name] = apart / moved if moved else float("nan")
    if tolerance is None:
        epsilon = max(float(jnp.finfo(y.dtype).eps) for y in base)
        tolerance = 4 * epsilon**0.5
    wrong = {name: apart for name, apart in found.items() if apart > tolerance}
    if wrong:
        listed = ", ".join(f"{name!r} by {apart:.2g}" for name, apart in wrong.items())
        raise ValueError(
            f"the adapted and the merged model differ by more than {tolerance:.2g} of "
            f"the update: {listed}; their layers use the kernel otherwise than planned"
        )
    return found


def _of_linen(
    model: nn.Module, variables: Any, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and the outputs of the adapted and the merged model."""
    from mora_jax import linen  # here: what the shells import knows no shell
    from mora_jax.linen._bound import params_of

    params = params_of(variables)
    apply = linen.wrap(model, plan)
    if any(spec.dropout > 0 for spec in plan.specs):
        apply = functools.partial(apply, adapter_deterministic=True)

    @jax.jit
    def adapted(adapters: Any, variables: Any, inputs: Any) -> list[jax.Array]:
        return _floating(apply(adapters, variables, *inputs, **kwargs))

    @jax.jit
    def merged(adapters: Any, variables: Any, inputs: Any) -> list[jax.Array]:
        new = merge(variables["params"], adapters, plan)
        return _floating(model.apply({**variables, "params": new}, *inputs, **kwargs))

    def of(function: Callable[..., list[jax.Array]]) -> Outputs:
        return lambda adapters: function(adapters, variables, inputs)

    return params, of(adapted), of(merged)


def _of_nnx(
    model: nnx.Module, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and the outputs of the adapted and the merged model."""
    from mora_jax import nnx as shell

    wrapped = shell.wrap(model, plan)
    wrapped.eval()  # the adapters drop nothing

    @nnx.jit
    def run(model: Any, inputs: Any) -> list[jax.Array]:
        return _floating(model(*inputs, **kwargs))

    def of(change: Callable[[Any], Any]) -> Outputs:
        def outputs(adapters: Any) -> list[jax.Array]:
            other = nnx.clone(wrapped)
            shell.set_adapters(other, adapters)
            return run(change(other), inputs)

        return outputs

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params, of(lambda model: model), of(shell.merge_adapters)


def _floating(outputs: Any) -> list[jax.Array]:
    arrays = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    return [y for y in arrays if jnp.issubdtype(y.dtype, jnp.floating)]


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(a, float))) for a in arrays)))


def _alone(spec: AdapterSpec | None, plan: Plan, kernel: Any, key: Any) -> Tree:
    """Adapters that are zero except for that of `spec`, whose update is as the kernel.

    `kernel` and `key` are for that one; without a `spec` all are zero.
    """
    ms = {one: jnp.zeros(one.shape, one.param_dtype) for one in plan.specs}
    if spec is not None:
        m = jax.random.normal(key, spec.shape, spec.param_dtype)
        delta = delta_kernel(spec, m.astype(jnp.float32))
        size = jnp.linalg.norm(jnp.asarray(kernel, jnp.float32).ravel())
        ratio = jnp.where(size > 0, size, 1) / jnp.linalg.norm(delta.ravel())
        ms[spec] = m * ratio.astype(m.dtype)
    return nest({adapter_path(one): m for one, m in ms.items()})
