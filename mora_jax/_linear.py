"""Linear maps whose transpose is written by hand.

JAX derives the transpose of a linear function from its steps, and keeps for it what
the steps computed. Where that is slow (a gather becomes a scatter) or keeps too much (a
folded kernel, every block of an input), the transpose is given here instead. Unlike
`jax.custom_vjp` this leaves forward mode, `jax.vmap` and higher derivatives alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._interception import undisturbed
from mora_jax._types import ArrayLike


class LinearMap(abc.ABC):
    """y = A(r) x, linear in x; the residuals r are any pytree of arrays.

    Instances must be hashable, since they become part of programs.
    """

    @abc.abstractmethod
    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        """A(r) x."""

    @abc.abstractmethod
    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        """A(r)^T y, of the shape and dtype of x."""

    def __call__(self, residuals: Any, x: ArrayLike) -> jax.Array:
        """A(r) x, with `backward` for its transpose."""
        leaves, treedef = jax.tree.flatten(residuals)
        return linear_p.bind(*leaves, x, call=_Call(self, treedef))

    def transpose(self, residuals: Any, y: ArrayLike) -> jax.Array:
        """A(r)^T y, with `forward` for its transpose."""
        leaves, treedef = jax.tree.flatten(residuals)
        return linear_p.bind(*leaves, y, call=_Call(self, treedef, transposed=True))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the primitive does with its arguments: the residuals' leaves, then x."""

    map: LinearMap
    treedef: Any
    transposed: bool = False

    @undisturbed  # what is traced here is kept: by caches, or as a compiled program
    def __call__(self, *args: Any) -> jax.Array:
        *leaves, x = args
        apply = self.map.backward if self.transposed else self.map.forward
        return apply(jax.tree.unflatten(self.treedef, leaves), x)

    @property
    def transpose(self) -> "_Call":
        return dataclasses.replace(self, transposed=not self.transposed)


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A call under `jax.vmap`, its batch axes all in front."""

    call: Any
    axes: tuple[int | None, ...]

    def __call__(self, *args: Any) -> jax.Array:
        return jax.vmap(self.call, self.axes)(*args)

    @property
    def transpose(self) -> "_Batched":
        return _Batched(self.call.transpose, self.axes)


linear_p = Primitive("linear_map")


@functools.partial(jax.jit, static_argnames="call")
def _run(*args: Any, call: Any) -> jax.Array:
    return call(*args)


@linear_p.def_impl
def _impl(*args: Any, call: Any) -> jax.Array:
    return _run(*args, call=call)


@linear_p.def_abstract_eval
def _abstract(*args: Any, call: Any) -> Any:
    return _result(jax.sharding.get_abstract_mesh(), call, *args)


@functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
def _result(context: Any, call: Any, *args: Any) -> Any:
    jaxpr = jax.make_jaxpr(lambda *args: call(*args))(*args)
    (result,) = jaxpr.out_avals
    return result


def _jvp(primals: Any, tangents: Any, *, call: Any) -> Any:
    *residuals, x = primals
    *by_residuals, by_x = tangents
    y = linear_p.bind(*primals, call=call)
    parts = []
    if not isinstance(by_x, ad.Zero):
        parts.append(linear_p.bind(*residuals, by_x, call=call))
    moving = [k for k, t in enumerate(by_residuals) if not isinstance(t, ad.Zero)]
    if moving:
        at, by = ([one[k] for k in moving] for one in (residuals, by_residuals))
        _, part = jax.jvp(_of(moving, primals, call), at, by)
        parts.append(part)
    return y, functools.reduce(jnp.add, parts)


def _of(positions: list[int], args: Any, call: Any) -> Callable[..., jax.Array]:
    """`call` as a function of its arguments at `positions` alone."""

    def of_some(*some: Any) -> jax.Array:
        given = dict(zip(positions, some, strict=True))
        return call(*(given.get(k, a) for k, a in enumerate(args)))

    return of_some


def _transpose(y: Any, *args: Any, call: Any) -> Any:
    back: list[Any] = [None] * len(args)
    linear = [k for k, a in enumerate(args) if ad.is_undefined_primal(a)]
    if isinstance(y, ad.Zero):
        for k in linear:
            back[k] = ad.Zero(args[k].aval)
    elif linear == [len(args) - 1]:
        back[-1] = linear_p.bind(*args[:-1], y, call=call.transpose)
    else:  # by what the map is linear in as well: as JAX would
        by = jax.linear_transpose(
            _of(linear, args, call), *(args[k].aval for k in linear)
        )
        for k, one in zip(linear, by(y), strict=True):
            back[k] = one
    return back


def _batch(args: Any, axes: Any, *, call: Any) -> Any:
    size = next(a.shape[k] for a, k in zip(args, axes, strict=True) if k is not None)
    args = [
        a if k is None else jnp.moveaxis(a, k, 0)
        for a, k in zip(args, axes, strict=True)
    ]
    if axes[-1] is None:  # its cotangents must not be added up within the map
        args[-1] = jnp.broadcast_to(args[-1], (size, *args[-1].shape))
    front = tuple(None if k is None else 0 for k in axes[:-1])
    return linear_p.bind(*args, call=_Batched(call, (*front, 0))), 0


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(
    linear_p,
    mlir.lower_fun(lambda *args, call: call(*args), multiple_results=False),
)


def with_derivatives(
    function: Callable[..., jax.Array],
    maps: Mapping[int, Callable[[Any, jax.Array], jax.Array]],
) -> Callable[..., jax.Array]:
    """`function`, with `maps` for its derivatives by some of its arguments.

    Args:
      function: of pytrees of arrays; in each argument that `maps` names it is linear,
        up to a constant.
      maps: {position of an array: the linear part}, a `LinearMap` or a function of the
        tuple of all other arguments and of the tangent. By the arguments not named JAX
        differentiates itself.
    """
    wrapped = jax.custom_jvp(function)

    def jvp(primals: Any, tangents: Any) -> Any:
        parts = []
        for k, tangent in enumerate(tangents):
            if all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangent)):
                continue
            before, primal, after = primals[:k], primals[k], primals[k + 1 :]
            if k in maps:
                parts.append(maps[k]((*before, *after), tangent))
                continue

            def of_one(primal: Any, before: Any = before, after: Any = after) -> Any:
                return function(*before, primal, *after)

            tangent = jax.tree.map(_instantiate, tangent)
            parts.append(jax.jvp(of_one, (primal,), (tangent,))[1])
        return wrapped(*primals), functools.reduce(jnp.add, parts)

    wrapped.defjvp(jvp, symbolic_zeros=True)
    return wrapped


def _instantiate(tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    aval: Any = tangent.aval
    return np.zeros(aval.shape, aval.dtype)
