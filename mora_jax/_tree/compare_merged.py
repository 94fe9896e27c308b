"""The outputs of adapted and merged models, compared by their numbers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax._common.checks import check_number, check_seed
from mora_jax._common.types import Path
from mora_jax._layer.delta import delta_kernel
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import copies
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.merge import merge
from mora_jax._tree.paths import adapter_path, named_leaves

Outputs = Callable[[Any], list[jax.Array]]
"""A function of adapters that returns the floating-point outputs of a model."""


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

    `linen.plan` and `nnx.plan` with inputs prove from a trace that both models compute
    the same. This function needs no trace, so it also serves plans that were made from
    shapes alone, and kernels of which a trace proves nothing. It gives each layer in
    turn, and no other layer, a random M whose delta is as large as the kernel.

    Args:
      model: A Linen or an NNX module without adapters.
      variables: The variables of a Linen model; None for an NNX model.
      plan: The plan to check.
      *inputs: The positional arguments of a call of the model.
      tolerance: The largest difference that passes. By default it is four times the
        square root of the machine epsilon of the outputs, 0.0014 for float32.
      seed: The seed of the random M's.
      **kwargs: The keyword arguments of the call.

    Returns:
      {path: norm(adapted - merged) / norm(adapted - base)}, with all norms over the
      model's floating-point outputs; NaN for a layer that has no effect on them.

    Raises:
      TypeError: `model` is not a Flax module, or `plan` is not a Plan.
      ValueError: Layers differ by more than `tolerance` (the message has each figure),
        the outputs are not finite, `tolerance` or `seed` is out of range, or a Linen
        model's variables lack params.

    Example::

      >>> import flax.linen as nn
      >>> import mora_jax
      >>> model, x = nn.Dense(8), jnp.ones((2, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = mora_jax.plan(variables["params"])
      >>> found = mora_jax.diagnostics.check(model, variables, plan, x)
      >>> found["kernel"] < 1e-3
      True
    """
    check_plan(plan)
    check_seed(seed)
    if tolerance is not None and check_number("tolerance", tolerance) < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if isinstance(model, nnx.Module):
        params, adapted, merged = _nnx_models(model, plan, inputs, kwargs)
    elif isinstance(model, nn.Module):
        params, adapted, merged = _linen_models(model, variables, plan, inputs, kwargs)
    else:
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    leaves = named_leaves(params)
    trained = copies(leaves, plan.trained)
    base = adapted(_adapters(plan, trained))
    if not base or not _are_finite(base):
        raise ValueError(
            "the model must give finite floating-point outputs for these inputs, got "
            + ("NaN or infinity" if base else "no floating-point output")
        )
    kernels = {name: leaf for name, (_, leaf) in leaves.items()}
    found = {}
    for number, (name, spec) in enumerate(plan.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        adapters = _adapters(plan, trained, spec, kernels[name], key)
        y_adapted, y_merged = adapted(adapters), merged(adapters)
        if not _are_finite([*y_adapted, *y_merged]):
            raise ValueError(
                f"the model must give finite outputs with a delta of {name!r} that is "
                "as large as its kernel, got NaN or infinity: give smaller inputs, or "
                "compare in float32"
            )
        difference = _distance(y_adapted, y_merged)
        # If the merged model alone has an effect, all of it is a difference: 1.
        effect = _distance(y_adapted, base) or _distance(y_merged, base)
        found[name] = difference / effect if effect else float("nan")
    if tolerance is None:
        epsilon = max(float(jnp.finfo(y.dtype).eps) for y in base)
        tolerance = 4 * epsilon**0.5
    wrong = {name: ratio for name, ratio in found.items() if ratio > tolerance}
    if wrong:
        listed = ", ".join(f"{name!r} by {ratio:.2g}" for name, ratio in wrong.items())
        raise ValueError(
            f"the adapted and the merged model differ by more than {tolerance:.2g} of "
            f"the delta: {listed}; their layers use the kernel otherwise than planned"
        )
    return found


def _linen_models(
    model: nn.Module, variables: Any, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and the outputs of the adapted and the merged model."""
    # Imported here, since the shells import the core and not the reverse.
    from mora_jax import linen
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

    def outputs(function: Callable[..., list[jax.Array]]) -> Outputs:
        return lambda adapters: function(adapters, variables, inputs)

    return params, outputs(adapted), outputs(merged)


def _nnx_models(
    model: nnx.Module, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and the outputs of the adapted and the merged model."""
    from mora_jax import nnx as shell

    wrapped = shell.wrap(model, plan)
    wrapped.eval()  # the adapters drop nothing

    @nnx.jit
    def run(model: Any, inputs: Any) -> list[jax.Array]:
        return _floating(model(*inputs, **kwargs))

    def adapted_copy(adapters: Any) -> Any:
        copy = nnx.clone(wrapped)
        shell.set_adapters(copy, adapters)
        return copy

    def adapted(adapters: Any) -> list[jax.Array]:
        return run(adapted_copy(adapters), inputs)

    def merged(adapters: Any) -> list[jax.Array]:
        return run(shell.merge_adapters(adapted_copy(adapters)), inputs)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params, adapted, merged


def _floating(outputs: Any) -> list[jax.Array]:
    arrays = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    return [y for y in arrays if jnp.issubdtype(y.dtype, jnp.floating)]


def _are_finite(ys: list[jax.Array]) -> bool:
    return all(bool(jnp.isfinite(y).all()) for y in ys)


def _distance(ys: list[jax.Array], references: list[jax.Array]) -> float:
    """The Frobenius norm of the differences of all arrays."""
    pairs = zip(ys, references, strict=True)
    squares = (np.sum(np.square(np.asarray(y - ref, float))) for y, ref in pairs)
    return float(np.sqrt(sum(squares)))


def _adapters(
    plan: Plan,
    trained: dict[Path, jax.Array],
    spec: AdapterSpec | None = None,
    kernel: Any = None,
    key: Any = None,
) -> Tree:
    """Adapters that are zero except for that of `spec`, and the `trained` arrays.

    Its delta is as large as `kernel`. Without a `spec` all adapters are zero.
    """
    ms = {each: jnp.zeros(each.shape, each.param_dtype) for each in plan.specs}
    if spec is not None:
        m = jax.random.normal(key, spec.shape, spec.param_dtype)
        delta = delta_kernel(spec, m.astype(jnp.float32))
        size = jnp.linalg.norm(jnp.asarray(kernel, jnp.float32).ravel())
        ratio = jnp.where(size > 0, size, 1) / jnp.linalg.norm(delta.ravel())
        ms[spec] = m * ratio.astype(m.dtype)
    return nest({adapter_path(each): m for each, m in ms.items()} | trained)
