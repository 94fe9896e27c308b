"""What the pages in docs/ show runs."""

import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from mora_jax import MoRAWarning

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    """The blocks of Python on a page, in order."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Run the blocks of a page, one after another, but those that need `without`."""

    def run(page, without="tunix"):
        scope = {"directory": tmp_path}
        for block in blocks(page):
            if without not in block:
                exec(compile(block, page, "exec"), scope)
        return scope

    return run


def test_checkpoints(run):
    pytest.importorskip("orbax.checkpoint")
    with pytest.warns(MoRAWarning, match="the call updates batch_stats") as seen:
        run("checkpoints.md")
    assert len(seen) == 1


def test_training_nnx(run):
    scope = run("training-nnx.md")
    assert not any(a.is_deleted() for a in jax.tree.leaves(nnx.state(scope["base"])))
