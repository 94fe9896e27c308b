"""Every model of Tunix with all its layers adapted: they are known by their names."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import close, random_like
from merged import merge_errors
from tunix_models import INPUTS, MODELS, logits, tiny

from mora_jax import MoRAConfig
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_adapted(name):
    model, kernels = tiny(name)
    config = MoRAConfig(rank=2, alpha=0.5, operator="sharing")
    plan = mora.plan(model, config, *INPUTS)  # and no warning
    found = {re.sub("layers/0/((attn|mlp|moe)/)?", "", path) for path in plan}
    assert found == kernels and not plan.unproven
    assert all(
        re.search("by its name|by its rule|an embedding", x.why) for x in plan.left_out
    )
    adapted, base = mora.wrap(model, plan), logits(model)
    close(logits(adapted), base, 1e-6)
    mora.set_adapters(adapted, random_like(mora.adapters(adapted)))
    y = logits(adapted)
    assert np.abs(y - base).max() > 0.05
    close(y, logits(mora.merge_adapters(adapted)))


@pytest.mark.parametrize("name", ["qwen2", "gemma4"])
def test_embeddings_can_be_targets(name):
    """Gemma scales what it looks up, and 4 has further tables."""
    model, _ = tiny(name)
    plan = mora.plan(model, MoRAConfig(rank=2, targets=".*_embedding"), *INPUTS)
    assert len(plan) == (2 if name == "gemma4" else 1)
    assert max(merge_errors(model, None, plan, *INPUTS).values()) < 1e-5
