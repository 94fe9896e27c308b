"""The first page about training, whose tab for gemma is a whole program."""

import jax
import pytest
from helpers import python_blocks
from processes import ROOT

pytest.importorskip("gemma")


def test_the_tab_runs_and_trains_the_adapters():
    (program,) = [b for b in python_blocks(ROOT / "docs/start.md") if "gemma" in b]
    scope = {}
    exec(program, scope)
    assert all(m.any() for m in jax.tree.leaves(scope["adapters"]))
    before, after = scope["variables"]["params"], scope["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
