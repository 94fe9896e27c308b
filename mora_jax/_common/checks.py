"""Checks of arguments: settings and arrays."""

import functools
import math
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from mora_jax._common.types import Shape

LEAVE_OUT = "leave it out with exclude"  # advice for a kernel that cannot be adapted


def remedy(dtype: DTypeLike = int, otherwise: str = LEAVE_OUT) -> str:
    """Advice of messages where an array is not floating-point."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"only real numbers are trained: {otherwise}"
    return f"dequantise it first (mora_jax.qwix.dequantize), or {otherwise}"


def positive_integer(name: str, value: Any) -> int:
    """Return `value` as an int, if it is an integer (not a bool) of at least 1."""
    return _integer(f"{name} must be a positive integer", value, 1)


def natural_number(name: str, value: Any) -> int:
    """Return `value` as an int, if it is an integer (not a bool) of at least 0."""
    return _integer(f"{name} must be a natural number, 0 or more", value, 0)


def check_seed(seed: Any) -> int:
    """Return `seed` as an int, if it is an integer that `RandomState` takes."""
    return _integer("seed must be an integer in [0, 2**32)", seed, 0, 2**32)


def _integer(rule: str, value: Any, least: int, end: float = math.inf) -> int:
    # int comes first: to ask for a protocol is slow, and plans ask for every kernel.
    if isinstance(value, bool) or not isinstance(value, int | SupportsIndex):
        raise TypeError(f"{rule}, got {value!r}")
    if not least <= (number := value.__index__()) < end:
        raise ValueError(f"{rule}, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value`, if it is one of `choices`."""
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def patterns_of(field: str, patterns: Any) -> tuple[str, ...]:
    """A regular expression, or several of them, as a tuple."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable):
        hint = "; leave it out for the default" if patterns is None else ""
        raise TypeError(f"{field} must be regular expressions, got {patterns!r}{hint}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{field} must hold regular expressions, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            got = f"{pattern!r}, which is not a regular expression"
            raise ValueError(f"{field} holds {got}: {error}") from error
    return patterns


def check_number(
    name: str, value: Any, fits: Callable[[float], bool] | None = None, must: str = ""
) -> float:
    """Return `value` as a Python float, if it is a finite real number."""
    # To Python, True is a number as well. A JAX array would make a config unhashable.
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        hint = f"; write float({name})" * isinstance(value, jax.Array)
        raise TypeError(f"{name} must be a number, got {value!r}{hint}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    if fits and not fits(number):
        raise ValueError(f"{name} must {must}, got {number}")
    return number


above_zero = functools.partial(check_number, fits=lambda n: n > 0, must="be above 0")


def check_dtype(name: str, value: DTypeLike | None) -> jnp.dtype:
    """Return `value` as a NumPy dtype, if it is a real floating-point dtype."""
    try:  # NumPy reads None as float64
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = dtype or repr(value)
        raise TypeError(f"{name} must be a floating-point dtype, got {got}")
    return dtype


def check_param_dtype(name: str, value: DTypeLike | None) -> jnp.dtype:
    """Return `value` as a NumPy dtype, if it is one in which arrays are trained."""
    dtype = check_dtype(name, value)
    if dtype.itemsize < 2:
        raise TypeError(f"{name} must have at least 16 bits, got {dtype}")
    return dtype


def as_jax_array(name: str, value: Any) -> jax.Array:
    """Return `value` as a JAX array, tracers included, if it is an array."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    _check_not_donated(value, name)
    return jnp.asarray(value)


def _check_not_donated(array: Any, name: str) -> None:
    """Raise if the numbers of a JAX array are gone."""
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return
    if array.is_deleted():
        got = "an array that was donated to a compiled function"
        hint = "take the one which that function returned"
        raise ValueError(f"{name} must hold numbers, got {got}: {hint}")


def check_floating(leaf: Any, name: str, otherwise: str = "") -> None:
    """Raise unless `leaf` is a floating-point array, or stands for one.

    `otherwise` says what else to do with a leaf of the base than to dequantise it.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(leaf).__name__}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        advice = f"; {remedy(leaf.dtype, otherwise)}" if otherwise else ""
        rule = f"{name} must have a floating-point dtype"
        raise TypeError(f"{rule}, got {leaf.dtype}{advice}")


def check_leaf(leaf: Any, name: str, shape: Shape, otherwise: str = "") -> None:
    """Raise unless `leaf` is a floating-point array of `shape`, or stands for one."""
    check_floating(leaf, name, otherwise)
    if tuple(leaf.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(leaf.shape)}")


def check_concrete(array: Any, name: str, shape: Shape) -> None:
    """Raise unless `array` is a floating-point array of `shape` with known numbers."""
    if isinstance(array, Tracer) or not isinstance(array, jax.Array | np.ndarray):
        outside = isinstance(array, Tracer)
        raise TypeError(
            f"{name} must be a concrete array, got {type(array).__name__}"
            f"{'; call this outside of jit, vmap and grad' if outside else ''}"
        )
    _check_not_donated(array, name)
    check_leaf(array, name, shape)


def check_finite(array: Any, name: str, where: str = "") -> None:
    """Raise if `array` holds NaN or infinity, unless it is being traced."""
    if isinstance(array, Tracer):
        return
    # NumPy is faster, and cannot read an array that is on several processes.
    xp = np if getattr(array, "is_fully_addressable", True) else jnp
    if not xp.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity{where}")


def check_kernel(kernel: Any, name: str) -> None:
    """Raise unless `kernel` has a shape and a floating-point dtype that MoRA adapts."""
    # A structure of qwix has a shape and a dtype as well.
    if hasattr(kernel, "dtype") and not jax.tree_util.all_leaves([kernel]):
        got = f"the structure {type(kernel).__name__}; {remedy()}"
        raise TypeError(f"{name} must be an array, got {got}")
    check_floating(kernel, name, LEAVE_OUT)
    if len(kernel.shape) < 2 or 0 in kernel.shape:
        rule = f"{name} must have at least two axes, none of them empty"
        raise ValueError(f"{rule}, got shape {tuple(kernel.shape)}")


def check_key(key: Any) -> None:
    """Raise unless `key` is a JAX PRNG key, or None."""
    try:
        if key is not None:
            jax.eval_shape(jax.random.bits, key)
    except Exception as error:  # of a wrong type, dtype or shape
        rule = "key must be one JAX PRNG key, such as jax.random.key(42)"
        got = key if isinstance(key, int) else type(key).__name__
        raise TypeError(f"{rule}, got {got}: {error}") from error
