"""The array types of the annotations."""

import jax
import numpy as np

ArrayLike = jax.Array | np.ndarray
"""A JAX array (tracers included) or a NumPy array; never a list or a scalar."""

Shape = tuple[int, ...]

Precision = jax.lax.PrecisionLike

Path = tuple[str, ...]
"""The keys that lead to a leaf of a tree; joined by slashes they are its name."""

FIRST = "0.2.0"
"""The first version of this library whose files all later ones read."""
