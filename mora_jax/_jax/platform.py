"""The platform that a program is traced for, which need not be the one it is traced on.

A program is compiled for the platform that it is lowered for, and an exported program
may be for several. `linear_map` traces each layer for the platform when it is lowered,
so that what is asked for here is right.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal

import jax

Chip = Literal["tpu", "gpu"]

CHIPS: Mapping[str, Chip] = {"tpu": "tpu", "cuda": "gpu", "rocm": "gpu"}
"""The kind of chip of each platform that has forms of its own, by JAX's name of it."""

# A sum of more slices than this is one sum over an axis. Up to here slices are added in
# one pass over memory, a third of the time on a CPU. More of them would make programs
# long, which XLA takes long to compile.
MAX_UNROLLED_SLICES = 64

chosen_platform: ContextVar[str | None] = ContextVar("platform", default=None)
"""The platform that is traced for now; None for JAX's default one."""


def default_platform() -> str:
    """Platform that JAX computes on by default, as `CHIPS` names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def current_platform() -> str:
    """Platform that what is traced now will run on."""
    return chosen_platform.get() or default_platform()


def current_chip() -> Chip | None:
    """The chip whose forms `chips` and `tiles` take; None for the plain ones."""
    return CHIPS.get(current_platform())
