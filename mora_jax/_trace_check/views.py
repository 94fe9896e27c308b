"""Views: the places of named axes after reshapes and transposes.

`jnp.einsum` and Flax's layers move axes before and after they multiply. To compare a
program with an equation, each axis of an array is followed by name. An axis of a view
is a sequence of pieces of named axes, as "(h d)" is in einops.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence

from mora_jax._common.types import Shape


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a named axis: every `stride`-th index, `size` of them.

    Attributes:
      axis: The name of the axis.
      size: The number of indices in the piece.
      stride: The distance between them; 1 for the fastest part of an axis.
    """

    axis: Hashable
    size: int
    stride: int = 1


Axis = tuple[Piece, ...]
View = tuple[Axis, ...]
"""An entry for each axis of an array; an axis of length 1 is ()."""


def named(axes: Iterable[Hashable], shape: Shape) -> View:
    """The view of an array of `shape` whose axes have the names `axes`.

    Example::

      >>> named("io", (4, 1))
      ((Piece(axis='i', size=4, stride=1),), ())
    """
    pairs = zip(axes, shape, strict=True)
    return tuple((Piece(axis, size),) if size != 1 else () for axis, size in pairs)


def length(axis: Axis) -> int:
    """The number of indices of an axis of a view."""
    return math.prod(piece.size for piece in axis)


def reshape(view: View, shape: Shape) -> View | None:
    """The view after a reshape; None if it splits a piece into unequal parts.

    Example::

      >>> view = named("bhd", (2, 3, 4))
      >>> reshape(view, (2, 12)) == (view[0], view[1] + view[2])
      True
      >>> reshape(reshape(view, (2, 12)), (2, 3, 4)) == view
      True
      >>> reshape(view, (4, 6)) is None
      True
    """
    pieces = [piece for axis in view for piece in axis]
    if math.prod(piece.size for piece in pieces) != math.prod(shape):
        return None
    axes = []
    for size in shape:
        axis: list[Piece] = []
        while size > 1:
            piece = pieces.pop(0)
            if size % piece.size == 0:
                axis.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                # The axis is the slower part of the piece, the next one the faster.
                inner = piece.size // size
                axis.append(Piece(piece.axis, size, piece.stride * inner))
                pieces.insert(0, Piece(piece.axis, inner, piece.stride))
                size = 1
            else:
                return None
        axes.append(_joined(axis))
    return tuple(axes)


def transpose(view: View, order: Sequence[int]) -> View:
    """The view after a transpose."""
    return tuple(view[k] for k in order)


def _joined(axis: Sequence[Piece]) -> Axis:
    """The same axis, with neighbouring pieces of one named axis joined."""
    joined: list[Piece] = []
    for piece in axis:
        step = piece.stride * piece.size
        if joined and (joined[-1].axis, joined[-1].stride) == (piece.axis, step):
            piece = Piece(piece.axis, joined.pop().size * piece.size, piece.stride)
        joined.append(piece)
    return tuple(joined)
