"""The authors' implementation, layer by layer (tests/data/README.md says how made)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mora_jax import FrozenDense, delta_weight, mora_apply
from mora_jax.io.peft._read import reference_operator

DATA = Path(__file__).parents[1] / "data"
LAYERS = json.loads((DATA / "layers.json").read_text())
TENSORS = load_file(DATA / "layers.safetensors")


def relative(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


# Each type at half of the sizes, and each size with half of the types.
FEW = [
    pytest.param(layer, marks=[] if k % 2 else [pytest.mark.slow])
    for k, layer in enumerate(LAYERS)
]


@pytest.mark.law
@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer["case"])
def test_reference_layer(layer):
    case = layer["case"]
    data = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in TENSORS.items()
        if name.startswith(f"{case}.")
    }
    operator = reference_operator(
        layer["mora_type"], layer["in_features"], layer["out_features"], layer["r"]
    )
    assert operator.square_rank == layer["square_rank"]
    frozen = FrozenDense(data["weight"].T, data["bias"], operator)
    m = data["lora_A"].T
    y, grad_m, grad_x, delta = computed(m, data["x"], data["cotangent"], frozen)
    assert relative(y, data["y"]) < 1e-5
    assert relative(grad_m.T, data["grad_lora_A"]) < 1e-5
    assert relative(grad_x, data["grad_x"]) < 1e-5
    assert relative(delta.T, data["delta_weight"]) < 1e-5


@jax.jit
def computed(m, x, cotangent, frozen):
    """Output, both gradients and the delta, in one program."""

    def apply(m, x):
        return mora_apply({"kernel_mora": m}, frozen, x)

    y, backward = jax.vjp(apply, m, x)
    return y, *backward(cotangent), delta_weight({"kernel_mora": m}, frozen)
