"""Measures of what adapters do to a model, and of what a merge loses.

Deltas as numbers::

  merge_loss            the share of each delta that rounding loses in a merge
  spectrum              the singular values of each delta
  effective_rank        the number of directions that a spectrum spreads over
  relative_norm         the norm of each delta, relative to its kernel

Models::

  check                 compare the adapted and the merged model on real inputs
"""

from mora_jax.diagnostics._compare_merged import check as check
from mora_jax.diagnostics._deltas import effective_rank as effective_rank
from mora_jax.diagnostics._deltas import merge_loss as merge_loss
from mora_jax.diagnostics._deltas import relative_norm as relative_norm
from mora_jax.diagnostics._deltas import spectrum as spectrum
