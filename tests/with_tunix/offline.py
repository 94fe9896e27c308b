"""Tunix's command line without a network, for a tiny Qwen2, and what it trained.

    python offline.py REPORT python -m tunix.cli.peft_main CONFIG KEY=VALUE ...
    python offline.py REPORT python LAUNCHER.py tunix.cli.peft_main CONFIG ...

What would download is replaced: the checkpoint of Hugging Face is already where it
would be put, and a data set is made here; for `grpo_main`, too, the choice of devices,
which knows TPUs alone. Tunix knows one size of Qwen2 more, "qwen2.5-tiny".
"""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tunix_models import tiny


def sentences(*_, split, **__):
    """The parts of a data set that is named as one of Tunix's."""
    pairs = [
        {"en": f"w{k} w{k + 1}", "fr": f"w{k + 2} w{k + 3} w{k + 4}"} for k in range(24)
    ]
    return [[{"translation": pair} for pair in pairs] for _ in split]


def first_devices(requirements, devices, **_):
    """The first ones for each mesh."""
    return {name: devices[:count] for name, count in requirements}


def state_of(model):
    """{path: (name of the variable's class, its value, its array)}."""
    return {
        "/".join(map(str, path)): (
            type(leaf).__name__,
            np.asarray(leaf[...]),
            leaf[...],
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def place_of(array):
    """The axes of an array's mesh, or None."""
    sharding = array.sharding
    return isinstance(sharding, jax.NamedSharding) and dict(sharding.mesh.shape)


def watch(report):
    """Write which parameters each trainer moved."""
    from tunix.sft.peft_trainer import PeftTrainer  # pyright: ignore

    train, buffer_metrics = PeftTrainer.train, PeftTrainer._buffer_metrics
    first, losses = {}, []

    def buffered(self, *args, loss, **settings):
        losses.append(float(loss))
        return buffer_metrics(self, *args, loss=loss, **settings)

    def trained(self, *args, **settings):
        first.update(first or state_of(self.model))
        train(self, *args, **settings)
        last, changes = state_of(self.model), {}
        for path, (kind, value, array) in last.items():
            moved = bool((first[path][1] != value).any())
            changes[path] = [kind, moved, place_of(array)]
        report.write_text(json.dumps({"changes": changes, "losses": losses}))

    PeftTrainer.train, PeftTrainer._buffer_metrics = trained, buffered


def main():
    import datasets  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen2.model import ModelConfig  # pyright: ignore
    from tunix.oss import utils  # pyright: ignore
    from tunix.utils import mesh  # pyright: ignore

    report, python, *words = sys.argv[1:]
    assert python == "python"
    config = tiny("qwen2")[0].config
    ModelConfig.qwen2p5_tiny = classmethod(lambda cls: config)
    utils.hf_pipeline = lambda model_id, directory: directory
    datasets.load_dataset = sentences
    mesh.allocate_named_mesh_device_slices = first_devices
    watch(Path(report))
    sys.path.insert(0, "")  # as Python does with -m, and here scripts lie
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
