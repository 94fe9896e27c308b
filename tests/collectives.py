"""What a compiled program sends from device to device."""

import collections
import re

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")


def collectives(compiled):
    """{(kind, shape without ones): how often it is there}; scalars are left out."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := _CALL.search(line):
            arrays, kind = match.groups()
            for dims in _ARRAY.findall(arrays):
                shape = tuple(int(n) for n in dims.split(",") if n not in ("", "1"))
                if shape:
                    found[kind, shape] += 1
    return found
