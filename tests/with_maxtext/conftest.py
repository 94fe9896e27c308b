"""MaxText's modules, tiny settings for its default decoder, and runs of its trainer."""

import json
import os
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

collect_ignore = [] if find_spec("maxtext") else ["test_maxtext.py"]

TINY = {
    "dataset_type": "synthetic",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "attention": "dot_product",
    "dtype": "float32",
    "matmul_precision": "highest",
    "vocab_size": 128,
    "max_target_length": 16,
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_num_decoder_layers": 3,
    "rope_type": "llama3.1",  # whose weights MaxText can export
    "rope_use_scale": False,
    "rope_max_timescale": 10_000,
    "learning_rate": 1e-2,
    "learning_rate_schedule_steps": 8,
    "warmup_steps_fraction": 0.0,
    "enable_checkpointing": False,
    "async_checkpointing": False,
    "checkpoint_period": 1,
    "enable_goodput_recording": False,
    "enable_tensorboard": False,
    "sharding_tolerance": 1.0,  # M's are on all devices, and all else is tiny here
}
EXPERTS = {
    "decoder_block": "mixtral",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 64,
    "megablox": False,  # a kernel of TPUs; without it jax.lax.ragged_dot
}
MESHES = {1: {}, 8: {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}}


MODULES = {
    "checkpointing": "common.checkpointing",
    "creation": "utils.model_creation_utils",
    "globals": "utils.globals",
    "maxtext_utils": "utils.maxtext_utils",
    "nnx_scan": "layers.nnx_scan",
    "pyconfig": "configs.pyconfig",
    "to_huggingface": "checkpoint_conversion.to_huggingface",
    "train": "trainers.pre_train.train",
    "train_utils": "utils.train_utils",
}


@pytest.fixture(scope="session")
def maxtext():
    """The modules of MaxText that tests use."""
    found = {n: import_module(f"maxtext.{path}") for n, path in MODULES.items()}
    return SimpleNamespace(**found)


@pytest.fixture(scope="module", params=[1, 8])
def runs(request, maxtext, tmp_path_factory):
    """Runs of MaxText's trainer on so many devices."""
    devices, all_devices = request.param, jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: all_devices(*args)[:devices])
        yield Runs(maxtext, devices, tmp_path_factory.mktemp("runs"))


class Runs:
    def __init__(self, maxtext, devices, folder):
        self.maxtext, self.devices, self.folder = maxtext, devices, folder
        self.losses = folder / "losses"
        self.base = os.path.join(maxtext.globals.MAXTEXT_CONFIGS_DIR, "base.yml")

    def config(self, lora=True, **settings):
        """MaxText's settings; eight rows a step, on one device or on several."""
        own = {"run_name": "run", "base_output_directory": str(self.folder)}
        own |= {"per_device_batch_size": 8 // self.devices, "steps": 6}
        own |= {"lora": {"enable_lora": lora}, "metrics_file": str(self.losses)}
        initialize = self.maxtext.pyconfig.initialize
        return initialize(
            ["", self.base], **TINY | MESHES[self.devices] | own | settings
        )

    def train(self, **settings):
        """The losses of a run of MaxText's own loop, and the state after it."""
        self.losses.unlink(missing_ok=True)
        state = self.maxtext.train.train_loop(self.config(**settings), None)
        assert self.losses.exists()  # or it stopped, and only logged why
        lines = map(json.loads, self.losses.read_text().splitlines())
        return [line["learning/loss"] for line in lines], state

    def start(self, **settings):
        """The config, and what MaxText's loop begins with: model and batches."""
        config = self.config(**settings)
        *_, loader, _, _, state = self.maxtext.train_utils.setup_train_loop(
            config, None
        )
        return config, state.model, loader

    def model(self, state, **settings):
        """The model of a run, of the state after it."""
        make = self.maxtext.creation.create_nnx_abstract_model
        _, model = make(self.config(**settings))
        nnx.update(model, state["model"])
        return model
