"""The adapted and the merged model compared by numbers, layer by layer."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax._common.checks import check_number, check_seed
from mora_jax._flax.proofs import unchecked
from mora_jax._layer.adapter import Adapter, delta_of
from mora_jax._tree.adapters import init
from mora_jax._tree.merge import merged_kernel
from mora_jax._tree.paths import adapters_in, replace_adapters, replace_leaves
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.diagnostics._measures import norm
from mora_jax.linen._bound import params_of
from mora_jax.linen._model import wrap as wrap_linen
from mora_jax.nnx._held import set_adapters
from mora_jax.nnx._model import wrap as wrap_nnx


@unchecked()  # by a trace: numbers are to show what layers do
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

    It gives each layer in turn, and no other layer, a random M whose delta is as large
    as the kernel. `linen.plan` and `nnx.plan` with inputs prove from a trace that both
    compute the same: this is for other plans, and kernels in `Plan.unproven`.

    Args:
      model: A Linen or an NNX module without adapters.
      variables: The variables of a Linen model; None for an NNX model.
      plan: The plan to check.
      *inputs: The positional arguments of a call of the model.
      tolerance: The largest difference that passes; None for four times the square root
        of the machine epsilon of the outputs, 0.0014 for float32.
      seed: The seed of the random M's.
      **kwargs: The keyword arguments of the call.

    Returns:
      {path: norm(adapted - merged) / norm(adapted - base)}, with all norms over the
      model's floating-point outputs; NaN for a layer without an effect on them.

    Raises:
      TypeError: `model` is not a Flax module, or `plan` is not a Plan.
      ValueError: Layers differ by more than `tolerance` (the message has each figure),
        outputs are not finite, an argument is out of range, or `variables` lack params.
    """
    check_plan(plan)
    check_seed(seed)
    if tolerance is not None and check_number("tolerance", tolerance) < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    params, adapted, plain = _models(model, variables, plan, inputs, kwargs)
    key, ratios = jax.random.key(seed), {}
    # An adapter may start at random, and each layer is to be the only one adapted.
    start = init(plan, key, params=params)
    kernels = dict(adapters_in(start).kernels)
    zeros = replace_adapters(start, jax.tree.map(jnp.zeros_like, kernels))
    base = _floats(adapted(zeros), "floating-point outputs for these inputs")
    items = adapters_in(zeros).kernels.in_base(params).items()
    for number, (path, (place, kernel)) in enumerate(items):
        name = "/".join(path)
        spec, own_key = kernels[path].spec, jax.random.fold_in(key, number)
        own = Adapter(jax.random.normal(own_key, spec.shape, spec.param_dtype), spec)
        factor = (norm(kernel) or 1.0) / norm(delta_of(own))
        own = own.replace(m=spec.operator.scaled(own.m, factor))
        merged = merged_kernel(own, kernel, rounding="dither")
        what = f"outputs with a delta of {name!r} that is as large as its kernel"
        left = _floats(adapted(replace_adapters(zeros, {path: own})), what)
        right = _floats(plain(replace_leaves(params, {place: merged})), what)
        # If the merged model alone has an effect, all of it is a difference: 1.
        effect = _distance(left, base) or _distance(right, base)
        ratios[name] = _distance(left, right) / effect if effect else math.nan
    if tolerance is None:
        # Far above errors of rounding, and far below 1, where a layer is another one.
        tolerance = 4 * max(float(jnp.finfo(y.dtype).eps) for y in base) ** 0.5
    wrong = [f"{name!r} by {r:.2g}" for name, r in ratios.items() if r > tolerance]
    if wrong:
        raise ValueError(
            f"the adapted and the merged model differ by more than {tolerance:.2g} of "
            f"the delta: {', '.join(wrong)}; they use kernels otherwise than planned"
        )
    return ratios


def _models(
    model: Any, variables: Any, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Params, and the model's outputs as functions of adapters and of params."""
    # Arrays are arguments. As constants XLA would copy them, and try to compute them.
    if isinstance(model, nn.Module):
        params, apply = params_of(variables), wrap_linen(model, plan)
        given = {"adapter_deterministic": True, **kwargs}
        adapted = jax.jit(lambda ms, v, inputs: apply(ms, v, *inputs, **given))
        plain = jax.jit(lambda v, inputs: model.apply(v, *inputs, **kwargs))
        return (
            params,
            lambda adapters: adapted(adapters, variables, inputs),
            lambda params: plain({**variables, "params": params}, inputs),
        )
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    run = nnx.jit(lambda model, inputs: model(*inputs, **kwargs))

    def outputs(model: nnx.Module, put: Callable[..., None], trained: Any) -> Any:
        copy = nnx.clone(model)
        copy.eval()  # nothing is dropped
        put(copy, trained)
        return run(copy, inputs)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    wrapped = functools.partial(outputs, wrap_nnx(model, plan), set_adapters)
    return params, wrapped, functools.partial(outputs, model, nnx.update)


def _floats(outputs: Any, what: str) -> list[jax.Array]:
    """The floating-point arrays that a model returned, which must be finite."""
    ys = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    ys = [y for y in ys if jnp.issubdtype(y.dtype, jnp.floating)]
    if not ys or not all(bool(jnp.isfinite(y).all()) for y in ys):
        got = "NaN or infinity" if ys else "no floating-point output"
        raise ValueError(f"the model must give finite {what}, got {got}; try float32")
    return ys


def _distance(ys: list[jax.Array], references: list[jax.Array]) -> float:
    """The Frobenius norm of the differences of all arrays."""
    pairs = zip(ys, references, strict=True)
    return math.hypot(*(np.linalg.norm(np.asarray(y - ref, float)) for y, ref in pairs))
