"""The outputs of adapted and merged models, compared by their numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax import linen
from mora_jax import nnx as shell
from mora_jax._common.checks import check_number, check_seed
from mora_jax._layer.equation import delta_kernel
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import init, refuse_nonlinear
from mora_jax._tree.merge import merged_kernel, wide, with_kernels
from mora_jax._tree.paths import adapter_path, replace_leaves
from mora_jax.linen._bound import params_of

Outputs = Callable[[Any], list[jax.Array]]
"""A function of adapters or params that returns a model's floating-point outputs."""


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
    the same. This function serves plans that were made from shapes alone, and kernels
    about which a trace proves nothing. It gives each layer in turn, and no other layer,
    a random M whose delta is as large as the kernel.

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
      model's floating-point outputs; NaN for a layer without an effect on them.

    Raises:
      TypeError: `model` is not a Flax module, or `plan` is not a Plan.
      ValueError: Layers differ by more than `tolerance` (the message has each figure),
        the outputs are not finite, `tolerance` or `seed` is out of range, a Linen
        model's variables lack params, or a delta is not linear in what is trained.
    """
    check_plan(plan)
    check_seed(seed)
    if tolerance is not None and check_number("tolerance", tolerance) < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    refuse_nonlinear(plan.specs, "so that no M is known whose delta has a given size")
    if isinstance(model, nnx.Module):
        params, adapted, plain = _nnx_models(model, plan, inputs, kwargs)
    elif isinstance(model, nn.Module):
        params, adapted, plain = _linen_models(model, variables, plan, inputs, kwargs)
    else:
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    key, ratios = jax.random.key(seed), {}
    items = [(spec, jnp.zeros(spec.shape, spec.param_dtype)) for spec in plan.specs]
    ms = {adapter_path(spec): m for spec, m in items}
    zeros = replace_leaves(init(plan, key, params=params), ms)
    base = adapted(zeros)
    _check_finite(base, "floating-point outputs for these inputs")
    for number, (spec, _, path, kernel) in enumerate(with_kernels(params, items)):
        m = _as_large_as(kernel, spec, jax.random.fold_in(key, number))
        merged = merged_kernel(spec, m, kernel, rounding="dither")
        y_adapted = adapted(replace_leaves(zeros, {adapter_path(spec): m}))
        y_merged = plain(replace_leaves(params, {path: merged}))
        ratios[spec.name] = _difference(y_adapted, y_merged, base, spec.name)
    if tolerance is None:
        epsilon = max(float(jnp.finfo(y.dtype).eps) for y in base)
        tolerance = 4 * epsilon**0.5
    wrong = [f"{name!r} by {r:.2g}" for name, r in ratios.items() if r > tolerance]
    if wrong:
        raise ValueError(
            f"the adapted and the merged model differ by more than {tolerance:.2g} of "
            f"the delta: {', '.join(wrong)}; their layers use the kernel otherwise "
            "than planned"
        )
    return ratios


def _linen_models(
    model: nn.Module, variables: Any, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and outputs by adapters and by params."""
    params, apply = params_of(variables), linen.wrap(model, plan)
    settings = {"adapter_deterministic": True, **kwargs}

    def outputs(call: Callable[..., Any]) -> Outputs:
        jitted = jax.jit(lambda *arrays: _floating(call(*arrays)))
        return lambda trained: jitted(trained, variables, inputs)

    def adapted(adapters: Any, variables: Any, inputs: Any) -> Any:
        return apply(adapters, variables, *inputs, **settings)

    def plain(params: Any, variables: Any, inputs: Any) -> Any:
        return model.apply({**variables, "params": params}, *inputs, **kwargs)

    return params, outputs(adapted), outputs(plain)


def _nnx_models(
    model: nnx.Module, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Outputs, Outputs]:
    """Params, and outputs by adapters and by params."""

    @nnx.jit
    def run(model: Any, inputs: Any) -> list[jax.Array]:
        return _floating(model(*inputs, **kwargs))

    def outputs(model: Any, put: Callable[[Any, Any], None]) -> Outputs:
        def call(trained: Any) -> list[jax.Array]:
            copy = nnx.clone(model)
            copy.eval()  # nothing is dropped
            put(copy, trained)
            return run(copy, inputs)

        return call

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adapted = outputs(shell.wrap(model, plan), shell.set_adapters)
    return params, adapted, outputs(model, nnx.update)


def _floating(outputs: Any) -> list[jax.Array]:
    arrays = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    return [y for y in arrays if jnp.issubdtype(y.dtype, jnp.floating)]


def _check_finite(ys: list[jax.Array], what: str) -> None:
    """Raise unless there are outputs, and all of them are finite."""
    if not ys or not all(bool(jnp.isfinite(y).all()) for y in ys):
        got = "NaN or infinity" if ys else "no floating-point output"
        raise ValueError(
            f"the model must give finite {what}, got {got}; smaller inputs or float32 "
            "may help"
        )


def _as_large_as(kernel: jax.Array, spec: AdapterSpec, key: jax.Array) -> jax.Array:
    """A random M with a delta of the norm of `kernel`; of norm 1 for a kernel of 0."""
    m = jax.random.normal(key, spec.shape, spec.param_dtype)
    arrays = wide(kernel), delta_kernel(spec, wide(m))
    size, delta_size = (float(jnp.linalg.norm(a.ravel())) for a in arrays)
    return m * ((size or 1.0) / delta_size)


def _difference(
    adapted: list[jax.Array], merged: list[jax.Array], base: list[jax.Array], name: str
) -> float:
    """The distance of two outputs, divided by their distance from the base's."""
    what = f"outputs with a delta of {name!r} that is as large as its kernel"
    _check_finite([*adapted, *merged], what)
    # If the merged model alone has an effect, all of it is a difference: 1.
    effect = _distance(adapted, base) or _distance(merged, base)
    return _distance(adapted, merged) / effect if effect else float("nan")


def _distance(ys: list[jax.Array], references: list[jax.Array]) -> float:
    """The Frobenius norm of the differences of all arrays."""
    pairs = zip(ys, references, strict=True)
    squares = (np.sum(np.square(np.asarray(y - ref, float))) for y, ref in pairs)
    return float(np.sqrt(sum(squares)))
