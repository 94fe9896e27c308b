"""Rooflines: costs of compiled programs on chips that need not be there.

The program is read as XLA compiled it for the chip (see `hlo`). Each instruction that
runs alone takes the longer of two times: one for its products at the chip's peak, and
one for the bytes that it moves at the bandwidth of the main memory. Their sum, with
loops counted as often as they run, is the program's time.

On TPUs the time of a product is the compiler's own number of cycles. It knows how
products are padded to the units of 128 x 128: LoRA of rank 8 costs what rank 128 costs.
The compiler's cycles of other instructions are far too many, and are not used.

What a roofline leaves out: latency, relayouts that are slower than the bandwidth, and
how collectives overlap with the rest. It does not time collectives; it says how many
bytes they bring. So use ratios of two programs on one chip, and no absolute times.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.chips.hlo import (
    COLLECTIVES,
    Array,
    Instruction,
    Program,
    Step,
    main_memory,
)
from benchmarks.chips.moved import bytes_moved
from benchmarks.mesh.traffic import group_size


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a chip.

    Attributes:
        bandwidth: Bytes a second of its main memory.
        flops: Operations a second of products in bfloat16.
        clock: Cycles a second of its compiler's estimates; 0 where it makes none.
        start: The seconds that it takes to start an instruction.
    """

    bandwidth: float
    flops: float
    clock: float = 0.0
    start: float = 0.0


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(819e9, 197e12, 1.5e9),
    "v6e": Chip(1640e9, 918e12, 1.75e9),
    "v5p": Chip(2765e9, 459e12, 1.75e9),
    # Products reach about 800 of 989 TFLOP/s, and a kernel starts in microseconds.
    "h100": Chip(3.35e12, 800e12, start=2.5e-6),
}
"""The chips, by name."""

COPIES = {
    "copy-start",
    "slice-start",
    "dynamic-slice-start",
    "dynamic-update-slice-start",
}
PASSES = {"sort", "fft", "scatter", "cholesky", "triangular-solve", "infeed", "outfeed"}
PASSES |= {"send", "recv", "rng"}
"""Instructions that may read memory more often than once."""
PLAIN_CALLS = {"ConcatBitcast", "AllocateBuffer", "Sharding", "SPMDFullToShardShape"}
PLAIN_CALLS |= {"SPMDShardToFullShape"}
"""Calls that name what is in memory already, and move nothing."""
SIXTEEN_BITS = {"bf16", "f16"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of all runs of one instruction.

    Attributes:
        name: The name of its result.
        opcode: Its operation.
        seconds: The time of its products or of its bytes, whichever is longer.
        product_seconds: The time of its products.
        moved: Bytes of main memory that it reads and writes.
        aside: Bytes that are copied while other instructions run.
        received: Bytes that each device receives, in rings.
        cycles: The compiler's estimate.
    """

    name: str
    opcode: str
    seconds: float = 0.0
    product_seconds: float = 0.0
    moved: float = 0.0
    aside: float = 0.0
    received: float = 0.0
    cycles: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Cost of a program.

    Attributes:
        seconds: Its time, without collectives.
        moved: Bytes of main memory that it reads and writes.
        received: Bytes that each device receives, by collective.
        temporary: Bytes of memory besides arguments and results, as XLA plans it.
        costs: Its instructions, the dearest first.
        notes: A sentence for each instruction that was not understood.
    """

    seconds: float
    moved: float
    received: Mapping[str, float]
    temporary: int
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]


def measure(compiled: Any, chip: str) -> Roofline:
    """The roofline of a program that was compiled for a chip in `CHIPS`."""
    return read(compiled.as_text(), CHIPS[chip], temporary_bytes(compiled))


def temporary_bytes(compiled: Any) -> int:
    """The memory of a program besides arguments and results, as XLA plans it."""
    return compiled.memory_analysis().temp_size_in_bytes


def read(text: str, chip: Chip, temporary: int = 0) -> Roofline:
    """The roofline of a program's text.

    Raises:
        ValueError: The text holds no program, or a dtype of unknown size.
    """
    reader = _Reader(Program(text), chip)
    costs = [reader.cost(step) for step in reader.program.steps()]
    received: dict[str, float] = collections.defaultdict(float)
    for cost in costs:
        if cost.received:
            received[cost.opcode] += cost.received
    # Copies aside hide behind products, which leave the memory idle.
    aside = sum(cost.aside for cost in costs) / chip.bandwidth
    idle = sum(max(0, c.product_seconds - c.moved / chip.bandwidth) for c in costs)
    return Roofline(
        sum(cost.seconds for cost in costs) + max(0, aside - idle),
        sum(cost.moved + cost.aside for cost in costs),
        dict(received),
        temporary,
        tuple(sorted(costs, key=lambda cost: -cost.seconds)),
        tuple(dict.fromkeys(reader.program.notes)),
    )


class _Reader:
    """The costs of a program's instructions on a chip."""

    def __init__(self, program: Program, chip: Chip) -> None:
        self.program = program
        self.chip = chip

    def cost(self, step: Step) -> Cost:
        """Cost of all runs of an instruction."""
        each, times = step.instruction, step.times
        kind, target = each.kind, each.target
        if target in PLAIN_CALLS:
            return Cost(each.name, each.opcode)
        if each.opcode in COPIES:
            return Cost(each.name, each.opcode, aside=self._copied(step) * times)
        if kind in COLLECTIVES:
            return self._collective(step, each, kind)
        inside = [i for _, i in self.program.inner(each)]
        sends = [i for i in inside if i.kind in COLLECTIVES]
        if any(i.target == "AsyncCollectiveDone" for i in inside):
            return Cost(each.name, each.opcode)
        if sends and not self.program.continues(each):
            return self._collective(step, sends[0], sends[0].kind)
        if each.opcode == "async-start" or kind in PASSES:
            self._note(f"{each.name} ({kind}) is counted as one pass over memory")
        if each.opcode.endswith("-start") and each.opcode != "async-start":
            self._note(f"{each.name} ({kind}) is counted as if nothing ran beside it")
        product, moved = self._product_seconds(step), bytes_moved(self.program, step)
        if target and "gemm" in target or target == "__cublas$lt$matmul":
            moved -= sum(a.bytes for a in each.arrays[1:])  # room to work in
        seconds = max(product, moved / self.chip.bandwidth) + self.chip.start
        return Cost(
            each.name,
            each.opcode,
            seconds * times,
            product * times,
            moved * times,
            cycles=_cycles(each) * times,
        )

    def _note(self, text: str) -> None:
        self.program.notes.append(text)

    def _result(self, step: Step) -> tuple[Array, ...]:
        """Arrays that an asynchronous instruction gives in the end."""
        inside = self.program.computations[step.computation].values()
        name = step.instruction.name
        ends = (i for i in inside if i.opcode.endswith("-done") and name in i.operands)
        end = next(ends, None)
        if end is None:
            self._note(f"the end of {name} was not found, its largest array is counted")
            return (max(step.instruction.arrays, key=lambda a: a.bytes),)
        return end.arrays

    def _copied(self, step: Step) -> float:
        """The bytes of main memory that an asynchronous copy reads and writes."""
        known = self.program.computations[step.computation]
        source = known[step.instruction.operands[0]].arrays
        result = self._result(step)
        size = sum(array.bytes for array in result)
        return size * (source[0].space == 0) + main_memory(result)

    def _collective(self, step: Step, each: Instruction, kind: str) -> Cost:
        """The bytes that a collective brings to each device, in rings."""
        arrays = each.arrays
        if each.opcode.endswith("-start") and each is step.instruction:
            arrays = self._result(step)
        if step.instruction.called().startswith("all-reduce-scatter"):
            kind, arrays = "reduce-scatter", step.instruction.arrays
        size = sum(array.bytes for array in arrays)
        if kind not in ("collective-permute", "collective-broadcast"):
            try:
                n = group_size(each.line)
            except ValueError as error:
                self._note(f"{each.name} counts as received in full: {error}")
            else:
                factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
                size *= factors.get(kind, (n - 1) / n)
        return Cost(each.name, kind, received=size * step.times)

    def _product_seconds(self, step: Step) -> float:
        """The time of the products in one run of an instruction."""
        each = step.instruction
        inside = list(self.program.inner(each)) or [(step.computation, each)]
        products = [(c, i) for c, i in inside if i.opcode in ("dot", "convolution")]
        target = each.target
        if self.chip.clock:
            if "COST_MODEL_TYPE_CLASSIC" in each.line:
                return _cycles(each) / self.chip.clock
            if products:
                text = f"{each.name} has products of which the compiler gives no cycles"
                self._note(f"{text}, their arithmetic is counted")
        elif target and ("gemm" in target or "matmul" in target):
            products.append((step.computation, each))
        elif each.opcode == "custom-call":
            self._note(f"{each.name} (a call of {target}) is counted as moving bytes")
        total = 0.0
        for computation, product in products:
            dtype, flops = self._flops(computation, product)
            rate = self.chip.flops / (1 if dtype in SIXTEEN_BITS else 2)
            total += flops / rate
        return total

    def _flops(self, computation: str, product: Instruction) -> tuple[str, float]:
        """The dtype of a product's operands, and its arithmetic."""
        known = self.program.computations[computation]
        left, right = (known[name].arrays[0] for name in product.operands[:2])
        size = math.prod(product.arrays[0].shape)
        if product.opcode == "convolution":
            labels = product.setting(r"dim_labels=\w+_(\w+)->") or ""
            outs = right.shape[labels.index("o")] if "o" in labels else 1
            return left.dtype, 2 * size * math.prod(right.shape) / outs
        over = product.setting(
            r'"?lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)[\]}]'
        )
        if over is None:
            self._note(f"the arithmetic of {product.name} is not known")
            return left.dtype, 0.0
        axes = [int(axis) for axis in re.findall(r"\d+", over)]
        return left.dtype, 2 * size * math.prod(left.shape[axis] for axis in axes)


def _cycles(each: Instruction) -> int:
    return int(each.setting(r'"estimated_cycles":"(\d+)"') or 0)
