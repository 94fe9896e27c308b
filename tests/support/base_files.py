"""Bases in files: a tiny Llama as the reference has it, and one in two files."""

import contextlib
import functools
import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from adapter_files import made, unflatten
from safetensors.numpy import load_file, save_file

import mora_jax
from models import smollm2
from mora_jax import MoRAConfig
from mora_jax.io import Checkpoint
from mora_jax.io._files import CONFIG, TENSORS

DATA = Path(__file__).parents[1] / "data" / "adapters"
"""What the reference implementation wrote, one directory for each type."""
NAMES = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
"""Of the Llama in `smollm2`."""


@functools.cache
def base(mora_type=1):
    """The params of an adapter's tiny Llama, under `smollm2`'s names."""
    flat, file = {}, DATA / f"type{mora_type}" / "base_model.safetensors"
    for name, array in load_file(file).items():
        path = name.removeprefix("model.").removesuffix(".weight")
        path = re.sub(r"layers\.(\d+)", r"layers_\1", path).replace(".", "/")
        if array.ndim == 1:
            flat[f"{path}/scale"] = array
        elif path == "embed_tokens":
            flat[f"{path}/embedding"] = array
        else:
            flat[f"{path}/kernel"] = array.T
    return unflatten(flat)


def llama():
    """The tiny Llama in Flax."""
    sizes = {"layers": 2, "width": 64, "hidden": 160, "heads": 4, "kv_heads": 2}
    config = smollm2.Config(vocab=97, **sizes, rope_base=10000.0, epsilon=1e-6)
    return smollm2.Llama(config)


def write_reference(directory, mora_type, squares):
    """What the authors' code saves of {module: M and its rank}."""
    directory.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": np.ascontiguousarray(m.T)
        for name, (m, _) in squares.items()
        for letter in "AB"
    }
    save_file(tensors, directory / TENSORS)
    config = {"peft_type": "LORA", "use_mora": True, "mora_type": mora_type}
    ranks = {name: rank for name, (_, rank) in squares.items()}
    config |= {"r": 1, "lora_alpha": 1, "bias": "none", "rank_pattern": ranks}
    (directory / CONFIG).write_text(json.dumps(config))


def sharded(directory, dtype=np.float32):
    """A Llama of two layers in two files with an index, and files beside them."""
    shapes = {"mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40), "norm": 24}
    rng, weights = np.random.default_rng(0), {}
    directory.mkdir()
    for number in range(2):
        tensors = {f"ids.{number}": np.arange(3)}
        for name, shape in shapes.items():
            array = rng.standard_normal(shape).astype(dtype)
            tensors[f"model.layers.{number}.{name}.weight"] = array
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        weights |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("a pickle")
    return directory


def kernels(base, names=None):
    """Adapters for what `names` know of a base."""
    plan = mora_jax.plan(Checkpoint(base).shapes(names), MoRAConfig(rank=2))
    return made(plan)


def resident():
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk on which no file can grow beyond as many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
