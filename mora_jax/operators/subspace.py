"""Subspace: given directions, such as the leading ones of a gradient."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.checks import check_concrete
from mora_jax._common.types import ArrayLike
from mora_jax.operators._base import Side
from mora_jax.operators._pytree import given, operator
from mora_jax.operators.orthogonal import Projection

TOLERANCE = 1e-3
"""Largest distance of the columns' products from the unit matrix."""


@operator
class Subspace(Projection):
    r"""Projection on q given orthonormal directions, and back along others.

    `gradient_bases` makes it from a gradient: inputs of the layer lie in its leading
    directions, and outputs should move in them. No seed gives such directions, so they
    are stored with the adapter: q (in + out) numbers.

    Attributes:
      in_basis, out_basis: The directions of each side, (features, q), as float32; of
        a stack's layers, (*stack, features, q).

    Raises:
      TypeError: A basis is not a floating-point array, or is a tracer.
      ValueError: A basis has another shape, or its columns are not orthonormal.

    Example::

      >>> import numpy as np
      >>> from mora_jax.operators import Subspace
      >>> first_two = np.eye(6, 2)
      >>> op = Subspace(6, 6, 2, in_basis=first_two, out_basis=first_two[::-1])
      >>> op.delta_weight(np.eye(2)).tolist()[0]
      [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """

    in_basis: ArrayLike = given(lambda op: _orthonormal(op, "in"))
    out_basis: ArrayLike = given(lambda op: _orthonormal(op, "out"))

    name = "subspace"

    @property
    def gains(self) -> tuple[float, float]:
        """Sizes c = sqrt(in / q) and d = sqrt(q / out) for numbers in the subspace."""
        # If all of x lies in the directions of C, then the q numbers of C(x) hold what
        # the `in` numbers of x held: their sum of squares is the same.
        c = math.sqrt(self.in_features / self.square_rank)
        return c, math.sqrt(self.square_rank / self.out_features)


def _orthonormal(op: Subspace, side: Side) -> np.ndarray:
    """A basis of `op` as a float32 array of its own, checked."""
    name = f"{side}_basis"
    basis: Any = getattr(op, name)
    shape = getattr(op, f"{side}_features"), op.square_rank
    check_concrete(basis, name, (*np.shape(basis)[:-2], *shape))
    basis = np.array(basis, np.float32)
    # Not by NumPy, whose threads keep the cores busy for a while after a product: the
    # directions of a model's gradient took twice as long beside them.
    with jax.ensure_compile_time_eval():
        transposed = jnp.swapaxes(basis, -2, -1)
        products = np.asarray(jnp.matmul(transposed, basis, precision="highest"))
    if not np.allclose(products, np.eye(op.square_rank), atol=TOLERANCE):
        raise ValueError(f"the columns of {name} must be orthonormal")
    basis.setflags(write=False)
    return basis
