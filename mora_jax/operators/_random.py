"""Random arrays that a seed fixes once and for all, for layers of any dtype."""

import functools

import numpy as np


# NumPy promises that the streams of `RandomState` never change; `Generator` and
# `jax.random` may change theirs, and have. Arrays are computed in float64 and rounded
# to float32, which is part of their definition.
def _state(kind: int, features: int, seed: int) -> np.random.RandomState:
    """One stream for each kind of array and width: equal widths get equal arrays."""
    return np.random.RandomState([seed, features, kind])


def _frozen(array: np.ndarray, dtype: type) -> np.ndarray:
    array = np.ascontiguousarray(array, dtype)
    array.setflags(write=False)  # it is cached, and shared by all layers of its shape
    return array


@functools.cache
def orthonormal(features: int, columns: int, seed: int) -> np.ndarray:
    """(features, columns) with orthonormal columns, uniform over all such matrices."""
    gaussian = _state(0, features, seed).standard_normal((features, columns))
    basis, triangle = np.linalg.qr(gaussian)
    # LAPACK leaves the signs open; a positive diagonal makes the factorisation unique.
    return _frozen(basis * np.sign(np.diag(triangle)), np.float32)


@functools.cache
def permutation(features: int, seed: int) -> np.ndarray:
    """(features,) a permutation of the indices."""
    keys = _state(1, features, seed).random_sample(features)
    return _frozen(np.argsort(keys, kind="stable"), np.int32)


@functools.cache
def signs(features: int, seed: int) -> np.ndarray:
    """(features,) of -1 and 1."""
    coins = _state(2, features, seed).random_sample(features) < 0.5
    return _frozen(np.where(coins, -1, 1), np.float32)
