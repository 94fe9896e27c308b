"""What the tests of adapters in files share: plans, adapters, and their files."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import sys
from unittest import mock

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors
from etils import epath

import mora_jax
from mora_jax import Adapter, AdapterSpec, MoRAConfig, Plan, cli
from mora_jax._plan.spec import same_record
from mora_jax._tree.paths import adapters_in
from mora_jax.io._files import CONFIG, TENSORS

PARAMS = {
    "enc": {"kernel": np.ones((16, 24), np.float32), "bias": np.ones(24, np.float32)},
    "dec": {
        "kernel": np.ones((3, 24, 16), np.float32),
        "out": {"kernel": np.ones((16, 16), np.float32)},
    },
}
OVERRIDES = {
    "enc/kernel": {
        "operator": "orthogonal",
        "seed": 7,
        "alpha": 0.5,
        "scale": "fine-tuning",
    },
    "dec/kernel": {"axes": "sio", "dropout": 0.25, "execution": "fold"},
    "dec/out/kernel": {"operator": "signed_decoupling", "param_dtype": "bfloat16"},
}
PLAN = mora_jax.plan(PARAMS, MoRAConfig(rank=3, overrides=OVERRIDES))
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
    spec = AdapterSpec(operator, shape, **settings)
    return Plan({path: spec}, math.prod(shape))


def specs_of(adapters):
    """{slash-joined path of its array in the base: meaning} of adapters."""
    return {"/".join(path): a.spec for path, a in adapters_in(adapters).items()}


def made(plan, seed=0, dtype=None, scale=1.0):
    """Adapters that are not zero."""
    rng = np.random.default_rng(seed)

    def numbers(m):
        return np.asarray(scale * rng.standard_normal(m.shape), dtype or m.dtype)

    return jax.tree.map(lambda m: jax.device_put(numbers(m)), plan.shapes.tree())


def without_digests(adapters):
    """The same without digests of a base, as a plan makes them."""

    def known(adapter):
        changes = {"base_digest": None} if hasattr(adapter.spec, "base_digest") else {}
        return adapter.replace(spec=dataclasses.replace(adapter.spec, **changes))

    return jax.tree.map(known, adapters, is_leaf=lambda a: isinstance(a, Adapter))


def specs_in(tree):
    """The specs of the adapters in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Adapter))
    return [leaf.spec for leaf in leaves if isinstance(leaf, Adapter)]


def assert_same(left, right):
    """Equal trees of equal dtypes, bit for bit; of adapters, with all that is known."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(specs_in(left), specs_in(right), strict=True):
        assert same_record(one, other), (one, other)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def contents(directory):
    """{name: bytes} of the files of a path or a URL."""
    return {path.name: path.read_bytes() for path in epath.Path(directory).iterdir()}


def config_of(directory):
    """A directory's parsed config: PEFT's, or that in the file of one of ours."""
    if (directory / CONFIG).exists():
        return json.loads((directory / CONFIG).read_bytes())
    data = (directory / TENSORS).read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return json.loads(json.loads(header)["__metadata__"]["mora_jax"])


def rewrite(directory, change=lambda config: None, tensors=None):
    """Change the parsed config, and sign it again as an attacker would.

    `tensors` are another file for it, whose header may be anything.
    """
    config = config_of(directory)
    if tensors is None:
        tensors = (directory / TENSORS).read_bytes()
    else:
        config["tensors_sha256"] = digest_of_tensors(tensors)
    change(config)
    data = with_metadata(tensors, {"mora_jax": signed(config)})
    (directory / TENSORS).write_bytes(data)


def signed(config):
    """A config as text, with the SHA-256 that belongs to it."""

    def text(config):
        return json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"

    others = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.sha256(text(others).encode()).hexdigest()
    return text(others | {"sha256": digest})


def digest_of_tensors(data):
    """SHA-256 of the bytes of all tensors in the order of their names."""
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return "0" * 64
    pieces = [tensor["data"] for _, tensor in sorted(tensors, key=lambda item: item[0])]
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def with_metadata(data, metadata):
    """A safetensors file with other metadata, and all its faults.

    A file whose header has no beginning or no end stays as a whole.
    """
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size].decode("latin-1"), data[8 + size :]
    if len(header) < size or not header.startswith("{"):
        return data
    before, key, after = header.partition('"__metadata__":')
    if key:
        with contextlib.suppress(ValueError):
            _, end = json.JSONDecoder().raw_decode(after)
            header = before + after[end:].removeprefix(",")
    entry = f'"__metadata__":{json.dumps(metadata)}'
    comma = "" if header[1:].lstrip().startswith("}") else ","
    header = ("{" + entry + comma + header[1:]).encode("latin-1")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


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


def adapters_between(op, m):
    """The adapter of a kernel fc/kernel with this operator, and a factor of 1."""
    plan = mora_jax.plan(
        {"fc": {"kernel": np.zeros((op.in_features, op.out_features), "f")}},
        mora_jax.MoRAConfig(rank=1, operator="sharing", scale="paper"),
    )
    spec = dataclasses.replace(plan["fc/kernel"], operator=op)
    return {"fc": {"kernel_mora": mora_jax.Adapter(m, spec)}}
