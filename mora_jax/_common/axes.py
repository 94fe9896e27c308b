"""A kernel's axes as letters: which are features, and which are stacked."""

import functools
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mora_jax._common.types import Shape

T = TypeVar("T")
Places = tuple[int, ...]


def may_be_conv1d(name: str) -> bool:
    """True for GPT-2's modules or kernels, which GPT-Neo and others have as Linear."""
    names = r"(.*[./])?h[./]\d+[./]\w+[./](c_\w+|q_attn)(/kernel)?"
    return re.fullmatch(names, name) is not None


def order_by_c_attn(arrays: Mapping[str, Any]) -> str:
    """The order "io" or "oi" in a model of GPT-2's names; "" if no array tells it."""
    ends = "c_attn.weight", "c_attn/kernel"  # keys and values too: wider than its input
    shapes = {tuple(a.shape) for name, a in arrays.items() if name.endswith(ends)}
    orders = {"io" if s[0] < s[1] else "oi" for s in shapes if len({*s}) == len(s) == 2}
    return orders.pop() if len(orders) == 1 else ""


def axes_by_name(name: str, arrays: Mapping[str, Any]) -> str:
    """The axes of one of a model's kernels, where names and shapes alone are known."""
    shape = tuple(arrays[name].shape)
    order = order_by_c_attn(arrays) if may_be_conv1d(name) else "io"
    if len(shape) == 2 and (order or shape[0] != shape[1]):
        return order or "io"
    # Flax's own attention modules have kernels of three axes.
    attention = re.fullmatch(r"(.*/)?(query|key|value|(out))/kernel", name)
    if len(shape) == 3 and attention:
        return "iio" if attention[3] else "ioo"
    raise ValueError(
        f"it is not known which of its axes {shape} are inputs or outputs; plan with "
        "mora_jax.linen.plan or mora_jax.nnx.plan, or say "
        f"overrides={{{name!r}: {{'axes': ...}}}}"
    )


def sizes(shape: Sequence[T], axes: str, letter: str) -> tuple[T, ...]:
    """The sizes in `shape`, or other things, of the axes marked with `letter`."""
    if len(shape) != len(axes):
        raise ValueError(f"axes must have a letter for each of {shape}, got {axes!r}")
    return tuple([one for one, kind in zip(shape, axes, strict=True) if kind == letter])


@functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
def features(shape: Shape, axes: str) -> tuple[int, int]:
    """The numbers of input and of output features of a kernel, with `axes` checked.

    "i" is an axis of input features, "o" an axis of output features, and "s" a stack
    axis with an M for each index (the layers of `nn.scan`, the experts of a mixture).
    "oi" is a dense layer that is stored transposed, and "ioo" the heads of attention.
    Several axes of a kind are flattened in the kernel's order.
    """
    if not isinstance(axes, str) or set(axes) - set("sio"):
        raise ValueError(f"axes must be made of the letters s, i and o, got {axes!r}")
    if len(axes) != len(shape):
        rule = f"axes must have one letter for each of the kernel's {len(shape)} axes"
        raise ValueError(f"{rule}, got {axes!r}")
    if not {"i", "o"} <= set(axes):
        raise ValueError(f"axes must hold at least one i and one o, got {axes!r}")
    return math.prod(sizes(shape, axes, "i")), math.prod(sizes(shape, axes, "o"))


def without(items: Sequence[T], places: Collection[int]) -> tuple[T, ...]:
    """The items that are at none of `places`."""
    return tuple([item for k, item in enumerate(items) if k not in places])


def stack_places(whole: Shape, shape: Shape) -> list[Places]:
    """Places of axes without which `whole` is `shape`: the ones in front come first."""
    places = itertools.combinations(range(len(whole)), max(len(whole) - len(shape), 0))
    return [each for each in places if without(whole, each) == shape]


def interleaved(stack: Sequence[T], rest: Sequence[T], at: Collection[int]) -> list[T]:
    """The items of a stack, `at` their places, between the others."""
    left, right, count = iter(stack), iter(rest), len(stack) + len(rest)
    return [next(left if k in at else right) for k in range(count)]


@functools.lru_cache(maxsize=1024)
def order_in_model(axes: str, ndim: int) -> tuple[int, ...]:
    """The axes of an M, (*stack, *m_shape), in the order in which a model has them."""
    # The stack's are where the kernel's are, since Flax's lifted transformations slice
    # both alike: an axis behind all features of the kernel is behind all of M's.
    last, places = max(axes.rfind("i"), axes.rfind("o")), range(len(axes))
    stack = [k if k < last else k - len(axes) for k in places if axes[k] == "s"]
    if any(not -ndim <= k < ndim for k in stack):
        rule = f"an M of {ndim - len(stack)} axes is stacked on one of its own at most"
        raise ValueError(f"{rule}, got a kernel with axes {axes!r}")
    at = {k % ndim: number for number, k in enumerate(stack)}
    features = iter(range(len(stack), ndim))
    return tuple([at[k] if k in at else next(features) for k in range(ndim)])


def to_model(array: Any, axes: str, *, back: bool = False) -> Any:
    """An array (*stack, ...), or its shape, as a model has it; or the way `back`."""
    order: Any = order_in_model(axes, array.ndim)
    order = sorted(range(array.ndim), key=order.__getitem__) if back else order
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct([array.shape[k] for k in order], array.dtype)
    return array.transpose(order)


def rows_from_kernel(kernel: jax.Array, axes: str) -> jax.Array:
    """A kernel as (*stack, in_features, out_features)."""
    stack, flat = sizes(kernel.shape, axes, "s"), features(kernel.shape, axes)
    return jnp.transpose(kernel, _order(axes)).reshape(*stack, *flat)


def kernel_from_rows(weight: jax.Array, shape: Shape, axes: str) -> jax.Array:
    """(*stack, in_features, out_features) as a kernel of `shape`."""
    order = _order(axes)
    weight = weight.reshape([shape[k] for k in order])
    return jnp.transpose(weight, [order.index(k) for k in range(len(shape))])


@functools.lru_cache(maxsize=1024)
def _order(axes: str) -> list[int]:
    """The numbers of the axes: the stack first, then inputs, then outputs."""
    return sorted(range(len(axes)), key=lambda k: "sio".index(axes[k]))
