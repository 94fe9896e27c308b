"""Constants of each platform: measured on CPUs, chosen by rooflines for chips.

A constant belongs here if another machine could want another value. To add a platform,
measure with the command that is named beside each constant, and add an entry to
`TUNING` under JAX's name of it. Until then a platform has the constants of the CPU.
"""

import dataclasses
import math
from collections.abc import Mapping

from mora_jax._jax.tracing import current_platform
from mora_jax.operators._base import Work


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The constants of one platform."""

    # For each kind of work of an operator the number of rows from which on a fold is
    # faster than the activation path, in units of in * out / (in + out). A fold reads
    # and writes the kernel, in * out numbers; the activation path reads input and
    # output again, in + out numbers for each row. Both move as much memory at 1.0. The
    # fold also has to form C M D and to do all of it again in the backward pass, so
    # that it pays later. With blocks it pays earlier: their activation path also
    # rearranges C(x), which is as long as x.
    fold_from: Mapping[Work, float]
    folds_16_bits: bool = False  # kernels of 16 bits, too, with a dither
    folds_gathered: bool = False  # kernels split over batches, before they are gathered


# Two cores of an x86-64 server, float32, JAX 0.10: `make bench-layer`, `make bench`.
_CPU = Tuning(fold_from={"products": 2.0, "sums": 2.0, "blocks": 0.6, "factors": 0.6})
# Rooflines of programs that XLA compiles for TPUs, bfloat16, 8,192 rows, relative to
# the frozen layer or model (`make bench-chips`, whose results have each operator both
# ways). "auto" goes by the model: a Llama of two layers with orthogonal costs 1.08 and
# folded 0.89 on a v5e, where its layers alone cost 1.34 to 1.43, folded 1.46 to 1.56.
# If kernels are gathered a fold of sharing saves about the time that its 1 GB more of
# traffic takes, others far more: on v5e:2x4 8B's step with rotation takes 464 ms fused
# and 418 folded, with sharing 432 and 410 (`--only meshes`).
_TPU = Tuning(
    fold_from={"products": 2.0, "sums": math.inf, "blocks": 0.6, "factors": 2.0},
    folds_16_bits=True,
    folds_gathered=True,
)
# The same for an H100, where what the activation path reads and writes in a model is
# fused with what stands around a layer: a Llama of 8B's width costs 1.00 and folded
# 1.03 with sharing, 1.05 and 1.03 with rotation; a layer alone is cheaper folded.
_GPU = Tuning(
    fold_from={"products": 8.0, "sums": math.inf, "blocks": 0.6, "factors": 2.0},
    folds_16_bits=True,
)
TUNING: Mapping[str, Tuning] = {"cpu": _CPU, "tpu": _TPU, "cuda": _GPU, "rocm": _GPU}
"""The constants of each platform, by JAX's name of it."""


def current_tuning() -> Tuning:
    """The constants of the platform that what is traced now will run on."""
    return TUNING.get(current_platform(), _CPU)
