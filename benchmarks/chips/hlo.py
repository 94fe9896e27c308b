"""The text of a compiled program: what runs how often, and what each step moves.

XLA prints a program as computations, which are lists of instructions. The instructions
of the entry, of loops and of calls run one after another, and their results are written
to memory. Instructions inside a fusion are computed together and write nothing.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2}
SIZES |= {"f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
"""The bytes of a number of each dtype."""
VIEWS = ("bitcast", "get-tuple-element", "tuple", "opt-barrier", "add-dependency")
"""Instructions that give what is in memory already another name."""
FREE = {*VIEWS, "parameter", "constant", "iota", "after-all"}
FREE |= {"partition-id", "replica-id", "async-update"}
"""Instructions that move nothing. (A chip has what it needs for an iota.)"""
SLICES = ("slice", "dynamic-slice")
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"}
COLLECTIVES |= {"collective-permute", "collective-broadcast", "ragged-all-to-all"}
"""Instructions that send something to other devices."""
UPDATE = "dynamic-update-slice"

_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


class Array(NamedTuple):
    """A dtype, a shape, and the memory that an array is in; 0 is the main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Its size."""
        return SIZES[self.dtype] * math.prod(self.shape)


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, which may be a tuple.

    Raises:
        ValueError: A dtype is not in `SIZES`.
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in SIZES:
            raise ValueError(f"dtype must be one of {sorted(SIZES)}, got {dtype}[]")
        space = _SPACE.search(layout)
        shape = tuple(int(n) for n in dims.split(",") if n)
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


def main_memory(arrays: tuple[Array, ...]) -> float:
    """The bytes of those arrays that are in the main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: The name of its result.
        opcode: Its operation.
        arrays: The type of its result.
        operands: The names of its operands.
        inside: The text between its brackets.
        line: All of its text.
        is_root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    line: str
    is_root: bool

    @classmethod
    def parse(cls, line: str) -> "Instruction | None":
        """The instruction of a line, if it has one."""
        if (found := _LINE.match(line)) is None:
            return None
        root, name, result, opcode, rest = found.groups()
        inside = rest[: _closing(rest)]
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        arrays = parse_arrays(result)
        return cls(name, opcode, arrays, operands, inside, line, root is not None)

    def setting(self, pattern: str) -> str | None:
        """Match of a regular expression's group in the text."""
        found = re.search(pattern, self.line)
        return found[1] if found else None

    @property
    def kind(self) -> str:
        """Operation, whether or not other instructions run meanwhile."""
        return self.opcode.removesuffix("-start")

    @property
    def target(self) -> str:
        """The name of the function that a custom call calls, or ""."""
        return self.setting(r'custom_call_target="([^"]*)"') or ""

    @property
    def aliases(self) -> dict[int, int]:
        """{number of a result: number of the operand whose memory it takes}."""
        pairs = self.setting(r"output_to_operand_aliasing=\{(.*?\))\}") or ""
        found = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", pairs)
        return {int(result or 0): int(operand) for result, operand in found}

    def called(self, word: str = "calls") -> str:
        """The name of a computation that it runs, or ""."""
        return self.setting(rf"\b{word}=%?([\w.\-]+)") or ""


def _closing(text: str) -> int:
    """Place of the bracket that closes the one opened before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


class Step(NamedTuple):
    """An instruction that runs.

    Attributes:
        instruction: The instruction.
        computation: The name of its computation.
        times: The number of its runs.
        in_loop: Whether a loop runs it.
    """

    instruction: Instruction
    computation: str
    times: int
    in_loop: bool


class Program:
    """A compiled program.

    Attributes:
        computations: {computation: {name: instruction}}, in order.
        entry: The name of the computation that runs.
        notes: A sentence for each instruction that was not understood.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.notes: list[str] = []
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif instruction := Instruction.parse(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError(f"a program must have an entry, got {text[:80]!r}")

    def steps(self) -> Iterator[Step]:
        """All that runs, in the order of the text; see `FREE` for what is left out."""
        yield from self._steps(self.entry, 1, False)

    def _steps(self, name: str, times: int, in_loop: bool) -> Iterator[Step]:
        for each in self.computations[name].values():
            if each.opcode == "while":
                again = times * self.trips(each, name)
                yield from self._steps(each.called("body"), again, True)
            elif each.opcode == "call":
                yield from self._steps(each.called("to_apply"), times, in_loop)
            elif each.opcode == "conditional":
                self.notes.append(f"all branches of {each.name} are counted")
                for branch in _branches(each):
                    yield from self._steps(branch, times, in_loop)
            elif each.opcode not in FREE and not each.opcode.endswith("-done"):
                yield Step(each, name, times, in_loop)

    def trips(self, loop: Instruction, name: str) -> int:
        """Number of runs of a loop, from XLA's own note or from its counter.

        Args:
            loop: The loop.
            name: The computation that it is in.
        """
        known = loop.setting(r'"known_trip_count":\{"n":"(\d+)"')
        if known is not None:
            return int(known)
        counted = self._counted(loop, name)
        if counted is not None:
            return counted
        limits = self._limits(loop)
        bound = max(limits, default=1)
        text = f"how often {loop.name} runs is not known, it is counted {bound} times"
        self.notes.append(text)
        return bound

    def _limits(self, loop: Instruction) -> list[int]:
        """The integers in the condition of a loop."""
        condition = self.computations[loop.called("condition")].values()
        constants = (c for c in condition if c.opcode == "constant")
        return [int(c.inside) for c in constants if re.fullmatch(r"-?\d+", c.inside)]

    def _counted(self, loop: Instruction, name: str) -> int | None:
        """The trips of a loop that counts from a constant, in constant steps."""
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        test = next(i for i in condition.values() if i.is_root)
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        limits = self._limits(loop)
        if len(counters) != 1 or len(limits) != 1 or len(loop.operands) != 1:
            return None
        if test.opcode not in ("compare", "fusion") or "GT" in test.line:
            return None
        index = int(counters[0].setting(r"index=(\d+)") or 0)
        end = next(i for i in body.values() if i.is_root)
        start = self.computations[name].get(loop.operands[0])
        if start is None or start.opcode != "tuple" or end.opcode != "tuple":
            return None
        first = self._constant(name, start.operands[index])
        step = body[end.operands[index]]
        by = [self._constant(loop.called("body"), k) for k in step.operands]
        sizes = [n for n in by if n is not None]
        if first is None or step.opcode != "add" or len(sizes) != 1 or sizes[0] < 1:
            return None
        return max(0, math.ceil((limits[0] - first) / sizes[0]))

    def _constant(self, name: str, operand: str) -> int | None:
        """The integer that an operand is, perhaps copied."""
        found = self.computations[name].get(operand)
        while found is not None and found.opcode in ("copy", "bitcast"):
            found = self.computations[name].get(found.operands[0])
        if found is None or found.opcode != "constant":
            return None
        return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None

    def inner(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """All instructions of a fusion, and their computations; none of other ones.

        Fusions within it are entered, too.
        """
        name = instruction.called()
        for each in self.computations.get(name, {}).values():
            if each.opcode == "fusion":
                yield from self.inner(each)
            else:
                yield name, each

    def continues(self, instruction: Instruction) -> bool:
        """True if a fusion carries on a collective that another one has started.

        On TPUs a collective may run beside several products. Each is fused with a copy
        of it, and passes on the arrays of the collective.
        """
        inside = [each for _, each in self.inner(instruction)]
        alone = any(i.target.startswith("AsyncCollective") for i in inside)
        sends = any(i.kind in COLLECTIVES for i in inside)
        computes = any(i.opcode in ("dot", "convolution") for i in inside)
        return sends and computes and not alone


def _branches(conditional: Instruction) -> list[str]:
    """The computations of a conditional."""
    names = conditional.setting(r"branch_computations=\{([^}]*)\}")
    if names is not None:
        return re.findall(r"[\w.\-]+", names)
    return [conditional.called(f"{kind}_computation") for kind in ("true", "false")]


def written(text: str) -> set[Array]:
    """The arrays that a program writes, to whichever memory.

    They are results of instructions that run alone, and of fusions as a whole. Axes of
    size one are left out of the shapes, and the memory is 0.
    """
    found = set()
    for step in Program(text).steps():
        for array in step.instruction.arrays:
            found.add(Array(array.dtype, tuple(n for n in array.shape if n != 1)))
    return found
