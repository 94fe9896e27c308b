"""Array types shared by the annotations."""

import jax
import numpy as np

ArrayLike = jax.Array | np.ndarray
"""A JAX array (tracers included) or a numpy array; never a list or a scalar."""

Shape = tuple[int, ...]
