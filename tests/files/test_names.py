"""Names of modules and kernels: each gives the other, by every template."""

import re

import pytest

from mora_jax.io._names import FAMILIES, LIBRARIES, bijection

TEMPLATES = {
    "stacked": {"model.layers.{n}.mlp.{name}_proj": "layers/{name}/kernel[{n}]"},
    "turned": {"{b}.h.{a}": "{a}/x_{b}/kernel"},
}


def filled(template):
    """A template with another text for each of its fields."""
    return re.sub(r"\{(\w+)\}", lambda field: f"{field[1]}7", template)


@pytest.mark.parametrize("names", [None, *FAMILIES, *LIBRARIES, *TEMPLATES])
def test_each_name_gives_the_other(names):
    known = bijection(TEMPLATES.get(names, names))
    if names in TEMPLATES:
        templates = TEMPLATES[names].items()
    else:
        families = FAMILIES | LIBRARIES
        pairs = sum(FAMILIES.values(), ()) if names is None else families[names]
        templates = [pair[:2] for pair in pairs]
    for module, kernel in templates:
        both = filled(module), filled(kernel)
        assert both in [pair[:2] for pair in known.of_module(both[0])]
        assert both in [pair[:2] for pair in known.of_kernel(both[1])]
        for pair in known.of_kernel(both[1]):
            assert pair in known.of_module(pair.module)


def test_a_family_is_made_once():
    assert bijection("qwen3") is bijection("qwen3")
    assert bijection(None) is bijection(None)


@pytest.mark.parametrize("kernel", ["fc/kernel", "fc/w[{n}]", "kernel"])
def test_a_bias_is_beside_its_kernel(kernel):
    module = "m.{n}" if "{n}" in kernel else "m"
    known = bijection({module: kernel})
    bias = re.sub(r"\w+(\[|$)", r"bias\1", filled(kernel), count=1)
    (pair,) = known.of_kernel(bias)
    assert (pair.tensor, pair.axes) == (f"{filled(module)}.bias", "o")


def test_embeddings_have_the_same_axes_everywhere():
    for names in ({"wte": "emb/table"}, {"words": "emb/embedding"}):
        (pair,) = bijection(names).of_module(*names)
        assert pair.is_table and not pair.transposed
    (pair,) = bijection({"fc": "fc/kernel"}).of_module("fc")
    assert pair.transposed and not pair.is_table
