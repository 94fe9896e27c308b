"""Gradients and optimizer of the adapters alone."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._optim import check_transformation
from mora_jax.nnx._adapters import named_sharding, variables
from mora_jax.nnx._param import MoRAParam


def value_and_grad(
    f: Callable[..., Any], *, argnums: int = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """`nnx.value_and_grad` with respect to the adapters alone.

    With Flax's own, the filter has to be given here and in the optimizer, and each
    has a default of its own (all of `nnx.Param`): two that differ train the base, or
    fail far from the cause. `value_and_grad` and `adapter_optimizer` here agree.

    Args:
      f: (model, *args) -> loss, or (loss, aux).
      argnums: the position of the model.
      has_aux: whether `f` returns a pair.

    Returns:
      A function like `f` that returns (loss, gradients), the gradients as a state of
      `MoRAParam`s.

    Example::

      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from mora_jax.nnx import adapter_optimizer, value_and_grad, wrap
      >>> model = wrap(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> opt = adapter_optimizer(model, optax.adam(1e-2))
      >>> grad = value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
      >>> before, grads = grad(model, jnp.ones((1, 16)))
      >>> _ = opt.update(model, grads)
      >>> after, _ = grad(model, jnp.ones((1, 16)))
      >>> bool(after < before), list(grads)
      (True, ['kernel_mora'])
    """
    adapters = nnx.DiffState(argnums, MoRAParam)
    return nnx.value_and_grad(f, argnums=adapters, has_aux=has_aux)


def adapter_optimizer(
    model: nnx.Module, tx: optax.GradientTransformation
) -> nnx.Optimizer:
    """`nnx.Optimizer` of the adapters alone, for gradients of `value_and_grad`.

    No state exists for the base, and what `tx` computes over the whole, such as a norm
    to clip by, sees the adapters only.

    Args:
      model: as `wrap` makes it.
      tx: any optax transformation.

    Returns:
      An optimizer; call `update(model, grads)`.

    Raises:
      TypeError: `tx` is no transformation.
      ValueError: `model` has no adapters.

    Example: see `value_and_grad`.

      >>> import optax
      >>> from flax import nnx
      >>> from mora_jax.nnx import adapter_optimizer, wrap
      >>> model = wrap(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> opt = adapter_optimizer(model, optax.sgd(0.1))
      >>> opt.wrt.__name__
      'MoRAParam'
    """
    check_transformation(tx)
    found = nnx.Optimizer(model, tx, wrt=MoRAParam)
    shardings = (named_sharding(m) for _, m in variables(model))
    placed = next((one for one in shardings if one is not None), None)
    if placed is not None:
        _put_counters(found, placed.mesh)
    return found


def _put_counters(optimizer: nnx.Optimizer, mesh: Any) -> None:
    """What is nowhere in particular onto `mesh`, where the first step would put it.

    The second step would see it there, and be compiled again.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.committed else jax.device_put(leaf, everywhere)

    nnx.update(optimizer, jax.tree.map(put, nnx.state(optimizer)))
