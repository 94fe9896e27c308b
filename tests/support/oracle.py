"""The operators as plain float64 matrices, element by element, from their definitions.

This is independent of the library, except for the numbers that a seed fixes, which are
read off the operator. C is (in, n, q), D is (n, q, out).
"""

import math

import numpy as np


def _sizes(op):
    return op.in_features, op.out_features, op.square_rank


def _one_block(c, d):
    """C and D as those of an operator with blocks, of which this one has one."""
    return c[:, None, :], d[None]


def delta(c, d, m):
    """C times M for each block, times D; in float64."""
    return np.einsum("inq,qr,nro->io", c, np.asarray(m, np.float64), d, optimize=True)


def m_gradient(c, d, x, g):
    """The gradient of M where g is the gradient of the output, (q, q)."""
    return np.einsum("...i,inq,...o,nro->qr", x, c, g, d, optimize=True)


def delta_of(op, m):
    """The delta of an operator that has no settings beside its sizes and its seed."""
    if not op.square:
        return globals()[op.name](op, m)
    return delta(*globals()[op.name](op), m)


def m_gradient_of(op, m, x, g):
    """The gradient of what such an operator trains."""
    if not op.square:
        return globals()[f"{op.name}_gradient"](op, m, x, g)
    return m_gradient(*globals()[op.name](op), x, g)


def _factors(op, m):
    m = np.asarray(m, np.float64)
    return m[: op.in_features], m[op.in_features :].T


def _own_numbers(op):
    """(i, o, place in M) of the numbers of a block-diagonal delta."""
    n = op.square_rank
    places = [
        [
            (k, j)
            for k, block in enumerate(np.array_split(np.arange(w), n))
            for j in range(len(block))
        ]
        for w in (op.in_features, op.out_features)
    ]
    ins, outs = (
        [*zip(np.asarray(orders[0]) if orders else range(w), place, strict=True)]
        for w, orders, place in (
            (op.in_features, op.in_orders, places[0]),
            (op.out_features, op.out_orders, places[1]),
        )
    )
    for i, (k, row) in ins:
        yield from ((i, o, (k, row, column)) for o, (b, column) in outs if b == k)


def block_diagonal(op, m):
    """Neighbouring features in n blocks, the first ones longer by one."""
    delta = np.zeros((op.in_features, op.out_features))
    for i, o, place in _own_numbers(op):
        delta[i, o] = np.float64(m[place])
    return delta


def block_diagonal_gradient(op, m, x, g):
    """The numbers of the kernel's gradient at their places in M."""
    by_m = np.zeros(op.m_shape)
    by_kernel = x.reshape(-1, op.in_features).T @ g.reshape(-1, op.out_features)
    for i, o, place in _own_numbers(op):
        by_m[place] = by_kernel[i, o]
    return by_m


def damping(op):
    """(I - V V^T) F, which rows x are multiplied by."""
    p = np.eye(op.in_features)
    if op.directions is not None:
        v = np.asarray(op.directions, np.float64)
        p -= v @ v.T
    if op.diagonal is not None:
        p *= np.asarray(op.diagonal, np.float64)[:, 0]
    return p


def damped(op):
    c, d = globals()[op.inner.name](op.inner)
    return np.einsum("ij,jnq->inq", damping(op), c), d


def low_rank(op, m):
    """A B, of A above the transpose of B."""
    a, b = _factors(op, m)
    return np.einsum("ir,ro->io", a, b)


def low_rank_gradient(op, m, x, g):
    """By A, above the transpose of the gradient by B."""
    a, b = _factors(op, m)
    by_kernel = x.reshape(-1, op.in_features).T @ g.reshape(-1, op.out_features)
    return np.concatenate([by_kernel @ b.T, by_kernel.T @ a])


def truncation(op):
    ins, outs, q = _sizes(op)
    return _one_block(np.eye(ins, q), np.eye(q, outs))


def _group_of(features, q, contiguous):
    """The group of each place; strided places go on past the end to a multiple of q."""
    if not contiguous:
        return [place % q for place in range(math.ceil(features / q) * q)]
    small = features // q
    longer = features - q * small
    groups = []
    for group in range(q):
        groups += [group] * (small + (group < longer))
    return groups


def sharing(op):
    ins, outs, q = _sizes(op)
    c, d = np.zeros((ins, q)), np.zeros((q, outs))
    for place, group in enumerate(_group_of(ins, q, op.compress_groups[0] == "c")):
        c[place % ins, group] += 1
    for place, group in enumerate(_group_of(outs, q, op.decompress_groups[0] == "c")):
        if place < outs:
            d[group, place] = 1
    if op.normalised:
        c /= math.sqrt(ins / q)
        d /= math.sqrt(outs / q)
    return _one_block(c, d)


def signed_sharing(op):
    c, d = sharing(op)
    ins, outs = np.asarray(op.in_signs), np.asarray(op.out_signs)
    return ins[:, None, None] * c, d * outs


def decoupling(op):
    ins, outs, q = _sizes(op)
    n, p = math.ceil(ins / q), math.ceil(outs / q)
    c, d = np.zeros((ins, n, q)), np.zeros((n, q, outs))
    for place in range(n * q):
        c[place % ins, place // q, place % q] += 1
    for out in range(outs):
        target = out // q
        for block in range(n):
            if op.truncate:
                feeds = block == target % n
            elif n >= p:
                feeds = block % p == target
            else:
                feeds = block == target % n
            if feeds:
                d[block, out % q, out] = 1
    return c, d


def signed_decoupling(op):
    c, d = decoupling(op)
    return c * np.asarray(op.in_signs, np.float64), d


def rotation(op):
    c, d = decoupling(op)
    q = op.square_rank
    rotated = c.copy()
    for block in range(c.shape[1]):
        for j in range(q // 2):
            angle = block * 10000 ** (-2 * j / q)
            low, high = c[:, block, j], c[:, block, j + q // 2]
            rotated[:, block, j] = low * math.cos(angle) - high * math.sin(angle)
            rotated[:, block, j + q // 2] = high * math.cos(angle) + low * math.sin(
                angle
            )
    return rotated, d


def orthogonal(op):
    c = np.asarray(op.in_basis, np.float64)
    d = np.asarray(op.out_basis, np.float64).T
    return _one_block(c, d)


def _walsh(size):
    if size == 1:
        return np.ones((1, 1))
    half = _walsh(size // 2)
    return np.kron([[1, 1], [1, -1]], half) / math.sqrt(2)


def _hadamard_side(signs, odd, coordinates):
    b = len(odd)
    mixing = np.kron(_walsh(len(signs) // b), np.asarray(odd, np.float64))
    return (np.asarray(signs, np.float64)[:, None] * mixing)[:, np.asarray(coordinates)]


def hadamard(op):
    c, d = _hadamard_side(*op.in_arrays), _hadamard_side(*op.out_arrays).T
    return _one_block(c, d)
