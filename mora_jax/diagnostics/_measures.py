"""Deltas as numbers, what rounding loses of them, and models compared by numbers."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax import linen
from mora_jax import nnx as shell
from mora_jax._common.checks import check_number, check_seed
from mora_jax._flax.calls import unchecked
from mora_jax._layer.adapter import Adapter, delta_of, wide
from mora_jax._layer.rounding import Rounding, check_rounding, share_lost
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import checked_adapters, init, kernels_of
from mora_jax._tree.merge import merged_kernel, with_kernels
from mora_jax._tree.paths import replace_adapters, replace_leaves
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.linen._bound import params_of


def merge_loss(
    params: Any,
    adapters: Any,
    dtype: DTypeLike | None = None,
    *,
    rounding: Rounding = "dither",
) -> dict[str, float]:
    """The share of each delta that rounding loses in the mean when it is merged.

    What arrives is measured along the delta itself: errors that cancel in sums over
    many inputs, as a dither's do, do not count. The arguments are as in `merge`.

    Returns:
      {path: abs(1 - <merged - base, delta> / <delta, delta>)}; 0 for a zero delta.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    check_rounding(rounding)
    found, loss = checked_adapters(adapters), {}
    for path, adapter, _, kernel in with_kernels(params, found):
        merged = merged_kernel(adapter, kernel, dtype=dtype, rounding=rounding)
        delta = delta_of(adapter)
        change = merged.astype(delta.dtype) - kernel.astype(delta.dtype)
        loss["/".join(path)] = float(share_lost(change, delta))
    return loss


def spectrum(adapters: Any) -> dict[str, np.ndarray]:
    """The singular values of every delta, the largest first.

    Args:
      adapters: The adapters, as `init` makes them.

    Returns:
      {path: (*stack, min(in, out))}, in float64.

    Raises:
      TypeError, ValueError: They are not adapters, or an M is not finite.
    """
    values = {}
    for path, adapter in kernels_of(checked_adapters(adapters)).items():
        spec = adapter.spec
        stack = np.asarray(adapter.m, np.float64).reshape(-1, *spec.operator.m_shape)
        spectra = [_spectrum(spec, m) for m in stack]
        values["/".join(path)] = np.reshape(spectra, (*spec.stack_shape, -1))
    return values


def _spectrum(spec: AdapterSpec, m: np.ndarray) -> np.ndarray:
    """The singular values of one M's delta: M -> (min(in, out),)."""
    op = spec.operator
    is_square = op.linear and op.m_shape == (op.square_rank, op.square_rank)
    if is_square and op.block and op.isometry:
        # The singular values of M, once for each block.
        values = np.repeat(np.linalg.svdvals(m), op.compressed_shape[0])
    elif is_square and not op.block:
        # The delta is C times the rows of M as D maps them, and C = Q R: rotations by
        # Q leave singular values as they are.
        triangle = np.linalg.qr(np.asarray(op.compress_matrix(), np.float64), "r")
        values = np.linalg.svdvals(triangle @ np.asarray(op.decompress(m), np.float64))
    else:
        # The smaller Gram matrix is ten times as fast as an SVD, and in float64 it is
        # exact enough for a delta in float32.
        delta = np.asarray(op.matrix(jnp.asarray(m)), np.float64)
        delta = delta.T if op.in_features > op.out_features else delta
        values = np.sqrt(np.linalg.eigvalsh(delta @ delta.T).clip(0)[::-1])
    missing = min(op.in_features, op.out_features) - len(values)
    return abs(spec.factor) * np.pad(values, (0, missing))


def effective_rank(values: Float[np.ndarray, "*stack k"]) -> np.ndarray | np.floating:
    r"""The number of directions that a delta spreads over, as a real number.

    .. math:: \exp(-\sum_i p_i \log p_i), \qquad p_i = \sigma_i / \sum_j \sigma_j

    (Roy and Vetterli, "The effective rank", 2007.) It is k where k singular values are
    equal and the rest is zero, and 0 where all are zero.

    Args:
      values: Singular values, (..., k).

    Returns:
      The effective ranks, (...).

    Raises:
      TypeError: `values` are what `spectrum` returns, and not one of its values.
      ValueError: `values` are a single number, or one is negative or not finite.
    """
    if isinstance(values, Mapping):
        rule = "values must be an array of singular values, got a mapping"
        raise TypeError(f"{rule}: give one of the values that spectrum returns")
    values = np.asarray(values, np.float64)
    if not values.ndim:
        raise ValueError(f"values must have shape (..., k), got {values!r}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("values must be finite and not negative")
    total = values.sum(-1, keepdims=True)
    p = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)[()]


def relative_norm(params: Any, adapters: Any) -> dict[str, float]:
    """The Frobenius norm of each delta over its kernel's; arguments as in `merge`.

    Returns:
      {path: norm(delta) / norm(kernel)}; infinity where a kernel is zero.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    norms, shares = spectrum(adapters), {}
    for path, _, _, kernel in with_kernels(params, checked_adapters(adapters)):
        name = "/".join(path)
        delta_norm = float(np.linalg.norm(norms[name]))
        # In float32, since squares of a float16 kernel overflow.
        kernel_norm = float(jnp.linalg.norm(wide(kernel).ravel()))
        shares[name] = delta_norm / kernel_norm if kernel_norm else math.inf
    return shares


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
    if isinstance(model, nnx.Module):
        params, adapted, plain = _nnx_models(model, plan, inputs, kwargs)
    elif isinstance(model, nn.Module):
        params, adapted, plain = _linen_models(model, variables, plan, inputs, kwargs)
    else:
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    key, ratios = jax.random.key(seed), {}
    # An adapter may start at random, and each layer is to be the only one adapted.
    start = init(plan, key, params=params)
    zeros = replace_adapters(
        start,
        {
            path: Adapter(jnp.zeros(spec.shape, spec.param_dtype), spec)
            for path, spec in plan.specs.items()
        },
    )
    base = _floats(adapted(zeros), "floating-point outputs for these inputs")
    items = enumerate(with_kernels(params, checked_adapters(zeros)))
    for number, (path, adapter, place, kernel) in items:
        name = "/".join(path)
        own = _as_large_as(kernel, adapter.spec, jax.random.fold_in(key, number))
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


def _linen_models(
    model: nn.Module, variables: Any, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Params, and the model's outputs as functions of adapters and of params."""
    params, apply = params_of(variables), linen.wrap(model, plan)
    settings = {"adapter_deterministic": True, **kwargs}

    @jax.jit
    def adapted(adapters: Any, variables: Any, inputs: Any) -> Any:
        return apply(adapters, variables, *inputs, **settings)

    @jax.jit
    def plain(params: Any, variables: Any, inputs: Any) -> Any:
        return model.apply({**variables, "params": params}, *inputs, **kwargs)

    # Arrays are arguments. As constants XLA would copy them, and try to compute them.
    given = variables, inputs
    return params, lambda ms: adapted(ms, *given), lambda params: plain(params, *given)


def _nnx_models(
    model: nnx.Module, plan: Plan, inputs: Any, kwargs: Any
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Params, and the model's outputs as functions of adapters and of params."""
    run = nnx.jit(lambda model, inputs: model(*inputs, **kwargs))

    def outputs(model: nnx.Module, put: Callable[..., None], trained: Any) -> Any:
        copy = nnx.clone(model)
        copy.eval()  # nothing is dropped
        put(copy, trained)
        return run(copy, inputs)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adapted = functools.partial(outputs, shell.wrap(model, plan), shell.set_adapters)
    return params, adapted, functools.partial(outputs, model, nnx.update)


def _floats(outputs: Any, what: str) -> list[jax.Array]:
    """The floating-point arrays that a model returned, which must be finite."""
    ys = [jnp.asarray(y) for y in jax.tree.leaves(outputs)]
    ys = [y for y in ys if jnp.issubdtype(y.dtype, jnp.floating)]
    if not ys or not all(bool(jnp.isfinite(y).all()) for y in ys):
        got = "NaN or infinity" if ys else "no floating-point output"
        raise ValueError(f"the model must give finite {what}, got {got}; try float32")
    return ys


def _as_large_as(kernel: jax.Array, spec: AdapterSpec, key: jax.Array) -> Adapter:
    """A random M with a delta of the norm of `kernel`; of norm 1 for a kernel of 0."""
    m = jax.random.normal(key, spec.shape, spec.param_dtype)
    arrays = wide(kernel), delta_of(Adapter(m, spec))
    size, delta_size = (float(jnp.linalg.norm(a.ravel())) for a in arrays)
    return Adapter(spec.operator.scaled(m, (size or 1.0) / delta_size), spec)


def _distance(ys: list[jax.Array], references: list[jax.Array]) -> float:
    """The Frobenius norm of the differences of all arrays."""
    pairs = zip(ys, references, strict=True)
    return math.hypot(*(np.linalg.norm(np.asarray(y - ref, float)) for y, ref in pairs))
