"""Constants of each platform: measured on CPUs, chosen by rooflines for chips.

A constant belongs here if another machine could want another value. To add a platform,
measure with the command that is named beside each constant, and add an entry to
`TUNING` under JAX's name of it. Until then a platform has the constants of the CPU.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Literal

import jax

Work = Literal["products", "sums", "blocks"]
"""The work of C and D: products with matrices, sums and copies, or moves of blocks."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The constants of one platform.

    Attributes:
      fold_from: For each kind of work of an operator, the number of rows from which on
        a fold is faster than the activation path, in units of in * out / (in + out).
      folds_16_bits: True if kernels of 16 bits are folded, too, with a dither.
      folds_gathered: True if kernels are folded that are split over batches (FSDP),
        and gathered before they are used.
      chip: The chip whose forms `chips` and `tiles` take; None for the plain ones.
      loops_over_rows: True if rows with M's of their own are multiplied one after
        another, and not in one product with a copy of an M for each row
        (`make bench-many`).
    """

    # A fold reads and writes the kernel, in * out numbers; the activation path reads
    # input and output again, in + out numbers for each row. Both move as much memory at
    # 1.0. The fold also has to form C M D and to do all of it again in the backward
    # pass, so that it pays later. With blocks it pays earlier: their activation path
    # also rearranges C(x), which is as long as x.
    fold_from: Mapping[Work, float]
    folds_16_bits: bool
    folds_gathered: bool
    chip: Literal["tpu", "gpu"] | None
    loops_over_rows: bool


# Two cores of an x86-64 server, float32, JAX 0.10, `make bench-layer`.
_CPU = Tuning(
    fold_from={"products": 2.0, "sums": 2.0, "blocks": 0.6},
    folds_16_bits=False,
    folds_gathered=False,
    chip=None,
    loops_over_rows=True,
)
# By rooflines of programs that XLA compiles for TPUs and an H100 (`make bench-chips`):
# benchmarks/README.md has both ways side by side, under "Constants of a platform".
# Where a layer alone and a model disagree, the model counts.
_TPU = Tuning(
    fold_from={"products": 2.0, "sums": math.inf, "blocks": 0.6},
    folds_16_bits=True,
    folds_gathered=True,
    chip="tpu",
    loops_over_rows=False,
)
_GPU = Tuning(
    fold_from={"products": 8.0, "sums": math.inf, "blocks": 0.6},
    folds_16_bits=True,
    folds_gathered=False,
    chip="gpu",
    loops_over_rows=False,
)
TUNING: Mapping[str, Tuning] = {"cpu": _CPU, "tpu": _TPU, "cuda": _GPU, "rocm": _GPU}
"""The constants of each platform, by JAX's name of it."""

# A sum of more slices than this is one sum over an axis. Up to here slices are added in
# one pass over memory, a third of the time on a CPU. More of them would make programs
# long, which XLA takes long to compile.
MAX_UNROLLED_SLICES = 64

# A program is compiled for the platform that it is lowered for, which need not be the
# one that it is traced on: an exported program may be for several. `linear_map` traces
# each layer for the platform when it is lowered, so that `current_tuning` is right.
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def chosen_platform() -> str | None:
    """Platform that what is traced now will run on, if it need not be the default."""
    return _platform.get()


def default_platform() -> str:
    """Platform that JAX computes on by default, as `TUNING` names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def current_tuning() -> Tuning:
    """The constants of the platform that what is traced now will run on."""
    return TUNING.get(chosen_platform() or default_platform(), _CPU)


@contextlib.contextmanager
def traced_for(platform: str | None) -> Iterator[None]:
    """Trace within for a platform; None for the default one."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)
