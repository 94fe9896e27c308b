"""Views: the places of named axes after reshapes and transposes.

`jnp.einsum` and Flax's layers move axes before and after they multiply. To compare a
program with an equation, each axis of an array is followed by name. An axis of a view
is a sequence of pieces of named axes, as "(h d)" is in einops.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable

from mora_jax._common.types import Shape


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a named axis: every `stride`-th index, `size` of them."""

    axis: Hashable
    size: int
    stride: int = 1


Axis = tuple[Piece, ...]
View = tuple[Axis, ...]  # an entry for each axis of an array; one of length 1 is ()


def named(axes: Iterable[Hashable], shape: Shape) -> View:
    """The view of an array of `shape` whose axes have the names `axes`."""
    pairs = zip(axes, shape, strict=True)
    return tuple([(Piece(axis, size),) if size != 1 else () for axis, size in pairs])


def length(axis: Axis) -> int:
    """The number of indices of an axis of a view."""
    return math.prod([piece.size for piece in axis])


def reshape(view: View, shape: Shape) -> View | None:
    """The view after a reshape; None if it splits a piece into unequal parts."""
    pieces, axes = [piece for axis in view for piece in axis], []
    for size in shape:
        axis: list[Piece] = []
        while size > 1 and pieces:
            piece = pieces.pop(0)
            part = math.gcd(size, piece.size)
            if part < min(size, piece.size):
                return None
            if part < piece.size:
                # The axis is the slower part of the piece, the next one the faster.
                inner = piece.size // part
                pieces.insert(0, Piece(piece.axis, inner, piece.stride))
                piece = Piece(piece.axis, part, piece.stride * inner)
            step = piece.stride * piece.size
            if axis and (axis[-1].axis, axis[-1].stride) == (piece.axis, step):
                # The piece continues the one before it: the two are one piece.
                piece = Piece(piece.axis, axis.pop().size * piece.size, piece.stride)
            axis.append(piece)
            size //= part
        if size > 1:
            return None
        axes.append(tuple(axis))
    return None if pieces else tuple(axes)
