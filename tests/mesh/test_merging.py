"""Merges on many devices beside those of one: docs/meshes.md says which are equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import by_kind
from helpers import random, wide
from jax.sharding import PartitionSpec as P
from meshes import assert_shardings, make_mesh, shardings

import mora_jax
from mora_jax import Adapter, AdapterSpec, sharding

# A device multiplies a part of their factors, and XLA adds up the products of a smaller
# matrix in another order.
FACTORS = "orthogonal", "subspace", "hadamard", "low_rank"
# Under jit XLA may join the product with alpha, with a scale or with a direction, and
# the sum with the kernel, and round them once. Here no such product is next to it.
EXACT_UNDER_JIT = "block_diagonal", "decoupling", "signed_decoupling", "rotation"

MESH = make_mesh(fsdp=2, model=4)
SPECS = {
    "rows": P("model"),
    "columns": P(None, "model"),
    "both": P("fsdp", "model"),
    "one axis by two": P(("fsdp", "model")),
    "stack": P(None, "fsdp", "model"),
}
INS, OUTS, Q = 64, 192, 24


def adapters_and_kernels(case, dtype):
    """{name: array} of the same adapter of kernels that a mesh splits in some way."""
    op = case.make(INS, OUTS, Q)
    spec = AdapterSpec(op, (INS, OUTS), alpha=0.7, scale=1.3)
    stacked = dataclasses.replace(spec, kernel_shape=(2, INS, OUTS), axes="sio")
    adapters, params = {}, {}
    for k, name in enumerate(SPECS):
        own = stacked if name == "stack" else spec
        m = 0.02 * random(k, *own.shape)
        kernel = jnp.asarray(0.05 * random(9, *own.kernel_shape), dtype)
        adapters[name] = {"kernel_mora": Adapter(jnp.asarray(m), own)}
        params[name] = {"kernel": kernel}
    return adapters, params


def in_order(number):
    """Bits of floating-point numbers as integers: neighbours differ by one."""
    bits = np.asarray(number).view(f"i{number.dtype.itemsize}").astype(np.int64)
    return np.where(bits < 0, np.iinfo(f"i{number.dtype.itemsize}").min - bits, bits)


@pytest.mark.law
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [("float32", "nearest"), ("bfloat16", "dither"), slow("bfloat16", "nearest")],
)
@by_kind
def test_a_merge_on_a_mesh_is_that_of_one_device(case, dtype, rounding):
    """Bit for bit, or but for the rounding of a few numbers."""
    adapters, params = adapters_and_kernels(case, dtype)
    places = {n: {"kernel": place} for n, place in shardings(SPECS, MESH).items()}
    split = jax.device_put(params, places)
    laid = sharding.on_mesh(adapters, split, batch_axes="fsdp")

    def merge(params, adapters):
        return mora_jax.merge(params, adapters, rounding=rounding)

    kind = case.label.removeprefix("scaled-").partition("-")[0]
    for run in (merge, jax.jit(merge)):
        expected = run(params, adapters)
        for given in (adapters, laid):
            where = sharding.adapter_shardings(given, split)
            merged = run(split, jax.device_put(given, where))
            if run is merge:
                assert_shardings(merged, places)
                exact = given is adapters or kind not in FACTORS
            else:
                exact = kind in EXACT_UNDER_JIT
            for name in SPECS:
                got, one = (np.asarray(t[name]["kernel"]) for t in (merged, expected))
                if exact:
                    np.testing.assert_array_equal(got, one, name)
                elif dtype == "float32":
                    error = np.abs(wide(got) - wide(one)).max()
                    assert error <= 2**-22 * np.abs(wide(one)).max(), name
                else:
                    steps = np.abs(in_order(got) - in_order(one))
                    assert steps.max() <= 1 and np.mean(steps) < 1e-3, name
