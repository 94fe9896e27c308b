"""What all tests share."""

import gc
import os
from pathlib import Path
from zlib import crc32

import jax
import jaxtyping
import pytest
from processes import ROOT

# Most of the time goes into compiling, so neither XLA nor LLVM need optimise, nor split
# small programs for several threads. XLA's older emitters of fused operations compile
# in half the time of the newer ones; JAX 0.12 has only these.
# Eigen would split a sum between threads, as the machine has them, and in another way
# for a batch of products: at M = 0 models must be equal to the last bit on any machine.
# An empty XLA_FLAGS tests what users run.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# LAPACK of JAX, which is SciPy's: its second thread would wait by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Annotations of shapes are checked while tests run; pyright knows the others. Not in
# linen: MoRADense inherits fields of nn.Dense whose annotations beartype cannot check.
_shaped = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "mora_jax").rglob("*.py")
    if "from jaxtyping import" in path.read_text() and path.parent.name != "linen"
]
jaxtyping.install_import_hook(_shaped, "beartype.beartype")

# Tracing makes many objects and few cycles of them: looking for these less often, and
# never among what is imported, saves a tenth of the time.
gc.set_threshold(100_000, 20, 20)


SHARE = 4
"""CI runs one in so many of the tests that are slow for their case or their size."""
OF_A_LAW = 3
"""By default one in so many cases of a law runs; the others are slow for their case."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Most of the slow cases and sizes of a law are exhaustive: CI leaves them out.

    Those are the ones that are slow for two reasons, and of the others all but a
    sample, which is the same everywhere since the tests' names choose it.
    """
    for item in items:
        name = crc32(item.nodeid.encode())
        of_all = [mark.name for mark in getattr(item.obj, "pytestmark", ())]
        reasons = [mark.name for mark in item.own_markers].count("slow")
        reasons -= of_all.count("slow")  # which CI runs, but for slow cases
        if "law" in of_all and name % OF_A_LAW and not reasons:
            item.add_marker("slow")
            reasons = 1
        if reasons > 1 or (reasons and name % SHARE):
            item.add_marker("exhaustive")


def pytest_collection_finish():
    """What was imported stays."""
    gc.freeze()


def pytest_configure(config):
    """Programs that were compiled once are kept; tests of meshes have eight devices."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


MAPPINGS = Path("/proc/self/maps")
MANY = 20_000
"""A worker with more memory mappings drops its programs. Linux allows 65,530."""


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """JAX keeps the programs of all tests, also of those that are over.

    On a CPU each program holds some memory mappings of the process. At the system's
    limit XLA cannot compile any more, and every test after that fails.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    """64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def unchecked():
    """The library as users run it: without the type checks that pytest adds.

    Tests of bad input need it, or they would see those checks and not our errors.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
