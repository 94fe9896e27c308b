"""What tests share."""

import numpy as np


def random(seed, *shape, dtype=np.float32):
    """Normal numbers of numpy: those of jax.random would compile for every shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got, expected, scale=1e-5):
    """Equal within the rounding of the largest number, and of the same shape."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    atol = scale * max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
