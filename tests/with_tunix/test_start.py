"""The first page about training, whose tab for Tunix is a whole program."""

from importlib.util import find_spec

import pytest
from helpers import python_blocks
from processes import ROOT

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)


@pytest.mark.filterwarnings("ignore")  # what the trainer imports uses old names
def test_the_tab_runs_and_trains_the_adapters_alone():
    (program,) = [b for b in python_blocks(ROOT / "docs/start.md") if "tunix" in b]
    scope = {}
    exec(program, scope)
    adapters = scope["mora_jax"].nnx.adapters(scope["model"])
    # Tunix starts the kernels of an MLP at zero: the first step moves no M there.
    assert adapters["layers"]["0"]["attn"]["q_proj"]["w_mora"].m.any()
    base, merged = (scope[name].layers[0].attn.q_proj for name in ("base", "merged"))
    assert type(merged) is type(base) and (merged.w[...] != base.w[...]).any()
