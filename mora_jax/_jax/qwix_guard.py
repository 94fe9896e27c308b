"""Products that other libraries intercept, and our own, which they must not reach.

While a model runs, qwix quantizes it by replacing the code of `jax.lax.dot_general`,
`jax.numpy.einsum` and others. That is meant for a layer's own product and not for the
adapter's: M stays exact, and no cache, ours or JAX's, may give a plain model what was
traced while a quantized one ran.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

_DOT_GENERAL = jax.lax.dot_general
_CODE = getattr(_DOT_GENERAL, "__code__", None)


def intercepted() -> bool:
    """True while some library computes `jax.lax.dot_general` in its own way."""
    # The library may do so in another thread only. It is safe to assume this one: the
    # delta is then added to the layer's output, with the same result.
    now = jax.lax.dot_general
    return now is not _DOT_GENERAL or getattr(now, "__code__", None) is not _CODE


def undisturbed(function: F) -> F:
    """`function` with the interceptions of this thread turned off."""
    # qwix's own switch is private, but no public name and nothing in JAX can do the
    # same: qwix decides inside which of the replaced functions act in each thread, and
    # a trace in another thread would lose JAX's settings (mesh, precision, 64 bits).
    # This is the only place that asks for it.
    if "qwix" not in sys.modules or not intercepted():
        return function
    module = sys.modules.get("qwix._src.interception")
    switch: Any = getattr(module, "disable_interceptions", None)
    if switch is None:
        what = f"keep qwix {version('qwix')} off the adapter's own products"
        hint = "install one of qwix 0.1.4 to 0.1.8"
        raise RuntimeError(f"mora_jax does not know how to {what}: {hint}")
    return switch(function)
