"""Where the axes of an array are after reshapes and transposes.

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
      size: How many indices the piece has.
      stride: How far apart they are; 1 for the fastest part of an axis.
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
    """How many indices an axis of a view has."""
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
            elif (
                piece.size % size == 0
            ):  # its slower part; the next axis takes the rest
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
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.axis == piece.axis
            and last.stride == piece.stride * piece.size
        ):
            joined[-1] = Piece(piece.axis, last.size * piece.size, piece.stride)
        else:
            joined.append(piece)
    return tuple(joined)
