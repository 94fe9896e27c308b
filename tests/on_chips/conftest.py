"""These tests need the compiler for TPUs; `make test-chips` installs it."""

from importlib.util import find_spec

import jax
import pytest

HAS_COMPILER = find_spec("libtpu") is not None
collect_ignore_glob = [] if HAS_COMPILER else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def without_cache():
    """A program for a chip that is not there cannot be loaded from a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
