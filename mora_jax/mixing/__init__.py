"""Adapters of one base mixed: scaled, added, cut back to a plan.

A delta is linear in its M (paper equation 3), so a sum of M's of one plan is the sum of
their deltas, exactly. Here an adapter is a pair (adapters, plan), as `load` returns it
and `save(directory, *pair)` takes it: only a plan says what an M means.

Adapters as numbers::

  scaled                adapters whose deltas are some factor as large
  weighted_sum          the sum of adapters of one plan, exactly
  project               the adapter of a plan that is nearest to a sum of any adapters
"""

from mora_jax.mixing._project import project as project
from mora_jax.mixing._sums import scaled as scaled
from mora_jax.mixing._sums import weighted_sum as weighted_sum
