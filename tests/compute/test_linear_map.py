"""Linear maps with a transpose of their own, under every transformation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, random
from jax.test_util import check_grads

from mora_jax._jax.linear_map import LinearMap, static


@dataclasses.dataclass(frozen=True)
class Product(LinearMap):
    """x @ w, which tells whether its own transpose was used: by a factor."""

    mark: float = 1.0

    def forward(self, residuals, operand):
        return operand @ residuals["w"]

    def backward(self, residuals, cotangent):
        return self.mark * (cotangent @ residuals["w"].T)


W, X = random(0, 2, 3), random(1, 4, 2)


def apply(w, x, mark=1.0):
    return Product(mark)({"w": w}, x)


@pytest.mark.slow
def test_derivatives_of_every_order(float64):
    args = np.float64(W), np.float64(X)
    function = jax.jit(lambda w, x: jnp.sin(apply(w, x)))
    check_grads(function, args, order=3, atol=1e-4, rtol=1e-4)


def test_its_own_transpose_is_used():
    def gradient(x, w=W, mark=3.0):
        return jax.grad(lambda x: jnp.sum(apply(w, x, mark)))(x)

    once = gradient(X, mark=1.0)
    for transform in (jax.jit, jax.checkpoint):
        close(transform(gradient)(X), 3 * once)
    batched = jax.vmap(gradient, (None, 0))(X, jnp.stack([W, 2 * W]))
    close(batched, jnp.stack([3 * once, 6 * once]))
    (back,) = jax.linear_transpose(lambda x: apply(W, x, 3.0), X)(jnp.ones((4, 3)))
    close(back, 3 * once)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 2), (1, 0)], ids=str)
def test_vmap(axes):
    """Over the residual, the argument or both, along any axis."""
    w = W if axes[0] is None else np.stack([W, 2 * W, 3 * W], axes[0])
    x = X if axes[1] is None else np.stack([X, 4 * X, 5 * X], axes[1])
    got = jax.vmap(apply, axes, 1)(w, x)
    close(got, jax.vmap(jnp.matmul, (axes[1], axes[0]), 1)(x, w))

    def by_x(product):
        loss = jax.vmap(lambda w, x: jnp.sum(jnp.sin(product(w, x))), axes)
        return jax.grad(lambda x: loss(w, x).sum())(x)

    close(by_x(apply), by_x(lambda w, x: x @ w))


@dataclasses.dataclass(frozen=True)
class Scaled(Product):
    """Three times as much for each level of `jax.vmap` that maps w and not b."""

    def mapped(self, residuals):
        assert residuals.keys() == {"b", "w"}
        more = residuals["w"] and not residuals["b"]
        return Scaled(3 * self.mark) if more else self

    def forward(self, residuals, operand):
        return self.mark * (operand @ residuals["w"])


def test_a_map_knows_which_residuals_are_mapped():
    def run(b, w, x):
        return Scaled()({"b": b, "w": w}, x)

    two, y = jnp.stack([W, W]), X @ W
    for axes, factor in (((None, 0, None), 3), ((0, 0, None), 1), ((0, None, 0), 1)):
        args = [jnp.ones(2), two, jnp.stack([X, X])]
        args = [a if k == 0 else a[0] for a, k in zip(args, axes, strict=True)]
        function = jax.vmap(run, axes)
        close(function(*args), factor * jnp.stack([y, y]))
        back = jax.grad(lambda x, f=function, a=args: jnp.sum(f(*a[:2], x)))(args[2])
        once = jnp.broadcast_to(W.sum(1), X.shape)
        copies = 1 if axes[2] == 0 else 2
        close(back, jnp.broadcast_to(factor * copies * once, back.shape))
    nested = jax.vmap(jax.vmap(run, (0, 0, None)), (None, 0, None))
    close(nested(jnp.ones(2), jnp.stack([two, two]), X)[1, 1], 3 * y)


def test_the_residual_is_kept_alone():
    """The gradient's program holds w and nothing that was computed from it."""

    @dataclasses.dataclass(frozen=True)
    class Dear(LinearMap):
        def forward(self, residuals, operand):
            return operand @ jnp.exp(residuals)

        def backward(self, residuals, cotangent):
            return cotangent @ jnp.exp(residuals).T

    _, vjp = jax.vjp(lambda x: Dear()(W, x), X)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if jnp.shape(leaf) == W.shape]
    close(kept, [W] * max(1, len(kept)))


@dataclasses.dataclass(frozen=True)
class Affine(LinearMap):
    """b + x w, whose derivative by w is written out, with a factor that tells."""

    mark: float = 1.0

    def forward(self, residuals, operand):
        b, w = residuals
        return b["b"] + operand @ w

    def backward(self, residuals, cotangent):
        return cotangent @ residuals[1].T

    def derivative(self, residuals, operand):
        return Times(self.mark), operand


@dataclasses.dataclass(frozen=True)
class Times(LinearMap):
    """mark * x w as a map of w."""

    mark: float

    def forward(self, residuals, operand):
        return self.mark * (residuals @ operand)

    def backward(self, residuals, cotangent):
        return self.mark * (residuals.T @ cotangent)


@pytest.mark.parametrize("batched", [False, True])
def test_a_derivative_by_a_residual_may_be_written_out(batched):
    """JAX differentiates by the others; and both work under jax.vmap."""

    def marked(b, w, x):
        return Affine(3.0)(({"b": b}, w), x)

    def plain(b, w, x):
        return b + x @ w

    args, functions = (jnp.ones(3), W, X), [marked, plain]
    if batched:  # over w and x
        args = args[0], *(jnp.stack([a, 2 * a]) for a in args[1:])
        functions = [jax.vmap(f, (None, 0, 0)) for f in functions]
    (b, w, x), tangents, found = args, tuple(2 * arg for arg in args[:2]), []
    for function in functions:
        y, back = jax.vjp(lambda b, w, f=function: f(b, w, x), b, w)
        _, tangent = jax.jvp(lambda b, w, f=function: f(b, w, x), (b, w), tangents)
        found.append((*back(jnp.ones_like(y)), tangent - tangents[0]))
    (by_b, *by_w), (expected_by_b, *expected_by_w) = found
    close((by_b, by_w), (expected_by_b, [3 * each for each in expected_by_w]))


def test_static_functions_compare_by_what_they_hold():
    """So that a second call finds the program of the first."""
    traces = []

    def scale(factor, x):
        traces.append(factor)
        return factor * x

    jitted = jax.jit(lambda function, x: function(x), static_argnums=0)
    for factor in (2.0, 2.0, 3.0):
        close(jitted(static(scale, factor), X), factor * X)
    assert traces == [2.0, 3.0]


def test_transposes():
    """Also by residuals in which it is linear, as JAX would; by both, one at a time."""
    y = X @ W
    (by_w,) = jax.linear_transpose(lambda w: apply(w, X, mark=2.0), W)(y)
    close(by_w, X.T @ y)
    (by_x,) = jax.linear_transpose(lambda x: apply(W, x, mark=2.0), X)(y)
    close(by_x, 2 * y @ W.T)
    # Forward is the transpose's transpose.
    close(Product(2.0)({"w": W}, y, transposed=True), 2 * y @ W.T)
    back = jax.linear_transpose(lambda y: Product(2.0)({"w": W}, y, transposed=True), y)
    close(back(X)[0], y)
