"""Every constant that was measured and not derived, by platform, with its source.

A program is compiled for the platform that it is lowered for, which need not be the one
that it is traced on: an exported program may be for several. So a choice that depends
on the platform is made by `by_platform`, in the program itself.

A constant belongs here if another machine could want another value. To add a platform,
measure with the command that is named beside each constant, and add an entry to
`TUNING` under JAX's name of it. Until then a platform has the constants of the
CPU.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The constants of one platform.

    The first three say from how many rows on a fold is faster than the activation path,
    in units of in * out / (in + out). Theory: a fold reads and writes the kernel,
    in * out numbers; the activation path reads the input and the output again, in + out
    numbers for each row. Both move as much memory at 1.0. The fold also has to form
    C M D and to do all of it again in the backward pass, so that it pays later.

    Attributes:
      fold_from: For operators whose C and D are products with matrices. Measured with
        `make bench-layer`.
      fold_cheap_from: For sharing and truncation, whose C and D multiply nothing.
      fold_blocks_from: For block operators. Their activation path also rearranges C(x),
        which is as long as x, and multiplies every block with M, while the fold builds
        the kernel from one copy of M's rows. So it pays earlier.
      folds_16_bits: Whether kernels of 16 bits are folded, too, with a dither.
      folds_gathered: Whether kernels are folded that are split over batches (FSDP), and
        gathered before they are used.
      tiled_memory: Whether arrays are stored as tiles of 8 rows and 128 features.
      slices_blocks: Whether block operators cut their blocks from x, and M is turned
        instead of each block of x. Otherwise x becomes an array of blocks.
      batches_blocks: Whether the gradient of a block operator's M is one product with
        an axis of blocks, and then turned. Otherwise each block of x is turned, and
        blocks and rows are summed over alike.
      orders_by_products: Whether a delta whose features are in another order is made by
        products with unit vectors. Otherwise its rows and columns are gathered.
      stores_folds: Whether a folded kernel becomes an array before it is multiplied.
        Otherwise each part of the product may form its own once more. A block
        operator's becomes one in any case, since it is changed in place.
      transform_step: How many multiplications by a matrix cost as much as one step of
        the fast Walsh-Hadamard transform: a matrix product runs near the peak of the
        machine, while a step of the transform moves all numbers through memory.
        Measured with `make bench-layer ARGS="--operators hadamard"`.
      matrix_from_rows: From more rows than this on, a matrix is worth making.
      loops_over_rows: Whether rows of a batch that have M's of their own are multiplied
        one after another. Otherwise the M's are copied, one for each row, and there is
        one product with an axis of rows. See `Rows with M's of their own` below.
    """

    fold_from: float
    fold_cheap_from: float
    fold_blocks_from: float
    folds_16_bits: bool
    folds_gathered: bool
    tiled_memory: bool
    slices_blocks: bool
    batches_blocks: bool
    orders_by_products: bool
    stores_folds: bool
    transform_step: int
    matrix_from_rows: int
    loops_over_rows: bool


# Two cores of an x86-64 server, float32, JAX 0.10.
_CPU = Tuning(
    fold_from=2.0,
    fold_cheap_from=2.0,
    fold_blocks_from=0.6,
    folds_16_bits=False,
    folds_gathered=False,
    tiled_memory=False,
    slices_blocks=False,
    batches_blocks=False,
    orders_by_products=False,
    stores_folds=False,
    transform_step=48,
    matrix_from_rows=8,
    loops_over_rows=True,
)
# Programs that XLA compiles for TPUs, bfloat16, 8,192 rows, relative to the frozen
# layer or model (`make bench-chips`). Activation and fold with orthogonal: 1.32 and
# 1.31 for 4096 -> 4096 on a v5e, 1.34 and 1.46 on a v6e; 1.31 and 1.23 for 4096 ->
# 14336, and 1.43 and 1.56. Of two layers of a Llama they are 1.08 and 0.89, and 1.07
# and 0.96, and "auto" goes by that. On a v5e 4096 -> 4096 costs 1.11 and 1.21 with
# sharing, 1.37 and 1.07 with rotation. Permutation's fold costs 1.16 there, 1.18 for
# 4096 -> 14336, by products with unit vectors; 1.38 and 1.58 if its rows are gathered.
# Kernels that are gathered, a training step of 8B on v5e:2x4 (`--only meshes`), fused
# and folded: rotation 464 and 418 ms, orthogonal 493 and 454, sharing 432 and 410. A
# device receives 13.6 to 13.7 GB fused, 14.2 to 14.6 folded, and 14.1 frozen. So a fold
# of sharing saves about the time that 1 GB more takes, and the other two far more.
_TPU = Tuning(
    fold_from=2.0,
    fold_cheap_from=math.inf,
    fold_blocks_from=0.6,
    folds_16_bits=True,
    folds_gathered=True,
    tiled_memory=True,
    slices_blocks=True,
    batches_blocks=False,
    orders_by_products=True,
    stores_folds=True,
    transform_step=4096,
    matrix_from_rows=8,
    loops_over_rows=False,
)
# The same for an H100. In a model what the activation path reads and writes is fused
# with what stands before and after a layer: of two layers of a Llama of 8B's width, 4 x
# 2,048 tokens, activation and fold cost 1.00 and 1.03 of the frozen model with sharing,
# 1.05 and 1.10 with orthogonal, 1.05 and 1.03 with rotation (alone, 4096 -> 4096: 1.23
# and 1.14, 1.36 and 1.29, 1.45 and 1.13). With the gradient of M as one product with an
# axis of blocks the last of these is 1.13, and 1.19 without.
_GPU = Tuning(
    fold_from=8.0,
    fold_cheap_from=math.inf,
    fold_blocks_from=0.6,
    folds_16_bits=True,
    folds_gathered=False,
    tiled_memory=False,
    slices_blocks=False,
    batches_blocks=True,
    orders_by_products=False,
    stores_folds=False,
    transform_step=4096,
    matrix_from_rows=8,
    loops_over_rows=False,
)
TUNING: Mapping[str, Tuning] = MappingProxyType(
    {"cpu": _CPU, "tpu": _TPU, "cuda": _GPU, "rocm": _GPU}
)
"""The constants of each platform, by JAX's name of it."""

MAX_UNROLLED_SLICES = 64
"""A sum of more slices than this is one sum over an axis.

Up to here slices are added in one pass over memory, a third of the time on a CPU. More
of them would make programs long, which XLA takes long to compile.
"""


UNROLLED_PRODUCTS = 8
"""How many products of a block operator's gradient of M are one step of a loop.

XLA fetches what a product reads while it computes the ones before it, in one step of a
loop. To find the number, change it and run `make bench-chips`: with 1, all and 8 a
Llama cost 0.92, 0.87 and 0.87 of the frozen one on a TPU v5e, and took 32, 101 and 37
seconds of two cores to compile.
"""

ORDERED_ROWS = 1024
"""How many rows of x are reordered in one step of permutation's gradient of M.

To find the number, change it and run `make bench-chips ARGS="--only layers --operators
permutation"`: 512 and 1,024 cost the same on a TPU v5e, 2,048 more on a v6e.
"""

MAX_SQUARES_IN_ONE = 4
"""Up to so many squares are multiplied as one matrix, with zeros between them.

It computes K times what is needed, which is little: what is needed is 0.6% of a layer
of 4096 x 4096 at rank 8. In separate products C(x), and what is made of it, was
rearranged first: on a TPU v5e a layer of 4096 x 14336 with two squares cost 1.11 of the
frozen one as one matrix, 1.12 in a product with a batch axis, and 1.19 in two products
(`make bench-chips ARGS="--only layers --operators sharing --squares auto"`).
"""

# --- Rows with M's of their own (`loops_over_rows`) ---
#
# Measured by hand on a busy machine, since the ways that lost are not in the library;
# `make bench-many` measures the two that are.
# Milliseconds on a CPU of 64 rows of one token, q = 256, with 4 and 64 slots: one after
# another 0.66 and 1.02; copied, in one product 18 and 19; rows sorted by slot, for
# `jax.lax.ragged_dot` 2.1, or in groups of 16 rows that are filled up with zeros 0.48
# and 5.5; all slots for all rows, of which a mask takes one, 1.27 for 4. The layer
# itself takes many times that, so that groups are not worth their code.
# On chips (rooflines of 4096 -> 4096, q = 256, relative to the layer alone): 64 rows of
# one token cost on an H100 with 4 and 64 slots 1.39 and 1.50 copied, 1.91 and 2.55 with
# ragged_dot, 25 one after another; with rotation 1.78 and 1.90, 2.09 and 3.64, 41. 8 x
# 512 tokens cost 1.25 and 1.26, 1.37 and 1.84, 1.89. On a v5e copies and ragged_dot are
# within 0.02 of each other for 64 rows, and cost 1.09 and 1.04 for 8 x 512 tokens,
# where the product inside of ragged_dot is not priced; one after another up to 4.7.

_as_if_on: str | None = None


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
    """Whatever is traced within takes the choices of another platform.

    So the tests compute here what a chip would compute. Nothing that was traced before
    is used within, nor afterwards what was traced within.

    Args:
      platform: One of `TUNING`.
    """
    global _as_if_on
    before, _as_if_on = _as_if_on, platform
    jax.clear_caches()
    try:
        yield
    finally:
        _as_if_on = before
        jax.clear_caches()


def current_tuning() -> Tuning:
    """The constants of the platform that JAX computes on by default."""
    platform = _as_if_on or jax.default_backend()
    return _GPU if platform == "gpu" else TUNING.get(platform, _CPU)


def by_platform(
    wanted: Callable[[Tuning], bool],
    function: Callable[..., Any],
    otherwise: Callable[..., Any],
    *args: Any,
) -> Any:
    """`function(*args)` on platforms for which it is wanted, `otherwise` on others.

    The two must give results of the same type.
    """
    if _as_if_on is not None:
        return (function if wanted(current_tuning()) else otherwise)(*args)
    chosen = {name: function if wanted(t) else otherwise for name, t in TUNING.items()}
    default = chosen.pop("cpu")
    if all(each is default for each in chosen.values()):
        return default(*args)
    return jax.lax.platform_dependent(*args, **chosen, default=default)
