"""Many adapters at once: a different one for each row of a batch.

The M's of N adapters of one plan are one tree, and the rows of a batch say by an array
of integers which of them they want. All of it is data: one compiled program serves any
mixture of adapters, also after one of them was replaced by another.

  stack                 the adapters of one plan in one tree, in slots
  put                   the same tree with another adapter in one slot
  select                the adapters for the rows of a batch
"""

from mora_jax.serving._stack import put as put
from mora_jax.serving._stack import select as select
from mora_jax.serving._stack import stack as stack
