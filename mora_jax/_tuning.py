"""Every constant that was measured and not derived, by platform, with its source.

A constant belongs here if another machine could want another value. To add a platform,
measure with the command that is named beside each constant, and add an entry to
`_BY_PLATFORM` under the name that `jax.default_backend()` gives. Until then a platform
has the constants of the CPU.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The constants of one platform.

    Attributes:
      fold_from: From how many rows on a fold is faster than the activation path, in
        units of in * out / (in + out), for operators without blocks. Theory: a fold
        reads and writes the kernel, in * out numbers; the activation path reads the
        input and the output again, in + out numbers for each row. Both move as much
        memory at 1.0. The fold also has to form C M D and to do all of it again in the
        backward pass, so that it pays later. Measured with `make bench-layer`.
      fold_blocks_from: The same for block operators. Their activation path also
        rearranges C(x), which is as long as x, and multiplies every block with M, while
        the fold builds the kernel from one copy of M's rows. So it pays earlier.
        Measured with `make bench-layer`.
      transform_step: How many multiplications by a matrix cost as much as one step of
        the fast Walsh-Hadamard transform: a matrix product runs near the peak of the
        machine, while a step of the transform moves all numbers through memory.
        Measured with `make bench-layer ARGS="--operators hadamard"`.
      matrix_from_rows: From more rows than this on, a matrix is worth making.
    """

    fold_from: float
    fold_blocks_from: float
    transform_step: int
    matrix_from_rows: int


# Two cores of an x86-64 server, float32, JAX 0.10.
_CPU = Tuning(
    fold_from=2.0, fold_blocks_from=0.6, transform_step=48, matrix_from_rows=8
)
_BY_PLATFORM = {"cpu": _CPU}

MAX_UNROLLED_SLICES = 64
"""A sum of more slices than this is one sum over an axis.

Up to here slices are added in one pass over memory, a third of the time on a CPU. More
of them would make programs long, which XLA takes long to compile.
"""


def tuning() -> Tuning:
    """The constants of the platform that JAX computes on by default."""
    return _BY_PLATFORM.get(jax.default_backend(), _CPU)
