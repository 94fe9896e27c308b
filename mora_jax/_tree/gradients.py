"""The first gradient: its directions as the maps around M, or M's start along it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from mora_jax._common import axes, checks
from mora_jax._common.messages import warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, delta_of, wide
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import damping, paths
from mora_jax._tree.adapters import init
from mora_jax._tree.base_digest import gathered
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.operators import Damped, Operator, Orthogonal, Subspace, square_rank
from mora_jax.operators.low_rank import LowRank

Specs = Mapping[Path, AdapterSpec]
OfLoras = Callable[[dict[Path, Adapter]], Mapping[Path, Adapter]]
"""A function from LoRAs, which stand where adapters do, to their gradients."""
ALONE = 4  # one in so many directions, the first ones, is a singular vector
HALVINGS = 20  # lengths that `gradient_start` tries at most


def gradient_bases(grads: Any, plan: Plan) -> Plan:
    r"""The same plan with a `Subspace` for each kernel: the directions of its gradient.

    .. math:: G \approx U S V^T, \qquad C = U, \quad D = V^T

    with the q largest singular values. Take the gradients of the base's loss on a first
    small batch. Each kernel of a stack has its own, or the largest one's if its
    gradient is zero. A square M keeps its size, others get one of their budget, and
    `scale` is the new operator's if it was the old one's. The source is LoRA-SB
    (Ponkshe et al. 2024); the factor is ours. docs/operators.md says what it costs.

    Args:
      grads: Gradients of the loss, in a tree as the base's params are.
      plan: The plan.

    Raises:
      TypeError: A gradient is not a concrete floating-point array.
      ValueError: A kernel lacks a gradient, or a gradient is zero, not finite, or of
        another shape than its kernel.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> loss = lambda params: jnp.sum(jnp.sin(jnp.eye(8) @ params["fc"]["kernel"]))
      >>> plan = mora_jax.gradient_bases(jax.grad(loss)(params), plan)
      >>> plan["fc/kernel"].operator.name, plan["fc/kernel"].shape
      ('subspace', (4, 4))
    """
    found = check_plan(plan).shapes.kernels
    arrays = found.in_base(grads, "grads")
    for path, (_, gradient) in arrays.items():
        what = f"the gradient of {'/'.join(path)!r}"
        checks.check_concrete(gradient, what, found[path].spec.kernel_shape)

    def of_loras(loras: Mapping[Path, Any]) -> dict[Path, Adapter]:
        products = {}
        for path, lora in loras.items():
            op, (_, gradient) = lora.operator, arrays[path]
            rows = axes.rows_from_kernel(gradient.astype(jnp.float32), lora.spec.axes)
            a, b = op.factors(lora.m)
            products[path] = lora.replace(m=op.joined(rows @ b.mT, a.mT @ rows))
        return products

    new = _along(of_loras, found.specs)
    return dataclasses.replace(plan, parts={**plan.parts, **new})


def directions(
    loss: Callable[..., Any],
    adapters_or_plan: Any,
    batches: Iterable[tuple[Any, ...]] = ((),),
    *,
    progress: Callable[[int], object] = lambda count: None,
) -> Any:
    r"""The same adapters between the leading directions of the loss's gradient.

    They are `gradient_bases`' of the gradient G of all batches together, which is not
    formed. A LoRA with A = 0 adds nothing, and its A has the gradient :math:`G B^T`;
    with B = 0 its B has :math:`A^T G`. With a random B of rank q + 8, and then with
    what that gradient spans for A, these are a randomised decomposition of G (Halko,
    Martinsson and Tropp 2011, algorithms 4.1 and 5.1). So it takes two gradients of a
    LoRA for each batch, on a mesh, under scan and beside quantized kernels as well.
    docs/what-it-learns.md says what it gains.

    Args:
      loss: A function from adapters, and the arguments of a batch, to the loss. It is
        compiled here: give what is large, such as the base, as an argument.
      adapters_or_plan: New adapters, as `init` makes them, `nnx.state(model,
        MoRAParam)`, or a plan.
      batches: The other arguments of `loss`, a tuple for each batch. Read twice.
      progress: A function of the number of batches, called after each gradient.

    Returns:
      Adapters, or a plan, with a `Subspace` of the same budget for each kernel; each of
      a stack has its own. Arrays that train themselves stay.

    Raises:
      TypeError, ValueError: `loss` is not a function, `batches` are not tuples that can
        be read twice, a delta is not zero, or a gradient is zero or not finite.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> def loss(adapters, params):
      ...     return jnp.sum(jnp.sin(mora_jax.fold(params, adapters)["fc"]["kernel"]))
      >>> adapters = mora_jax.directions(loss, mora_jax.init(plan), [(params,)])
      >>> adapters["fc"]["kernel_mora"]
      Adapter(subspace, float32[4, 4])
    """
    if isinstance(plan := adapters_or_plan, Plan):
        made = directions(loss, init(plan), batches, progress=progress)
        specs = paths.adapters_in(made).specs
        return dataclasses.replace(plan, parts={**plan.parts, **specs})
    check_loss(loss)
    given = [] if isinstance(batches, Iterator) else [*batches]
    if not given or not all(isinstance(batch, tuple) for batch in given):
        rule = "batches must be one tuple of arguments at least, in a sequence"
        raise TypeError(f"{rule}, got {batches!r:.80}")
    found = paths.checked_adapters(adapters_or_plan).kernels
    for path, adapter in found.items():
        damping.check_new("/".join(path), adapter)

    def total(loras: Mapping[Path, Adapter]) -> Any:
        sums = None
        for batch in given:
            grads = _compiled_gradient(loss, loras, adapters_or_plan, *batch)
            sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)
            progress(1)
        return sums

    specs = _along(total, found.specs).items()
    new = {path: Adapter(spec.start(path), spec) for path, spec in specs}
    return paths.replace_adapters(adapters_or_plan, new)


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is a function."""
    if not callable(loss):
        rule = "loss must be a function from adapters, and more, to a number"
        raise TypeError(f"{rule}, got {type(loss).__name__}")


def lora_gradient(
    loss: Callable[..., Any], loras: Any, adapters: Any, *batch: Any
) -> dict[Path, Adapter]:
    """The gradients of LoRAs that stand where adapters do."""

    def of(loras: Any) -> Any:
        return loss(paths.replace_adapters(adapters, loras), *batch)

    return jax.grad(of)(loras)


# One program for all calls with the same function.
_compiled_gradient = jax.jit(lora_gradient, static_argnums=0)


def _along(gradient: OfLoras, specs: Specs) -> dict[Path, Any]:
    """{path: spec} with a `Subspace` along the kernel's gradient."""
    new = {}
    for path, (span, product) in _sketched(gradient, specs).items():
        spec, what = specs[path], f"the gradient of {'/'.join(path)!r}"
        checks.check_finite(product, what)
        if not product.any():
            raise ValueError(f"{what} is zero, and has no directions")
        old, q = spec.operator, _width(spec)
        widths = spec.in_features, spec.out_features, q
        op: Operator = Subspace(*widths, *map(gathered, _leading(span, product, q)))
        if isinstance(old, Damped):
            op = dataclasses.replace(old, inner=op, square_rank=q)
        new[path] = dataclasses.replace(spec, operator=op, scale=scale_with(op, spec))
    return new


def scale_with(op: Operator, spec: AdapterSpec) -> float:
    """The scale of an adapter that gets `op`: that one's own, if it had its own."""
    own = spec.scale == spec.operator.fine_tuning_scale
    return op.fine_tuning_scale if own else spec.scale


def renewed(gradient: OfLoras, specs: Specs) -> dict[Path, Any]:
    """{path: spec} of subspaces, along new gradients; for use under jit."""
    found = _sketched(gradient, specs)
    return {p: moved(s, *_leading(*found[p], _width(s))) for p, s in specs.items()}


def sketches(specs: Specs) -> dict[Path, Any]:
    """{path: LoRA} with A = 0 and a random B, of a rank a little beyond q."""
    loras, plain = {}, {"alpha": 1.0, "scale": 1.0, "dropout": 0.0, "rank": None}
    for path, spec in specs.items():
        features = spec.in_features, spec.out_features
        # With a few more columns one comes nearer to the last directions.
        op = LowRank(*features, min(*features, _width(spec) + 8))
        how: Any = {"operator": op, "execution": "activation", **plain}
        lora = dataclasses.replace(spec, **how)
        m = op.start((), "embedding", jax.random.key(0), jnp.float32)
        loras[path] = Adapter(jnp.broadcast_to(m, lora.shape), lora)
    return loras


def _sketched(gradient: OfLoras, specs: Specs) -> dict[Path, tuple[Array, Array]]:
    """{path: (Q, Q^T G)}, where columns Q nearly span G, in two gradients of LoRAs."""
    loras, spans = sketches(specs), {}
    first: Mapping[Path, Any] = gradient(loras)
    for path, lora in first.items():
        by_a, by_b = lora.operator.factors(lora.m)
        spans[path] = _span(_seen(specs[path], by_a))
        a, b = _seen(specs[path], spans[path]), jnp.zeros_like(by_b)
        loras[path] = lora.replace(m=lora.operator.joined(a, b))
    second: Mapping[Path, Any] = gradient(loras)
    return {p: (spans[p], a.operator.factors(a.m)[1]) for p, a in second.items()}


def at_random(specs: Specs, key: Array) -> dict[Path, Any]:
    """{path: spec} of subspaces, with random directions."""
    new = {}
    for path, spec in specs.items():
        key, *own = jax.random.split(key, 3)
        shapes = (basis.shape for basis in bases_of(spec))
        new[path] = moved(spec, *map(_span, map(jax.random.normal, own, shapes)))
    return new


def bases_of(spec: AdapterSpec) -> tuple[Any, Any]:
    """The directions of inputs and of outputs of a subspace, which may be damped."""
    leaves = jax.tree_util.tree_leaves_with_path(spec)
    by_name = {_last_name(path): leaf for path, leaf in leaves}
    return by_name["in_basis"], by_name["out_basis"]


def _last_name(path: tuple[Any, ...]) -> str | None:
    """The name of the field at the end of a path in a pytree, or None."""
    return getattr(path[-1], "name", None)


def moved(spec: AdapterSpec, *bases: Array) -> AdapterSpec:
    """The adapter of a subspace between other directions, placed as features are."""
    shapes = ((*spec.stack_shape, *basis.shape[-2:]) for basis in bases)
    whole = map(jnp.broadcast_to, bases, shapes)  # one layer's are for all of a stack
    bases = tuple(basis.astype(jnp.bfloat16) for basis in whole)
    if spec.layout:
        places = spec.layout.of_directions(spec.axes, spec.kernel_shape)
        bases = tuple(map(jax.lax.with_sharding_constraint, bases, places))
    new: dict[Any, Array] = dict(zip(("in_basis", "out_basis"), bases, strict=True))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(_last_name(path), leaf), spec
    )


def _width(spec: AdapterSpec) -> int:
    """The width of a square of the budget of an adapter."""
    if spec.operator.square:
        return spec.operator.square_rank
    rank = spec.rank or max(1, round(spec.lora_rank))
    return square_rank(rank, spec.in_features, spec.out_features, "orthogonal")


def _seen(spec: AdapterSpec, columns: Array) -> Array:
    """P times columns, for an adapter of P x, whose inner maps are to follow P G."""
    if not isinstance(spec.operator, Damped):
        return columns
    v = spec.operator.columns(columns.dtype)
    return columns - v @ (v.mT @ columns)


def _unit(arrays: Array) -> tuple[Array, Array]:
    """Matrices whose largest number is 1, or all 0, and what it was."""
    # Squares of small numbers would be zero in float32.
    largest = jnp.abs(arrays).max((-2, -1), keepdims=True)
    return arrays / jnp.where(largest > 0, largest, 1), largest


@jax.jit
def _span(columns: Array) -> Array:
    """Orthonormal columns that span the same, (..., features, width)."""
    return jnp.linalg.qr(_unit(columns)[0])[0]


@functools.partial(jax.jit, static_argnames="count")
def _leading(span: Array, product: Array, count: int) -> tuple[Array, Array]:
    """Leading directions of G by columns Q and Q^T G, (..., features, count)."""
    # Within the span of Q they are exact. They hold nearly all of the squares that the
    # best directions hold (`make bench-quality EXPERIMENT=bases`), so that powers of
    # G G^T, which would come nearer, are not worth their time.
    # Between singular vectors M's gradient is diagonal, so that Adam's first step would
    # move few numbers: most are turned among themselves. The first ones are not, since
    # that would make all numbers of the gradient as large as theirs.
    product, size = _unit(product)

    def turned(basis: Array, seed: int) -> Array:
        first, others = jnp.split(basis, [count // ALONE], axis=-1)
        turn = Orthogonal(*3 * others.shape[-1:], seed=seed).in_basis
        basis = jnp.concatenate([first, others @ turn], axis=-1)
        # An expert that saw nothing has the directions of the one that saw most.
        most = basis.reshape(-1, *basis.shape[-2:])[jnp.argmax(size)]
        return jnp.where(size > 0, basis, most)

    with jax.default_matmul_precision("highest"):
        _, rotation = jnp.linalg.eigh(product @ product.mT)
        rotation = rotation[..., ::-1][..., :count]
        # Rounding says which of two signs a vector has, and so how it would be turned.
        negative = (span @ rotation).sum(-2, keepdims=True) < 0
        rotation = jnp.where(negative, -rotation, rotation)
        # Orthogonal columns; the factorisation completes what has length zero.
        outs = jnp.linalg.qr(product.mT @ rotation)[0]
        return turned(span @ rotation, 0), turned(outs, 1)


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
      loss: A function from adapters to a first batch's loss. Compile it, or the call.
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
    checks.check_finite(value, "the loss")
    checks.check_finite(slope, "the gradient of the loss")

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
