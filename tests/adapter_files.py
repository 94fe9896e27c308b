"""What the tests of adapters in files share: plans, adapters, bases and damage."""

import contextlib
import functools
import hashlib
import io
import json
import math
import re
import resource
import sys
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import AdapterSpec, MoRAConfig, Plan, cli
from mora_jax.io import Checkpoint

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TEMPORARY = ".mora-jax-"
"""How the names of unfinished files begin."""
DATA = Path(__file__).parent / "data" / "adapters"
"""What the reference implementation wrote, one directory for each type."""

PARAMS = {
    "enc": {"kernel": np.ones((16, 24), np.float32), "bias": np.ones(24, np.float32)},
    "dec": {
        "kernel": np.ones((3, 24, 16), np.float32),
        "out": {"kernel": np.ones((16, 16), np.float32)},
    },
}
CONFIGURED = MoRAConfig(
    rank=3,
    overrides={
        "enc/kernel": {"operator": "orthogonal", "seed": 7, "alpha": 0.5},
        "dec/kernel": {"axes": "sio", "dropout": 0.25, "execution": "fold"},
        "dec/out/kernel": {"operator": "permutation", "param_dtype": "bfloat16"},
    },
)
PLAN = mora_jax.plan(PARAMS, CONFIGURED)
UP_PROJ = "model", "layers", "0", "mlp", "up_proj", "kernel"
"""A kernel that the built-in families know."""


def slow(*values):
    """Values of a parameter that are tested among the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


flatten = functools.partial(flax.traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(flax.traverse_util.unflatten_dict, sep="/")


def single(operator, shape=None, path=("a", "kernel"), **settings):
    """A plan of one kernel, which has the operator's own shape by default."""
    shape = shape or (operator.in_features, operator.out_features)
    spec = AdapterSpec(operator, shape, path=path, **settings)
    return Plan((spec,), math.prod(shape))


@functools.cache
def _shapes(plan):
    return jax.eval_shape(lambda: mora_jax.init(plan, jax.random.key(0)))


def made(plan, seed=0, dtype=None, scale=1.0):
    """Adapters that are not zero."""
    rng = np.random.default_rng(seed)

    def numbers(m):
        return np.asarray(scale * rng.standard_normal(m.shape), dtype or m.dtype)

    return jax.tree.map(lambda m: jnp.asarray(numbers(m)), _shapes(plan))


def assert_same(left, right):
    """Equal trees of equal dtypes, bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def is_new(found, new):
    """Whether adapters of `PLAN` are these."""
    return np.array_equal(found["enc"]["kernel_mora"], new["enc"]["kernel_mora"])


def contents(directory):
    """{name: bytes} of the files of a path or a URL."""
    return {path.name: path.read_bytes() for path in epath.Path(directory).iterdir()}


def config_of(directory):
    """A directory's parsed config."""
    return json.loads((directory / CONFIG).read_bytes())


def rewrite(directory, change=lambda config: None, tensors=None):
    """Change the parsed config, and sign it again as an attacker would."""
    config = config_of(directory)
    if tensors is not None:
        (directory / TENSORS).write_bytes(tensors)
        config["tensors_bytes"] = len(tensors)
        config["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
    change(config)
    config.pop("sha256", None)

    def text(config):
        return json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"

    digest = hashlib.sha256(text(config).encode()).hexdigest()
    (directory / CONFIG).write_text(text(config | {"sha256": digest}))


# Bases: a tiny Llama as the reference's adapters have it, and one in two files.

NAMES = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
"""Of the Llama in `smollm2`."""


@functools.cache
def base(mora_type=1):
    """The params of an adapter's tiny Llama, under `smollm2`'s names."""
    flat = {}
    file = DATA / f"type{mora_type}" / "base_model.safetensors"
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
    from models import smollm2

    sizes = {"layers": 2, "width": 64, "hidden": 160, "heads": 4, "kv_heads": 2}
    config = smollm2.Config(vocab=97, **sizes, rope_base=10000.0, epsilon=1e-6)
    return smollm2.Llama(config)


def sharded(directory, dtype=np.float32):
    """A Llama of two layers in two files with an index, and files beside them."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    weights = {}
    for number in range(2):
        layer = f"model.layers.{number}"
        part = {
            f"{layer}.mlp.up_proj.weight": rng.standard_normal((40, 24)),
            f"{layer}.mlp.down_proj.weight": rng.standard_normal((24, 40)),
            f"{layer}.norm.weight": rng.standard_normal(24),
        }
        part = {name: array.astype(dtype) for name, array in part.items()}
        part[f"ids.{number}"] = np.arange(3)
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, directory / file, {"format": "pt"})
        weights |= {name: file for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("a pickle")
    return directory


def kernels(base, names=None):
    """The plan and adapters for what `names` know of a base."""
    plan = mora_jax.plan(Checkpoint(base).shapes(names), MoRAConfig(rank=2))
    return made(plan), plan


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


def run(*args, code=0):
    """Output of `mora-jax`, which must exit with `code`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["mora-jax", *map(str, args)]),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()
