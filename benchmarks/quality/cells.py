"""Experiments in cells: each is computed once, and kept.

An experiment is a list of cells, which are settings, and a function that computes what
is found with them. Each finished cell is a line of a JSON file. A run that was killed
goes on where it was; one with more cells computes only those that are missing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

Cell = dict[str, Any]

VARIED = ("rate", "seed")
"""What a ladder of rates and several sets of data vary."""


def run(
    cells: Sequence[Cell], compute: Callable[[Cell], Cell], path: Path
) -> list[Cell]:
    """Each cell's settings, together with what `compute` finds for it.

    Args:
        cells: Settings, which JSON can hold.
        compute: The function that gives what is found with some settings.
        path: The file of finished cells, a line each. It is made if it is not there.

    Raises:
        ValueError: A line of the file lacks the form of a finished cell.
    """
    finished = {_key(row["cell"]): row["found"] for row in _rows(path)}
    missing = [cell for cell in cells if _key(cell) not in finished]
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in (bar := tqdm(missing, unit="cell", smoothing=0.1)):
        bar.set_description(", ".join(map(str, cell.values())))
        found = compute(cell)
        with path.open("a") as file:
            file.write(json.dumps({"cell": cell, "found": found}) + "\n")
        finished[_key(cell)] = found
    return [{**cell, **finished[_key(cell)]} for cell in cells]


def finished(path: Path, settings: Mapping[str, Any]) -> list[Cell]:
    """The finished cells of a file with these settings, of any rate and seed."""
    return [
        {**row["cell"], **row["found"]}
        for row in _rows(path)
        if settings == {k: v for k, v in row["cell"].items() if k not in VARIED}
    ]


def kept(path: Path, cell: Cell) -> list[Cell]:
    """The finished cell of a file with this rate and seed too, or an empty list."""
    settings = {k: v for k, v in cell.items() if k not in VARIED}
    rows = finished(path, settings)
    return [row for row in rows if all(row[k] == cell[k] for k in VARIED)]


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _rows(path: Path) -> list[Cell]:
    """The finished cells of a file; a last line that was cut off is taken away."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    for number, row in enumerate(rows, 1):
        if set(row) != {"cell", "found"}:
            raise ValueError(f"line {number} of {path} must hold cell and found")
    return rows
