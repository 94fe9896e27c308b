"""Optimizers that methods are tried with beside Adam, named behind a method's comma."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WIDEST = 512
"""The largest side of an array that SOAP turns."""


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
        taken: Steps.
        mu: Means of gradients.
        nu: Means of their squares, between the eigenvectors.
        left: Means of G G^T, empty where that is too wide.
        right: Means of G^T G, likewise.
    """

    taken: jax.Array
    mu: Any
    nu: Any
    left: Any
    right: Any


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
    """SOAP (2409.11321): Adam between the eigenvectors of Shampoo's moments.

    Leaves are (..., p, s). The eigenvectors are found anew at each step, since an M is
    small. The first step fills the moments and moves nothing, as in the paper.
    """

    def moment(leaf: jax.Array, axis: int) -> jax.Array:
        size = leaf.shape[axis] if leaf.shape[axis] <= WIDEST else 0
        return jnp.zeros((*leaf.shape[:-2], size, size))

    def init(params: Any) -> SoapState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        left = jax.tree.map(lambda leaf: moment(leaf, -2), params)
        right = jax.tree.map(lambda leaf: moment(leaf, -1), params)
        return SoapState(jnp.zeros((), jnp.int32), zeros, zeros, left, right)

    def mean(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
        return decay * old + (1 - decay) * new

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        taken = state.taken
        corrections = [1 - b ** jnp.maximum(taken, 1) for b in (b1, b2)]

        def one(g: Any, mu: Any, nu: Any, left: Any, right: Any) -> Any:
            p, s = (_eigenvectors(m) for m in (left, right))
            left = mean(b2, left, g @ g.mT) if left.size else left
            right = mean(b2, right, g.mT @ g) if right.size else right
            mu, nu = mean(b1, mu, g), mean(b2, nu, _between(p, g, s) ** 2)
            mu, nu = (jnp.where(taken == 0, 0, m) for m in (mu, nu))
            first, second = _between(p, mu, s) / corrections[0], nu / corrections[1]
            step = first / (jnp.sqrt(second) + eps)
            return _between(_t(p), step, _t(s)), mu, nu, left, right

        leaves, tree = jax.tree.flatten(updates)
        parts = [tree.flatten_up_to(part) for part in state[1:]]
        found = [one(*of_leaf) for of_leaf in zip(leaves, *parts, strict=True)]
        steps, *after = (tree.unflatten(part) for part in zip(*found, strict=True))
        return steps, SoapState(taken + 1, *after)

    return optax.GradientTransformation(init, update)


def _t(matrix: jax.Array | None) -> jax.Array | None:
    return None if matrix is None else matrix.mT


def _eigenvectors(moment: jax.Array) -> jax.Array | None:
    """Of symmetric matrices; None for those that were too wide."""
    return jnp.linalg.eigh(moment)[1] if moment.size else None


def _between(left: jax.Array | None, g: jax.Array, right: jax.Array | None) -> Any:
    """left^T g right."""
    g = g if left is None else left.mT @ g
    return g if right is None else g @ right


OPTIMIZERS = {
    "nadam": optax.scale_by_adam(nesterov=True),
    "b1=0.8": optax.scale_by_adam(b1=0.8),
    "soap": scale_by_soap(),
}


def optimizer(method: str) -> optax.GradientTransformation:
    """The optimizer that a method's name says, by default Adam."""
    named = [OPTIMIZERS[word] for word in method.split(", ") if word in OPTIMIZERS]
    return named[0] if named else optax.scale_by_adam()
