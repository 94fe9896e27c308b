"""What tests share: numbers, adapters as after training, comparisons.

All numbers are NumPy's. `jax.random` would compile a program for every shape, and
compiling is what tests spend their time on.
"""

import re
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from mora_jax import Adapter, Plan, init


def random(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    """An array of normal numbers."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(dtype))


def random_like(tree: Any, scale: float = 0.3) -> Any:
    """Normal numbers in place of all arrays or shapes of a tree."""
    numbers = np.random.default_rng(0)

    def like(leaf: Any) -> jax.Array:
        values = numbers.normal(0, scale, leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype))

    return jax.tree.map(like, tree)


def made_for(model: Any, *args: Any) -> Any:
    """Normal numbers as the variables of a Linen model, with nothing to compile."""
    return random_like(jax.eval_shape(model.init, jax.random.key(0), *args))


def trained(plan: Plan, scale: float = 0.3) -> Any:
    """Adapters as after training: far from zero."""
    return random_like(jax.eval_shape(lambda: init(plan)), scale)


def bare(adapters: Any) -> Any:
    """The arrays of a tree of adapters, without what they mean."""

    def array(leaf: Any) -> Any:
        return leaf.m if isinstance(leaf, Adapter) else leaf

    is_adapter = {"is_leaf": lambda leaf: isinstance(leaf, Adapter)}
    return jax.tree.map(array, adapters, **is_adapter)


def largest(tree: Any) -> float:
    """The largest absolute value in a tree of arrays."""
    return max(np.abs(leaf).max(initial=0) for leaf in map(wide, jax.tree.leaves(tree)))


def wide(array: Any) -> np.ndarray:
    """An array in NumPy's float64, in which differences are exact."""
    return np.asarray(array).astype(np.float64)


def orthonormal(basis: Any) -> np.ndarray:
    """Columns that are orthonormal and span what those of a rounded basis span.

    A basis in eight bits is orthonormal to `ROUNDED` alone. A model uses its span.
    """
    columns, triangle = np.linalg.qr(wide(basis))
    return columns * np.sign(np.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]


ROUNDED = 2**-3 + 2**-8
"""A product of two columns of length 1 moves by as much, if each moves by 2**-4."""


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Two trees are equal within `tolerance` of each array's largest value."""
    chex.assert_trees_all_equal_structs(got, expected)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        one, other = wide(one), wide(other)
        assert one.shape == other.shape
        atol = tolerance * max(1, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python on a page of Markdown, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
