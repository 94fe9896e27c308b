"""Renewals within a training step: merged, and trained on along a new gradient."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from mora_jax._common import checks
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._tree import gradients, paths
from mora_jax._tree.optim import restarted_state, transformation
from mora_jax._tree.plan import Plan
from mora_jax.operators import Damped, LowRank, Operator, Subspace
from mora_jax.operators.orthogonal import Projection
from mora_jax.remora._due import accumulation, check_accumulation, schedule
from mora_jax.remora._merging import merged_deltas, respecified
from mora_jax.remora._state import State, check_state, mark_of, with_specs


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
    tx: optax.GradientTransformation | optax.MultiSteps,
    every: int | Callable[[Array], Any],
    *,
    along: Literal["gradient", "random"] = "gradient",
    moments: Literal["restart", "keep"] = "restart",
    merge: Callable[[Any, Any, Array], Any] | None = None,
) -> Renewing:
    """A training step that merges the adapters at times, and goes on between new maps.

    It is one program for all renewals, since directions are data here. A renewal takes
    two gradients of a LoRA beside the adapters, and merges as `restart` does. The first
    step is one, and finds the first directions.

    A renewal that is due is postponed to the next step that can make it, if a gradient
    or an M is not finite. Params and adapters then stay as they are. With
    `optax.MultiSteps` only the optimizer's own steps count, and a renewal waits until
    the sum of gradients is complete.

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
      `directions`. If the delta of orthogonal ones is not zero, it is merged into the
      state's params at once. If `step` is compiled with the state donated, the params
      that `init` was given are overwritten.

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
      >>> bool(value < 0.9), int(state.renewals), state.adapters
      (True, 2, {'kernel_mora': Adapter(subspace, float32[4, 4])})
    """
    tx = transformation(tx)
    checks.check_choice("along", along, ("gradient", "random"))
    checks.check_choice("moments", moments, ("restart", "keep"))
    is_due = schedule(every)
    gradients.check_loss(loss)
    merge_into = merged_deltas if merge is None else merge
    if not callable(merge_into):
        raise TypeError(f"merge must be a function or None, got {merge!r}")

    def init(params: Any, adapters: Any) -> State:
        found = paths.checked_adapters(adapters).kernels
        if merge is None:
            paths.checked_adapters(adapters).in_base(params, any_base=False)
        if any(_must_be_merged(adapter) for adapter in found.values()):
            params = merge_into(params, adapters, jnp.zeros((), jnp.int32))
            adapters = _with_zeros(adapters)
            found = paths.adapters_in(adapters).kernels
        parts = {}
        shapes = {}
        for path, adapter in found.items():
            op = _replaceable("/".join(path), adapter.operator)
            spec = respecified(adapter.spec, op)
            if along == "gradient":
                scale = gradients.scale_with(op, adapter.spec)
                spec = dataclasses.replace(spec, scale=scale)
            # Copies, since a step may be given the state to overwrite.
            spec = jax.tree.map(jnp.array, spec)
            parts[path] = gradients.moved(spec, *gradients.bases_of(spec))
            shape = jax.eval_shape(lambda spec: spec, parts[path])
            shapes[path] = Adapter(adapter.m, shape)
        ms = jax.tree.map(jnp.copy, paths.replace_adapters(adapters, shapes))
        opt_state = tx.init(ms)
        check_accumulation(opt_state)
        return State(
            params=params,
            ms=ms,
            plan=Plan(parts),
            opt_state=opt_state,
            step=jnp.zeros((), jnp.int32),
            renewals=jnp.zeros((), jnp.int32),
            pending=jnp.zeros((), bool),
            mark=mark_of(Plan(parts)),
        )

    def new_directions(state: State, batch: Any) -> tuple[Plan, Array]:
        """Specs with new directions, and True if these can be used."""
        specs = state.plan.specs
        if along == "random":
            key = jax.random.fold_in(jax.random.key(0), state.step)
            return Plan(gradients.at_random(specs, key)), jnp.asarray(True)
        adapters = with_specs(state.ms, specs)
        beside = _Beside(loss, adapters, state.params, batch)
        plan = Plan(gradients.renewed(beside.gradient, specs))
        return plan, jnp.stack(beside.are_finite).all()

    def renew(state: State, *batch: Any) -> State:
        check_state(state)
        plan, can_be_made = new_directions(state, batch)
        for adapter in paths.adapters_in(state.ms).kernels.values():
            can_be_made &= jnp.isfinite(adapter.m).all()
        _, is_complete = accumulation(state.opt_state, state.step)

        def made(state: State) -> State:
            adapters = with_specs(state.ms, state.plan.specs)
            merged = merge_into(state.params, adapters, state.step)
            ms = _with_zeros(state.ms)
            opt_state = state.opt_state
            if moments == "restart":
                opt_state = restarted_state(opt_state, tx, merged, ms)
            return dataclasses.replace(
                state,
                params=merged,
                ms=ms,
                plan=plan,
                opt_state=opt_state,
                renewals=state.renewals + 1,
                pending=jnp.zeros_like(state.pending),
                mark=mark_of(plan),
            )

        def postponed(state: State) -> State:
            return dataclasses.replace(state, pending=jnp.ones_like(state.pending))

        return jax.lax.cond(can_be_made & is_complete, made, postponed, state)

    def step(state: State, *batch: Any) -> tuple[State, Array]:
        check_state(state)
        count, is_complete = accumulation(state.opt_state, state.step)
        due = (state.pending | is_due(count)) & is_complete
        after = jax.lax.cond(due, renew, lambda state, *_: state, state, *batch)
        was_renewed = after.renewals > state.renewals

        def of(ms: Any) -> Any:
            adapters = with_specs(ms, after.plan.specs)
            return loss(adapters, after.params, *batch)

        value, grads = jax.value_and_grad(of)(after.ms)
        if along == "gradient":
            grads = _own_gradients(grads, was_renewed)
        updates, opt_state = tx.update(grads, after.opt_state, after.ms)
        ms = optax.apply_updates(after.ms, updates)
        after = dataclasses.replace(
            after, ms=ms, opt_state=opt_state, step=after.step + 1
        )
        return after, value

    return Renewing(init, step, renew)


class _Beside:
    """Gradients of LoRAs that stand beside adapters, and whether they are finite.

    The adapters are the first columns of a wider LoRA. So the gradient is the one at
    the merged params, and nothing is merged before it is known to be finite.
    """

    def __init__(
        self, loss: Callable[..., Any], adapters: Any, params: Any, batch: Any
    ) -> None:
        self.loss = loss
        self.adapters = adapters
        self.params = params
        self.batch = batch
        self.are_finite: list[Array] = []

    def gradient(self, loras: Mapping[Path, Adapter]) -> dict[Path, Adapter]:
        """The gradients of LoRAs; zeros, if any of them is not finite."""
        found = paths.adapters_in(self.adapters).kernels
        olds = {path: _as_low_rank(adapter) for path, adapter in found.items()}

        def of(loras: Mapping[Path, Adapter]) -> Any:
            both = {path: _joined(olds[path], lora) for path, lora in loras.items()}
            adapters = paths.replace_adapters(self.adapters, both)
            return self.loss(adapters, self.params, *self.batch)

        grads = jax.grad(of)(loras)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)])
        self.are_finite.append(finite.all())
        # Factorisations of NaN differ from platform to platform.
        return jax.tree.map(lambda g: jnp.where(finite.all(), g, 0), grads)


def _as_low_rank(adapter: Adapter) -> Array:
    """The trained array of a LoRA with the delta of an adapter between directions."""
    spec = adapter.spec
    op = spec.operator
    ins, outs = (wide(basis) for basis in gradients.bases_of(spec))
    with jax.default_matmul_precision("highest"):
        a = spec.factor * (ins @ wide(adapter.m))
        if isinstance(op, Damped):
            a = op.times(a)
    outs = jnp.broadcast_to(outs, (*a.shape[:-2], *outs.shape[-2:]))
    return jnp.concatenate([a, outs], axis=-2)


def _joined(old: Array, lora: Adapter) -> Adapter:
    """The LoRA whose delta is the sum of the deltas of `old` and `lora`."""
    spec = lora.spec
    m = jnp.concatenate([old.astype(lora.m.dtype), lora.m], axis=-1)
    op = LowRank(spec.in_features, spec.out_features, m.shape[-1])
    return Adapter(m, dataclasses.replace(spec, operator=op))


def _with_zeros(ms: Any) -> Any:
    """The same with M's of zero; arrays that train themselves stay."""
    found = paths.adapters_in(ms).kernels
    zeros = {path: a.replace(m=jnp.zeros_like(a.m)) for path, a in found.items()}
    return paths.replace_adapters(ms, zeros)


def _must_be_merged(adapter: Adapter) -> bool:
    """True unless M is known to be zero, or lies between directions that stay."""
    op = adapter.operator
    if isinstance(op.inner if isinstance(op, Damped) else op, Subspace):
        return False
    return isinstance(adapter.m, Tracer) or bool(jnp.any(adapter.m))


def _own_gradients(grads: Any, was_renewed: Array) -> Any:
    """Gradients of M's between the directions of their own batch, after a renewal."""
    # Adam would make whole steps of the rounding errors where they are zero.
    new = {}
    for path, grad in paths.adapters_in(grads).kernels.items():
        q = grad.m.shape[-1]
        others = np.arange(q) >= q // gradients.ALONE
        where = np.eye(q, dtype=bool) | others & others[:, None]
        new[path] = grad.replace(m=jnp.where(where | ~was_renewed, grad.m, 0))
    return paths.replace_adapters(grads, new)


def _replaceable(name: str, op: Operator) -> Operator:
    """The operator with directions that may be replaced, or an error."""
    if isinstance(op, Damped):
        return op.around(_replaceable(name, op.inner))
    if isinstance(op, Subspace):
        return op
    if not isinstance(op, Projection):
        raise ValueError(
            "renewing needs directions, of directions(loss, adapters) or "
            f"operator='orthogonal', got {op.name!r} at {name!r}"
        )
    # Not by `Subspace` itself, which refuses the arrays of a trace.
    sizes = op.in_features, op.out_features, op.square_rank
    eyes = (np.eye(width, op.square_rank) for width in sizes[:2])
    bases = [op.basis(side, jnp.float32).astype(jnp.bfloat16) for side in ("in", "out")]
    return jax.tree.unflatten(jax.tree.structure(Subspace(*sizes, *eyes)), bases)
