"""Directions of a gradient as the maps around M: of a first one, and renewed."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common import axes, checks
from mora_jax._common.messages import patterns, warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import damping, losses, paths
from mora_jax._tree.adapters import init
from mora_jax._tree.base_digest import gathered
from mora_jax._tree.losses import check_loss as check_loss
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.operators import Damped, Operator, Orthogonal, Subspace, square_rank
from mora_jax.operators.low_rank import LowRank
from mora_jax.operators.orthogonal import in_eight_bits

Specs = Mapping[Path, AdapterSpec]
OfLoras = Callable[[dict[Path, Adapter]], Mapping[Path, Adapter]]
"""A function from LoRAs, which stand where adapters do, to their gradients."""
ALONE = 4  # one in so many directions, the first ones, is a singular vector


def gradient_bases(
    grads: Any, plan: Plan, *, dtype: DTypeLike = jnp.float8_e4m3fn
) -> Plan:
    r"""The same plan with a `Subspace` for each kernel: the directions of its gradient.

    .. math:: G \approx U S V^T, \qquad C = U, \quad D = V^T

    with the q largest singular values. Take the gradients of the base's loss on a first
    small batch. A kernel whose gradient is zero keeps its operator, with a
    `MoRAWarning`. Each kernel of a stack has its own, or the largest one's if its
    gradient is zero. A square M keeps its size, others get one of their budget, and
    `scale` is the new operator's if it was the old one's. The source is LoRA-SB
    (Ponkshe et al. 2024); the factor is ours. docs/operators.md says what it costs.

    Args:
      grads: Gradients of the loss, in a tree as the base's params are.
      plan: The plan.
      dtype: As for `directions`.

    Raises:
      TypeError: A gradient is not a concrete floating-point array.
      ValueError: A kernel lacks a gradient, a gradient is not finite or of another
        shape than its kernel, all gradients are zero, or `dtype` is another one.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> loss = lambda params: jnp.sum(jnp.sin(jnp.eye(8) @ params["fc"]["kernel"]))
      >>> plan = mora_jax.gradient_bases(jax.grad(loss)(params), plan)
      >>> plan["fc/kernel"].operator.name, plan["fc/kernel"].shape
      ('subspace', (4, 4))
    """
    dtype = _check_dtype(dtype)
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

    new = _along(of_loras, found.specs, dtype)
    return dataclasses.replace(plan, parts={**plan.parts, **new})


def directions(
    loss: Callable[..., Any],
    adapters_or_plan: Any,
    batches: Iterable[tuple[Any, ...] | list[Any]] = ((),),
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
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
      loss: A function from adapters, and the arguments of a batch, to the loss, one
        floating-point number. It is compiled here: give what is large, such as the
        base, as an argument.
      adapters_or_plan: New adapters, as `init` makes them, `nnx.state(model,
        MoRAParam)`, or a plan that trains no arrays themselves.
      batches: The other arguments of `loss`, a tuple or list for each batch. An
        iterator will do if it ends: it is read once, and its batches are kept in memory
        until both gradients are taken.
      dtype: The dtype that directions are rounded to, float8_e4m3fn or bfloat16. A file
        has one or two bytes for each number. In memory they are bfloat16.
      progress: A function of the number of batches, called after each gradient.

    Returns:
      Adapters, or a plan, with a `Subspace` of the same budget for each kernel; each of
      a stack has its own. Arrays that train themselves stay. A kernel whose gradient is
      zero keeps its operator, and a `MoRAWarning` names it.

    Raises:
      TypeError: An argument is of another kind, `loss` does not return one
        floating-point number, or the call is inside of jit, vmap or grad.
      ValueError: `batches` is empty, a delta is not zero, a gradient is not finite,
        all gradients are zero, or `dtype` is another one.

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
    check_loss(loss)
    dtype = _check_dtype(dtype)
    if not callable(progress):
        raise TypeError(f"progress must be a function, got {type(progress).__name__}")
    if isinstance(adapters_or_plan, Plan):
        plan = adapters_or_plan
        adapters = _new_adapters(plan)
        made = directions(loss, adapters, batches, dtype=dtype, progress=progress)
        specs = paths.adapters_in(made).specs
        return dataclasses.replace(plan, parts={**plan.parts, **specs})
    adapters = adapters_or_plan
    found = paths.checked_adapters(adapters).kernels
    given = losses.read_batches(batches, "directions")
    for path, adapter in found.items():
        damping.check_new("/".join(path), adapter)

    def total(loras: Mapping[Path, Adapter]) -> Any:
        sums = None
        for batch in given:
            grads = _compiled_gradient(loss, loras, adapters, *batch)
            losses.refuse_traced("loss", grads, "directions")
            sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)
            progress(1)
        return sums

    new = {}
    for path, spec in _along(total, found.specs, dtype).items():
        new[path] = Adapter(spec.start(path), spec)
    return paths.replace_adapters(adapters, new)


def _new_adapters(plan: Plan) -> Any:
    """Adapters for the directions of a plan, whose deltas are zero."""
    for name in plan.trained:
        raise ValueError(
            "adapters_or_plan must be adapters where a plan trains arrays themselves, "
            f"got one that trains {name!r}; give init(plan, params=params)"
        )
    for name, spec in plan.items():
        if spec.init == "gaussian":
            raise ValueError(
                "adapters_or_plan must start with deltas of zero, got init='gaussian' "
                f"for {name!r}; plan with init='zeros'"
            )
    return init(plan)


def lora_gradient(
    loss: Callable[..., Any], loras: Any, adapters: Any, *batch: Any
) -> dict[Path, Adapter]:
    """The gradients of LoRAs that stand where adapters do."""

    def of(loras: Any) -> Any:
        given = paths.replace_adapters(adapters, loras)
        return losses.checked_loss(loss)(given, *batch)

    return jax.grad(of)(loras)


# One program for all calls with the same function.
_compiled_gradient = jax.jit(lora_gradient, static_argnums=0)


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that directions are rounded to, checked."""
    allowed = "float8_e4m3fn", "bfloat16"
    checked = checks.check_dtype("dtype", dtype)
    if checked.name not in allowed:
        raise ValueError(f"dtype must be one of {allowed}, got {checked.name!r}")
    return checked


def _along(gradient: OfLoras, specs: Specs, dtype: np.dtype) -> dict[Path, Any]:
    """{path: spec} with a `Subspace` along the gradient of each kernel that has one."""
    new, without = {}, []
    for path, (span, product) in _sketched(gradient, specs).items():
        name, spec = "/".join(path), specs[path]
        checks.check_finite(product, f"the gradient of {name!r}")
        if not product.any():
            without.append(name)
            continue
        old, q = spec.operator, _width(spec)
        widths = spec.in_features, spec.out_features, q
        bases = _leading(span, product, q)
        if dtype != jnp.bfloat16:
            bases = map(in_eight_bits, bases)
        op: Operator = Subspace(*widths, *map(gathered, bases))
        if isinstance(old, Damped):
            op = dataclasses.replace(old, inner=op, square_rank=q)
        new[path] = dataclasses.replace(spec, operator=op, scale=scale_with(op, spec))
    if not new:
        raise ValueError(
            f"the gradient of {patterns(without)} is zero, and has no directions; give "
            "a loss and batches that depend on the adapted kernels"
        )
    if without:
        warn(
            f"the gradient of {patterns(without)} is zero, and has no directions: "
            "these adapters keep their operators"
        )
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
        op = specs[path].operator
        if isinstance(op, Damped):  # the inner maps follow the gradient of P x
            spans[path] = _span(op.transposed_times(by_a))
            a = op.times(spans[path])
        else:
            a = spans[path] = _span(by_a)
        b = jnp.zeros_like(by_b)
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
