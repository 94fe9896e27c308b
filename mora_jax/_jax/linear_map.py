"""Linear maps whose transpose is written by hand.

JAX derives the transpose of a linear function from its steps, and keeps for it what
the steps computed. Where that is slow (a gather becomes a scatter) or keeps too much (a
folded kernel, every block of an input), the transpose is given here instead. Since
`forward` and `backward` are each other's transposes, derivatives of all orders and
modes work, and so does `jax.vmap`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_algebra import alike
from mora_jax._jax.tracing import CHIPS, chosen_platform, default_platform, undisturbed


@functools.lru_cache(maxsize=4096, typed=True)
def static(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """`functools.partial`, which is the same object for equal arguments."""
    # A part of a compiled program is told from others by its hash. A partial function
    # hashes by identity, so that every call would compile again.
    return functools.partial(function, *args, **settings)


class LinearMap(abc.ABC):
    """y = A(r) x, linear in the operand x; the residuals r are any pytree of arrays."""

    # Instances must be hashable, since they become part of programs.
    elementwise: ClassVar[bool] = False
    """True if it does the same with each number, so that a batch is an operand, too."""

    @abc.abstractmethod
    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        """A(r) x."""

    @abc.abstractmethod
    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        """A(r)^T y, with the shape and dtype of x."""

    def derivative(self, residuals: Any, operand: jax.Array) -> "tuple[LinearMap, Any]":
        """The derivative by the second residual, a map of its tangent, with residuals.

        It is given where JAX, which takes it otherwise, would do more than it must.
        """
        raise NotImplementedError

    def chosen(self, residuals: Any) -> "LinearMap":
        """Map that computes the same in the way of `current_platform()`."""
        return self

    def mapped(self, residuals: Any) -> "LinearMap":
        """Map for a `jax.vmap` over the leaves of `residuals` that are True."""
        return self

    def __call__(
        self, residuals: Any, operand: ArrayLike, transposed: bool = False
    ) -> jax.Array:
        """A(r) x, or A(r)^T y if `transposed`; each is the other's transpose."""
        leaves, treedef = jax.tree.flatten(residuals)
        call = _Call(self, treedef, chosen_platform.get(), transposed)
        return linear_p.bind(*alike(*leaves, operand), call=call)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Function of the primitive's arguments: the residuals' leaves, then x."""

    map: LinearMap
    treedef: Any  # of the residuals
    platform: str | None  # None for the default one, until it is lowered for another
    transposed: bool = False  # True if it computes `backward`
    # The axes that each `jax.vmap` around it maps, the outermost first.
    batch_axes: tuple[tuple[int | None, ...], ...] = ()

    def __call__(self, *args: Any) -> jax.Array:
        if self.batch_axes and not self.map.elementwise:
            return self._batched(_Call.__call__)(*args)
        residuals = jax.tree.unflatten(self.treedef, args[:-1])
        token = chosen_platform.set(self.platform)
        try:
            chosen = self.map.chosen(residuals)
            apply = chosen.backward if self.transposed else chosen.forward
            # What is traced here is kept: by caches, or as a compiled program.
            return undisturbed(apply)(residuals, args[-1])
        finally:
            chosen_platform.reset(token)

    @property
    def by_hand(self) -> int | None:
        """The number of the argument by which the map has a derivative of its own."""
        # There may be more leaves before it: an operator may have arrays.
        if self.transposed or type(self.map).derivative is LinearMap.derivative:
            return None
        return self.treedef.children()[0].num_leaves

    def derivative(self, args: Sequence[Any]) -> tuple[list[Any], "_Call"]:
        """That derivative of a plain call: the residuals' leaves, and its own call."""
        residuals = jax.tree.unflatten(self.treedef, args[:-1])
        by_second, residuals = undisturbed(self.map.derivative)(residuals, args[-1])
        leaves, treedef = jax.tree.flatten(residuals)
        return leaves, _Call(by_second, treedef, chosen_platform.get())

    def tangent(self, *args: Any) -> jax.Array:
        """The same under all maps, of the tangent that is the last argument."""
        if self.batch_axes and (by_hand := self.by_hand) is not None:
            return self._batched(_Call.tangent, (by_hand,))(*args)
        leaves, call = self.derivative(args[:-1])
        return linear_p.bind(*alike(*leaves, args[-1]), call=call)

    def _batched(
        self, method: Callable[..., Any], like: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """`method` of the plain call under all maps; extra arguments mapped `like`."""
        plain = dataclasses.replace(self, batch_axes=())
        function: Callable[..., Any] = functools.partial(method, plain)
        for axes in reversed(self.batch_axes):
            function = jax.vmap(function, (*axes, *(axes[k] for k in like)))
        return function


# A primitive of our own, since `jax.custom_vjp` forbids forward mode, and up to JAX
# 0.12 `jax.custom_derivatives.linear_call` lacks a batching rule, and a derivative by
# its residuals, which M's own gradient needs when x has one, too. A primitive also has
# a lowering rule for each platform. So the platform is chosen there, once for a whole
# layer, and a program for several platforms holds a choice by layer and no more.
linear_p = Primitive("linear_map")
_run = jax.jit(_Call.__call__, static_argnums=0)
linear_p.def_impl(lambda *args, call: _run(call, *args))
# JAX keeps the trace: a model's layers ask the same again and again.
linear_p.def_abstract_eval(lambda *xs, call: _run.trace(call, *xs).jaxpr.out_avals[0])


def _jvp(primals: Any, tangents: Any, *, call: _Call) -> Any:
    *residuals, operand = primals
    *residual_tangents, tangent = tangents
    # y = A(r) x has two kinds of derivatives, A(r) dx and dA(r) x. The first is the map
    # again; the second may be given by hand for one residual, and is JAX's for others.
    parts = []
    if not isinstance(tangent, ad.Zero):
        parts.append(linear_p.bind(*residuals, tangent, call=call))
    moving = {k: t for k, t in enumerate(residual_tangents) if type(t) is not ad.Zero}
    if moving and (by_hand := call.by_hand) in moving:
        by_second = moving.pop(by_hand)
        if call.batch_axes:
            parts.append(call.tangent(*primals, by_second))
        else:  # as `tangent` does, with a frame less between a user and the product
            leaves, derivative = call.derivative(primals)
            parts.append(linear_p.bind(*alike(*leaves, by_second), call=derivative))
    if moving:
        at = [residuals[k] for k in moving]
        function = _as_function_of(list(moving), primals, call)
        parts.append(jax.jvp(function, at, list(moving.values()))[1])
    return linear_p.bind(*primals, call=call), functools.reduce(jnp.add, parts)


def _as_function_of(
    positions: list[int], args: Any, call: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`call` as a function of its arguments at `positions` alone."""

    def function(*values: Any) -> jax.Array:
        given = dict(zip(positions, values, strict=True))
        return call(*(given.get(k, arg) for k, arg in enumerate(args)))

    return function


def _transpose(cotangent: Any, *args: Any, call: _Call) -> Any:
    linear = [k for k, arg in enumerate(args) if ad.is_undefined_primal(arg)]
    avals = [args[k].aval for k in linear]
    if isinstance(cotangent, ad.Zero):
        back = map(ad.Zero, avals)
    elif linear == [len(args) - 1]:
        call = dataclasses.replace(call, transposed=not call.transposed)
        back = [linear_p.bind(*args[:-1], cotangent, call=call)]
    else:
        # By a residual in which the map is linear as well: as JAX would, or by hand,
        # since the derivative then is the map itself, of the tangent.
        apply: Callable[..., jax.Array] = call
        if linear == [call.by_hand]:
            apply = lambda *args: call.tangent(*args, args[linear[0]])  # noqa: E731
        function = _as_function_of(linear, args, apply)
        back = jax.linear_transpose(function, *avals)(cotangent)
    found = dict(zip(linear, back, strict=True))
    return [found.get(k) for k in range(len(args))]


def _batch(args: Any, axes: Any, *, call: _Call) -> Any:
    pairs = list(zip(args, axes, strict=True))
    size = next(arg.shape[k] for arg, k in pairs if k is not None)
    args = [arg if k is None else jnp.moveaxis(arg, k, 0) for arg, k in pairs]
    if axes[-1] is None:  # its cotangents must not be summed within the map
        args[-1] = jnp.broadcast_to(args[-1], (size, *args[-1].shape))
    front = (*(None if k is None else 0 for k in axes[:-1]), 0)
    mapped = jax.tree.unflatten(call.treedef, [k is not None for k in axes[:-1]])
    linear_map, batch_axes = call.map.mapped(mapped), (front, *call.batch_axes)
    call = dataclasses.replace(call, map=linear_map, batch_axes=batch_axes)
    return linear_p.bind(*args, call=call), 0


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch


def _lowered_on(platform: str) -> Any:
    # By `_run`, so that all calls of the same shapes share one function of the program,
    # and for the default platform what was traced already.
    def run(*args: Any, call: _Call) -> jax.Array:
        if call.platform is None and platform != default_platform():
            call = dataclasses.replace(call, platform=platform)
        return _run(call, *args)

    return mlir.lower_fun(run, multiple_results=False)


# Where a program is lowered for several platforms, JAX asks for the rule of each.
mlir.register_lowering(linear_p, _lowered_on("cpu"))
for _platform in CHIPS:
    mlir.register_lowering(linear_p, _lowered_on(_platform), platform=_platform)
