"""Measures of what adapters do to a model, and of what a merge loses.

Deltas as numbers::

  merge_loss            the share of each delta that rounding loses in a merge
  spectrum              the singular values of each delta
  effective_rank        the number of directions that a spectrum spreads over
  relative_norm         the norm of each delta, relative to its kernel

Pictures, for which matplotlib must be installed::

  plot_delta            an operator's pattern, or a trained delta

Example::

  >>> import jax.numpy as jnp, mora_jax
  >>> from mora_jax import diagnostics
  >>> params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
  >>> config = mora_jax.MoRAConfig(operator="truncation", square_rank=4, scale="paper")
  >>> plan = mora_jax.plan(params, config)
  >>> adapters = plan.adapters({"kernel_mora": jnp.full((4, 4), 2.0**-10)})
  >>> diagnostics.merge_loss(params, adapters, rounding="nearest")
  {'kernel': 1.0}
  >>> diagnostics.relative_norm(params, adapters)
  {'kernel': 0.0009765625}
  >>> values = diagnostics.spectrum(adapters)["kernel"]
  >>> values.shape, float(diagnostics.effective_rank(values).round(3))
  ((4,), 1.0)
"""

from mora_jax.diagnostics._measures import effective_rank as effective_rank
from mora_jax.diagnostics._measures import merge_loss as merge_loss
from mora_jax.diagnostics._measures import relative_norm as relative_norm
from mora_jax.diagnostics._measures import spectrum as spectrum
from mora_jax.diagnostics._plots import plot_delta as plot_delta
