"""Adapters of one base mixed: scaled, added, cut back to a plan.

A delta is linear in its M (paper equation 3), so a sum of M's of one plan is the sum of
their deltas, exactly. Here an adapter is a pair (adapters, plan), as `load` returns it
and `save(directory, *pair)` takes it: only a plan says what an M means.

Adapters as numbers::

  scaled                adapters whose deltas are some factor as large
  weighted_sum          the sum of adapters of one plan, exactly
  project               the adapter of a plan that is nearest to a sum of any adapters

Example::

  >>> import jax, jax.numpy as jnp, mora_jax
  >>> from mora_jax import mixing
  >>> small, large = (mora_jax.plan({"kernel": jnp.ones((4, 4))}, mora_jax.MoRAConfig(
  ...     operator="truncation", square_rank=q)) for q in (2, 4))
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(small))
  >>> mixing.scaled(ones, -0.5)["kernel_mora"][0]
  Array([-0.5, -0.5], dtype=float32)
  >>> mixing.weighted_sum([(ones, small)] * 2, [0.5, 0.25])[0]["kernel_mora"][0]
  Array([0.75, 0.75], dtype=float32)
  >>> mixing.project([(ones, small)], [1.0], large)[1]
  {'kernel': 0.0}
"""

from mora_jax.mixing._project import project as project
from mora_jax.mixing._sums import scaled as scaled
from mora_jax.mixing._sums import weighted_sum as weighted_sum
