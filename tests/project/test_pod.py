"""The page has the figures of steps on pods that the program wrote."""

import json

from processes import ROOT

from benchmarks.chips.pod import COLUMNS
from benchmarks.common.harness import show


def test_the_table_of_pods_is_in_the_results(capsys):
    page = (ROOT / "benchmarks/README.md").read_text()
    found = json.loads((ROOT / "benchmarks/chips/results/pod.json").read_text())
    show(COLUMNS, found["results"])
    _, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == len(found["results"])
    assert not [line for line in lines if line not in page]
