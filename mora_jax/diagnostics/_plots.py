"""Pictures of deltas, in the caller's style of matplotlib."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.checks import check_concrete, check_finite
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators import Operator


def plot_delta(
    operator: Operator | AdapterSpec | Adapter,
    m: jax.Array | None = None,
    *,
    ax: Any = None,
) -> Any:
    """Draw a delta: red is positive, blue is negative, white is zero.

    Args:
      operator: An operator; or with its factor `plan[path]`, or an adapter.
      m: One M, of the operator's `m_shape`; None for the adapter's own, or for waves,
        which show where each part of M comes to lie.
      ax: The matplotlib Axes to draw in; None for a new figure.

    Returns:
      The Axes, with a row for each input feature and a column for each output feature.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `operator` or `m` has another type.
      ValueError: `m` has another shape, or is not finite.

    Example:
      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 6))}})
      >>> ax = mora_jax.diagnostics.plot_delta(plan["fc/kernel"])
      >>> ax.images[0].get_array().shape
      (8, 6)
    """
    if isinstance(operator, Adapter):
        operator, m = operator.spec, operator.m if m is None else m
    factor = getattr(operator, "factor", 1.0)
    op = getattr(operator, "operator", operator)
    if not isinstance(op, Operator):
        rule = "operator must be an operator or an AdapterSpec"
        raise TypeError(f"{rule}, got {operator!r}")
    if m is None:  # neither its rows nor its columns are alike, nor is it symmetric
        y, x = (jnp.linspace(0, 1, size) for size in op.m_shape)
        m = jnp.cos(5 * y[:, None] + 9 * x) * (0.3 + 0.7 * x)
    check_concrete(m, "m", op.m_shape)
    check_finite(m, "m")
    delta = np.asarray(factor * op.matrix(jnp.asarray(m)), np.float32)
    top = float(abs(delta).max()) or 1.0
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("pictures need: pip install matplotlib") from error
        _, ax = pyplot.subplots(figsize=(4.8, 3.6), layout="constrained")
    ax.imshow(delta, cmap="RdBu_r", vmin=-top, vmax=top)
    ax.set(xlabel="output features", ylabel="input features", title=op.name)
    return ax
