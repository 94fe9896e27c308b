"""Einsum equations as dense layers."""

import math

import jax
import numpy as np
import pytest
from helpers import close, random, wide

from mora_jax._common.axes import kernel_from_rows, sizes
from mora_jax.products import Contraction

EQUATIONS = [
    ("...i,io->...o", (2, 3, 5), (5, 4), "io"),
    ("...i,oi->...o", (2, 3, 5), (4, 5), "oi"),
    ("btd,dnh->btnh", (2, 3, 5), (5, 4, 2), "ioo"),
    ("btnh,nhd->btd", (2, 3, 4, 2), (4, 2, 5), "iio"),
    ("bsd,sndh->sbnh", (2, 3, 5), (3, 4, 5, 2), "soio"),
    ("bd,sndh->sbnh", (2, 5), (3, 4, 5, 2), "ooio"),
    ("ebi,eio->ebo", (3, 2, 5), (3, 5, 4), "sio"),
    ("e...i,eio->...oe", (3, 2, 6, 5), (3, 5, 4), "sio"),
    ("i,io->o", (5,), (5, 4), "io"),
    ("ib,oi", (5, 2), (4, 5), "oi"),  # implicit output: b, o
    ("ba d, d c -> c b a", (2, 3, 5), (5, 4), "io"),
]


@pytest.mark.parametrize(("equation", "x_shape", "w_shape", "axes"), EQUATIONS)
def test_rows_compute_the_einsum(equation, x_shape, w_shape, axes):
    """Rows times the flattened kernel, put back, is what the einsum gives."""
    x, w = random(0, *x_shape), random(1, *w_shape)
    contraction = Contraction.parse(equation, x.ndim)
    assert contraction.axes == axes
    order = [k for letter in "sio" for k, kind in enumerate(axes) if kind == letter]
    stack, ins = sizes(w_shape, axes, "s"), math.prod(sizes(w_shape, axes, "i"))

    @jax.jit
    def run(x, w):
        flat = w.transpose(order).reshape(*stack, ins, -1)
        rows = contraction.to_rows(x)
        assert rows.shape[-1] == ins and rows.shape[: len(stack)] == stack
        batch = (1,) * (rows.ndim - 1 - len(stack) - 1)
        product = rows @ flat.reshape(*stack, *batch, ins, -1) if stack else rows @ flat
        y = contraction.from_rows(product, sizes(w_shape, axes, "o"))
        return y, kernel_from_rows(flat, w_shape, axes)

    close(run(x, w), (np.einsum(equation.replace(" ", ""), wide(x), wide(w)), w))


@pytest.mark.parametrize(
    ("equation", "ndim"),
    [
        ("bi->bo", 2),  # one operand
        ("bi,io,o->bo", 2),
        ("bi,io->b", 2),  # sums over an axis of the kernel alone
        ("bti,io->bo", 3),  # sums over an axis of the input alone
        ("bi,bi->b", 2),  # no output feature
        ("b,io->bio", 1),  # no input feature
        ("bi,ii->bi", 2),  # a diagonal
        ("bb,bo->bo", 2),
        ("bi,io->boz", 2),  # an axis from nowhere
        ("...i,...io->...o", 2),  # unnamed axes of the kernel
        ("bti,io->bto", 2),  # the input has too few axes
        ("bi,io->bo", 3),  # and too many
    ],
)
def test_other_equations_are_refused(equation, ndim):
    with pytest.raises(ValueError, match="equation|'.*->.*'"):
        Contraction.parse(equation, ndim)
