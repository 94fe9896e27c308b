"""The bytes of main memory that an instruction of a compiled program moves."""

from collections.abc import Container, Mapping

from benchmarks.chips.hlo import SLICES, UPDATE, Instruction, Program, Step, main_memory


def bytes_moved(program: Program, step: Step) -> float:
    """The bytes of main memory that one run of an instruction reads and writes.

    A fusion reads of an operand what it slices or gathers, if it does nothing else with
    it.
    An update of a slice is done in place, if it is fused or in a loop. A collective
    that is carried on beside a product moves nothing there.
    """
    each, known = step.instruction, program.computations[step.computation]
    operands = [known[name] for name in each.operands if name in known]
    if each.opcode == UPDATE and step.in_loop:
        update = known[each.operands[1]]
        is_outside = main_memory(each.arrays) > 0
        return main_memory(update.arrays) + update.arrays[0].bytes * is_outside
    if each.opcode in SLICES:
        return main_memory(each.arrays) + sum(
            result.bytes for result in each.arrays if operands[0].arrays[0].space == 0
        )
    fused, read = each.called(), 0.0
    passed = each.aliases if program.continues(each) else {}
    for place, operand in enumerate(operands):
        size = 0 if place in passed.values() else main_memory(operand.arrays)
        if fused in program.computations and size:
            size = _read_of_parameter(program, fused, place, size)
        read += size
    return read + _written(program, each, passed)


def _written(program: Program, each: Instruction, passed: Container[int] = ()) -> float:
    """The bytes that an instruction writes; of a fused update the slice alone.

    Args:
        program: The program.
        each: The instruction.
        passed: The numbers of results that it does not write.
    """
    inside = program.computations.get(each.called(), {})
    root = next((i for i in inside.values() if i.is_root), None)
    if root is None:
        return main_memory(each.arrays)
    parts = [root]
    if root.opcode == "tuple" and len(root.operands) == len(each.arrays):
        parts = [inside[name] for name in root.operands]
    if len(parts) != len(each.arrays):
        return main_memory(each.arrays)
    total = 0.0
    for number, (part, result) in enumerate(zip(parts, each.arrays, strict=True)):
        if number in passed:
            continue
        while part.opcode == "bitcast":
            part = inside[part.operands[0]]
        if part.opcode == UPDATE and _exists(inside, part.operands[0]):
            result = inside[part.operands[1]].arrays[0]._replace(space=result.space)
        total += main_memory((result,))
    return total


def _read_of_parameter(program: Program, name: str, number: int, size: float) -> float:
    for each in program.computations[name].values():
        if each.opcode == "parameter" and each.inside == str(number):
            return _read_of(program, name, each.name, size)
    return size


def _read_of(program: Program, name: str, value: str, size: float) -> float:
    """The bytes of a value that a fused computation reads, `size` at most."""
    total = 0.0
    for each in program.computations[name].values():
        if value not in each.operands:
            continue
        if each.opcode in SLICES or (
            each.opcode == "gather" and each.operands[0] == value
        ):
            total += sum(array.bytes for array in each.arrays)
        elif each.opcode in ("bitcast", "get-tuple-element"):
            total += _read_of(program, name, each.name, size)
        elif each.opcode == "fusion":
            places = (k for k, operand in enumerate(each.operands) if operand == value)
            inner = each.called()
            total += sum(_read_of_parameter(program, inner, k, size) for k in places)
        elif each.opcode != UPDATE or each.operands[0] != value:
            return size
    return min(size, total)


def _exists(inside: Mapping[str, Instruction], name: str) -> bool:
    """True if a fusion need not fill the array that it updates a slice of."""
    each = inside[name]
    while each.opcode == "bitcast":
        each = inside[each.operands[0]]
    return each.opcode == "parameter" or '"AllocateBuffer"' in each.line
