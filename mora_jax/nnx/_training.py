"""Gradients and optimizer of the adapters alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from mora_jax._common.trees import located_leaves
from mora_jax._tree.optim import transformation
from mora_jax.nnx._held import MoRAParam, attributes, held_adapters, named_sharding


def value_and_grad(
    f: Callable[..., Any], *, argnums: int = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """`nnx.value_and_grad` with respect to the adapters alone.

    Args:
      f: A function (model, *args) -> loss, or (loss, aux).
      argnums: The position of the model among the arguments.
      has_aux: True if `f` returns a pair.

    Returns:
      A function like `f` that returns (loss, gradients), the gradients as a state of
      `MoRAParam`s. Its calls raise ValueError if the model lacks adapters.

    Example::

      >>> import jax.numpy as jnp, mora_jax, optax
      >>> model = mora_jax.nnx.wrap(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> opt = mora_jax.nnx.adapter_optimizer(model, optax.adam(1e-2))
      >>> grad = mora_jax.nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
      >>> before, grads = grad(model, x := jnp.ones((1, 16)))
      >>> _ = opt.update(model, grads)
      >>> bool(grad(model, x)[0] < before), list(grads)
      (True, ['kernel_mora'])
    """
    adapters = nnx.DiffState(argnums, MoRAParam)
    grad = nnx.value_and_grad(f, argnums=adapters, has_aux=has_aux)

    @functools.wraps(f)
    def of_adapters(*args: Any, **kwargs: Any) -> Any:
        for model in args[argnums:][:1]:  # without one Flax says so
            held_adapters(model)
        return grad(*args, **kwargs)

    return of_adapters


def adapter_optimizer(
    model: nnx.Module, tx: optax.GradientTransformation
) -> nnx.Optimizer:
    """An `nnx.Optimizer` of the adapters alone; see the example of `value_and_grad`.

    Args:
      model: An adapted model, as `wrap` makes it.
      tx: Any optax transformation. A norm that it clips by is of the adapters only.

    Returns:
      An optimizer, which keeps nothing for the base. Call its `update(model, grads)`.

    Raises:
      TypeError: `tx` is not a transformation.
      ValueError: The model lacks adapters.
    """
    tx = transformation(tx)
    held_adapters(model)
    shardings = (named_sharding(m) for *_, m in attributes(model, MoRAParam))
    optimizer = _AdapterOptimizer(model, tx, wrt=MoRAParam)
    if (sharding := next(filter(None, shardings), None)) is None:
        return optimizer
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    # The first step would put what is not committed to a device, such as counters, onto
    # the mesh, and the second would be compiled again.
    def put(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.committed else jax.device_put(leaf, replicated)

    nnx.update(optimizer, jax.tree.map(put, nnx.state(optimizer)))
    return optimizer


class _AdapterOptimizer(nnx.Optimizer[Any]):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2:  # else Flax says what is missing
            trees = nnx.state(args[0], MoRAParam), args[1]
            ms, grads = (located_leaves(tree, "grads").keys() for tree in trees)
            for path in sorted(ms ^ grads):
                rule = "grads must be what mora_jax.nnx.value_and_grad gives"
                raise ValueError(f"{rule}, and differ in {'/'.join(path)!r}")
        return super().update(*args, **kwargs)
