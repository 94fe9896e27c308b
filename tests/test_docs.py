"""What the pages in docs/ show runs."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mora_jax
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


def test_what_is_adapted():
    (block,) = blocks("what-is-adapted.md")
    model, batch = (
        nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)]),
        jnp.ones((2, 32)),
    )
    variables = model.init(jax.random.key(0), batch)
    scope = dict(mora_jax=mora_jax, model=model, variables=variables, batch=batch)
    exec(compile(block, "what-is-adapted.md", "exec"), scope)
    assert len(scope["plan"]) == 2


def test_training_nnx(run):
    scope = run("training-nnx.md")
    assert not any(a.is_deleted() for a in jax.tree.leaves(nnx.state(scope["base"])))
