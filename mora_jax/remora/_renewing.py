"""Renewals within a training step: merged, and trained on along a new gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mora_jax._common import checks
from mora_jax._layer.adapter import Adapter
from mora_jax._tree import gradients, paths
from mora_jax._tree.optim import check_transformation, restarted_state
from mora_jax._tree.plan import Plan
from mora_jax.operators import Damped, Operator, Subspace
from mora_jax.operators.orthogonal import Projection
from mora_jax.remora._merging import merged_deltas, respecified


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A run whose adapters are renewed: a pytree of arrays, for jit and checkpoints.

    Attributes:
      params: The base, with all deltas up to the last renewal.
      ms: The adapters, whose meanings have the shapes of directions alone.
      plan: The meanings of the adapters of kernels, with the directions.
      opt_state: The optimizer's state.
      step: The number of steps, ().
    """

    params: Any
    ms: Any
    plan: Plan
    opt_state: Any
    step: Array

    @property
    def adapters(self) -> Any:
        """The adapters, to be called, merged or saved."""
        found = paths.adapters_in(self.ms).kernels
        new = {path: a.replace(spec=self.plan.parts[path]) for path, a in found.items()}
        return paths.replace_adapters(self.ms, new)


class Renewing(NamedTuple):
    """Training with renewals, as functions to be compiled.

    Attributes:
      init: (params, adapters) -> State.
      step: (state, *batch) -> (state, loss).
      renew: (state, *batch) -> state, for a loop that says itself when.
    """

    init: Callable[[Any, Any], State]
    step: Callable[..., tuple[State, Array]]
    renew: Callable[..., State]


def renewing(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    every: int | Callable[[Array], Any],
    *,
    along: Literal["gradient", "random"] = "gradient",
    moments: Literal["restart", "keep"] = "restart",
    merge: Callable[[Any, Any, Array], Any] | None = None,
) -> Renewing:
    """A training step that merges the adapters at times, and goes on between new maps.

    It is one program for all renewals, since directions are data here. A renewal merges
    as `restart` does, and takes two gradients of a LoRA at the merged params. The first
    step is one, and finds the first directions.

    Args:
      loss: A function from adapters, params and the arguments of a batch to the loss.
      tx: The optimizer.
      every: The number of steps from renewal to renewal, or a function from the number
        of steps so far to True where one is due, also at 0 unless there are directions.
      along: "gradient" for the `directions` of the step's batch; "random" for random
        ones, as ReLoRA and the paper's ReMoRA have it.
      moments: "restart" for an optimizer's state as after `restart`; "keep" for the
        moments of the old directions.
      merge: A function from params, adapters and the step to params with the deltas, as
        `qwix.merge_quantized`; None merges into floating-point kernels.

    Returns:
      (init, step, renew). `init` takes adapters with `operator="orthogonal"`, or of
      `directions`. If `step` is compiled with the state donated, the params that `init`
      was given are overwritten.

    Raises:
      TypeError, ValueError: An argument is of another kind.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax, optax
      >>> params, x = {"kernel": jnp.ones((8, 8))}, jnp.eye(8)
      >>> def loss(adapters, params, x):
      ...     return jnp.mean((x @ mora_jax.fold(params, adapters)["kernel"]) ** 2)
      >>> config = mora_jax.MoRAConfig(operator="orthogonal", rank=1)
      >>> adapters = mora_jax.init(mora_jax.plan(params, config))
      >>> init, step, _ = mora_jax.remora.renewing(loss, optax.adam(0.1), every=2)
      >>> state, step = init(params, adapters), jax.jit(step, donate_argnums=0)
      >>> for _ in range(4):
      ...     state, value = step(state, x)
      >>> bool(value < 0.9), state.adapters
      (True, {'kernel_mora': Adapter(subspace, float32[4, 4])})
    """
    check_transformation(tx)
    checks.check_choice("along", along, ("gradient", "random"))
    checks.check_choice("moments", moments, ("restart", "keep"))
    if not callable(every):
        checks.positive_integer("every", every)
    gradients.check_loss(loss)
    if not callable(merge_into := merge or merged_deltas):
        raise TypeError(f"merge must be a function or None, got {merge!r}")

    def init(params: Any, adapters: Any) -> State:
        found, parts, shapes = paths.checked_adapters(adapters), {}, {}
        if not merge:
            found.in_base(params, any_base=False)
        for path, adapter in found.kernels.items():
            op = _replaceable("/".join(path), adapter.operator)
            # Copies, since a step may be given the state to overwrite.
            spec = jax.tree.map(jnp.array, respecified(adapter.spec, op))
            if along == "gradient":
                scale = gradients.scale_with(op, adapter.spec)
                spec = dataclasses.replace(spec, scale=scale)
            parts[path] = gradients.moved(spec, *jax.tree.leaves(spec)[-2:])
            shape = jax.eval_shape(lambda spec: spec, parts[path])
            shapes[path] = Adapter(adapter.m, shape)
        ms = jax.tree.map(jnp.copy, paths.replace_adapters(adapters, shapes))
        return State(params, ms, Plan(parts), tx.init(ms), jnp.zeros((), jnp.int32))

    def renew(state: State, *batch: Any) -> State:
        adapters, old = state.adapters, paths.adapters_in(state.ms).kernels
        merged = merge_into(state.params, adapters, state.step)
        if along == "random":
            key = jax.random.fold_in(jax.random.key(0), state.step)
            parts = gradients.at_random(state.plan.specs, key)
        else:
            args = adapters, merged, *batch
            parts = gradients.renewed(
                lambda loras: gradients.lora_gradient(loss, loras, *args),
                state.plan.specs,
            )
        zeros = {path: a.replace(m=jnp.zeros_like(a.m)) for path, a in old.items()}
        ms, opt_state = paths.replace_adapters(state.ms, zeros), state.opt_state
        if moments == "restart":
            opt_state = restarted_state(opt_state, tx, merged, ms)
        return State(merged, ms, Plan(parts), opt_state, state.step)

    def step(state: State, *batch: Any) -> tuple[State, Array]:
        at = state.step
        due = every(at) if callable(every) else at % every == 0
        state = jax.lax.cond(due, renew, lambda state, *_: state, state, *batch)

        def of(ms: Any) -> Any:
            adapters = dataclasses.replace(state, ms=ms).adapters
            return loss(adapters, state.params, *batch)

        value, grads = jax.value_and_grad(of)(state.ms)
        if along == "gradient":
            grads = _own_gradients(grads, due)
        updates, opt_state = tx.update(grads, state.opt_state, state.ms)
        ms = optax.apply_updates(state.ms, updates)
        return State(state.params, ms, state.plan, opt_state, at + 1), value

    return Renewing(init, step, renew)


def _own_gradients(grads: Any, due: Array) -> Any:
    """Gradients of M's between the directions of their own batch, if it is due."""
    # Adam would make whole steps of the rounding errors where they are zero.
    new = {}
    for path, grad in paths.adapters_in(grads).kernels.items():
        others = np.arange(q := grad.m.shape[-1]) >= q // gradients.ALONE
        where = np.eye(q, dtype=bool) | others & others[:, None]
        new[path] = grad.replace(m=jnp.where(where | ~due, grad.m, 0))
    return paths.replace_adapters(grads, new)


def _replaceable(name: str, op: Operator) -> Operator:
    """The operator with directions that may be replaced, or an error."""
    if isinstance(op, Damped):
        return op.around(_replaceable(name, op.inner))
    if isinstance(op, Subspace):
        return op
    if not isinstance(op, Projection):
        rule = "renewing needs directions, of directions(loss, adapters)"
        got = f"got {op.name!r} at {name!r}"
        raise ValueError(f"{rule} or operator='orthogonal', {got}")
    bases = (op.basis(side, jnp.float32) for side in ("in", "out"))
    return Subspace(op.in_features, op.out_features, op.square_rank, *bases)
