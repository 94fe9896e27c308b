"""What a compiled program sends from device to device, counted in its HLO."""

import collections
import functools
import math
import re
from collections.abc import Mapping

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
"""Bytes of HLO's dtypes."""
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
GROUPS = re.compile(r"replica_groups=(\{\{[\d,]+|\[\d+,\d+\]|mesh\[.*?\].*?\{.*?\})")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collectives(hlo: str) -> collections.Counter[tuple[str, tuple[int, ...]]]:
    """How often a program's text has each kind of collective for each shape of array.

    Axes of size one are left out of the shapes, and so are scalars.
    """
    found: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for result, kind, _ in COLLECTIVE.findall(hlo):
        for _, sizes in ARRAY.findall(result):
            shape = tuple(int(n) for n in sizes.split(",") if n not in ("", "1"))
            if shape:
                found[kind, shape] += 1
    return found


def traffic(hlo: str, sizes: Mapping[str, int] = SIZES) -> dict[str, float]:
    """Bytes that each device receives in a run of a compiled program, by collective.

    Args:
      hlo: the program's text. What is in a loop counts as often as the loop runs.
      sizes: bytes of each dtype.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        bodies.setdefault(name, []).append("" if head else line)

    @functools.cache
    def total(name: str) -> dict[str, float]:
        found: dict[str, float] = collections.defaultdict(float)
        for line in bodies[name]:
            if one := COLLECTIVE.search(line):
                found[one[2]] += received(one, line, sizes)
            called = re.findall(r"[\w.-]+", " ".join(CALLED.findall(line)))
            inner = [pair for name in called for pair in total(name).items()]
            times = TRIPS.search(line) if " while(" in line else None
            if " while(" in line and inner and times is None:
                raise ValueError(f"a loop must say how often it runs, got {line[:80]}")
            for kind, size in inner:
                found[kind] += size * (int(times[1]) if times else 1)
        return dict(found)

    return total(entry)


def received(one: re.Match[str], line: str, sizes: Mapping[str, int]) -> float:
    """Bytes that a device receives in one collective, as rings do it."""
    result, kind, is_async = one.groups()
    if is_async:
        raise ValueError(f"collectives must not be asynchronous, got {kind}-start")
    size = sum(
        sizes[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in ARRAY.findall(result)
    )
    if kind == "collective-permute":
        return size
    n = group_size(line)
    factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
    return size * factors.get(kind, (n - 1) / n)


def group_size(line: str) -> int:
    """How many devices a collective is among, which HLO says in one of three ways."""
    if (found := GROUPS.search(line)) is None:
        raise ValueError(f"a collective must have groups, got {line.strip()[:200]}")
    groups = found[1]
    if groups.startswith("{{"):
        return groups.count(",") + 1
    if groups.startswith("["):
        return int(groups[1:-1].split(",")[1])
    axes, names = groups.split("]", 1)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", names)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
