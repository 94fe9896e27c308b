"""Devices to compile for that this machine does not have: TPUs, and an H100.

Import this before JAX computes anything. `make bench-chips` sets up what it needs.
"""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# libtpu reads these when it is loaded: without a TPU it cannot ask for a place in a
# pod, and several programs may compile at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# What computes is the CPU. JAX would look for a TPU and a GPU, and fail.
jax.config.update("jax_platforms", "cpu")

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
"""The smallest topology of each kind that libtpu knows."""

WHEELS = "jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} nvidia-cuda-nvcc-cu12 "
WHEELS += "nvidia-cuda-runtime-cu12 nvidia-cublas-cu12 nvidia-cuda-cupti-cu12 "
WHEELS += "nvidia-cufft-cu12 nvidia-cusolver-cu12 nvidia-cusparse-cu12 "
WHEELS += "nvidia-nvjitlink-cu12 nvidia-cuda-nvrtc-cu12"

_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
platform_name: "CUDA"
"""


class NoCompilerError(RuntimeError):
    """This environment cannot compile for a chip; the message says what it needs."""


def devices(chip: str) -> list[Any]:
    """Devices of a chip: "v5e", "v6e", "v5p", "h100", or a topology such as "v5e:2x4".

    Raises:
        NoCompilerError: The chip's compiler is not installed.
    """
    if chip == "h100":
        return _h100()
    try:
        version("libtpu")
    except PackageNotFoundError as error:
        needs = "programs for TPUs need libtpu: make bench-chips installs it"
        raise NoCompilerError(needs) from error
    return list(topologies.get_topology_desc(TPUS.get(chip, chip), "tpu").devices)


def _h100() -> list[Any]:
    """One H100, through parts of JAX that it does not promise to keep."""
    try:
        version("jax-cuda12-pjrt")
        from jax._src import xla_bridge
        from jaxlib import xla_client

        library: Any = importlib.import_module("jaxlib._jax")

        xla_bridge._discover_and_register_pjrt_plugins()
        if not xla_client.pjrt_plugin_initialized("cuda"):
            xla_client.initialize_pjrt_plugin("cuda")
        options: Any = {"topology": "1x1x1", "target_config": _H100}
        described = library.get_default_c_api_topology("cuda", "", options)
        return list(described._make_compile_only_devices())
    except (PackageNotFoundError, ImportError, AttributeError, RuntimeError) as error:
        wheels = WHEELS.format(version("jax"))
        needs = f"programs for an H100 need pip install --no-deps {wheels}"
        raise NoCompilerError(f"{needs} ({error})") from error


def on_first(chips: list[Any]) -> NamedSharding:
    """The sharding that puts whole arrays on the first of some devices."""
    return NamedSharding(Mesh(np.array(chips[:1]), ("device",)), PartitionSpec())


def platform_of(chip: str) -> str:
    """JAX's name of a chip's platform."""
    return "cuda" if chip == "h100" else "tpu"
