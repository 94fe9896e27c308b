"""Pictures of deltas and of training, in the caller's style of matplotlib."""

from collections.abc import Mapping, Sequence
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
    ax = ax or _axes(1)[0]
    ax.imshow(delta, cmap="RdBu_r", vmin=-top, vmax=top)
    ax.set(xlabel="output features", ylabel="input features", title=op.name)
    return ax


def plot_training(
    records: Sequence[Mapping[str, Any]], *, axes: Sequence[Any] | None = None
) -> list[Any]:
    """Draw what a training loop recorded, a panel for each name.

    Args:
      records: A mapping for each recorded step: "step", and names of your own, such as
        "loss" or "recall", which a record may lack. A value is a number, or a mapping
        of paths to numbers, as `relative_norm` returns it: a line for each path, the
        first one dark.
      axes: An Axes for each name, which are returned; None for a new figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: A record lacks "step", no record has a value, a value is not a number,
        or there are more or fewer axes than names.

    Example:
      >>> import mora_jax
      >>> records = [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0, "recall": 0.5}]
      >>> [ax.get_ylabel() for ax in mora_jax.diagnostics.plot_training(records)]
      ['loss', 'recall']
    """
    records = list(records)
    names = [*dict.fromkeys(n for record in records for n in record if n != "step")]
    if not names or not all("step" in record for record in records):
        raise ValueError(f'records must each have "step" and a value, got {records!r}')
    axes = _axes(len(names)) if axes is None else list(axes)
    if len(axes) != len(names):
        raise ValueError(f"axes must be one for each of {names}, got {len(axes)}")
    for name, ax in zip(names, axes, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for record in records:
            value = record.get(name, {})
            values = value if isinstance(value, Mapping) else {"": value}
            for path, y in values.items():
                try:
                    lines.setdefault(path, []).append((record["step"], float(y)))
                except (TypeError, ValueError):
                    raise ValueError(f"{name} must be numbers, got {y!r}") from None
        for k, points in enumerate(lines.values()):
            shade = (0.1, 0.25 + 0.6 * k / len(lines), 0.6) if len(lines) > 1 else None
            ax.plot(*zip(*points, strict=True), color=shade)
        ax.set(xlabel="step", ylabel=name)
    return axes


def _axes(count: int) -> list[Any]:
    """Axes side by side in a new figure."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need: pip install matplotlib") from error
    figure = pyplot.figure(figsize=(4.8 * count, 3.6), layout="constrained")
    return [figure.add_subplot(1, count, k + 1) for k in range(count)]
