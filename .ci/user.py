"""A user's program; run and type-checked against the installed wheel alone."""

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import mora_jax

params = {"dense": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=2))
assert_type(plan, mora_jax.Plan)
assert_type(plan.trainable_parameters, int)
assert_type(mora_jax.square_rank(64, 64, 2), int)
merged = mora_jax.merge(params, mora_jax.init(plan))
assert jax.tree.all(jax.tree.map(jnp.array_equal, params, merged))

layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
assert_type(mora_jax.nnx.wrap(layer), nnx.Linear)
assert type(mora_jax.nnx.merge_adapters(mora_jax.nnx.wrap(layer))) is nnx.Linear

assert mora_jax.__file__ is not None
assert Path(mora_jax.__file__).is_relative_to(sys.prefix), mora_jax.__file__
assert Path(mora_jax.__file__).with_name("py.typed").exists()
files = importlib.metadata.files("mora-jax") or []
assert all(file.parts[0].startswith(("mora_jax", "..")) for file in files), files


def required(distribution: str, *, extra: bool) -> set[str]:
    """The names of what a distribution requires, of its extras or else always."""
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:  # for another platform
        return set()
    return {
        re.split(r"[^\w.-]", requirement)[0].lower()
        for requirement in requirements
        if ("extra ==" in requirement) == extra
    }


def brought(names: set[str]) -> set[str]:
    """What comes with distributions, as rich does with flax, and etils with orbax."""
    found: set[str] = set()
    while names:
        found |= names
        names = {new for one in names for new in required(one, extra=False)} - found
    return found


extras = required("mora-jax", extra=True) - {"mora-jax"}
extras -= brought(required("mora-jax", extra=False))
provided_by = importlib.metadata.packages_distributions()
modules = {name.partition(".")[0] for name in sys.modules}
loaded = {d.lower() for name in modules for d in provided_by.get(name, [])}
assert not loaded & extras, f"mora_jax imports {loaded & extras}"
