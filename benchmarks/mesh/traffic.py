"""Traffic of a compiled program between devices, counted in its HLO."""

import collections
import functools
import math
import re
from collections.abc import Mapping

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
"""The bytes of HLO's dtypes."""
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
    """Number of collectives in a program's text, by kind and shape of array.

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
    """The bytes that each device receives in one run of a program, by collective.

    Args:
        hlo: The text of the compiled program. The body of a loop counts as often as the
            loop runs.
        sizes: The bytes of each dtype.

    Raises:
        ValueError: The text does not tell how often a loop with collectives runs, or
            which devices take part, or a collective is asynchronous.
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
            if collective := COLLECTIVE.search(line):
                found[collective[2]] += received(collective, line, sizes)
            called = re.findall(r"[\w.-]+", " ".join(CALLED.findall(line)))
            inner = [pair for name in called for pair in total(name).items()]
            times = TRIPS.search(line) if " while(" in line else None
            if " while(" in line and inner and times is None:
                raise ValueError(f"a loop must say how often it runs, got {line[:80]}")
            for kind, size in inner:
                found[kind] += size * (int(times[1]) if times else 1)
        return dict(found)

    return total(entry)


def received(collective: re.Match[str], line: str, sizes: Mapping[str, int]) -> float:
    """The bytes that a device receives in one collective, which is done in rings."""
    result, kind, is_async = collective.groups()
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
    """The number of devices in a collective, which HLO writes in one of three ways."""
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
