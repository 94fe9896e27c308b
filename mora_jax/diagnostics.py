"""What adapters do to a model, and what a merge loses."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.checks import as_jax_array
from mora_jax._layer.delta import scaled
from mora_jax._layer.rounding import Rounding, share_lost
from mora_jax._layer.squares import block_diagonal
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.compare_merged import check as check
from mora_jax._tree.merge import delta_weight, finite_items, merge, wide
from mora_jax._tree.paths import find_kernel, named_leaves


def merge_loss(
    params: Any,
    adapters: Any,
    plan: Plan,
    dtype: DTypeLike | None = None,
    *,
    rounding: Rounding = "dither",
) -> dict[str, float]:
    """The share of each delta that rounding loses in the mean when it is merged.

    The numbers of a 16-bit kernel are a coarse grid, and small deltas fall between its
    points. What arrives of a delta D is measured along D itself: of a change C of the
    kernel it is <C, D> / <D, D>. Errors that cancel in sums over many inputs, as those
    of a dither do, do not count.

    Args:
      params: The base's params.
      adapters: The adapters, as `init` makes them.
      plan: The plan of the adapters.
      dtype: The dtype of the merged kernels, as in `merge`.
      rounding: How to round, as in `merge`.

    Returns:
      {path: the absolute value of 1 - <merged - base, delta> / <delta, delta>}, 0 where
      the delta is zero.

    Raises:
      TypeError, ValueError: As `merge`.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
      >>> config = mora_jax.MoRAConfig(operator="truncation", square_rank=4)
      >>> plan = mora_jax.plan(params, config)
      >>> adapters = {"kernel_mora": jnp.full((4, 4), 1e-4)}
      >>> mora_jax.diagnostics.merge_loss(params, adapters, plan, rounding="nearest")
      {'kernel': 1.0}
    """
    settings = {"any_base": True, "rounding": rounding}
    merged = named_leaves(merge(params, adapters, plan, dtype, **settings))
    base, deltas = named_leaves(params), named_leaves(delta_weight(adapters, plan))
    loss = {}
    for spec in plan.specs:
        before, after, delta = (
            jnp.asarray(leaves[spec.name][1], deltas[spec.name][1].dtype)
            for leaves in (base, merged, deltas)
        )
        loss[spec.name] = share_lost(after - before, delta)
    return loss


def spectrum(adapters: Any, plan: Plan) -> dict[str, np.ndarray]:
    """The singular values of every delta, the largest first.

    Where the operator allows it, they are computed from matrices of q rows and not from
    the delta at full size. The delta of an isometric block operator has M's singular
    values, once for each block, and the delta of an operator without blocks is a
    product of two thin factors.

    Args:
      adapters: The adapters, as `init` makes them.
      plan: The plan of the adapters.

    Returns:
      {path: (*stack, min(in, out))}, in float64.

    Raises:
      TypeError, ValueError: Adapters do not fit the plan, or an M holds NaN or
        infinity.

    Example::

      >>> import mora_jax
      >>> config = mora_jax.MoRAConfig(square_rank=2, scale="paper")
      >>> plan = mora_jax.plan({"kernel": jnp.ones((4, 4))}, config)
      >>> mora_jax.diagnostics.spectrum({"kernel_mora": 3 * jnp.eye(2)}, plan)
      {'kernel': array([3., 3., 3., 3.])}
    """
    values = {}
    for spec, m in finite_items(adapters, plan):
        m = np.asarray(m, np.float64)
        stack = m.reshape(-1, *spec.operator.m_shape)
        spectra = [_spectrum(spec, one) for one in stack]
        values[spec.name] = np.reshape(spectra, (*spec.stack_shape, -1))
    return values


def _spectrum(spec: AdapterSpec, m: np.ndarray) -> np.ndarray:
    """The singular values of one M's delta: M -> (min(in, out),)."""
    op, m = spec.operator, scaled(spec, m)
    if op.block and op.isometry:
        of_squares = np.atleast_2d(np.linalg.svd(m, compute_uv=False))
        of_blocks = of_squares[np.arange(op.compressed_shape[0]) % op.squares]
        values = np.sort(of_blocks, axis=None)[::-1]
    elif op.block:
        # The smaller Gram matrix is ten times as fast as an SVD, and in float64 it is
        # exact enough for a delta in float32.
        delta = np.asarray(op.delta_weight(m), np.float64)
        delta = delta.T if op.in_features > op.out_features else delta
        values = np.sqrt(np.linalg.eigvalsh(delta @ delta.T).clip(0)[::-1])
    else:
        triangle = np.linalg.qr(np.asarray(op.compress_matrix(), np.float64), "r")
        rows = np.asarray(op.decompress(block_diagonal(m)), np.float64)
        values = np.linalg.svd(triangle @ rows, compute_uv=False)
    full = np.zeros(min(op.in_features, op.out_features))
    full[: len(values)] = values
    return full


def effective_rank(
    values: Float[np.ndarray, "*stack k"],
) -> np.ndarray | np.floating:
    r"""How many directions a delta spreads over, as a real number.

    .. math:: \exp(-\sum_i p_i \log p_i), \qquad p_i = \sigma_i / \sum_j \sigma_j

    (Roy and Vetterli, "The effective rank", 2007.) It is k where k singular values are
    equal and the rest is zero, and 0 where all are zero.

    Args:
      values: Singular values, (..., k).

    Returns:
      The effective ranks, (...).

    Raises:
      TypeError: `values` are what `spectrum` returns, and not one of its values.
      ValueError: `values` have no axis, or one of them is negative or not finite.

    Example::

      >>> import mora_jax
      >>> mora_jax.diagnostics.effective_rank(np.array([2.0, 2.0, 0.0])).round(6)
      np.float64(2.0)
    """
    values = _singular_values(values)
    total = values.sum(-1, keepdims=True)
    p = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)[()]


def _singular_values(values: Any) -> np.ndarray:
    """`values` in float64, if they can be singular values."""
    if isinstance(values, Mapping):
        raise TypeError(
            "values must be an array of singular values, got a mapping: give one of "
            "the values that spectrum returns"
        )
    values = np.asarray(values, np.float64)
    if not values.ndim:
        raise ValueError(f"values must have shape (..., k), got {values!r}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("values must be finite and not negative")
    return values


def count_above(
    values: Float[np.ndarray, "*stack k"], threshold: float = 0.1
) -> np.ndarray | np.integer:
    """How many singular values exceed `threshold`: the paper's figure 4, at 0.1.

    Args:
      values: Singular values, (..., k).
      threshold: The value that they must exceed.

    Returns:
      The counts, (...).

    Raises:
      TypeError, ValueError: As `effective_rank`.
    """
    return (_singular_values(values) > threshold).sum(-1)


def relative_norm(params: Any, adapters: Any, plan: Plan) -> dict[str, float]:
    """The Frobenius norm of each delta, relative to that of its kernel.

    Args:
      params: The base's params.
      adapters: The adapters, as `init` makes them.
      plan: The plan of the adapters.

    Returns:
      {path: norm(delta) / norm(kernel)}; infinity where a kernel is zero.

    Raises:
      TypeError, ValueError: As `merge`.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> config = mora_jax.MoRAConfig(operator="truncation", square_rank=4)
      >>> plan = mora_jax.plan(params, config)
      >>> adapters = {"kernel_mora": jnp.full((4, 4), 0.5)}
      >>> mora_jax.diagnostics.relative_norm(params, adapters, plan)
      {'kernel': 0.5}
    """
    leaves, values = named_leaves(params), spectrum(adapters, plan)
    shares = {}
    for spec in plan.specs:
        kernel = as_jax_array(spec.name, find_kernel(leaves, spec)[1])
        delta_norm = float(np.linalg.norm(values[spec.name]))
        # In float32, since squares of a float16 kernel overflow.
        kernel_norm = float(jnp.linalg.norm(wide(kernel).ravel()))
        shares[spec.name] = delta_norm / kernel_norm if kernel_norm else math.inf
    return shares


def plot_spectrum(adapters: Any, plan: Plan) -> Any:
    """A figure of the singular values of every delta, and how many exceed 0.1.

    Args:
      adapters: The adapters, as `init` makes them.
      plan: The plan of the adapters.

    Returns:
      A `matplotlib.figure.Figure`, to save with `.savefig(path)`.

    Raises:
      ImportError: Matplotlib is not installed.
      TypeError, ValueError: As `spectrum`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install mora-jax[plot]"
        ) from error
    spectra = sorted(spectrum(adapters, plan).items(), key=_numerically)
    layers = [
        (name, values)
        for name, stack in spectra
        for values in stack.reshape(-1, stack.shape[-1])
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    lines, bars = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(_kind(name) for name, _ in layers))
    for name, values in layers:
        colour = f"C{kinds.index(_kind(name)) % 10}"
        lines.plot(values, color=colour, linewidth=0.8, alpha=0.6)
    for kind in kinds:
        counts = [count_above(values) for name, values in layers if _kind(name) == kind]
        bars.plot(counts, "o-", color=f"C{kinds.index(kind) % 10}", label=kind)
    lines.set(yscale="log", xlabel="index", ylabel="singular value of the delta")
    bars.set(xlabel="layer", ylabel="singular values above 0.1", ylim=(0, None))
    figure.legend(*bars.get_legend_handles_labels(), loc="outside right center")
    return figure


def _numerically(item: tuple[str, Any]) -> list[Any]:
    """A key that puts layer 2 before layer 10."""
    words = re.split(r"(\d+)", item[0])
    return [int(word) if word.isdigit() else word for word in words]


def _kind(name: str) -> str:
    """The name of a layer's kind: the end of its path, without the numbers."""
    words = [word for word in name.split("/") if not any(map(str.isdigit, word))]
    return "/".join(words[-2:])
