"""Cost of an adapter by arithmetic and memory traffic alone."""

import dataclasses

import jax
from jax.typing import DTypeLike

from benchmarks.common.ways import choose
from mora_jax import AdapterSpec
from mora_jax.products import Contraction

WAYS = ("activation", "fold")
"""The two values of `execution=` that are not "auto"."""


def way_of_auto(spec: AdapterSpec, rows: int, dtype: DTypeLike) -> str:
    """The one of `WAYS` that a dense layer takes for this many rows."""
    x = jax.ShapeDtypeStruct((rows, spec.in_features), dtype)
    return choose(spec, Contraction.from_axes("io", 2), x, x.dtype)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes, forward and backward, that cannot be avoided.

    The formulas are explained in benchmarks/README.md.
    """

    flops: float
    bytes: float

    @classmethod
    def dense(cls, ins: int, outs: int, rows: int, itemsize: int) -> "Cost":
        """The layer alone: its output and the gradient of its input."""
        traffic = 2 * ins * outs + 2 * rows * (ins + outs)
        return cls(4 * rows * ins * outs, itemsize * traffic)

    @classmethod
    def adapter(cls, spec: AdapterSpec, rows: int, way: str, itemsize: int) -> "Cost":
        """Operations and bytes that the adapter adds."""
        op, q = spec.operator, spec.operator.square_rank
        ins, outs = op.in_features, op.out_features
        blocks = min(-(-ins // q), -(-outs // q)) if op.block else 1
        by_m = 2 * rows * q * q * blocks
        # The products with C and D, for operators that are more than copies.
        around = 2 * q * (ins + outs) if op.name in ("orthogonal", "hadamard") else 0
        if way == "activation":
            traffic = 3 * rows * (ins + outs)  # x and y twice, and their gradients
            return cls(3 * by_m + 2 * rows * around, itemsize * traffic)
        matrices = 4 * ins * q * outs if around else 0
        traffic = 4 * ins * outs + rows * (ins + outs)  # two folds; x and y's gradient
        return cls(by_m + rows * around + matrices, itemsize * traffic)

    @classmethod
    def lora(cls, ins: int, outs: int, rank: int, rows: int, itemsize: int) -> "Cost":
        """LoRA: three products with A and three with B."""
        traffic = 4 * rows * (ins + outs)
        return cls(6 * rows * rank * (ins + outs), itemsize * traffic)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The sum of both times, as operations of few flops a byte cannot overlap."""
        return self.flops / rate + self.bytes / bandwidth
