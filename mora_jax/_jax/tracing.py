"""The platform that a trace is for, and libraries that intercept its products.

A program is compiled for the platform that it is lowered for, which need not be the one
it is traced on, and an exported program may be for several. `linear_map` traces each
layer for the platform when it is lowered, so that what is asked for here is right.

While a model runs, qwix quantizes it by replacing the code of `jax.lax.dot_general`,
`jax.numpy.einsum` and others. That is meant for a layer's own product and not for the
adapter's: M stays exact, and no cache, ours or JAX's, may give a plain model what was
traced while a quantized one ran.
"""

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
Chip = Literal["tpu", "gpu"]

CHIPS: Mapping[str, Chip] = {"tpu": "tpu", "cuda": "gpu", "rocm": "gpu"}
"""The kind of chip of each platform that has forms of its own, by JAX's name of it."""

# A sum of more slices than this is one sum over an axis. Up to here slices are added in
# one pass over memory, a third of the time on a CPU. More of them would make programs
# long, which XLA takes long to compile.
MAX_UNROLLED_SLICES = 64

chosen_platform: ContextVar[str | None] = ContextVar("platform", default=None)
"""The platform that is traced for now; None for JAX's default one."""


def default_platform() -> str:
    """Platform that JAX computes on by default, as `CHIPS` names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def current_platform() -> str:
    """Platform that what is traced now will run on."""
    return chosen_platform.get() or default_platform()


def current_chip() -> Chip | None:
    """The chip whose forms `chips` and `tiles` take; None for the plain ones."""
    return CHIPS.get(current_platform())


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
