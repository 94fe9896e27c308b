"""A process that saves is killed by the kernel, at any moment."""

import pytest
from processes import python

KILLER = """
import os, random, signal, sys, time
from pathlib import Path

import jax.numpy as jnp
import mora_jax
from mora_jax.io import _files as files

directory = Path(sys.argv[1])
plan = mora_jax.plan({"fc": {"kernel": jnp.ones((64, 64))}})
adapters = [
    plan.adapters({"fc": {"kernel_mora": jnp.full(plan["fc/kernel"].shape, m)}})
    for m in (1.0, 2.0)
]
contents = []
for one in adapters:
    mora_jax.save(directory, one)
    contents.append((directory / files.TENSORS).read_bytes())


def slow(function):
    def run(*args, **kwargs):
        time.sleep(0.001)
        return function(*args, **kwargs)

    return run


chance, killed, seen = random.Random(0), 0, {1.0: 0, 2.0: 0}
while killed < 200:
    child = os.fork()
    if child == 0:
        for name in ("fsync", "replace", "open", "close"):
            setattr(files.os, name, slow(getattr(files.os, name)))
        for number in range(killed, killed + 100):  # JAX itself is not for forks
            files.replace_file(directory / files.TENSORS, contents[number % 2])
        os._exit(0)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    back = mora_jax.load(directory)["fc"]["kernel_mora"]
    m = back.m
    assert back.spec == plan["fc/kernel"] and (m == m.ravel()[0]).all(), m
    seen[float(m.ravel()[0])] += 1
print(killed, sorted(seen.values()))
assert min(seen.values()) > 20, seen
"""


@pytest.mark.slow
def test_killed_200_times(tmp_path):
    """By SIGKILL, in a process that does nothing but save, on a slow file system."""
    out = python("-c", KILLER, tmp_path / "a", JAX_PLATFORMS="cpu")
    assert out.startswith("200 ")
