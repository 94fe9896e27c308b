r"""ReMoRA: merge the adapters into the base, start them again, and train on.

The rank of one delta is bounded by its operator. A *restart* adds the delta to the base
and starts M with a delta of zero between other maps C and D, so that the sum of all
deltas may have a higher rank: so the paper pretrains with adapters alone. The adapters
say where in the cycle a run is, so that a run which is resumed from a saved base and
adapters restarts as it would have.

Public names::

  restart               merge the adapters, and start new ones between other maps
  Restarted             the result of `restart`
  renewing              a training step that does it, along new gradients
  Renewing              the result of `renewing`
  State                 the state of such a run
  learned               one LoRA of all that was learned

Example::

  >>> import jax.numpy as jnp, mora_jax, optax
  >>> from mora_jax import remora
  >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
  >>> config = mora_jax.MoRAConfig(rank=1, operator="signed_decoupling", seed=3)
  >>> plan = mora_jax.plan(params, config)
  >>> adapters, tx = mora_jax.init(plan), optax.adam(1e-3)
  >>> after = remora.restart(params, adapters, tx.init(adapters), tx)
  >>> after.adapters["fc"]["kernel_mora"].operator.seed
  4
"""

from mora_jax.remora._learned import learned as learned
from mora_jax.remora._renewing import Renewing as Renewing
from mora_jax.remora._renewing import State as State
from mora_jax.remora._renewing import renewing as renewing
from mora_jax.remora._restart import Restarted as Restarted
from mora_jax.remora._restart import restart as restart
