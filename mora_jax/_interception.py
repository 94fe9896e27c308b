"""Products that other libraries intercept, and those of ours, which none may reach.

qwix quantizes a model by replacing the code of `jax.lax.dot_general`, `jax.numpy`'s
`einsum` and others for as long as the model runs. A layer's own product is meant by
that. The adapter's is not: M stays exact, and what was traced while a quantized model
ran must not be found in a cache, ours or JAX's, when the plain model runs.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from mora_jax._types import ArrayLike

P = ParamSpec("P")
R = TypeVar("R")

_DOT_GENERAL = jax.lax.dot_general
_CODE = getattr(_DOT_GENERAL, "__code__", None)


def intercepted() -> bool:
    """Whether some library computes `jax.lax.dot_general` in its own way now.

    It may be doing that for another thread alone. Taking it for this one is safe: the
    update is then added to the layer's output, which gives the same numbers.
    """
    now = jax.lax.dot_general
    return now is not _DOT_GENERAL or getattr(now, "__code__", None) is not _CODE


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called with the interceptions of this thread turned off.

    Raises:
      RuntimeError: in a call: an interception by a qwix that cannot be turned off.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return _turned_off(function)(*args, **kwargs)

    return call


def _turned_off(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as qwix's own switch wraps it, if qwix is there and active.

    The switch is private, but no public name and nothing in JAX can do the same: which
    of the replaced functions act is decided for each thread inside of qwix, and a trace
    in another thread would lose JAX's settings (mesh, precision, 64 bits). It has had
    this name and meaning from qwix 0.1.4 to 0.1.8, and only here it is asked for.
    """
    if "qwix" not in sys.modules or not intercepted():
        return function
    module = sys.modules.get("qwix._src.interception")
    switch: Any = getattr(module, "disable_interceptions", None)
    if switch is None:
        raise RuntimeError(
            "qwix intercepts jax.lax.dot_general, and mora_jax does not know how this "
            f"version ({sys.modules['qwix'].__version__}) is told to leave the "
            "adapter's own products alone; qwix 0.1.4 to 0.1.8 are known"
        )
    return switch(function)


def matmul(
    a: ArrayLike, b: ArrayLike, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """`a @ b`, (..., k) and (k, n) to (..., n).

    Not by `jax.numpy.matmul`: JAX compiles that on its own, and keeps the program. One
    that was traced in a quantized model would then be used in a plain one, or the other
    way round.
    """
    dtype = jnp.result_type(a, b)
    a, b = jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype)
    contracted = (a.ndim - 1,), (0,)
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision)
