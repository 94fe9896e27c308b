"""Damped inputs: adapters that see less of what ordinary inputs have most of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.checks import check_concrete, natural_number
from mora_jax._common.messages import patterns, warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.equation import Delta
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import moments, paths
from mora_jax._tree.moments import Moments
from mora_jax.operators import Damped

FLOOR = 0.03  # the part of the mean second moment that each is raised by
SAME = 0.01  # the relative difference up to which two readings of inputs are the same


def input_damping(
    call: Callable[[Any], Any],
    adapters: Any,
    *,
    directions: int = 0,
    mask: Any = None,
) -> Any:
    r"""The same adapters on damped inputs, so that the model forgets less.

    .. math:: x \mapsto D(C(x P) M), \qquad P = (I - V V^T)\, F

    `call` is of some hundred tokens of text: what should stay as it is, what the model
    itself writes (`own_text`), or the first batch of the task. F divides each feature
    of a layer's input by its size there, so that all are of about one size. Steps of M
    then lean on what ordinary inputs lack. The sum of all sizes stays, and so the
    learning rate. It takes one forward pass. F is multiplied into M for blocks and
    LoRAs, where a step costs nothing more.

    With `directions` above 0 their inputs are scaled down first along V, the leading
    directions of their second moments, to what they are in all others. It takes a
    second pass, no gradient of a kernel, and the time of a LoRA of that rank in a step.

    Its relatives are CorDA (https://arxiv.org/abs/2406.05223), LoRA-Null
    (https://arxiv.org/abs/2503.02659), AlphaEdit (https://arxiv.org/abs/2410.02355),
    which remove such directions; and EVA (https://arxiv.org/abs/2410.07170), which
    takes the task's. docs/what-it-learns.md says what it gains.

    Args:
      call: A function from adapters to outputs of the adapted model. Give it compiled.
        With directions it is called twice, and must compute with the same inputs both
        times: let it use arrays or a list of them, and no iterator and no dropout.
      adapters: New adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        The layers of a stack each have directions of their own.
      directions: The number of directions, V's columns. 0 scales features alone, and 4
        are enough for what more of them gain.
      mask: An array of 1 for each position that counts and 0 for padding, such as a
        tokenizer's (batch, length) `attention_mask`. It holds for each layer whose
        input is (*mask.shape, ..., features), or has these positions flattened to one
        axis. All rows of other inputs count, and a `MoRAWarning` names their layers.
        None counts all rows of all inputs, padding too.

    Returns:
      Adapters whose operator is `operators.Damped` around the old one. A `MoRAWarning`
      names the adapters that stay as they are: of kernels that `call` does not use, of
      those whose inputs are all zero, and of those that do not multiply rows of
      numbers: embeddings, convolutions in groups, and kernels that methods read.

    Raises:
      TypeError: An argument is of another kind, or the call is inside of jit, vmap or
        grad.
      ValueError: `call` lacks floating-point outputs, multiplies nothing by an adapted
        kernel, or has other inputs the second time; an adapter is damped already, or
        its delta is not zero; inputs are not finite; or `mask` is not of 0 and 1.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params, mora_jax.MoRAConfig(rank=2)))
      >>> call = lambda adapters: adapters["fc"]["kernel_mora"](jnp.eye(8)[:3])
      >>> mora_jax.input_damping(call, adapters)["fc"]["kernel_mora"]
      Adapter(block_diagonal, damped (diagonal), float32[2, 4, 4])
    """
    natural_number("directions", directions)
    if not callable(call):
        raise TypeError(
            "call must be a function from adapters to outputs, got "
            f"{type(call).__name__}"
        )
    counted = None if mask is None else _checked_mask(mask)
    found = paths.checked_adapters(adapters).kernels
    columns = {}
    for path, adapter in found.items():
        name, width = "/".join(path), adapter.operator.in_features
        if isinstance(adapter.operator, Damped):
            raise ValueError(f"{name} has damped inputs already: damp new adapters")
        check_new(name, adapter)
        count = min(width, 2 * directions + 8) if directions else 1
        columns[path] = np.random.RandomState(0).choice([-1.0, 1.0], (width, count))
    # Randomised (Halko, Martinsson and Tropp 2011): the span of S Z, with a random Z,
    # holds the leading directions of S, and within it they are Q^T S Q's.
    first = moments.measured(call, adapters, found, columns, counted)
    seen = _with_rows(first, found)
    second = {path: first[path] for path in seen}
    columns = {path: columns[path] for path in seen}
    if directions:
        for path in seen:
            columns[path] = np.linalg.qr(first[path].products)[0]
        second = moments.measured(call, adapters, found, columns, counted)
        _check_same(first, second)
    known: dict[bytes, np.ndarray] = {}  # queries, keys and values have one input
    damped = {}
    for path, of_path in second.items():
        v, taken = None, np.zeros_like(of_path.squares)
        if directions:
            v, taken = _directions(columns[path], of_path, directions)
            v = known.setdefault(v.tobytes(), v)
        f = _diagonal(of_path.squares - taken)
        f = known.setdefault(f.tobytes(), f)
        damped[path] = _damped(found[path], v, f)
    others = ["/".join(path) for path in second if second[path].ignores_mask]
    if others and counted is not None:
        warn(
            f"mask of shape {counted.shape} does not fit the inputs of "
            f"{patterns(others)}: all of their rows count"
        )
    return paths.replace_adapters(adapters, damped)


def _checked_mask(mask: Any) -> np.ndarray:
    """The mask as an array of 0 and 1."""
    rule = "mask must be a concrete array of 0 and 1"
    if isinstance(mask, Tracer):
        raise TypeError(
            f"{rule}, got a {type(mask).__name__}; call input_damping outside of jit, "
            "vmap and grad"
        )
    if not isinstance(mask, jax.Array | np.ndarray):
        raise TypeError(f"{rule}, got {type(mask).__name__}")
    array = np.asarray(mask)
    if array.ndim == 0 or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{rule}, such as a tokenizer's attention_mask, got shape {array.shape} "
            f"with {np.unique(array)[:3]}"
        )
    if not array.any():
        raise ValueError(
            f"mask must have a 1 for each position that counts, got {array.size} zeros"
        )
    return array.astype(np.float32)


def _with_rows(
    measured: Mapping[Path, Moments], found: Mapping[Path, Adapter]
) -> list[Path]:
    """The kernels whose inputs can be damped; a warning or error names the others."""
    seen = []
    unused = []
    otherwise = []
    zero = []
    for path in found:
        of_path, name = measured[path], "/".join(path)
        if of_path.is_used_otherwise:
            otherwise.append(name)
        elif not of_path.is_multiplied:
            unused.append(name)
        elif not of_path.squares.any():
            zero.append(name)
        else:
            seen.append(path)
    reasons = []
    if unused:
        reasons.append(f"call does not use {patterns(unused)}, or as a tied head alone")
    if otherwise:
        reasons.append(
            f"call uses {patterns(otherwise)} otherwise than to multiply rows of "
            "numbers: as an embedding, in groups of a convolution, or as a whole"
        )
    if zero:
        reasons.append(f"all inputs of {patterns(zero)} are zero")
    if not seen:
        raise ValueError(
            "call must multiply inputs that are not zero by an adapted kernel, got "
            f"none: {'; '.join(reasons)}"
        )
    for reason in reasons:
        warn(f"{reason}: these adapters are not damped")
    return seen


def _check_same(first: Mapping[Path, Moments], second: Mapping[Path, Moments]) -> None:
    """Raise unless `call` had the same inputs both times."""
    for path, of_path in second.items():
        one, other = first[path].squares, of_path.squares
        # Programs may sum in another order, so that they differ in the last bits.
        least = 1e-3 * one.mean(-1, keepdims=True)
        if (abs(one - other) > SAME * (one + other) / 2 + least).any():
            raise ValueError(
                "call must compute with the same inputs each time, got others the "
                f"second time at {'/'.join(path)!r}; read a loader into a list before, "
                "without shuffling, and turn dropout off"
            )


def check_new(name: str, adapter: Adapter) -> None:
    """Raise if the delta of an adapter whose maps are to change is not zero."""
    spec, op = adapter.spec, adapter.operator
    check_concrete(adapter.m, f"{name}{SUFFIX} in the adapters", spec.shape)
    x = jnp.asarray(np.random.RandomState(0).standard_normal(op.in_features), "float32")
    x = jnp.broadcast_to(x, (*spec.stack_shape, *x.shape))
    moved = Delta.of(spec, adapter.m).rows(x).any()
    if isinstance(moved, Tracer):
        raise TypeError(
            f"{name}{SUFFIX} in the adapters must be used outside of jit, got a call "
            "that is being compiled; call this outside of jit, vmap and grad"
        )
    if moved:
        raise ValueError(
            f"{name}: the delta of an adapter must be zero, since its maps change, got "
            f"one of init={spec.init!r} that is not; give new adapters, as of "
            "init(plan) with init='zeros'"
        )


def _damped(adapter: Adapter, v: np.ndarray | None, f: np.ndarray) -> Adapter:
    """The adapter on inputs that V and F damp."""
    inner = adapter.operator
    op = Damped(
        inner.in_features,
        inner.out_features,
        inner.square_rank,
        inner=inner,
        directions=v,
        diagonal=f,
    )
    return adapter.replace(spec=dataclasses.replace(adapter.spec, operator=op))


def _directions(
    basis: np.ndarray, measured: Moments, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """V, and the second moment of each feature that it takes away, (..., features).

    Args:
      basis: Orthonormal columns Q, which nearly span the leading directions.
      measured: The second moments S, by S Q.
      count: The number of directions.
    """
    features = basis.shape[-2]
    within = basis.swapaxes(-2, -1) @ measured.products
    values, vectors = np.linalg.eigh((within + within.swapaxes(-2, -1)) / 2)
    values = values[..., -count:].clip(0)
    v = basis @ vectors[..., -count:]
    # Each direction is scaled by a root, to what a mean one of the others is. Then
    # I - V V^T has these factors: 1 - |v|^2.
    trace = measured.trace[..., None]
    rest = (trace - values.sum(-1, keepdims=True)).clip(0) / max(features - count, 1)
    floor = _floor(trace / features)
    factors = np.sqrt((rest + floor) / (values + floor)).clip(max=1)
    scaled = v * np.sqrt(1 - factors)[..., None, :]
    # Of S' = (I - V V^T) S (I - V V^T) the diagonal, from S V and V^T S V.
    product = measured.products @ vectors[..., -count:]
    product = product * np.sqrt(1 - factors)[..., None, :]
    within = scaled.swapaxes(-2, -1) @ product
    taken = 2 * (product * scaled).sum(-1) - ((scaled @ within) * scaled).sum(-1)
    return np.asarray(scaled, jnp.bfloat16), taken


def _diagonal(squares: np.ndarray) -> np.ndarray:
    """F by the second moments of features, (..., features) -> (..., features, 1)."""
    squares = squares.clip(0)
    floor = _floor(squares.mean(-1, keepdims=True))
    factors = 1 / np.sqrt(squares + floor)
    # A step of Adam moves an output by the rate times the sum of its inputs' sizes. The
    # sum stays what it was, so that the rate for damped inputs is the usual one.
    sizes = np.sqrt(squares)
    before = sizes.sum(-1, keepdims=True)
    after = (sizes * factors).sum(-1, keepdims=True)
    factors = factors * (before / np.where(before > 0, after, 1))
    factors = np.where(before > 0, factors, 1)
    return factors[..., None].astype(np.float32)


def _floor(mean: np.ndarray) -> np.ndarray:
    """The number that each second moment is raised by, given the mean of all."""
    # A layer that sees nothing stays as it is.
    return FLOOR * mean + np.finfo(mean.dtype).tiny
