"""Damped inputs: the directions of ordinary inputs, found by adapters that are none."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.checks import check_concrete, check_finite, positive_integer
from mora_jax._common.messages import patterns, warn
from mora_jax._common.types import Path, Precision, Shape
from mora_jax._jax.linear_algebra import rows_product
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._layer.equation import Delta
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax.operators import Damped, Operator
from mora_jax.operators._pytree import operator

FLOOR = 0.03  # the part of the mean second moment that each is raised by


def input_damping(
    call: Callable[[Any], Any], adapters: Any, *, directions: int = 16
) -> Any:
    r"""The same adapters on damped inputs, so that ordinary text is forgotten less.

    .. math:: x \mapsto D(C(P x) M), \qquad P = I - V V^T

    V are the leading directions of the second moments of each layer's inputs in `call`,
    which is of what should stay as it is: some hundred tokens of any text. Inputs are
    scaled down along them to what they are in all other directions. Steps of M then
    lean on what ordinary inputs lack. It takes two forward passes and no gradient of a
    kernel; V is stored with the adapters: in * `directions` bfloat16s for each input.

    Its relatives are CorDA (https://arxiv.org/abs/2406.05223), LoRA-Null
    (https://arxiv.org/abs/2503.02659), AlphaEdit (https://arxiv.org/abs/2410.02355),
    which remove such directions; and EVA (https://arxiv.org/abs/2410.07170), which
    takes the task's. docs/what-it-learns.md says what it gains.

    Args:
      call: A function from adapters to outputs of the adapted model. Give it compiled.
      adapters: New adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        The layers of a stack each have directions of their own.
      directions: k, the number of directions, at most as many as inputs.

    Returns:
      Adapters whose operator is `operators.Damped` around the old one. A `MoRAWarning`
      names what stays: embeddings, convolutions and kernels that methods read.

    Raises:
      TypeError, ValueError: `call` is not a function, lacks floating-point outputs, or
        multiplies nothing by an adapted kernel; an adapter is damped already, or its
        delta is not zero; or inputs are not finite.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params, mora_jax.MoRAConfig(rank=2)))
      >>> call = lambda adapters: adapters["fc"]["kernel_mora"](jnp.eye(8)[:3])
      >>> mora_jax.input_damping(call, adapters, directions=2)["fc"]["kernel_mora"]
      Adapter(block_diagonal, damped (2), float32[2, 4, 4])
    """
    positive_integer("directions", directions)
    if not callable(call):
        rule = "call must be a function from adapters to outputs"
        raise TypeError(f"{rule}, got {type(call).__name__}")
    found = paths.checked_adapters(adapters).kernels
    columns = {}
    for path, adapter in found.items():
        name, width = "/".join(path), adapter.operator.in_features
        if isinstance(adapter.operator, Damped):
            raise ValueError(f"{name} has damped inputs already: damp new adapters")
        check_new(name, adapter)
        shape = width, min(width, 2 * directions + 8)
        columns[path] = np.random.RandomState(0).choice([-1.0, 1.0], shape)
    # Randomised (Halko, Martinsson and Tropp 2011): the span of S Z, with a random Z,
    # holds the leading directions of S, and within it they are Q^T S Q's.
    first = _moments(call, adapters, found, columns)
    columns = {path: np.linalg.qr(product)[0] for path, (product, _) in first.items()}
    if not columns:
        raise ValueError("call must multiply inputs by an adapted kernel, got none")
    known: dict[bytes, np.ndarray] = {}  # queries, keys and values have one input
    damped = {}
    for path, (product, trace) in _moments(call, adapters, found, columns).items():
        inner = (adapter := found[path]).operator
        v = _damping(columns[path], product, trace, directions)
        v = known.setdefault(v.tobytes(), v)
        sizes = inner.in_features, inner.out_features, inner.square_rank
        new = Damped(*sizes, inner=inner, directions=v)
        spec = dataclasses.replace(adapter.spec, operator=new)
        damped[path] = adapter.replace(spec=spec)
    if left := ["/".join(path) for path in found if path not in damped]:
        names = patterns(left)
        warn(f"the inputs of {names} are no rows of numbers, and are not damped")
    return paths.replace_adapters(adapters, damped)


def check_new(name: str, adapter: Adapter) -> None:
    """Raise if the delta of an adapter whose maps are to change is not zero."""
    spec, op = adapter.spec, adapter.operator
    check_concrete(adapter.m, f"{name}{SUFFIX}", spec.shape)
    x = jnp.asarray(np.random.RandomState(0).standard_normal(op.in_features), "float32")
    x = jnp.broadcast_to(x, (*spec.stack_shape, *x.shape))
    if Delta.of(spec, adapter.m).rows(x).any():
        rule = "the delta of an adapter must be zero, since its maps change"
        raise ValueError(f"{name}: {rule}; give new adapters, as of init(plan)")


def _moments(
    call: Callable[[Any], Any],
    adapters: Any,
    found: Mapping[Path, Adapter],
    columns: Mapping[Path, np.ndarray],
) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
    """{path: (S Z, trace of S)} of second moments S of inputs, for columns Z."""
    # Both are of each layer of a stack. Kernels whose inputs are not seen are left out.
    sketches = {}
    plain: Any = {"alpha": 1.0, "scale": 1.0, "dropout": 0.0, "layout": None}
    for path, z in columns.items():
        old = found[path].spec
        op = _Moments(old.in_features, old.out_features, z.shape[-1])
        spec = dataclasses.replace(old, operator=op, execution="activation", **plain)
        m = jnp.insert(jnp.asarray(z, jnp.float32), 0, 0, -1)
        sketches[path] = Adapter(jnp.broadcast_to(m, spec.shape), spec)

    def total(given: Any) -> Array:
        outputs = map(jnp.asarray, jax.tree.leaves(call(given)))
        real = [y for y in outputs if jnp.issubdtype(y.dtype, jnp.floating)]
        if not real:
            raise ValueError("call must return floating-point outputs, got none")
        return sum((jnp.sum(y.astype(jnp.float32)) for y in real), jnp.zeros(()))

    grads = jax.grad(total)(paths.replace_adapters(adapters, sketches))
    moments = {}
    for path, gradient in paths.adapters_in(grads).kernels.items():
        if path in sketches:
            array = np.asarray(gradient.m, np.float64)
            check_finite(array, f"the moment of inputs of {'/'.join(path)}")
            if (trace := array[..., 0].sum(-1)).any():
                moments[path] = array[..., 1:], trace
    return moments


def _damping(
    basis: np.ndarray, product: np.ndarray, trace: np.ndarray, count: int
) -> np.ndarray:
    """V by an orthonormal basis and its product S Q with second moments."""
    features, within = basis.shape[-2], basis.swapaxes(-2, -1) @ product
    values, vectors = np.linalg.eigh((within + within.swapaxes(-2, -1)) / 2)
    values, v = values[..., -count:].clip(0), basis @ vectors[..., -count:]
    # Each direction is scaled by a root, to what a mean one of the others is. Then
    # P = I - V V^T has these factors: 1 - |v|^2.
    floor = FLOOR * trace[..., None] / features
    rest = (trace[..., None] - values.sum(-1, keepdims=True)).clip(0)
    rest = rest / max(features - count, 1)
    floor += np.finfo(floor.dtype).tiny  # a layer that sees nothing stays as it is
    factors = np.sqrt((rest + floor) / (values + floor)).clip(max=1)
    return np.asarray(v * np.sqrt(1 - factors)[..., None, :], jnp.bfloat16)


@operator
class _Moments(Operator):
    """A delta of zero, whose "gradient by M" is the second moment of the inputs.

    M is a column that is not used, in whose place squares are returned, and columns Z.
    """

    # A wrapped model computes what adapters say, under scan and remat, with quantized
    # kernels and in both APIs. So this sees the inputs of all layers, and no hook is
    # needed. XLA leaves out the backward pass, since nothing depends on a gradient.
    name = "moments"
    square = False
    bounded = False
    block = True

    @property
    def m_shape(self) -> Shape:
        return self.in_features, 1 + self.square_rank

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        return jnp.zeros((*x.shape[:-1], self.out_features), x.dtype)

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        return x, m

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        return self.rows(kept[0], tangent)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        x, m = map(wide, kept)
        x = x.reshape(-1, self.in_features)
        by_columns = rows_product(x, x @ m[:, 1:])
        return jnp.concatenate([jnp.sum(x**2, 0)[:, None], by_columns], -1)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        return jnp.zeros((*indices.shape, self.out_features), m.dtype)
