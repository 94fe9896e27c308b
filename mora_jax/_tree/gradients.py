"""The first gradient: its directions as the maps around M, or M's start along it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from mora_jax._common.axes import rows_from_kernel
from mora_jax._common.checks import check_concrete, check_finite
from mora_jax._common.messages import lacking, nearest_paths, warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, delta_of, wide
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import paths
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.operators import Damped, Operator, Subspace, square_rank

HALVINGS = 20
"""Lengths that `gradient_start` tries at most."""


def gradient_bases(grads: Any, plan: Plan) -> Plan:
    r"""The same plan with a `Subspace` for each kernel: the directions of its gradient.

    .. math:: G \approx U S V^T, \qquad C = U, \quad D = V^T

    with the q largest singular values. Take the gradients of the base's loss on a first
    small batch. Each kernel of a stack has its own; where its gradient is zero, the
    mean's. A square M keeps its size, others get one of their budget, and `scale` is
    the new operator's if it was the old one's. The source is LoRA-SB (Ponkshe et al.
    2024); the factor is ours.
    docs/what-it-learns.md says what it gains, and docs/operators.md what it costs.

    Args:
      grads: Gradients of the loss, in a tree as the base's params are, or as pairs of
        (slash-joined path, gradient); of an iterator memory holds one at a time.
      plan: The plan.

    Raises:
      TypeError: A gradient is not a concrete floating-point array.
      ValueError: A kernel lacks a gradient or has two, the plan lacks a path, or a
        gradient is zero, not finite, or of another shape than its kernel.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> loss = lambda params: jnp.sum(jnp.sin(jnp.eye(8) @ params["fc"]["kernel"]))
      >>> plan = mora_jax.gradient_bases(jax.grad(loss)(params), plan)
      >>> plan["fc/kernel"].operator.name, plan["fc/kernel"].shape
      ('subspace', (4, 4))
    """
    specs = specs_along(grads, check_plan(plan).specs)
    return dataclasses.replace(plan, parts={**plan.parts, **specs})


def specs_along(
    grads: Any, specs: Mapping[Path, AdapterSpec], what: str = "plan"
) -> dict[Path, AdapterSpec]:
    """{path: spec} with a `Subspace` along the gradient of each kernel."""
    named, found = {"/".join(path): path for path in specs}, {}
    for name, gradient in _pairs(grads, named):
        if name not in named:
            hint = nearest_paths(name, named)
            raise ValueError(f"grads have {name!r}, which the {what} lacks{hint}")
        if (path := named[name]) in found:
            raise ValueError(f"grads have {name!r} twice")
        found[path] = _with_bases(name, specs[path], gradient)
    for name, path in named.items():
        if path not in found:
            hint = lacking(name, [*map("/".join, found)])
            raise ValueError(f"grads lack the kernel {name!r}{hint}")
    return found


def _pairs(grads: Any, named: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    if isinstance(grads, Iterator | list | tuple):
        for pair in grads:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise TypeError(f"grads must give (path, gradient) pairs, got {pair!r}")
            yield pair
        return
    for name, (_, gradient) in paths.named_leaves(grads, "grads").items():
        if name in named:
            yield name, gradient


def _with_bases(name: str, spec: AdapterSpec, gradient: Any) -> AdapterSpec:
    """The adapter between the leading directions of its kernel's gradient."""
    old, what = spec.operator, f"the gradient of {name!r}"
    check_concrete(gradient, what, spec.kernel_shape)
    rows = rows_from_kernel(jnp.asarray(gradient, jnp.float32), spec.axes)
    # Squares of small numbers would be zero in float32, so the largest becomes 1.
    largest = jnp.abs(rows).max((-2, -1), keepdims=True)
    check_finite(largest, what)
    if not largest.any():
        raise ValueError(f"{what} is zero, and has no directions")
    rows /= jnp.where(largest > 0, largest, 1)
    mean = rows.reshape(-1, *rows.shape[-2:]).mean(0)
    rows = jnp.where(largest > 0, rows, mean)  # of an expert that saw nothing
    if isinstance(old, Damped):  # the inner operator is to follow P G
        v = old.columns(rows.dtype)
        rows -= v @ (v.mT @ rows)
    q, features = old.square_rank, (spec.in_features, spec.out_features)
    if not old.square:  # a square of the same budget
        rank = spec.rank or max(1, round(spec.lora_rank))
        q = square_rank(rank, *features, "orthogonal")
    bases = _leading(rows, q), _leading(rows.mT, q)
    new: Operator = Subspace(*features, q, in_basis=bases[0], out_basis=bases[1])
    if isinstance(old, Damped):
        new = dataclasses.replace(old, inner=new, square_rank=q)
    scale = new.fine_tuning_scale if spec.scale == old.fine_tuning_scale else spec.scale
    return dataclasses.replace(spec, operator=new, scale=scale)


@functools.partial(jax.jit, static_argnames="count")
def _leading(matrices: jax.Array, count: int) -> jax.Array:
    """The leading eigenvectors of each G G^T, (..., features, count), largest first."""
    # Randomised (Halko, Martinsson and Tropp 2011, algorithms 4.1 and 5.3): the columns
    # of G Z, with a random Z, lie mostly in the leading directions. Within their span Q
    # the directions are exact: the eigenvectors of Q^T G G^T Q. They hold nearly all of
    # the squares that the best directions hold (`make bench-quality EXPERIMENT=bases`),
    # so that powers of G G^T, which would come nearer, are not worth their time.
    features, outs = matrices.shape[-2:]
    width = min(features, count + 8)  # a few more come nearer to the last ones
    columns = jax.random.normal(jax.random.key(0), (outs, width), matrices.dtype)
    with jax.default_matmul_precision("highest"):
        basis, _ = jnp.linalg.qr(matrices @ columns)
        half = matrices.mT @ basis
        _, rotation = jnp.linalg.eigh(half.mT @ half)
        return (basis @ rotation)[..., ::-1][..., :count]


def gradient_start(loss: Callable[[Any], Float[jax.Array, ""]], adapters: Any) -> Any:
    r"""Adapters moved by one step of gradient descent, which say so.

    .. math:: M_0 = -t\, \frac{\|\partial M\|^2}{\|\alpha s\, C\, \partial M\, D\|^2}\,
        \partial M, \qquad \partial M = \alpha s\, C^T G D^T

    is the step whose delta lies nearest to the kernel's own step -t G among all
    adapters. One length t serves all kernels. It begins where a linear loss would be
    zero, |loss| / slope, and is halved while the loss at half of it is lower. That
    takes a gradient and a few losses. If no length lowers the loss, nothing is moved,
    and a `MoRAWarning` says so outside of jit.
    The source is LoRA-SB (Ponkshe et al. 2024), here for operators of any kind; the
    length is ours. docs/what-it-learns.md says where it pays.

    Args:
      loss: A function from adapters to the loss of a first batch. Give it compiled, or
        compile the whole call.
      adapters: New adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        Arrays that are trained themselves stay.

    Returns:
      The adapters, with `init="gradient"` in their specs, since the model does not
      compute what its base does any more.

    Raises:
      TypeError, ValueError: A delta is not linear in what is trained, or the loss or
        its gradient is not finite.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> def loss(adapters):
      ...     folded = mora_jax.fold(params, adapters)
      ...     return jnp.mean(folded["fc"]["kernel"] ** 2)
      >>> adapters = mora_jax.gradient_start(loss, mora_jax.init(plan))
      >>> bool(loss(adapters) < 0.8), adapters["fc"]["kernel_mora"].spec.init
      (True, 'gradient')
    """
    found, steps = paths.checked_adapters(adapters).kernels, {}
    found.refuse_nonlinear("and has no such step")
    slope = jnp.float32(0)
    value, grads = jax.value_and_grad(loss)(adapters)
    for path, gradient in paths.adapters_in(grads).kernels.items():
        grad, delta = wide(gradient.m), delta_of(gradient)
        squares, across = jnp.sum(grad**2), jnp.sum(delta**2)
        steps[path] = grad * jnp.where(across > 0, squares / across, 0)
        slope += jnp.sum(steps[path] * grad)
    check_finite(value, "the loss")
    check_finite(slope, "the gradient of the loss")

    def moved(length: jax.Array, **changes: Any) -> Any:
        new = {}
        for path, adapter in found.items():
            m = (adapter.m - length * steps[path]).astype(adapter.m.dtype)
            new[path] = Adapter(m, dataclasses.replace(adapter.spec, **changes))
        return paths.replace_adapters(adapters, new)

    def is_best(state: Any) -> jax.Array:
        _, before, now = state
        return (before < value) & (before <= now)

    def halved(state: Any) -> Any:  # the only place of the loss in the program
        number, _, now = state
        return number + 1, now, loss(moved(longest / 2.0**number))

    longest = jnp.where(slope > 0, jnp.abs(value) / slope, 0)
    nothing = jnp.full_like(value, jnp.inf)
    start = 0, nothing, nothing
    state = jax.lax.while_loop(lambda s: (s[0] < HALVINGS) & ~is_best(s), halved, start)
    length = jnp.where(is_best(state), longest / 2.0 ** (state[0] - 2), 0)
    if not isinstance(length, Tracer) and length == 0:
        warn("no step along the gradient lowers the loss, so that no adapter is moved")
    return moved(length, init="gradient")
